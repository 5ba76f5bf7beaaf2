"""The multiprocess iterator: give out tasks, wait, settle what came back, deliver.

Everything runs in the thread that calls ``next()``; nothing is raised anywhere else. Tasks are kept in the ledger,
processes in the crew; this module connects the two.

*Source*: ``_MultiProcessingDataLoaderIter`` in ``torch/utils/data/dataloader.py``, torch 2.13, for the order in which
the sampler is read, tasks are assigned and batches are delivered.
"""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass
from multiprocessing import util
from typing import Any

import torch
from torch.utils.data import DataLoader

from robustloader.decisions.blame import Blame, Judgement
from robustloader.decisions.keys import Key, as_list, index_key, positions_of
from robustloader.decisions.ledger import Ledger, Task
from robustloader.decisions.spares import SpareReservoir
from robustloader.engine.crew import Crew, Slot, TrialCase
from robustloader.engine.faults import rebuild
from robustloader.engine.inprocess import MAX_ROUNDS, StandIn, loaded_indices, spares_for
from robustloader.engine.options import EngineOptions
from robustloader.engine.pinning import Pinner
from robustloader.engine.pool import Died, NotStarted, Pool, Said, Started, Worker
from robustloader.errors import SampleError, WorkerError, WorkerHangError, WorkerStartError
from robustloader.events import BatchInfo, FaultRecord, PoolShrunk, TaskReplayed
from robustloader.system import host, torch_private
from robustloader.telemetry import EpochRecording
from robustloader.transport.channel import Frame
from robustloader.transport.messages import (
    Exhausted,
    Failed,
    Fault,
    Fetch,
    Fetched,
    Raised,
    Ready,
    Report,
    Resume,
    StartFailed,
    Trial,
    TrialPassed,
    Unfilled,
)
from robustloader.worker.fetch import Broken, Ended, Loaded, Short
from robustloader.worker.process import Cargo, Setup

__all__ = ["MultiprocessIterator"]


@dataclass(slots=True, eq=False)
class _Result:
    """What a task came to: a batch, or an error for the trainer."""

    batch: Any = None
    error: BaseException | None = None
    samples: int = 0
    nbytes: int = 0
    load_ns: int = 0
    worker_id: int | None = None
    report: Report | None = None
    pinned: bool = True


@dataclass(slots=True)
class _Resources:
    """What must be given back when the iterator goes; knows nothing of the iterator."""

    pool: Pool
    pinner: Pinner | None = None
    recording: EpochRecording | None = None
    size: int = 0

    def release(self) -> None:
        if not self.pool.owned:
            return
        if self.recording is not None:
            self.recording.close(complete=False, workers_at_end=self.size, now_ns=time.monotonic_ns())
        if self.pinner is not None:
            self.pinner.stop()
        self.pool.stop()


