"""Spares: which other samples may stand in for one that cannot be loaded.

Only indices that this epoch's sampler itself yielded may: a train and a validation split often share one dataset, so
``range(len(dataset))`` would leak one into the other, and a distributed sampler's rank must stay inside its share.

The choice depends on (seed, epoch, task) and on nothing that happens at run time, so a replayed or resumed run draws
the same spares whatever its lookahead and number of workers.
"""

from __future__ import annotations

from typing import Any

__all__ = ["SpareReservoir"]

_MASK = (1 << 64) - 1
_OFFERED_PER_TASK = 8


def _mix(value: int) -> int:
    """SplitMix64's finaliser: a fast, well-spread 64-bit hash (Steele, Lea and Flood, OOPSLA 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


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
