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

    ``observe`` is called once per task, in task order. Of a large batch only eight indices are offered: the reservoir
    needs variety, not every index, and this keeps its cost per batch constant.
    """

    def __init__(self, *, seed: int, epoch: int, capacity: int = 1024) -> None:
        self._key = _mix(_mix(seed & _MASK) ^ (epoch & _MASK))
        self._capacity = capacity
        self._kept: list[Any] = []
        self._seen = 0

    def __len__(self) -> int:
        return len(self._kept)

    def observe(self, task: int, indices: list[Any]) -> None:
        """Take note of the indices of ``task``."""
        count = len(indices)
        if not count:
            return
        start = _mix(self._key ^ task) % count
        for step in range(min(count, _OFFERED_PER_TASK)):
            self._offer(indices[(start + step * max(1, count // _OFFERED_PER_TASK)) % count])

    def draw(self, task: int, count: int, *, round: int = 0) -> tuple[Any, ...]:
        """Up to ``count`` different spares for ``task``; a later ``round`` gives other ones."""
        kept = self._kept
        size = len(kept)
        if not size:
            return ()
        state = self._key ^ _mix(task) ^ (round << 48)
        slots: dict[int, None] = {}
        for _ in range(min(count, size)):
            state = _mix(state)
            slot = state % size
            while slot in slots:
                slot = (slot + 1) % size
            slots[slot] = None
        return tuple(kept[slot] for slot in slots)

    def _offer(self, index: Any) -> None:
        self._seen += 1
        if len(self._kept) < self._capacity:
            self._kept.append(index)
            return
        slot = _mix(self._key ^ (self._seen << 20)) % self._seen
        if slot < self._capacity:
            self._kept[slot] = index
