"""Spares: which other samples may stand in for one that cannot be loaded.

Only indices that this epoch's sampler itself yielded may: a train and a validation split often share one dataset, so
``range(len(dataset))`` would leak one into the other, and a distributed sampler's rank must stay inside its share.

The choice depends on (seed, epoch, task) and on nothing that happens at run time, so a replayed or resumed run draws
the same spares whatever its lookahead and number of workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["SpareReservoir"]

_MASK = (1 << 64) - 1
_MULTIPLIER = 6_364_136_223_846_793_005  # of Knuth's MMIX, whose high bits are good
_OFFERED_PER_TASK = 8
_HASHED_AT_ONCE = 256


def _mix(value: Any) -> Any:
    """SplitMix64's finaliser: a fast, well-spread 64-bit hash (Steele, Lea and Flood, OOPSLA 2014).

    Of an int, or of each element of an array of uint64, whose arithmetic wraps by itself.
    """
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class SpareReservoir:
    """Up to ``capacity`` indices of the epoch so far, and draws from them.

    ``observe`` is called once per task, in task order, however far ahead of the deliveries. What task *t* may draw from
    is fixed then: the tasks before it and its own indices; from its second round on also the task after it, from the
    third the two after it, and so on, so that even an epoch that begins with nothing but bad samples finds a good one.

    Of each batch at most eight indices are offered, and kept or not together, as one row: the reservoir needs variety,
    not every index. Observing is a handful of operations, because every batch pays for it; drawing may cost more.
    """

    def __init__(self, *, seed: int, epoch: int, capacity: int = 1024) -> None:
        self._key: int = _mix(_mix(seed & _MASK) ^ (epoch & _MASK))
        self._capacity = capacity
        self._rows: list[list[Any]] = []
        self._most_rows = 0  # known once a batch has been seen
        self._seen = 0
        # What the rows were: (task, row, what it held before, or None where it was added), as far as it may be asked.
        self._changes: deque[tuple[int, int, list[Any] | None]] = deque()
        self._offers: dict[int, list[Any]] = {}
        self._open: dict[int, None] = {}
        self._observed = 0
        self._hashed = range(0)  # the tasks that _hashes are of, by round
        self._hashes: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._rows))

    @property
    def observed(self) -> int:
        """How many tasks have been observed."""
        return self._observed

    def observe(self, task: int, indices: list[Any]) -> None:
        """Take note of the indices of ``task``, the next one in order."""
        self._observed = task + 1
        self._open[task] = None
        count = len(indices)
        if not count:
            return
        word = self._hash(task, 0)
        offered = min(_OFFERED_PER_TASK, self._capacity)
        stride = max(1, count // offered)
        row = self._offers[task] = indices[word % stride :: stride][:offered]
        if not self._seen:
            self._most_rows = max(1, self._capacity // min(offered, count))
        self._seen += 1
        if self._seen <= self._most_rows and len(self._rows) * offered + len(row) <= max(self._capacity, offered):
            self._changes.append((task, len(self._rows), None))
            self._rows.append(row)
            return
        # Each row so far is as likely as any other to be among those kept (algorithm R, with rows for items).
        place = (word >> 32) % self._seen
        if place < len(self._rows) and len(row) <= len(self._rows[place]):
            self._changes.append((task, place, self._rows[place]))
            self._rows[place] = row

    def pass_over(self, items: Sequence[Any], size: int) -> None:
        """Take note of the next tasks, of ``size`` indices each, that will never be loaded again: a resumed epoch's.

        The same as ``observe`` and ``close`` for each of them, at a small part of the cost. No task may be open.

        Args:
            items: the indices of these tasks, one after another.
            size: indices per task; divides ``len(items)``.
        """
        assert not self._open
        done, count = 0, len(items) // size
        while done < count and (not self._seen or self._seen < self._most_rows):
            task = self._observed
            self.observe(task, list(items[done * size : (done + 1) * size]))
            self.close(task)
            done += 1
        # From here on no row is added, and the longer this goes on, the fewer are replaced.
        offered = min(_OFFERED_PER_TASK, self._capacity)
        stride = max(1, size // offered)
        words = _mix(np.arange(self._observed, self._observed + count - done, dtype=np.uint64) ^ np.uint64(self._key))
        places = (words >> 32) % np.arange(self._seen + 1, self._seen + 1 + count - done, dtype=np.uint64)
        for hit in np.flatnonzero(places < len(self._rows)).tolist():
            begin, place = (done + hit) * size, int(places[hit])
            row = list(items[begin : begin + size])[int(words[hit]) % stride :: stride][:offered]
            if len(row) <= len(self._rows[place]):
                self._rows[place] = row
        self._observed += count - done
        self._seen += count - done

    @property
    def mark(self) -> tuple[int, int, int, tuple[list[Any], ...]]:
        """What the choices of tasks that are not observed yet depend on, as plain values."""
        return self._observed, self._seen, self._most_rows, tuple(self._rows)

    def restore(self, mark: tuple[int, int, int, Sequence[Sequence[Any]]]) -> None:
        """Go on from a :attr:`mark`, with no task open."""
        self._observed, self._seen, self._most_rows, rows = mark
        self._rows = [list(row) for row in rows]

    def draw(self, task: int, count: int, *, round: int = 1) -> tuple[Any, ...]:
        """Up to ``count`` different spares for ``task``; a later ``round``, counted from 1, gives other ones.

        Round *r* looks at the ``r - 1`` tasks after this one: observe them first, as far as the sampler goes.
        """
        rows = self._rows_at(task)
        for later in range(task + 1, task + round):
            if offers := self._offers.get(later):
                rows = [*rows, offers]
        if not rows:
            return ()
        state = self._hash(task, round)
        size = len(rows)
        if size >= count > 0:  # one of each row, a stride apart: as good as any other choice, and quickly made
            column = state >> 48
            start, stride = state % size, 1 + (state >> 24) % (size // count)
            picked = rows[start : start + count * stride : stride]
            if len(picked) < count:  # once around
                picked += rows[start + len(picked) * stride - size : start : stride][: count - len(picked)]
            return tuple([row[(column + step) % len(row)] for step, row in enumerate(picked)])
        taken: dict[tuple[int, int], None] = {}
        most = sum(map(len, rows)) if len(rows) < count else count
        for _ in range(min(count, most)):
            state = (state * _MULTIPLIER + 1) & _MASK
            row = (state >> 33) % len(rows)
            column = (state >> 48) % len(rows[row])
            while (row, column) in taken:
                column += 1
                if column == len(rows[row]):
                    row, column = (row + 1) % len(rows), 0
            taken[row, column] = None
        return tuple(rows[row][column] for row, column in taken)

    def close(self, task: int) -> None:
        """``task`` needs no spares any more."""
        self._open.pop(task, None)
        oldest = next(iter(self._open), self._observed)
        changes, offers = self._changes, self._offers
        while changes and changes[0][0] <= oldest:
            changes.popleft()
        while (number := next(iter(offers), oldest)) < oldest:
            del offers[number]

    def _hash(self, task: int, round: int) -> int:
        """A word of its own for each task and round; those that every task needs are found for many at once."""
        if round > 1 or task < self._hashed.start:
            return int(_mix(self._key ^ task ^ (round << 48)))
        if task not in self._hashed:
            self._hashed = range(task, task + _HASHED_AT_ONCE)
            numbers = np.arange(task, task + _HASHED_AT_ONCE, dtype=np.uint64) ^ np.uint64(self._key)
            self._hashes = {number: _mix(numbers ^ np.uint64(number << 48)).tolist() for number in (0, 1)}
        return self._hashes[round][task - self._hashed.start]

    def _rows_at(self, task: int) -> list[list[Any]]:
        """The rows as they were when ``task`` had just been observed."""
        if task not in self._open:
            return []
        if not self._changes or self._changes[-1][0] <= task:
            return self._rows
        rows = self._rows.copy()
        for changed, place, before in reversed(self._changes):
            if changed <= task:
                break
            if before is None:
                del rows[place]
            else:
                rows[place] = before
        return rows
