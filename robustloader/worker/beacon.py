"""The beacon: a worker's small shared record of what it is doing, since when.

The worker writes it around each phase and before each sample (about 0.3 µs); the training process reads it to name the
sample a dead worker had in hand, and to tell a stuck worker from a slow one, with no timer in the worker. Times are
``CLOCK_MONOTONIC``, which is one clock for all processes of a machine.

Written with a sequence counter, odd while a write is under way. The one who reads tries until two readings agree; of a
dead writer it takes what is there.
"""

from __future__ import annotations

import time
from typing import Literal, NamedTuple

from robustloader.system.host import SharedPage

__all__ = ["COLLATE", "ENCODE", "INIT", "ITEM", "ITEMS", "POSITION", "Beacon", "Phase", "Reading"]

Phase = Literal["idle", "init", "item", "items", "collate", "encode"]
PHASES: tuple[Phase, ...] = ("idle", "init", "item", "items", "collate", "encode")
IDLE, INIT, ITEM, ITEMS, COLLATE, ENCODE = range(6)

_SEQUENCE, _RUN, _TASK, POSITION, _COUNT, _PHASE, _STARTED, _DONE, _DISMISSED = range(9)

NOBODY = -(1 << 62)


class Reading(NamedTuple):
    """What a worker was doing.

    Attributes:
        phase: "idle" (waiting, or sending a finished batch), "init", "item" (one sample), "items"
            (``__getitems__``), "collate" or "encode".
        run, task: which task, meaningless while idle.
        position: the sample's place in the task's indices; -1 - k for spare number k; None where no single sample is
            in hand.
        in_flight: how many samples that phase is about.
        started_ns: when this phase began, ``time.monotonic_ns()``; with some samples in it, a change of ``position``
            is the only sign that it goes on.
        done: tasks finished so far.
    """

    phase: Phase
    run: int
    task: int
    position: int | None
    in_flight: int
    started_ns: int
    done: int


class Beacon:
    """The record itself. The worker calls ``enter`` and ``sample``, the training process ``read``.

    Attributes:
        cells: the record's numbers. Going from sample to sample, a worker just sets the one at ``POSITION``, one store
            that needs no protection: a clock and a call per sample would cost more than a cheap sample does.
    """

    def __init__(self, page: SharedPage) -> None:
        self._page = page  # keeps the mapping alive
        self.cells = memoryview(page.memory).cast("q")

    def enter(self, phase: int, *, run: int = 0, task: int = 0, position: int = NOBODY, count: int = 1) -> None:
        """A phase begins. Runs in the worker."""
        cells = self.cells
        cells[_SEQUENCE] += 1
        cells[_RUN] = run
        cells[_TASK] = task
        cells[POSITION] = position
        cells[_COUNT] = count
        cells[_PHASE] = phase
        cells[_STARTED] = time.monotonic_ns()
        cells[_SEQUENCE] += 1

    def sample(self, position: int) -> None:
        """The next sample of the task under way begins. Runs in the worker."""
        cells = self.cells
        cells[_SEQUENCE] += 1
        cells[POSITION] = position
        cells[_COUNT] = 1
        cells[_PHASE] = ITEM
        cells[_STARTED] = time.monotonic_ns()
        cells[_SEQUENCE] += 1

    def finish(self) -> None:
        """A task is done; the worker is idle. Runs in the worker."""
        cells = self.cells
        cells[_SEQUENCE] += 1
        cells[_PHASE] = IDLE
        cells[POSITION] = NOBODY
        cells[_STARTED] = time.monotonic_ns()
        cells[_DONE] += 1
        cells[_SEQUENCE] += 1

    def dismiss(self) -> None:
        """Ask the worker to leave before its next task. Runs in the training process."""
        self.cells[_DISMISSED] = 1

    @property
    def dismissed(self) -> bool:
        """Whether the worker was asked to leave. Runs in the worker, between tasks."""
        return bool(self.cells[_DISMISSED])

    def read(self) -> Reading:
        """What the worker is (or was last) doing. Runs in the training process."""
        cells = self.cells
        values = cells[:8].tolist()
        for _ in range(16):
            again = cells[:8].tolist()
            if again == values and not values[_SEQUENCE] % 2:
                break
            values = again
        position = values[POSITION]
        return Reading(
            PHASES[values[_PHASE]],
            values[_RUN],
            values[_TASK],
            None if position == NOBODY else position,
            values[_COUNT],
            values[_STARTED],
            values[_DONE],
        )
