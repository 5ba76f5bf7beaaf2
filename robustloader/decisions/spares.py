"""Spares: which other samples may stand in for one that cannot be loaded.

Only indices that this epoch's sampler itself yielded may: a train and a validation split often share one dataset, so
``range(len(dataset))`` would leak one into the other, and a distributed sampler's rank must stay inside its share.

The choice depends on (seed, epoch, task) and on nothing that happens at run time, so a replayed or resumed run draws
the same spares whatever its lookahead and number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["SpareReservoir"]

_MASK = (1 << 64) - 1
_OFFERED_PER_TASK = 8


def _mix(value: int) -> int:
    """SplitMix64's finaliser: a fast, well-spread 64-bit hash (Steele, Lea and Flood, OOPSLA 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mix_all(values: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The same for an array; its arithmetic wraps by itself."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class SpareReservoir:
    """Up to ``capacity`` indices of the epoch so far, and draws from them.

    ``observe`` is called once per task, in task order, however far ahead of the deliveries. What task *t* may draw from
    is fixed then: the tasks before it and its own indices; from its second round on also the task after it, from the
    third the two after it, and so on, so that even an epoch that begins with nothing but bad samples finds a good one.

    Of a large batch only eight indices are offered: the reservoir needs variety, not every index, and this keeps its
    cost per batch constant.
    """

    def __init__(self, *, seed: int, epoch: int, capacity: int = 1024) -> None:
        self._key = _mix(_mix(seed & _MASK) ^ (epoch & _MASK))
        self._capacity = capacity
        self._kept: list[Any] = []
        self._seen = 0
        self._views: dict[int, tuple[Any, ...]] = {}
        self._offers: dict[int, list[Any]] = {}
        self._observed = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def observed(self) -> int:
        """How many tasks have been observed."""
        return self._observed

    def observe(self, task: int, indices: list[Any]) -> None:
        """Take note of the indices of ``task``, the next one in order."""
        self._observed = task + 1
        count = len(indices)
        offers = []
        if count:
            start = _mix(self._key ^ task) % count
            stride = max(1, count // _OFFERED_PER_TASK)
            offers = [indices[(start + k * stride) % count] for k in range(min(count, _OFFERED_PER_TASK))]
        for index in offers:
            self._offer(index)
        self._offers[task] = offers
        self._views[task] = tuple(self._kept)

    def pass_over(self, items: Sequence[Any], size: int) -> None:
        """Take note of the next tasks, of ``size`` indices each, that will never be loaded again: a resumed epoch's.

        The same as ``observe`` and ``close`` for each of them, at a small part of the cost.

        Args:
            items: the indices of these tasks, one after another.
            size: indices per task; divides ``len(items)``.
        """
        count = len(items) // size
        first, self._observed = self._observed, self._observed + count
        each = min(size, _OFFERED_PER_TASK)
        starts = _mix_all(np.uint64(self._key) ^ np.arange(first, first + count, dtype=np.uint64)) % np.uint64(size)
        steps = np.arange(each, dtype=np.uint64) * np.uint64(max(1, size // _OFFERED_PER_TASK))
        within = (starts[:, None] + steps) % np.uint64(size)
        places = (within + (np.arange(count, dtype=np.uint64) * np.uint64(size))[:, None]).ravel()
        room = min(len(places), self._capacity - len(self._kept))
        for place in places[:room].tolist():
            self._offer(items[place])
        places = places[room:]
        numbers = np.arange(self._seen + 1, self._seen + 1 + len(places), dtype=np.uint64)
        slots = _mix_all(np.uint64(self._key) ^ (numbers << np.uint64(20))) % numbers
        for hit in np.flatnonzero(slots < np.uint64(self._capacity)).tolist():
            self._kept[int(slots[hit])] = items[int(places[hit])]
        self._seen += len(places)

    @property
    def mark(self) -> tuple[int, int, tuple[Any, ...]]:
        """All that later choices depend on: tasks and offers so far, and what is kept."""
        return self._observed, self._seen, tuple(self._kept)

    def restore(self, mark: tuple[int, int, Sequence[Any]]) -> None:
        """Go on from a :attr:`mark`."""
        self._observed, self._seen, kept = mark
        self._kept = list(kept)

    def draw(self, task: int, count: int, *, round: int = 1) -> tuple[Any, ...]:
        """Up to ``count`` different spares for ``task``; a later ``round``, counted from 1, gives other ones.

        Round *r* looks at the ``r - 1`` tasks after this one: observe them first, as far as the sampler goes.
        """
        pool = self._views.get(task, ())
        for later in range(task + 1, task + round):
            pool += tuple(self._offers.get(later, ()))
        size = len(pool)
        state = self._key ^ _mix(task) ^ (round << 48)
        slots: dict[int, None] = {}
        for _ in range(min(count, size)):
            state = _mix(state)
            slot = state % size
            while slot in slots:
                slot = (slot + 1) % size
            slots[slot] = None
        return tuple(pool[slot] for slot in slots)

    def close(self, task: int) -> None:
        """``task`` needs no spares any more."""
        self._views.pop(task, None)
        oldest = next(iter(self._views), self._observed)
        for number in [number for number in self._offers if number <= task and number < oldest]:
            del self._offers[number]

    def _offer(self, index: Any) -> None:
        self._seen += 1
        if len(self._kept) < self._capacity:
            self._kept.append(index)
            return
        slot = _mix(self._key ^ (self._seen << 20)) % self._seen
        if slot < self._capacity:
            self._kept[slot] = index
