"""Any value as JSON: users' indices may be any object, and an event must never fail for what they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["as_json"]

# Messages and tracebacks are cut to 4,096 and 16,384 characters where they are made; nothing else should be longer.
_TEXT_CHARS = 20_000
_REPR_CHARS = 1_000
_ITEMS = 1_000
_DEPTH = 8
# Python refuses to print integers of more than 4,300 digits; beyond 64 bits other readers lose digits anyway.
_INT_BITS = 64
_ARRAYS = ("numpy", "torch")


def as_json(value: Any, depth: int = _DEPTH) -> Any:
    """The value, or what comes closest to it in JSON.

    Tuples, sets, and small tensors and arrays become lists; numbers that JSON lacks (NaN, infinities, integers beyond
    64 bits) and everything else become their ``repr``, cut to 1,000 characters. Long texts and lists are cut as well.
    Never raises an ``Exception``.
    """
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is str:
        return value if len(value) <= _TEXT_CHARS else value[:_TEXT_CHARS] + "…"
    if kind is int and value.bit_length() <= _INT_BITS:
        return value
    if kind is float and math.isfinite(value):
        return value
    try:
        if depth > 0:
            if isinstance(value, Mapping):
                return {_key(key): as_json(item, depth - 1) for key, item in _first(value.items())}
            if isinstance(value, (list, tuple, set, frozenset)):
                return [as_json(item, depth - 1) for item in _first(value)]
            if kind.__module__.partition(".")[0] in _ARRAYS and _elements(value) <= _ITEMS:
                listed = value.tolist()
                if type(listed) is not kind:
                    return as_json(listed, depth - 1)
    except Exception:
        # A user's own container, or a tensor that cannot be read (no storage, a lost device).
        pass
    return _text_of(value)


def _first(items: Any) -> list[Any]:
    return [item for item, _ in zip(items, range(_ITEMS), strict=False)]


def _elements(value: Any) -> int:
    """How many elements a tensor or an array has."""
    size = value.numel() if hasattr(value, "numel") else value.size
    return int(size)


def _key(key: Any) -> str:
    return key if type(key) is str and len(key) <= _REPR_CHARS else _text_of(key)


def _text_of(value: Any) -> str:
    try:
        text = repr(value)
        text = text if type(text) is str else str.__str__(text)
    except Exception:
        text = object.__repr__(value)
    return text if len(text) <= _REPR_CHARS else text[:_REPR_CHARS] + "…"
