"""One canonical, hashable, JSON-able key per index, so that 7, ``np.int64(7)`` and ``tensor(7)`` are one sample."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

__all__ = ["Key", "as_list", "count_indices", "index_key", "once_only", "positions_of", "probe"]

Key = int | str


def index_key(index: Any) -> Key:
    """The canonical key of an index.

    Integers of any kind (Python, NumPy, a tensor with one element) are their value. Strings, and sequences of indices,
    get a prefix that keeps them apart from everything else. Any other object is known by its ``repr``, so an object
    whose ``repr`` shows its address is a new sample in every process.
    """
    if isinstance(index, int):
        return int(index)
    if isinstance(index, str):
        return "s:" + index
    if isinstance(index, (tuple, list)):
        return "t:[" + ",".join(str(index_key(part)) for part in index) + "]"
    item, shape = probe(index, "item"), probe(index, "shape")
    try:
        if callable(item) and isinstance(shape, tuple) and shape in ((), (1,)):
            value = item()
            if isinstance(value, (int, str)):
                return index_key(value)
        return "r:" + repr(index)
    except Exception:  # a user's __repr__
        return f"r:<{type(index).__qualname__}>"


def as_list(indices: Any, *, batched: bool) -> list[Any]:
    """The indices of a task, one per sample; empty where a batch sampler yielded something that has no samples."""
    if not batched:
        return [indices]
    if isinstance(indices, (list, tuple)):
        return list(indices)
    try:
        return list(iter(indices))  # list() alone asks for a length, which may raise
    except Exception:  # the dataset may still know what to do with it
        return []


def count_indices(indices: Any) -> int:
    """How many samples a batch of indices asks for; 1 where it has no length."""
    try:
        return len(indices)
    except Exception:  # a user's __len__
        return 1


def probe(thing: Any, name: str) -> Any:
    """What an object of the user's says to the attribute ``name``; None where it has none, or raises: samplers and
    indices are asked for what they need not know anything of."""
    try:
        return getattr(thing, name, None)
    except Exception:  # a user's property, or __getattr__
        return None


def once_only(indices: Any) -> Any:
    """``indices``, as a list where it is an iterator: that can be read once, and is needed more often."""
    if type(indices) is list:
        return indices
    return list(indices) if isinstance(indices, Iterator) else indices


def positions_of(indices: Sequence[Any], known: Container[Key]) -> tuple[int, ...]:
    """Where ``indices`` hold a sample whose key is in ``known``."""
    return tuple(p for p, index in enumerate(indices) if index_key(index) in known)
