"""A pool without processes: simulated workers that a test lets answer, die and come back in any order it likes.

Stands in for :class:`robustloader.engine.pool.Pool`, so that the real iterator, with its real ledger, budgets, blame
and recovery, can be driven through thousands of histories a minute. Nothing here decides anything.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from robustloader.engine.pool import Died, Happening, NotStarted, Said, Started
from robustloader.transport.messages import Fetch, Fetched, Ready, Report, Resume, Trial, TrialPassed, Unfilled
from robustloader.worker.beacon import Reading

_pids = itertools.count(1_000_000)

IDLE = Reading("idle", 0, -1, None, 1, 0, 0)


@dataclass
class SimFrame:
    """A frame that has crossed."""

    message: Any
    payload: Any = None
    nbytes: int = 0

    def batch(self) -> Any:
        return self.payload


@dataclass(eq=False)
class SimWorker:
    """What the engine keeps about a worker, and the messages that the worker has not seen to yet."""

    worker_id: int
    incarnation: int
    run: int
    pid: int = field(default_factory=lambda: next(_pids))
    ready: bool = False
    finished: int = 0
    dismissed: bool = False
    killed_for: str = ""
    arena_lost: str = ""
    silent_s: float = 0.0
    stack: str = ""
    silent_since: tuple[int, int | None] = (0, None)
    task: tuple[int, int, int] = (-1, -1, -1)
    task_s: float = 0.0
    reported: bool = False
    inbox: deque[Any] = field(default_factory=deque)
    beacon: Any = field(default_factory=lambda: SimpleNamespace(read=lambda: IDLE))

    @property
    def order(self) -> Fetch | Trial | None:
        """What it works on: the first message that asks for work."""
        while self.inbox and isinstance(self.inbox[0], Resume):
            self.inbox.popleft()
        return self.inbox[0] if self.ready and self.inbox else None


class SimPool:
    """The simulated processes.

    Attributes:
        starting: restarts under way.
        frames: all that was ever sent, by whom: to be sent again, too late or twice.
        drains: from now on whoever waits sees every worker do its work and nothing else happen.
    """

    def __init__(self, context: Any, make_setup: Any) -> None:
        self.workers: list[Any] = []
        self.starting: list[SimWorker] = []
        self.outbox: deque[Happening] = deque()
        self.frames: list[tuple[SimWorker, SimFrame]] = []
        self.start_method = "fork"
        self.owned = True
        self.busy = False
        self.stopped = False
        self.drains = False
        self._idle_waits = 0

    # --- what the engine calls

    def start(self, worker_id: int, incarnation: int, **details: Any) -> Any:
        worker = SimWorker(worker_id, incarnation, details["run"])
        self.workers.append(worker)
        return worker

    def start_aside(self, worker_id: int, incarnation: int, **details: Any) -> Any:
        worker = SimWorker(worker_id, incarnation, details["run"])
        self.starting.append(worker)
        return worker

    def send(self, worker: Any, message: Any, parcel: Any = None) -> None:
        worker.inbox.append(message)

    def dismiss(self, worker: Any) -> None:
        worker.dismissed = True

    def wait(self, timeout_s: float | None) -> list[Happening]:
        if self.drains and not self.outbox and timeout_s != 0:
            self._drain()
            self._idle_waits = 0 if self.outbox else self._idle_waits + 1
            assert self._idle_waits < 3, "the engine waits for something that nobody was asked for"
        heard, self.outbox = list(self.outbox), deque()
        return heard

    def wake(self) -> None:
        pass

    def stop(self) -> None:
        self.stopped = True
        self.workers.clear()
        self.starting.clear()

    # --- what the test calls

    def come_up(self, worker: SimWorker, *, fails: bool = False) -> None:
        """A restart succeeds or fails."""
        self.starting.remove(worker)
        if fails:
            self.outbox.append(NotStarted(worker.worker_id, BlockingIOError(11, "fork refused")))
            return
        self.workers.append(worker)
        self.outbox.append(Started(worker))  # type: ignore[arg-type]

    def work(self, worker: SimWorker) -> None:
        """The worker does the next thing it has to do."""
        if not worker.ready:
            self._say(worker, SimFrame(Ready(worker.pid)))
            return
        order = worker.order
        if order is None:
            return
        worker.inbox.popleft()
        if isinstance(order, Trial):
            self._say(worker, SimFrame(TrialPassed(order.run, order.task, order.position)))
            return
        self._say(worker, _load(order))

    def die(self, worker: SimWorker, exitcode: int, reading: Reading) -> None:
        """The worker's process ends; what it has said is heard first. What it might still have said is kept."""
        self.workers.remove(worker)
        if isinstance(worker.order, Fetch):
            self.frames.append((worker, _load(worker.order)))
        self.outbox.append(Died(worker, exitcode, reading))  # type: ignore[arg-type]

    def repeat(self, worker: SimWorker, frame: SimFrame) -> None:
        """A frame is heard (again), whatever has become of its sender."""
        self.outbox.append(Said(worker, frame))  # type: ignore[arg-type]

    def _say(self, worker: SimWorker, frame: SimFrame) -> None:
        if not isinstance(frame.message, Ready):
            self.frames.append((worker, frame))
        self.outbox.append(Said(worker, frame))  # type: ignore[arg-type]

    def _drain(self) -> None:
        for worker in list(self.starting):
            self.come_up(worker)
        for worker in list(self.workers):
            if worker.dismissed:
                self.die(worker, 0, IDLE)
            elif not worker.ready or worker.order is not None:
                self.work(worker)


def _load(order: Fetch) -> SimFrame:
    """A batch is the list of its indices, spares in the places to avoid."""
    if len(order.avoid) > len(order.spares):
        return SimFrame(Unfilled(order.run, order.task, order.avoid, Report()))
    used = dict(zip(order.avoid, order.spares, strict=False))
    batch = [used.get(place, index) for place, index in enumerate(order.indices)]
    replaced = {place: (order.indices[place], spare) for place, spare in used.items()}
    report = Report(replaced=replaced) if replaced else None
    return SimFrame(Fetched(order.run, order.task, len(batch), 1, 0, report), batch)
