"""Where two batches differ first: a path into their structure, and both values.

Pure: arrays and tensors are read through the functions that the caller gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Difference", "find_difference"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first place where two runs differ.

    Attributes:
        batch: number of the batch, from 0.
        path: inside it, as an expression: ``batch["image"][3, 0]``.
        what: "value", "type", "dtype", "shape", "length", "keys", or "end" where one run ends before the other.
        first, second: what stands there, shortened, in each.
    """

    batch: int
    path: str
    what: str
    first: str
    second: str

    def __str__(self) -> str:
        where = f"batch {self.batch}" + ("" if self.path == "batch" else f", {self.path}")
        return f"{where}: {self.what} {self.first} in the first, {self.second} in the second"


Found = tuple[str, str, str, str] | None
Leaves = Callable[[Any, Any], "tuple[str, str, str, str] | bool | None"]


def find_difference(first: Any, second: Any, leaves: Leaves, path: str = "batch") -> Found:
    """``(path, what, first, second)`` of the first difference, depth first; None where there is none.

    Two NaNs are the same value.

    Args:
        first, second: two batches.
        leaves: compares what is no container: None for alike, the difference with a path from there, or False where it
            does not know this type.
        path: of these two.
    """
    if type(first) is not type(second):
        return path, "type", type(first).__qualname__, type(second).__qualname__
    found = leaves(first, second)
    if found is not False:
        return None if found is None else (path + found[0], *found[1:])  # type: ignore[index]
    if isinstance(first, Mapping):
        if list(first) != list(second):
            return path, "keys", _short(list(first)), _short(list(second))
        pairs = [(f"[{key!r}]", first[key], second[key]) for key in first]
    elif isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return path, "length", str(len(first)), str(len(second))
        names = getattr(first, "_fields", None)
        pairs = [
            (f".{names[place]}" if names else f"[{place}]", one, other)
            for place, (one, other) in enumerate(zip(first, second, strict=True))
        ]
    elif dataclasses.is_dataclass(first):
        pairs = [
            (f".{field.name}", getattr(first, field.name), getattr(second, field.name))
            for field in dataclasses.fields(first)
        ]
    else:
        return None if _same(first, second) else (path, "value", _short(first), _short(second))
    for step, one, other in pairs:
        inner = find_difference(one, other, leaves, path + step)
        if inner is not None:
            return inner
    return None


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, float):
        return (first == second and str(first) == str(second)) or (first != first and second != second)
    if isinstance(first, complex):
        return _same(first.real, second.real) and _same(first.imag, second.imag)
    try:
        return bool(first == second) or _state(first) == _state(second) is not None
    except Exception:  # a user's __eq__
        return False


def _state(thing: Any) -> Any:
    """What an object without an ``__eq__`` of its own consists of."""
    own = any("__eq__" in vars(kind) for kind in type(thing).__mro__[:-1])
    return vars(thing) if not own and hasattr(thing, "__dict__") else None


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # a user's __repr__
        text = f"<{type(value).__qualname__}>"
    return text if len(text) <= 60 else text[:57] + "..."
