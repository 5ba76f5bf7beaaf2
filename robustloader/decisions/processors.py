"""Which process has a processor when, simulated: shared evenly by all, or a line at each, as an operating system has.

No clock is read: who uses this says how much time has passed. A process has one piece of work at a time, in seconds of
a processor that it has for itself.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

__all__ = ["Lines", "Processors", "Scheduler", "Shared"]

Speed = Callable[[int], float]
"""How fast each of so many processes runs that run at once, 1 where it is alone on the machine."""


class Processors(Protocol):
    """Processors, and the processes that have work for them.

    Attributes:
        work_s: done so far, for all.
    """

    work_s: float

    def begin(self, process: int, work_s: float, *, goes_on: bool = False) -> None:
        """A process has work; ``goes_on``: its last piece ended just now, and it has not slept since."""

    def stop(self, process: int) -> None:
        """Whatever is left of a process's work is not done."""

    def next_s(self) -> float:
        """Seconds until something happens here by itself; infinite for never."""

    def advance(self, seconds: float) -> None:
        """So much time passes, at most :meth:`next_s`."""

    def happen(self) -> int | None:
        """After that time: what happens. A process whose work is done, or None for nobody's."""


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """What makes processes wait beside a processor that is idle.

    A process that wakes goes to the processor that it had, or to an idle one; if there is none it waits in line for
    the one it had. A processor that is idle takes over from another line, but not who ran a moment ago, since its data
    are still in the other one's cache. Nobody's turn is cut short by one who wakes.

    Attributes:
        migration_cost_s: a moment, in seconds.
        slice_s: a turn, if others wait in line.

    Raises:
        ValueError: a turn takes no time.
    """

    migration_cost_s: float
    slice_s: float

    def __post_init__(self) -> None:
        if self.slice_s <= 0:
            raise ValueError(f"slice_s={self.slice_s}: a turn takes some time; give seconds above 0")

    @classmethod
    def linux(cls, processors: int) -> Self:
        """The kernel's own figures (``kernel/sched/fair.c``, 6.12 and later): ``sched_migration_cost_ns`` 500,000;
        ``base_slice_ns`` 700,000 × (1 + log2 of the processors, which count up to 8)."""
        return cls(migration_cost_s=500e-6, slice_s=700e-6 * min(8, processors).bit_length())


class Shared:
    """All processors are shared evenly by all who have work, at any moment.

    Ends of work lie at a *service*: how much work each process would have got done that was here from the start
    (processor sharing in virtual time, so that an arrival does not move every other end).
    """

    def __init__(self, speed: Speed) -> None:
        self.work_s = 0.0
        self._speed = speed
        self._service = 0.0
        self._ends: list[tuple[float, int, int]] = []
        self._pieces: dict[int, int] = {}
        self._begun = 0

    def begin(self, process: int, work_s: float, *, goes_on: bool = False) -> None:
        """A process has work."""
        self._begun += 1
        self._pieces[process] = self._begun
        heapq.heappush(self._ends, (self._service + work_s, self._begun, process))

    def stop(self, process: int) -> None:
        """It has none any more."""
        self._pieces.pop(process, None)

    def next_s(self) -> float:
        """Seconds until :meth:`happen`."""
        while self._ends and self._pieces.get(self._ends[0][2]) != self._ends[0][1]:
            heapq.heappop(self._ends)
        return (self._ends[0][0] - self._service) / self._speed(len(self._pieces)) if self._ends else math.inf

    def advance(self, seconds: float) -> None:
        """So much time passes."""
        service = seconds * self._speed(len(self._pieces))
        self._service += service
        self.work_s += service * len(self._pieces)

    def happen(self) -> int | None:
        """Whose work is done."""
        self._service, _, process = heapq.heappop(self._ends)
        del self._pieces[process]
        return process


@dataclass(eq=False)
class _Turn:
    """A process in a line.

    Attributes:
        left_s: work left.
        ran_at: when it ran last.
        used_s: of its slice.
    """

    process: int
    left_s: float
    ran_at: float
    used_s: float = 0.0


class Lines:
    """A line at each processor; who is first in it runs.

    Args:
        count: of processors.
        speed: for so many processors at work.
        scheduler: who runs next, and where.
    """

    def __init__(self, count: int, speed: Speed, scheduler: Scheduler) -> None:
        self.work_s = 0.0
        self._speed = speed
        self._scheduler = scheduler
        self._now = 0.0
        self._lines: list[list[_Turn]] = [[] for _ in range(count)]
        self._had: dict[int, int] = {}
        self._ran_at: dict[int, float] = {}
        self._used_s = 0.0  # of the slice of whom happen() named last
        self._next, self._ends = 0, False

    def begin(self, process: int, work_s: float, *, goes_on: bool = False) -> None:
        """A process has work."""
        place = self._had.get(process, process % len(self._lines))
        turn = _Turn(process, work_s, self._ran_at.get(process, -math.inf))
        if goes_on:
            turn.used_s = self._used_s
            self._lines[place].insert(0, turn)
        else:
            if self._lines[place]:
                place = next((other for other, line in enumerate(self._lines) if not line), place)
            self._lines[place].append(turn)
        self._had[process] = place

    def stop(self, process: int) -> None:
        """It has none any more."""
        for line in self._lines:
            line[:] = [turn for turn in line if turn.process != process]

    def next_s(self) -> float:
        """Seconds until :meth:`happen`."""
        speed = self._running_speed()
        cold_at = min((turn.ran_at for line in self._lines for turn in line[1:]), default=math.inf)
        take_over_s = max(0.0, cold_at + self._scheduler.migration_cost_s - self._now)
        soonest_s = math.inf
        for place, line in enumerate(self._lines):
            after_s = max(0.0, line[0].left_s / speed) if line else take_over_s
            slice_s = max(0.0, self._scheduler.slice_s - line[0].used_s) if len(line) > 1 else math.inf
            if min(after_s, slice_s) < soonest_s:
                soonest_s, self._next, self._ends = min(after_s, slice_s), place, after_s <= slice_s
        return soonest_s

    def advance(self, seconds: float) -> None:
        """So much time passes."""
        speed = self._running_speed()
        self._now += seconds
        for line in self._lines:
            if line:
                line[0].left_s -= seconds * speed
                line[0].used_s += seconds
                line[0].ran_at = self._now
                self.work_s += seconds * speed

    def happen(self) -> int | None:
        """Whose work is done; None for a turn that is over, or a process that is taken over."""
        line = self._lines[self._next]
        if not line:
            self._take_over()
            return None
        first = line.pop(0)
        if not self._ends:
            first.used_s = 0.0
            line.append(first)
            return None
        self._ran_at[first.process], self._used_s = self._now, first.used_s
        return first.process

    def _take_over(self) -> None:
        """An idle processor takes who has waited longest."""
        turn = min((turn for line in self._lines for turn in line[1:]), key=lambda turn: turn.ran_at)
        next(line for line in self._lines if turn in line).remove(turn)
        self._lines[self._next].append(turn)
        self._had[turn.process] = self._next

    def _running_speed(self) -> float:
        return self._speed(sum(1 for line in self._lines if line))