class MultiprocessIterator(torch_private.LoaderIterator):
    """One epoch (with ``persistent_workers``, one after another) loaded by worker processes.

    ``iter(loader)`` makes it and starts the workers; they are given their first tasks at once.
    """

    def __init__(self, loader: DataLoader[Any], options: EngineOptions, *, prefetch_factor: int) -> None:
        super().__init__(loader)
        if prefetch_factor <= 0:
            raise AssertionError("prefetch_factor must be greater than 0 for MultiProcessingDataLoaderIter")
        self._options = options
        self._desk = options.desk
        self._policy = options.recovery
        self._prefetch = prefetch_factor
        self._in_order = bool(getattr(loader, "in_order", True))
        self._drop_last = loader.drop_last
        self._persistent = loader.persistent_workers
        self._worker_init_fn = loader.worker_init_fn
        self._cargo = Cargo(options.dataset, self.collate_fn, loader.worker_init_fn, options.faults)
        self._run = 0
        self._error: BaseException | None = None
        self._closed = False
        self._stand_in: StandIn | None = None
        self._local = False
        self._local_reason = ""
        self._orphans: deque[Slot] = deque()
        self._queue: list[Task] = []
        self._last: tuple[Task, _Result] | None = None
        self._returned_ns = 0
        self._cycle = 0
        self._ahead = 0
        self._epoch = options.next_epoch()
        context = loader.multiprocessing_context
        self._pool = Pool(torch.multiprocessing if context is None else context, self._make_setup)
        self._resources = _Resources(self._pool)
        self._crew = Crew(
            self._pool,
            num_workers=self.num_workers,
            policy=self._policy,
            timeout_s=float(self.timeout_s or 0),
            details=self._start_details,
        )
        self._begin_recording()
        self._finalizer = util.Finalize(self, self._resources.release, exitpriority=100)
        try:
            self._start_workers()
            if self.pins:
                self._resources.pinner = Pinner(
                    lambda batch: torch_private.pin_memory(batch, device),
                    torch.accelerator.current_device_index(),
                    self._pool.wake,
                ) if (device := self.pin_device) or True else None
            self.reset(loader, first=True)
            if self._worker_init_fn is not None:
                self._await_starts()
        except BaseException:
            self.close()
            raise

    # --- starting

    def _make_setup(self, **process: Any) -> Setup:
        options = self._options
        return Setup(
            cargo=self._cargo,
            num_workers=self.num_workers,
            base_seed=self.base_seed,
            seed_batches=options.seeding == "batch" and not options.iterable,
            iterable=options.iterable,
            batched=options.batched,
            drop_last=self._drop_last,
            **process,
        )

    def _start_details(self, slot: Slot) -> dict[str, Any]:
        skip = slot.batches if self._options.iterable else 0
        return {"epoch": self._epoch, "run": self._run, "skip": skip, "indices": self._stream_indices if skip else None}

    def _start_workers(self) -> None:
        error = self._crew.start_all()
        if error is None:
            return
        # EAGAIN, ENOMEM, or a daemonic process, which may have no children: nothing a restart would mend.
        refused = isinstance(error, (OSError, AssertionError))
        if self._policy is None:
            raise error
        if not refused:
            raise WorkerStartError(f"a worker process could not be started: {error}") from error
        started = sum(slot.worker is not None for slot in self._crew.slots)
        reason = f"a worker process could not be started: {error}"
        if started >= self._policy.min_workers:
            for slot in self._crew.slots:
                if slot.worker is None:
                    self._crew.retire(slot, reason)
                    if self._options.iterable:
                        self._orphans.append(slot)
        else:
            self._fall_back(reason, error)

    def _await_starts(self) -> None:
        """Wait until every worker has run ``worker_init_fn``, so that what it raised is raised by ``iter()``."""
        while self._error is None and any(not worker.ready for worker in self._pool.workers):
            self._turn()
        self._raise_error()

    def begin_epoch(self, loader: DataLoader[Any], *, first: bool) -> None:
        """Begin an epoch: fresh books, and tasks for every worker. ``iter(sampler)`` has just been called."""
        if not first:
            self._raise_error()
            self._end_recording(complete=False)
            self._epoch = self._options.next_epoch()
            self._run += 1
            self._begin_recording()
        self._ledger = Ledger(in_order=self._in_order)
        self._blame = Blame(self._policy.poison_after if self._policy else 1)
        self._spares = SpareReservoir(seed=self.base_seed, epoch=self._epoch)
        self._queue.clear()
        self._cycle = self._ahead = 0
        self._last = None
        self._stand_in = None
        self._stream_indices: Any = None
        self._returned_ns = 0
        for slot in self._crew.slots:
            slot.ended, slot.batches = False, 0
            slot.orders.clear()
            slot.trials.clear()
            slot.trial = None
            if not first and slot.worker is not None:
                self._pool.send(slot.worker, Resume(self._run, self._epoch))
        if self._options.iterable and not first:
            self._orphans = deque(slot for slot in self._crew.slots if slot.state == "retired")
        for _ in range(self._prefetch * self.num_workers):
            self._put()

    def _begin_recording(self) -> None:
        self._recording = self._options.recorder.begin_epoch(
            epoch=self._epoch,
            workers=self.num_workers,
            usable_cpus=host.usable_cpus(),
            now_ns=time.monotonic_ns(),
            persistent=self._persistent,
        )
        self._recording.active_workers = self._crew.size
        self._crew.recording = self._resources.recording = self._recording

    # --- giving out

    def _put(self) -> None:
        """Read one batch of indices from the sampler and give it to a worker, as torch would."""
        try:
            indices = self.next_indices()
        except StopIteration:
            return
        if self._options.iterable:
            self._put_stream(indices)
            return
        task = self._ledger.open(indices, as_list(indices, batched=self._options.batched))
        if self._desk.repairs:
            self._spares.observe(task.id, task.samples)
            self._avoid_known(task)
            if task.avoid:
                left_out = [task.samples[position] for position in task.avoid]
                self._desk.left_out(left_out, self._recording, task=task.id)
        slot = self._choose()
        if slot is None:
            self._queue.append(task)
        else:
            self._give(task, slot)

    def _avoid_known(self, task: Task) -> None:
        """Provide for what must not be fetched, and for what may turn out bad."""
        known = positions_of(task.samples, self._desk.known_bad)
        task.avoid = tuple(sorted({*task.avoid, *known}))
        task.spares = spares_for(self._spares, self._desk, task.id, len(task.avoid), task.rounds)

    def _put_stream(self, indices: Any) -> None:
        self._stream_indices = indices
        slots = self._crew.slots
        for _ in slots:
            slot = slots[self._cycle % len(slots)]
            self._cycle += 1
            if not slot.ended and slot.state != "retired":
                self._give_stream(slot, indices)
                return

    def _give_stream(self, slot: Slot, indices: Any) -> None:
        task = self._ledger.open(indices, [])
        task.worker_id = slot.worker_id
        if slot.worker is not None and not slot.orders:
            self._give(task, slot)
        else:
            slot.orders.append(task)

    def _choose(self) -> Slot | None:
        """Who gets the next task: torch's rule over the live workers, or the least loaded one."""
        if self._local:
            return None
        live = self._crew.live
        if not live:
            return None
        if self._options.seeding == "batch":
            return min(live, key=lambda slot: self._ledger.waiting_for(slot.worker_id))
        slots = self._crew.slots
        capacity = self._prefetch * self.num_workers // len(live)
        for _ in slots:
            slot = slots[self._cycle % len(slots)]
            self._cycle += 1
            if slot.takes_tasks and (self._in_order or self._ledger.held_by(slot.worker_id) < capacity):
                return slot
        return None

    def _give(self, task: Task, slot: Slot) -> None:
        worker = slot.worker
        assert worker is not None
        self._ledger.assign(task, slot.worker_id, worker.incarnation)
        if task.attempt > 1:
            self._crew.emit(
                TaskReplayed(epoch=self._epoch, task=task.id, worker_id=slot.worker_id, attempt=task.attempt)
            )
        order = Fetch(self._run, task.id, task.indices, task.spares, task.avoid, task.careful, task.verify)
        try:
            self._pool.send(worker, order)
        except Exception as error:  # the sampler's indices do not pickle
            self._fail(task, error)

    def _feed(self, slot: Slot) -> None:
        """A slot's process has room: a trial first, then what is waiting to be replayed."""
        worker = slot.worker
        if worker is None or not worker.ready or slot.trial is not None:
            return
        if slot.trials:
            if self._ledger.waiting_for(slot.worker_id):
                return
            case = slot.trial = slot.trials.popleft()
            self._pool.send(worker, Trial(self._run, case.task.id, case.position, case.index))
            return
        while slot.orders:
            self._give(slot.orders.popleft(), slot)
        while self._queue and self._ledger.waiting_for(slot.worker_id) < self._prefetch:
            self._give(self._queue.pop(0), slot)

    def _requeue(self, task: Task) -> None:
        """Have a task done (again) by whoever has room first; the oldest goes first."""
        if self._options.iterable:
            slot = self._crew.slots[task.worker_id]
            slot.orders.append(task)
            return
        if task.avoid or self._desk.known_bad:
            self._avoid_known(task)
        self._queue.append(task)
        self._queue.sort(key=lambda queued: queued.id)

    def _feed_all(self) -> None:
        for slot in self._crew.live:
            self._feed(slot)

    # --- delivering

    def next_batch(self) -> Any:
        """The next batch, waiting for it as long as it takes."""
        begun = time.monotonic_ns()
        if self._returned_ns:
            self._recording.stepped(begun - self._returned_ns)
        self._crew.begin_wait()
        if self._pool.workers and not self._closed:
            self._turn(0.0)
        heard_ns = begun
        while True:
            self._raise_error()
            task = self._ledger.deliverable()
            if task is not None and task.result.pinned:
                return self._deliver(task, begun)
            if not len(self._ledger) and not self._adopt_orphans():
                self._finish()
                raise StopIteration
            if self._turn():
                heard_ns = time.monotonic_ns()
            elif self._policy is None and self.timeout_s and time.monotonic_ns() - heard_ns > self.timeout_s * 1e9:
                raise RuntimeError(f"DataLoader timed out after {self.timeout_s} seconds")

    def _deliver(self, task: Task, begun: int) -> Any:
        result: _Result = task.result
        ready = self._ledger.ready
        self._ledger.deliver(task)
        if self._ahead:
            self._ahead -= 1
        else:
            self._put()
        task.result = None
        self._crew.delivered()
        self._last = (task, result)
        batch, error = result.batch, result.error
        result.batch = None
        now = time.monotonic_ns()
        if error is not None:
            self._returned_ns = now
            result.error = None
            raise error
        self._recording.waited(now - begun, ready)
        self._recording.delivered(result.samples, result.nbytes)
        self._returned_ns = now
        return batch

    def _finish(self) -> None:
        self._end_recording(complete=True)
        if not self._persistent:
            self.close()

    def _end_recording(self, *, complete: bool) -> None:
        self._recording.close(complete=complete, workers_at_end=self._crew.size, now_ns=time.monotonic_ns())

    @property
    def batch_info(self) -> BatchInfo | None:
        """About the batch returned last; None before the first."""
        if self._last is None:
            return None
        task, result = self._last
        report = result.report or Report()
        return BatchInfo(
            index=task.id,
            indices=loaded_indices(task.samples, report),
            replaced=dict(report.replaced),
            skipped=report.skipped,
            worker_id=result.worker_id,
            attempts=max(1, task.attempt),
            load_s=result.load_ns / 1e9,
        )

    # --- waiting and settling

    def _turn(self, wait_s: float | None = None) -> bool:
        """One round of waiting and settling; whether anything was heard from a worker."""
        if self._local:
            return self._load_here()
        crew = self._crew
        crew.start_due()
        if wait_s is None:
            wait_s = crew.next_due_s()
            if self._policy is None and self.timeout_s:
                wait_s = min(wait_s, self.timeout_s / 8)
        heard = False
        for happening in self._pool.wait(wait_s):
            try:
                if isinstance(happening, Said):
                    heard = True
                    self._on_said(happening.worker, happening.frame)
                elif isinstance(happening, Died):
                    self._on_died(happening)
                elif isinstance(happening, Started):
                    self._on_started(happening.worker)
                else:
                    self._on_not_started(happening)
            except SampleError as error:  # the fault budget
                self._error = self._error or error
        heard = self._take_pinned() or heard
        crew.watch(self._sample_in_hand)
        return heard

    def _on_said(self, worker: Worker, frame: Frame) -> None:
        message = frame.message
        slot = self._crew.slot_of(worker)
        if isinstance(message, Ready):
            worker.ready = True
            self._feed(slot)
        elif isinstance(message, StartFailed):
            self._on_start_failed(worker, message.raised)
        elif isinstance(message, TrialPassed):
            self._on_trial_passed(slot, worker)
        elif message.run == self._run:
            task = self._ledger.accept(message.task, worker.worker_id, worker.incarnation)
            worker.finished += 1
            if task is not None:
                self._settle(task, slot, worker, frame)
            self._feed(slot)

    def _settle(self, task: Task, slot: Slot, worker: Worker, frame: Frame) -> None:
        message = frame.message
        self._blame.arrived(task.id)
        report: Report | None = message.report
        try:
            self._desk.take(
                report,
                self._recording,
                task=task.id,
                worker_id=worker.worker_id,
                pid=worker.pid,
                batches=slot.batches,
            )
        finally:
            if isinstance(message, Fetched):
                self._on_fetched(task, slot, worker, message, frame)
            elif isinstance(message, Failed):
                index = report.faults[-1].index if report is not None and report.faults else None
                error = rebuild(message.raised, index=index, worker_id=worker.worker_id, pid=worker.pid)
                self._arrive(task, _Result(error=error, worker_id=worker.worker_id, report=report))
            elif isinstance(message, Unfilled):
                self._on_unfilled(task, slot, message)
            elif isinstance(message, Exhausted):
                self._on_exhausted(slot)

    def _on_fetched(self, task: Task, slot: Slot, worker: Worker, message: Fetched, frame: Frame) -> None:
        try:
            batch = frame.batch()
        except Exception as error:  # a user's __setstate__
            self._on_undecodable(task, slot, worker, error)
            return
        slot.batches += 1
        self._desk.budget.fetched(message.samples)
        self._recording.worker_task(worker.worker_id, message.samples, message.load_ns, message.rss_bytes)
        self._arrive(
            task,
            _Result(
                batch=batch,
                samples=message.samples,
                nbytes=frame.nbytes,
                load_ns=message.load_ns,
                worker_id=worker.worker_id,
                report=message.report,
            ),
        )

    def _arrive(self, task: Task, result: _Result) -> None:
        self._ledger.arrive(task, result)
        pinner = self._resources.pinner
        if pinner is not None and result.error is None:
            result.pinned = False
            pinner.submit(result, result.batch)
            result.batch = None

    def _take_pinned(self) -> bool:
        pinner = self._resources.pinner
        if pinner is None:
            return False
        taken = pinner.take()
        for result, batch, error in taken:
            result.batch, result.pinned = batch, True
            if error is not None:
                where = f"in pin memory thread for device {torch.accelerator.current_device_index()}"
                result.batch = None
                result.error = rebuild(Raised.of(error, where), index=None, worker_id=None, pid=None)
        if not pinner.alive and not self._closed:
            self._error = self._error or RuntimeError("Pin memory thread exited unexpectedly")
        return bool(taken)

    def _on_undecodable(self, task: Task, slot: Slot, worker: Worker, error: Exception) -> None:
        """A batch arrived that cannot be unpickled here: find the sample, or do without the whole batch."""
        raised = Raised.of(error, f"while decoding a batch of DataLoader worker process {worker.worker_id}")
        action = self._desk.policy.action
        if action == "raise" or self._options.iterable or (task.verify and len(task.avoid) == len(task.samples)):
            self._desk.enter(
                Fault("undecodable", None, -1, raised.error_type, raised.message, raised.traceback, 1, "raised"),
                self._recording,
                task=task.id,
                worker_id=worker.worker_id,
                pid=worker.pid,
            )
            error = rebuild(raised, index=None, worker_id=worker.worker_id, pid=worker.pid)
            slot.batches += 1
            self._arrive(task, _Result(error=error, worker_id=worker.worker_id))
            return
        if task.verify:  # each sample survives alone, the batch does not
            task.avoid = tuple(range(len(task.samples)))
            self._condemn(task, "undecodable", raised.message, None, worker)
        task.verify = True
        self._avoid_known(task)
        self._give(task, slot)

    def _on_unfilled(self, task: Task, slot: Slot, message: Unfilled) -> None:
        """The worker could not fill the batch with the spares it had: send it again with others."""
        task.avoid = tuple(sorted({*task.avoid, *message.avoid}))
        task.rounds += 1
        if task.rounds > MAX_ROUNDS and not self._options.iterable:
            self._fail(task, SampleError(f"no replacement was found for {len(task.avoid)} samples of batch {task.id}"))
            return
        if not self._options.iterable:
            # The sampler may have yielded too little so far to draw from: read one batch ahead of torch's schedule.
            if not self._ahead:
                before = self._ledger.next_id
                self._put()
                self._ahead += self._ledger.next_id - before
            self._avoid_known(task)
        task.attempt -= 1  # the same worker goes on with it: no replay
        self._give(task, slot)

    def _on_exhausted(self, slot: Slot) -> None:
        """This worker's share of an iterable dataset has ended."""
        slot.ended = True
        for task in self._ledger:
            if task.worker_id == slot.worker_id and not task.arrived:
                self._ledger.withdraw(task)
        slot.orders.clear()
        if slot.worker is not None and (not self._persistent or self._orphans):
            self._pool.dismiss(slot.worker)
        self._put()

    def _fail(self, task: Task, error: BaseException) -> None:
        self._arrive(task, _Result(error=error))

    # --- deaths

    def _on_died(self, died: Died) -> None:
        worker = died.worker
        slot = self._crew.slot_of(worker)
        if slot.worker is not worker and slot.worker is not None:
            return
        if worker.dismissed:
            slot.worker = None
            if slot.state == "live":
                self._leave(slot)
            return
        cause = self._crew.account(died)
        case, slot.trial = slot.trial, None
        lost = self._ledger.release(worker.worker_id, worker.incarnation)
        task, position, index = self._in_hand(died, case)
        event = self._crew.report_death(died, cause, index, len(lost))
        self._crew.vacate(slot)
        if self._policy is None:
            raise_now = self._crew.crash_error(event)
            self._error = self._error or raise_now
            return
        key = None if index is None or position is None else index_key(index)
        judgement = self._judge(task, key, case, died, cause)
        self._resume_tasks(slot, lost, task, position, index, key, case, judgement, died, cause)
        if judgement is not None and judgement.action in ("convict", "condemn"):
            self._crew.spend(cause, key)
            if key is not None:
                self._crew.forgive(key, judgement.refund)
            else:
                self._crew.budget.refund(judgement.refund)
            self._crew.schedule(slot)
        elif self._crew.spend(cause, key):
            self._crew.schedule(slot)
        else:
            self._shrink(slot, cause)
        self._feed_all()

    def _leave(self, slot: Slot) -> None:
        """A shard's process left after its end; a waiting shard may have the place."""
        slot.state = "ended"
        if self._orphans and self._policy is not None:
            self._adopt(self._orphans.popleft())

    def _in_hand(self, died: Died, case: TrialCase | None) -> tuple[Task | None, int | None, Any]:
        """The task, position and index that a dead worker was at."""
        if case is not None:
            return case.task, case.position, case.index
        reading = died.reading
        if reading.phase in ("idle", "init") or reading.run != self._run:
            return None, None, None
        task = self._ledger.get(reading.task)
        if task is None or task.arrived:
            return None, None, None
        return task, reading.position, _index_at(task, reading.position)

    def _sample_in_hand(self, worker: Worker) -> Any:
        reading = worker.beacon.read()
        task = self._ledger.get(reading.task) if reading.run == self._run else None
        return _index_at(task, reading.position) if task is not None else None

    def _judge(
        self, task: Task | None, key: Key | None, case: TrialCase | None, died: Died, cause: Any
    ) -> Judgement | None:
        if task is None or self._options.iterable:
            return None
        if key is None:
            return self._blame.task_died(task.id, cause, careful=task.careful)
        if key in self._desk.known_bad:
            return Judgement("convict", refund=1, deaths=1)
        return self._blame.sample_died(key, cause, on_trial=case is not None)

    def _resume_tasks(
        self,
        slot: Slot,
        lost: list[Task],
        task: Task | None,
        position: int | None,
        index: Any,
        key: Key | None,
        case: TrialCase | None,
        judgement: Judgement | None,
        died: Died,
        cause: Any,
    ) -> None:
        """Decide what becomes of the tasks a dead worker held."""
        waiting = case.waiting if case is not None else []
        if judgement is None or task is None:
            for other in lost:
                self._requeue(other)
            return
        if judgement.action == "trial" and key is not None and position is not None:
            suspected = [other for other in lost if key in map(index_key, other.samples)] or (
                [task] if case is None else []
            )
            for other in lost:
                if other not in suspected:
                    self._requeue(other)
            slot.trials.append(TrialCase(key, index, position, task, waiting + suspected))
            return
        if judgement.action == "convict" and key is not None:
            self._convict(key, index, task, judgement, died, cause)
        elif judgement.action == "condemn":
            task.avoid = tuple(range(len(task.samples)))
            self._condemn(task, "poison", f"its worker died {judgement.deaths} times ({cause})", died, died.worker)
        elif judgement.action == "careful":
            task.careful = True
        for other in waiting + lost:
            if not other.arrived:
                self._requeue(other)

    def _convict(
        self, key: Key, index: Any, task: Task, judgement: Judgement, died: Died, cause: Any
    ) -> None:
        """It is proved that this sample kills workers: never load it again, nowhere."""
        if key in self._desk.known_bad:
            return
        action = self._desk.policy.action
        how = host.signal_name(died.exitcode) or (
            "it stayed silent" if cause == "hang" else f"exit code {died.exitcode}"
        )
        message = f"sample {index!r} killed its worker {judgement.deaths} times, the last time alone in it ({how})"
        self._desk.quarantine.add(index)
        self._desk.enter_record(
            FaultRecord(
                kind="poison",
                index=index,
                error_type="",
                message=message,
                worker_id=died.worker.worker_id,
                pid=died.worker.pid,
                epoch=self._epoch,
                task=task.id,
                attempts=judgement.deaths,
                signal=host.signal_name(died.exitcode),
                action="quarantined" if action != "raise" else "raised",
            ),
            self._recording,
        )
        if action == "raise":
            for other in self._ledger:
                if not other.arrived and key in map(index_key, other.samples):
                    if other in self._queue:
                        self._queue.remove(other)
                    error: WorkerError
                    if cause == "hang":
                        error = WorkerHangError(
                            message, worker_id=died.worker.worker_id, pid=died.worker.pid, index=index
                        )
                    else:
                        error = self._crew.crash_error(
                            self._crew.report_death(died, cause, index, 0)
                        )
                    self._fail(other, error)

    def _condemn(self, task: Task, kind: Any, message: str, died: Died | None, worker: Worker) -> None:
        """The task as a whole cannot be had; all its samples are replaced."""
        self._desk.enter_record(
            FaultRecord(
                kind=kind,
                index=None,
                message=message,
                worker_id=worker.worker_id,
                pid=worker.pid,
                epoch=self._epoch,
                task=task.id,
                attempts=task.attempt,
                signal=host.signal_name(died.exitcode) if died is not None else None,
                action="replaced" if self._desk.policy.action == "replace" else "skipped",
            ),
            self._recording,
        )

    def _on_trial_passed(self, slot: Slot, worker: Worker) -> None:
        case, slot.trial = slot.trial, None
        worker.finished += 1
        if case is not None:
            self._blame.acquit(case.key)
            for task in case.waiting:
                self._requeue(task)
        if self._local_reason and not self._trials_open():
            self._go_local()
            return
        self._feed_all()

    def _on_started(self, worker: Worker) -> None:
        slot = self._crew.slot_of(worker)
        if slot.state != "starting":  # retired meanwhile
            self._pool.dismiss(worker)
            return
        self._crew.arrived(worker)

    def _on_not_started(self, happening: NotStarted) -> None:
        slot = self._crew.slot_of(happening.worker)
        error = happening.error
        if self._policy is None:
            self._error = self._error or error
            return
        slot.incarnation += 1
        slot.streak += 1
        if self._crew.spend("start", None):
            self._crew.schedule(slot)
        else:
            self._shrink(slot, f"a worker process could not be started: {error}")

    def _on_start_failed(self, worker: Worker, raised: Raised) -> None:
        """A worker said why it cannot work. Of the first incarnation that is an error; a later one just dies."""
        if worker.incarnation > 0 and self._policy is not None:
            return
        cause = rebuild(raised, index=None, worker_id=worker.worker_id, pid=worker.pid)
        if self._policy is None:
            self._error = self._error or cause
            return
        error = WorkerStartError(
            f"worker {worker.worker_id} (pid {worker.pid}) cannot start: {raised.error_type}: {raised.message}\n"
            f"Original {raised.traceback}",
            worker_id=worker.worker_id,
            pid=worker.pid,
        )
        error.__cause__ = cause
        self._error = self._error or error

    # --- fewer workers

    def _shrink(self, slot: Slot, reason: str) -> None:
        assert self._policy is not None
        crew = self._crew
        if crew.size - 1 >= self._policy.min_workers:
            crew.retire(slot, f"worker {slot.worker_id} is not restarted ({reason})")
            crew.budget.refill()
            self._recording.active_workers = crew.size
            self._hand_on(slot)
            return
        if self._local_reason:  # only trials were left to do, and their worker cannot be had
            self._give_up_trials()
            return
        self._fall_back(f"no worker is left and the restart budget is spent ({reason})", None, slot)

    def _hand_on(self, slot: Slot) -> None:
        """A retired slot's trials go to another slot; its shard waits for a place."""
        if self._options.iterable:
            for task in self._ledger:
                if task.worker_id == slot.worker_id and not task.arrived:
                    self._ledger.withdraw(task)
            slot.orders.clear()
            if not slot.ended:
                self._orphans.append(slot)
            return
        while slot.trials:
            case = slot.trials.popleft()
            other = next((other for other in self._crew.slots if other.state not in ("retired", "ended")), None)
            if other is None:
                slot.trials.appendleft(case)
                return
            other.trials.append(case)

    def _fall_back(self, reason: str, error: BaseException | None, slot: Slot | None = None) -> None:
        """No workers can be kept: the training process loads the rest, where that is allowed and safe."""
        crew = self._crew
        assert self._policy is not None
        if not self._policy.in_process or not crew.safe_in_process:
            why = "in_process=False" if not self._policy.in_process else "what killed them would kill it too"
            if slot is not None:
                slot.state = "retired"
            self._error = self._error or crew.budget_error(
                f"{reason}, and the training process does not load in their place: {why}."
            )
            self._error.__cause__ = error
            return
        self._local_reason = reason
        if slot is not None and self._trials_open():
            # Suspects are never loaded in the training process: one more process tries them, outside the budget.
            crew.schedule(slot)
            return
        self._go_local()

    def _trials_open(self) -> bool:
        return any(slot.trials or slot.trial for slot in self._crew.slots)

    def _give_up_trials(self) -> None:
        """Suspects that cannot be tried are left out rather than loaded in the training process."""
        for slot in self._crew.slots:
            cases = [*slot.trials, *([slot.trial] if slot.trial else [])]
            slot.trials.clear()
            slot.trial = None
            for case in cases:
                self._desk.quarantine.add(case.index)
                for task in case.waiting:
                    self._requeue(task)
        self._go_local()

    def _go_local(self) -> None:
        self._local = True
        for slot in self._crew.slots:
            for task in self._ledger.release(slot.worker_id, slot.worker.incarnation) if slot.worker else ():
                if not self._options.iterable:
                    self._requeue(task)
            if self._options.iterable:
                for task in self._ledger:
                    if task.worker_id == slot.worker_id and not task.arrived:
                        self._ledger.withdraw(task)
                slot.orders.clear()
                if not slot.ended and slot not in self._orphans:
                    self._orphans.append(slot)
        self._crew.retire_all(self._local_reason)
        self._recording.active_workers = 0

    def _adopt_orphans(self) -> bool:
        """Give a shard that lost its process a place; whether there was one."""
        if not self._orphans:
            return False
        if self._local:
            return self._load_orphan()
        if self._crew.processes == 0 or any(slot.state in ("live", "starting", "waiting") for slot in self._crew.slots):
            return True
        self._adopt(self._orphans.popleft())
        return True

    def _adopt(self, slot: Slot) -> None:
        slot.streak = 0
        self._crew.schedule(slot)
        for _ in range(self._prefetch):
            self._give_stream(slot, self._stream_indices or self.next_indices())

    # --- the training process as a worker

    def _load_here(self) -> bool:
        """Load the oldest task in this process."""
        if self._take_pinned():
            return True
        if self._options.iterable:
            return self._load_orphan()
        if not self._queue:
            return bool(self._pool.wait(0.01))
        task = self._queue.pop(0)
        if self._stand_in is None:
            self._stand_in = self._make_stand_in(0)
        task.attempt += 1
        self._load_locally(task, None)
        return True

    def _make_stand_in(self, worker_id: int, skip: int = 0) -> StandIn:
        return StandIn(
            self._options,
            collate_fn=self.collate_fn,
            drop_last=self._drop_last,
            worker_init_fn=self._worker_init_fn,
            worker_id=worker_id,
            num_workers=self.num_workers,
            base_seed=self.base_seed,
            skip=skip,
            indices=self._stream_indices,
        )

    def _load_orphan(self) -> bool:
        """Load one batch of the first shard that waits; whether there is one."""
        if not self._orphans:
            return False
        slot = self._orphans[0]
        indices = self._stream_indices if self._stream_indices is not None else self.next_indices()
        self._stream_indices = indices
        if self._stand_in is None:
            self._stand_in = self._make_stand_in(slot.worker_id, slot.batches)
        task = self._ledger.open(indices, [])
        task.attempt = 1
        self._load_locally(task, slot)
        return True

    def _load_locally(self, task: Task, shard: Slot | None) -> None:
        assert self._stand_in is not None
        begun = time.monotonic_ns()
        while True:
            order = Fetch(self._run, task.id, task.indices, task.spares, task.avoid)
            outcome = self._stand_in.fetch(order, self._epoch)
            self._desk.take(
                outcome.report,
                self._recording,
                task=task.id,
                worker_id=None,
                pid=os.getpid(),
                batches=shard.batches if shard else 0,
            )
            if not isinstance(outcome, Short):
                break
            task.avoid = tuple(sorted({*task.avoid, *outcome.avoid}))
            task.rounds += 1
            if task.rounds > MAX_ROUNDS and shard is None:
                self._fail(task, SampleError(f"no replacement was found for {len(task.avoid)} samples of batch {task.id}"))
                return
            if shard is None:
                self._avoid_known(task)
        load_ns = time.monotonic_ns() - begun
        if isinstance(outcome, Ended):
            self._ledger.withdraw(task)
            self._orphans.popleft()
            self._stand_in = None
            if shard is not None:
                shard.ended = True
        elif isinstance(outcome, Broken):
            index = outcome.report.faults[-1].index if outcome.report.faults else None
            raised = Raised.of(outcome.error, "in the training process")
            self._fail(task, rebuild(raised, index=index, worker_id=None, pid=None))
        elif isinstance(outcome, Loaded):
            if shard is not None:
                shard.batches += 1
            self._desk.budget.fetched(outcome.samples)
            self._recording.worker_task(None, outcome.samples, load_ns, 0)
            self._arrive(
                task, _Result(batch=outcome.batch, samples=outcome.samples, load_ns=load_ns, report=outcome.report)
            )

    # --- the end

    def _raise_error(self) -> None:
        if self._error is not None:
            self.close()
            raise self._error

    @property
    def active_workers(self) -> int:
        """Worker processes now alive."""
        return sum(not worker.dismissed for worker in self._pool.workers)

    def processes(self) -> list[Any]:
        """The worker processes, in the order of their ids."""
        workers = sorted(self._pool.workers, key=lambda worker: worker.worker_id)
        return [worker.process for worker in workers]

    def close(self) -> None:
        """Stop the workers (five seconds at most, then SIGKILL) and close the epoch's recording. Idempotent."""
        self._closed = True
        self._resources.size = self._crew.size
        self._finalizer()


def _index_at(task: Task, position: int | None) -> Any:
    if position is None:
        return None
    if position < 0:
        place = -1 - position
        return task.spares[place] if place < len(task.spares) else None
    return task.samples[position] if position < len(task.samples) else None
