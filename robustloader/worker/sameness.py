"""Whether two states are the same, whatever users keep in theirs."""

from __future__ import annotations

import copyreg
import io
import pickle
import types
from typing import Any

import numpy as np
import torch

__all__ = ["same_pickles", "same_values"]

_SCALARS: set[type] = {int, str, bytes, bool, float, type(None)}
_PLAIN: set[type] = {*_SCALARS, bytearray, set, frozenset}
_BY_NAME = (type, types.FunctionType, types.ModuleType)
_PROTOCOL = 4
"""Of what objects are taken apart into: from 5 on large arrays are buffers, which say nothing of what is in them."""


def same_pickles(one: bytes, other: bytes) -> bool:
    """Whether two pickles are of the same value.

    Their bytes seldom tell: those of a torch tensor name the address of its memory, and those of anything depend on
    which of its parts are one object. False where it cannot be known.
    """
    if one == other:
        return True
    try:
        return same_values(pickle.loads(one), pickle.loads(other))
    except Exception:  # what the user's classes do when they are unpickled
        return False


def same_values(one: Any, other: Any) -> bool:
    """Whether two values are of the same types and hold the same, NaN being NaN.

    No ``__eq__`` of the user's is asked, which may raise or return an array, but for keys of dicts and members of sets:
    objects are taken apart as pickle does. False where it cannot be known.
    """
    try:
        return _same(one, other, {})
    except Exception:  # a user's __reduce__ or __eq__; nested too deeply
        return False


def _same(one: Any, other: Any, seen: dict[tuple[int, int], Any]) -> bool:
    """``seen``: pairs that were met already, by identity; they stay alive, so that no other object gets theirs."""
    kind = type(one)
    if one is other:
        return True
    if kind is not type(other):
        return False
    if kind in _PLAIN:
        return bool(one == other or (one != one and other != other))
    if isinstance(one, _BY_NAME):
        return False
    if (id(one), id(other)) in seen:  # it holds itself, or is there twice: what differs is found elsewhere
        return True
    seen[id(one), id(other)] = one, other
    if kind is list or kind is tuple:
        if len(one) != len(other):
            return False
        return _same_scalars(one, other) or all(_same(*pair, seen) for pair in zip(one, other, strict=True))
    if kind is dict:
        return len(one) == len(other) and all(key in other and _same(one[key], other[key], seen) for key in one)
    if kind is np.ndarray:
        return _same(_array_parts(one), _array_parts(other), seen)
    if kind is torch.Tensor and _is_dense(one) and _is_dense(other):
        return one.requires_grad == other.requires_grad and one.dtype == other.dtype and _same_bytes(one, other)
    if isinstance(one, (torch.TypedStorage, torch.UntypedStorage)):
        return _saved(one) == _saved(other)
    return _same(_parts(one), _parts(other), seen)


def _same_scalars(one: Any, other: Any) -> bool:
    """Whether two lists hold the same numbers and texts alone: quickly, as a state may hold a whole permutation."""
    kinds = list(map(type, one))
    return set(kinds) <= _SCALARS and kinds == list(map(type, other)) and bool(one == other)


def _array_parts(array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    return array.dtype, array.shape, array.tolist() if array.dtype.hasobject else array.tobytes()


def _is_dense(tensor: torch.Tensor) -> bool:
    strided = tensor.layout is torch.strided and not tensor.is_nested
    return strided and not tensor.is_quantized and tensor.device.type != "meta"


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    first, second = (
        tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
        for tensor in (one, other)
    )
    return torch.equal(first, second)


def _saved(storage: Any) -> bytes:
    """What is in a storage: of the ways to ask, the one that works for every kind and warns of none."""
    file = io.BytesIO()
    torch.save(storage, file)
    return file.getvalue()


def _parts(thing: Any) -> tuple[Any, ...]:
    """What pickle would take an object apart into."""
    reduce = copyreg.dispatch_table.get(type(thing))
    parts = thing.__reduce_ex__(_PROTOCOL) if reduce is None else reduce(thing)
    if isinstance(parts, str):  # the name of a global
        return (parts,)
    contents = [None if items is None else list(items) for items in parts[3:5]]
    return (*parts[:3], *contents, *parts[5:])
