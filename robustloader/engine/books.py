"""The books of one epoch: its open tasks, what they came to, and what is known of the samples in them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from robustloader.decisions.blame import Blame
from robustloader.decisions.keys import as_list, index_key, positions_of
from robustloader.decisions.ledger import Ledger, Task
from robustloader.decisions.spares import SpareReservoir
from robustloader.engine.crew import TrialCase
from robustloader.engine.faults import FaultDesk
from robustloader.engine.pinning import Pinner
from robustloader.engine.pool import Died, Worker
from robustloader.telemetry import EpochRecording
from robustloader.transport.messages import Report

__all__ = ["MAX_ROUNDS", "SPARES_PER_TASK", "Books", "Result", "loaded_indices", "spares_for"]

SPARES_PER_TASK = 4
"""Sent with each task: where any samples are bad, one in a batch is common and four are rare."""

MAX_ROUNDS = 8
"""How often a task is sent again with other spares before it is given up."""


@dataclass(slots=True, eq=False)
class Result:
    """What a task came to: a batch, or an error for the trainer. ``pinned`` is False while the pin thread has it.

    Of an iterable dataset: which ``shard``, after how many ``calls``, and the ``snapshot`` of what keeps its own state.
    """

    batch: Any = None
    error: BaseException | None = None
    samples: int = 0
    nbytes: int = 0
    load_ns: int = 0
    worker_id: int | None = None
    report: Report | None = None
    pinned: bool = True
    shard: int = -1
    calls: int = 0
    snapshot: bytes | str | None = None


class Books:
    """Kept by one iterator, begun anew for each epoch.

    Attributes:
        run: numbers the epochs of this iterator; workers send it back, so that late results are told apart.
        epoch: numbers the epochs of the loader.
        queue: tasks that nobody has, oldest first (map-style).
        closing: the last worker only finds out about suspects; ``parked`` are the tasks above suspicion, which wait for
            the training process.
        error: what the next ``next()`` raises.
    """

    def __init__(self, desk: FaultDesk, *, in_order: bool, batched: bool, iterable: bool) -> None:
        self.desk = desk
        self.batched = batched
        self.iterable = iterable
        self.pinner: Pinner | None = None
        self.error: BaseException | None = None
        self.run = -1
        self.recording: EpochRecording
        self._in_order = in_order

    def begin(self, recording: EpochRecording, *, base_seed: int, poison_after: int, first: int = 0) -> None:
        """Begin an epoch with empty pages; a resumed one with task ``first``."""
        self.run += 1
        self.epoch = recording.epoch
        self.recording = recording
        self.ledger = Ledger(in_order=self._in_order, _next_id=first)
        self.blame = Blame(poison_after)
        self.spares = SpareReservoir(seed=base_seed, epoch=self.epoch)
        self.queue: list[Task] = []
        self.parked: list[Task] = []
        self.closing = False

    def open(self, indices: Any) -> Task:
        """Enter a task for what the sampler yielded. With ``faults="raise"``, one that needs a convicted sample has
        failed already."""
        if self.iterable:
            return self.ledger.open(indices, [])
        task = self.ledger.open(indices, as_list(indices, batched=self.batched))
        if self.desk.repairs:
            self.spares.observe(task.id, task.samples)
            if not self.desk.known_bad:  # as a rule
                task.spares = self.spares.draw(task.id, SPARES_PER_TASK)
                return task
            refusal = self.desk.refusal(task.samples)
            if refusal is not None:
                self.fail(task, refusal)
                return task
            self.avoid_known(task)
            if task.avoid:
                left_out = [task.samples[position] for position in task.avoid]
                self.desk.left_out(left_out, self.recording, task=task.id)
        return task

    def pass_over(self, indices: Any) -> None:
        """A task that was delivered before the epoch was resumed."""
        task = self.ledger.skip()
        if self.desk.repairs:
            self.spares.observe(task, as_list(indices, batched=self.batched))
            self.spares.close(task)

    def avoid_known(self, task: Task) -> None:
        """Provide for what must not be fetched, and for what may turn out bad."""
        if self.desk.known_bad:
            task.avoid = tuple(sorted({*task.avoid, *positions_of(task.samples, self.desk.known_bad)}))
        task.spares = spares_for(self.spares, self.desk, task.id, len(task.avoid), task.rounds)

    def learn(self) -> None:
        """A sample was convicted: what nobody has yet must not be loaded with it either."""
        for task in self.ledger:
            if task.worker_id < 0 and not task.arrived:
                self.avoid_known(task)

    def requeue(self, task: Task) -> None:
        """Let whoever has room first do a task again; the oldest goes first."""
        if task.avoid or self.desk.known_bad:
            self.avoid_known(task)
        queue = self.parked if self.closing and not self.suspected(task) else self.queue
        queue.append(task)
        queue.sort(key=lambda queued: queued.id)

    def suspected(self, task: Task) -> bool:
        """Whether a task, or a sample that it will load, has a death to its name."""
        keys = (index_key(index) for position, index in enumerate(task.samples) if position not in task.avoid)
        return self.blame.open and self.blame.suspects(task.id, keys)

    def close_in(self) -> None:
        """From now on only suspected tasks are given to workers."""
        self.closing = True
        waiting, self.queue = self.queue, []
        for task in waiting:
            self.requeue(task)

    def open_up(self) -> None:
        """Nothing is suspected any more: the parked tasks are in the queue again."""
        self.closing = False
        waiting, self.parked = self.parked, []
        for task in waiting:
            self.requeue(task)

    def arrive(self, task: Task, result: Result) -> None:
        """A task is done; what it came to waits to be pinned, then to be delivered."""
        self.ledger.arrive(task, result)
        if self.pinner is not None and result.error is None:
            result.pinned = False
            self.pinner.submit(result, result.batch)
            result.batch = None

    def fail(self, task: Task, error: BaseException) -> None:
        """A task ends with an error, raised when its turn comes."""
        for queue in (self.queue, self.parked):
            with contextlib.suppress(ValueError):
                queue.remove(task)
        self.ledger.arrive(task, Result(error=error))

    def raise_once(self, error: BaseException) -> None:
        """Remember an error that ends the iteration; the first one counts."""
        if self.error is None:
            self.error = error

    def withdraw_stream(self, worker_id: int) -> None:
        """Close the open tasks of a shard: it has ended, or is to be asked again later."""
        for task in self.ledger:
            if task.worker_id == worker_id and not task.arrived:
                self.ledger.withdraw(task)

    def in_hand(self, died: Died, case: TrialCase | None) -> tuple[Task | None, int | None, Any]:
        """The task, position and index that a dead worker was at; None where there was none."""
        if case is not None:
            return case.task, case.position, case.index
        reading = died.reading
        if reading.phase in ("idle", "init") or reading.run != self.run:
            return None, None, None
        task = self.ledger.get(reading.task)
        if task is None or task.arrived:
            return None, None, None
        return task, reading.position, _index_at(task, reading.position)

    def has_work(self, worker: Worker) -> bool:
        """Whether a worker has been given something that has not come back."""
        return self.ledger.waiting_for(worker.worker_id) > 0

    def sample_in_hand(self, worker: Worker) -> Any:
        """The index a live worker is at, for reports; None where no single one is known."""
        reading = worker.beacon.read()
        task = self.ledger.get(reading.task) if reading.run == self.run else None
        return _index_at(task, reading.position) if task is not None else None


def spares_for(reservoir: SpareReservoir, desk: FaultDesk, task: int, avoid: int, round: int = 1) -> tuple[Any, ...]:
    """Spares for a task with ``avoid`` samples to replace from the start, none of them known to be bad."""
    spares = reservoir.draw(task, SPARES_PER_TASK + 2 * avoid, round=round)
    bad = set(positions_of(spares, desk.known_bad)) if desk.known_bad else ()
    return tuple(spare for place, spare in enumerate(spares) if place not in bad) if bad else spares


def loaded_indices(samples: Any, report: Report | None) -> tuple[Any, ...]:
    """The indices that a batch was really made of, in its order."""
    if report is None:
        return tuple(samples)
    replaced, skipped = report.replaced, set(report.skipped)
    return tuple(
        replaced[place][1] if place in replaced else index
        for place, index in enumerate(samples)
        if place not in skipped
    )


def _index_at(task: Task, position: int | None) -> Any:
    if position is None:
        return None
    if position < 0:
        place = -1 - position
        return task.spares[place] if place < len(task.spares) else None
    return task.samples[position] if position < len(task.samples) else None
