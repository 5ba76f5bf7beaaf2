"""The multiprocess iterator: give out tasks, wait, settle what came back, deliver.

Everything runs in the thread that calls ``next()``; nothing is raised anywhere else. The books hold the tasks, the crew
the processes, recovery says what a death means; this module moves tasks between them.

*Source*: ``_MultiProcessingDataLoaderIter`` in ``torch/utils/data/dataloader.py``, torch 2.13, for the order in which
the sampler is read, tasks are assigned and batches are delivered.
"""

from __future__ import annotations

import functools
import os
import time
from collections import deque
from dataclasses import dataclass
from multiprocessing import util
from typing import Any

import torch
from torch.utils.data import DataLoader

from robustloader.decisions.adaptation import Step
from robustloader.decisions.blame import ShardBlame
from robustloader.decisions.keys import index_key, once_only
from robustloader.decisions.ledger import Task
from robustloader.decisions.limits import plan_recycle
from robustloader.engine.adapting import Adapter
from robustloader.engine.books import MAX_ROUNDS, Books, Result, loaded_indices
from robustloader.engine.crew import Crew, Slot
from robustloader.engine.faults import rebuild
from robustloader.engine.inprocess import LOOKED_AT, StandIn, batch_nbytes, calls_of
from robustloader.engine.memory import UNSIZED_PREFETCH, MemoryGuard, arena_limits
from robustloader.engine.options import EngineOptions
from robustloader.engine.pinning import Pinner
from robustloader.engine.pool import Died, Happening, Pool, Said, Started, Worker
from robustloader.engine.progress import Resumption
from robustloader.engine.recovery import Recovery
from robustloader.engine.resume import shard_progress
from robustloader.errors import FaultBudgetError, ResourceError, SampleError, WorkerStartError
from robustloader.events import BatchInfo, TaskReplayed, TransportDegraded
from robustloader.system import host, torch_private
from robustloader.telemetry import EpochRecording
from robustloader.transport.arena import unseen_memory
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
    Resumed,
    StartFailed,
    Trial,
    TrialPassed,
    Trimmed,
    Unfilled,
)
from robustloader.worker.fetch import Broken, Ended, Loaded, Short
from robustloader.worker.process import Cargo, Setup
from robustloader.worker.seeding import worker_seed

__all__ = ["MultiprocessIterator"]

_LOOK_EVERY_NS = 1_000_000
_LARGE_BYTES = 1_000_000
"""Batches from this size on: a message to say that one has been let go costs less than memory for another one."""


@dataclass(slots=True)
class _Resources:
    """What must be given back when the iterator goes; knows nothing of the iterator."""

    pool: Pool
    pinner: Pinner | None = None
    recording: EpochRecording | None = None
    all_delivered: bool = False

    def release(self) -> None:
        if not self.pool.owned:
            return
        self.close_recording()
        if self.pinner is not None:
            self.pinner.stop()
        self.pool.stop()

    def close_recording(self) -> None:
        """An epoch is complete when its last batch was delivered: Lightning takes ``len()`` batches and no more."""
        if self.recording is not None:
            size = self.recording.active_workers
            self.recording.close(complete=self.all_delivered, workers_at_end=size, now_ns=time.monotonic_ns())


class MultiprocessIterator(torch_private.LoaderIterator):
    """One epoch (with ``persistent_workers``, one after another) loaded by worker processes.

    ``iter(loader)`` makes it and starts the workers; they are given their first tasks at once.
    """

    def __init__(self, loader: DataLoader[Any], options: EngineOptions) -> None:
        resume, opened = options.resume, options.opened
        if resume is not None:
            state = resume.state
            super().__init__(loader, indices=resume.indices, base_seed=state.base_seed, yielded=state.delivered)
        elif opened is not None:
            super().__init__(loader, indices=opened.indices, base_seed=opened.base_seed)
        else:
            super().__init__(loader)
        self._resume_from = resume
        adaptation = options.adaptation
        if adaptation is not None:  # num_workers="auto": as many as the last epoch came to
            self.num_workers = adaptation.workers
        # An iterable epoch keeps its shards to its end; the loader's own number of workers comes with the next one.
        self._rest_only = resume is not None and options.iterable and resume.state.workers != self.num_workers
        if resume is not None and self._rest_only:
            self.num_workers = resume.state.workers
        prefetch_factor = 2 if loader.prefetch_factor is None else loader.prefetch_factor
        if prefetch_factor <= 0:
            raise AssertionError("prefetch_factor must be greater than 0 for MultiProcessingDataLoaderIter")
        self._options = options
        self._policy = options.recovery
        self._wanted_prefetch = self._prefetch = prefetch_factor
        self._in_order = bool(getattr(loader, "in_order", True))
        self._drop_last = loader.drop_last
        self._persistent = loader.persistent_workers and not self._rest_only
        self._worker_init_fn = loader.worker_init_fn
        self.closed = False
        self._arena, self._no_arena = arena_limits(
            options.transport, options.memory, self.num_workers, resizes=adaptation is not None
        )
        self._happenings: deque[Happening] = deque()
        self._size_awaited = False
        self._held: deque[Task] = deque()
        self._guard = MemoryGuard(
            options.memory,
            options.measured,
            min_workers=self._policy.min_workers if self._policy is not None else 1,
            can_shrink=not options.iterable,
        )
        startable, shortage = self._guard.before_start(self.num_workers, recovers=self._policy is not None)
        memory = options.memory
        self._max_worker_bytes = memory.max_worker_bytes if memory is not None and not options.iterable else None
        context = loader.multiprocessing_context
        make_setup = functools.partial(
            Setup,
            cargo=Cargo(options.dataset, self.collate_fn, loader.worker_init_fn, options.faults),
            num_workers=self.num_workers,
            seed_batches=options.seeding == "batch" and not options.iterable,
            iterable=options.iterable,
            batched=options.batched,
            drop_last=loader.drop_last,
            max_worker_bytes=self._max_worker_bytes,
        )
        try:
            self._pool = Pool(torch.multiprocessing if context is None else context, make_setup)
        except OSError as error:
            raise self._guard.explain(error) or error from error
        self._resources = _Resources(self._pool)
        self._finalizer = util.Finalize(self, self._resources.release, exitpriority=100)
        self._books = Books(
            options.desk,
            in_order=self._in_order,
            batched=options.batched,
            iterable=options.iterable,
        )
        self._crew = Crew(
            self._pool,
            num_workers=self.num_workers,
            policy=self._policy,
            timeout_s=float(self.timeout_s or 0),
            heals=not options.iterable,
        )
        keeps_opening = self._persistent and not options.iterable
        self._recovery = Recovery(
            self._books,
            self._crew,
            self._policy,
            on_fall_back=options.journal.keep_opening if keeps_opening else None,
        )
        # Only with num_workers="auto".
        self._adapter = Adapter(adaptation, self._crew, self._guard) if adaptation is not None else None
        try:
            self._open_books()
            if resume is not None and options.iterable:
                self._resume_shards(resume)
            elif (loaded := options.journal.loaded) is not None:
                self._begin_shards([shard_progress(shard).end for shard in loaded.shards])
            self._start_workers(startable, shortage)
            if self.pins:
                pin = functools.partial(torch_private.pin_memory, device=self.pin_device)
                self._books.pinner = Pinner(pin, torch.accelerator.current_device_index(), self._pool.wake)
                self._resources.pinner = self._books.pinner
            self.reset(loader, first=True)
            self._resume_from = None
            if self._worker_init_fn is not None:
                self._await_starts()
        except BaseException:
            self.close()
            raise

    @property
    def once(self) -> bool:
        """Whether the next epoch is for another iterator although workers persist: this one loads the rest of an epoch
        that began with another number of workers, or has none left."""
        return self._rest_only or self._recovery.local

    # --- the beginning

    def _open_books(self) -> None:
        recording = self._options.recorder.begin_epoch(
            epoch=self._options.epochs.next(),
            workers=self.num_workers,
            usable_cpus=host.usable_cpus(),
            now_ns=time.monotonic_ns(),
            persistent=self._persistent,
        )
        recording.active_workers = self._crew.size
        self._crew.recording = self._resources.recording = recording
        self._stream_seed = self._choose_stream_seed(recording.epoch)
        self._resources.all_delivered = self._drained = False
        self._degraded: set[int | None] = set()
        if self._no_arena:
            self._note_degraded(None, self._no_arena)
        resume = self._resume_from
        self._books.begin(
            recording,
            base_seed=self.base_seed,
            poison_after=self._policy.poison_after if self._policy else 1,
            first=resume.state.delivered if resume is not None else 0,
        )
        self._taken = frozenset(resume.state.ahead) if resume is not None else frozenset()
        if resume is not None:
            self._books.spares = resume.spares
        self._cycle = 0
        self._put_ahead = 0
        self._returned_ns = self._looked_ns = self._asked_ns = self._lay_ready = 0
        self._last: tuple[Task, Result] | None = None
        self._stand_in: StandIn | None = None
        self._stream_indices: Any = None

    def _choose_stream_seed(self, epoch: int) -> int:
        """What the workers' random streams are seeded from: torch's base seed. In a resumed epoch of a map-style
        dataset another one, or they would repeat what the epoch began with; the same where an epoch has the base seed
        of the one before it."""
        resume, opened, options = self._resume_from, self._options.opened, self._options
        if options.iterable or options.seeding == "batch":
            return self.base_seed
        if resume is not None and resume.state.delivered:
            return worker_seed(self.base_seed, resume.state.delivered, 1 << 21)
        if opened is not None and "s" not in opened.opening:
            return worker_seed(self.base_seed, epoch, 1 << 22)
        return self.base_seed

    def _resume_shards(self, resume: Resumption) -> None:
        """Put every shard where it stood."""
        self._stream_indices = self.next_indices()
        self._cycle = resume.state.next_shard
        for slot, shard in zip(self._crew.slots, resume.state.shards, strict=True):
            progress = shard_progress(shard)
            slot.calls, slot.batches, slot.rng, slot.snapshot = (
                progress.calls,
                progress.batches,
                progress.rng,
                progress.snapshot,
            )
            slot.ended = progress.final is not None

    def _begin_shards(self, ends: list[bytes | None]) -> None:
        """Let every shard begin with its dataset as it was when the epoch before had ended."""
        if len(ends) == len(self._crew.slots):
            for slot, end in zip(self._crew.slots, ends, strict=True):
                slot.snapshot = end

    def _begin_progress(self, opening: str) -> None:
        self._progress = self._options.journal.begin(
            self,
            epoch=self._books.epoch,
            opening=opening,
            iterable=self._options.iterable,
            sampler=self._options.stateful_sampler,
            batch_size=self._options.batch_size,
            resume=self._resume_from,
        )
        if self._resume_from is not None and self._options.iterable:
            self._progress.shards = [shard_progress(shard) for shard in self._resume_from.state.shards]
        if self._resume_from is None:
            self._progress.read(-1, self._books.spares)
            for slot, shard in zip(self._crew.slots, self._progress.shards, strict=False):
                shard.snapshot = slot.snapshot

    def _start_details(self, slot: Slot) -> dict[str, Any]:
        return {
            "epoch": self._books.epoch,
            "run": self._books.run,
            "base_seed": self._stream_seed,
            "skip": slot.calls - calls_of(slot.snapshot) if self._options.iterable else 0,
            "snapshot": slot.snapshot,
            "indices": self._stream_indices,
            "rng": slot.rng,
            "arena": self._arena,
            "num_workers": max(self.num_workers, slot.worker_id + 1),
            "unseen": self._unseen(),
        }

    def _unseen(self) -> set[int]:
        """Where batches lie that were not handed out yet. A worker forked now does not hold up their memory."""
        addresses: set[int] = set()
        if self._pool.start_method == "fork":
            for task in self._books.ledger:
                if task.result is not None:
                    addresses |= unseen_memory(task.result.batch)
        return addresses

    def _start_workers(self, startable: int, shortage: ResourceError | None) -> None:
        """Start ``startable`` processes; with a ``shortage`` these are not all."""
        error = self._crew.start_all(self._start_details, startable) or shortage
        if error is None:
            return
        if self._policy is None:
            raise self._guard.explain(error) or error from error
        # EAGAIN and ENOMEM, or the assertion that a daemonic process has no children: nothing a retry would mend.
        if not isinstance(error, (OSError, AssertionError, ResourceError)):
            raise WorkerStartError(f"a worker process could not be started: {error}") from error
        missing = [slot for slot in self._crew.slots if slot.worker is None and not slot.ended]
        self._recovery.without(missing, error)

    def _await_starts(self) -> None:
        """Wait until every worker has run ``worker_init_fn``, so that what it raised is raised by ``iter()``."""
        while not self._recovery.local and any(not worker.ready for worker in self._pool.workers):
            self._raise_error()
            self._turn()
        self._raise_error()

    def begin_epoch(self, loader: DataLoader[Any], *, first: bool) -> None:
        """Begin an epoch: fresh books, and tasks for every worker. ``iter(sampler)`` has just been called."""
        opening = "i"
        if first:
            opening = "isi" if self._options.opened is None else self._options.opened.opening
        else:
            self._raise_error()
            journal = self._options.journal
            if journal.openings is not None and not self._options.iterable:
                opening = journal.openings[0]
                self.open_as(loader, opening, journal.base_seed)
            self._resources.close_recording()
            self._open_books()
            self._recovery.orphans.clear()
            self._begin_shards([shard.end for shard in self._progress.shards])
            for slot in self._crew.slots:
                slot.ended, slot.batches, slot.calls, slot.blame, slot.rng = False, 0, 0, ShardBlame(), None
                slot.orders.clear()
                slot.trials.clear()
                slot.trial = None
                if slot.worker is not None and not slot.worker.dismissed:
                    self._resume(slot.worker)
                elif slot.worker is not None or slot.state in ("ended", "retired"):
                    self._crew.refill(slot, heals=self._options.iterable)
        self._crew.memory_low = False
        self._prefetch = self._guard.begin_epoch(self._wanted_prefetch, self.num_workers, self._books.recording)
        self._begin_progress(opening)
        self._held.clear()
        self._size_awaited = self._guard.awaits_size and self._prefetch > UNSIZED_PREFETCH and not self._recovery.local
        ahead = UNSIZED_PREFETCH if self._size_awaited and self._options.iterable else self._prefetch
        for _ in range(ahead * sum(slot.counts and not slot.ended for slot in self._crew.slots)):
            self._put()
        if self._adapter is not None:
            self._adapter.settle(len(self._books.ledger))

    def _resume(self, worker: Worker) -> None:
        worker.run = self._books.run
        self._pool.send(worker, Resume(self._books.run, self._books.epoch, self._stream_seed))

    # --- giving out

    def _put(self) -> None:
        """Read what the sampler yields next and give it to a worker, as torch would."""
        try:
            indices = once_only(self.next_indices())
            while self._books.ledger.next_id in self._taken:
                self._books.pass_over(indices)
                self._progress.read(self._books.ledger.next_id - 1, self._books.spares, indices)
                indices = once_only(self.next_indices())
        except StopIteration:
            self._drained = True
            self._progress.reads += 1
            return
        if self._options.iterable:
            self._stream_indices = indices
            slot = self._next_shard()
            if slot is not None:
                self._ask(slot)
            return
        task = self._books.open(indices)
        self._progress.read(task.id, self._books.spares, indices)
        if task.arrived:
            return
        if self._size_awaited and len(self._books.ledger) > UNSIZED_PREFETCH * len(self._crew.slots):
            self._held.append(task)
        else:
            self._hand_out(task)

    def _hand_out(self, task: Task) -> None:
        chosen = None if self._recovery.local or self._books.closing else self._choose()
        if chosen is None:
            self._books.requeue(task)
        else:
            self._give(task, chosen)

    def _end_holding(self, *, fits: bool = True) -> None:
        """Hand out what was read from the sampler and held until a batch would tell its size.

        Args:
            fits: whether all of it may be under way; else workers get it as they have room.
        """
        if not self._size_awaited:
            return
        self._size_awaited = False
        held = list(self._held)
        self._held.clear()
        for task in held:
            if task.arrived:  # it needs a sample that was convicted meanwhile
                continue
            if fits:
                self._hand_out(task)
            else:
                self._books.requeue(task)
        if not fits:
            self._feed_all()
        self._top_up()

    def _next_shard(self) -> Slot | None:
        slots = self._crew.slots
        for _ in slots:
            slot = slots[self._cycle % len(slots)]
            self._cycle += 1
            if not slot.ended and slot.state not in ("retired", "ended"):
                return slot
        return None

    def _top_up(self) -> None:
        """Ask the shards for as much as they should have under way: what a lost shard had been asked for is withdrawn,
        although it was asked in return for batches of others."""
        books, before = self._books, -1
        if not self._options.iterable or self._recovery.local:
            return
        active = sum(not slot.ended and slot.state not in ("retired", "ended") for slot in self._crew.slots)
        while len(books.ledger) < self._prefetch * active and before < books.ledger.next_id:
            before = books.ledger.next_id
            self._put()

    def _ask(self, slot: Slot) -> None:
        """Ask a shard for its next batch, now or once it has a process (again)."""
        task = self._books.open(self._stream_indices)
        task.worker_id = slot.worker_id
        if slot.worker is not None and not slot.orders:
            self._give(task, slot)
        else:
            slot.orders.append(task)

    def _choose(self) -> Slot | None:
        """Who gets the next task: torch's rule over the live workers, or the least loaded one."""
        slots, ledger = self._crew.slots, self._books.ledger
        if self._options.seeding == "batch":
            return min(self._crew.live, key=lambda slot: ledger.waiting_for(slot.worker_id), default=None)
        if not self._in_order:
            capacity = self._prefetch * len(slots) // max(1, len(self._crew.live))
        for _ in slots:
            slot = slots[self._cycle % len(slots)]
            self._cycle += 1
            if slot.takes_tasks and (self._in_order or ledger.held_by(slot.worker_id) < capacity):
                return slot
        return None

    def _give(self, task: Task, slot: Slot) -> None:
        worker = slot.worker
        assert worker is not None
        books = self._books
        books.ledger.assign(task, slot.worker_id, worker.incarnation)
        if task.attempt > 1:
            self._crew.emit(
                TaskReplayed(epoch=books.epoch, task=task.id, worker_id=slot.worker_id, attempt=task.attempt)
            )
        order = Fetch(books.run, task.id, task.indices, task.spares, task.avoid, task.careful, task.verify)
        try:
            self._pool.send(worker, order)
        except Exception as error:  # the sampler's indices do not pickle
            books.fail(task, error)

    def _feed(self, slot: Slot) -> None:
        """A slot's process may have room: a trial comes first, then what waits to be replayed."""
        worker = slot.worker
        if worker is None or not worker.ready or slot.trial is not None:
            return
        books = self._books
        if slot.trials:
            if not books.ledger.waiting_for(slot.worker_id):
                case = slot.trial = slot.trials.popleft()
                self._pool.send(worker, Trial(books.run, case.task.id, case.position, case.index))
            return
        if slot.leaving and not books.closing:
            if not books.ledger.waiting_for(slot.worker_id):
                self._crew.let_go(slot, self._max_worker_bytes)
            return
        while slot.orders:
            self._give(slot.orders.popleft(), slot)
        while books.queue and books.ledger.waiting_for(slot.worker_id) < self._prefetch:
            self._give(books.queue.pop(0), slot)

    def _feed_all(self) -> None:
        for slot in self._crew.slots:
            if slot.state == "live":
                self._feed(slot)

    # --- delivering

    def next_batch(self) -> Any:
        """The next batch, waiting for it as long as it takes."""
        begun = time.monotonic_ns()
        books, strict_s = self._books, 0.0 if self._policy is not None else float(self.timeout_s)
        if self._returned_ns:
            books.recording.stepped(begun - self._returned_ns)
        self._crew.begin_wait()
        if self._pool.busy:
            books.raise_once(
                RuntimeError("an exception interrupted this iterator in the middle of its work; make a new one")
            )
        elif not self._pool.owned:
            raise RuntimeError("this iterator belongs to another process; make one of its own in a forked child")
        elif not self.closed and begun - self._looked_ns > _LOOK_EVERY_NS and self._has_ready():
            self._looked_ns = begun
            self._turn(0.0)
        if self._last is not None and self._last[1].nbytes >= _LARGE_BYTES:
            self._pool.tell_released()
        self._asked_ns, self._lay_ready = begun, books.ledger.ready
        heard_ns = begun
        while True:
            if books.error is not None:
                self._raise_error()
            task = books.ledger.deliverable()
            if task is not None and task.result.pinned:
                return self._deliver(task, begun)
            if not len(books.ledger) and not self._wake_orphan():
                self._finish()
                raise StopIteration
            if self.closed:
                raise RuntimeError("this iterator was closed; make a new one")
            if self._turn():
                heard_ns = time.monotonic_ns()
            elif strict_s and time.monotonic_ns() - heard_ns > strict_s * 1e9:
                raise RuntimeError(f"DataLoader timed out after {self.timeout_s} seconds")

    def _has_ready(self) -> bool:
        """Whether a batch can be handed out without waiting. Then the workers are listened to now and then only: a loop
        that takes less than a millisecond would spend a good part of it on that."""
        task = self._books.ledger.deliverable()
        return task is not None and bool(task.result.pinned)

    def _deliver(self, task: Task, begun: int) -> Any:
        books, result = self._books, task.result
        books.ledger.deliver(task)
        books.spares.close(task.id)
        if self._put_ahead and len(books.ledger):
            self._put_ahead -= 1
        else:
            self._put()
        if books.queue and not self._recovery.local:  # it may be that no message of a worker's comes any more
            self._feed_all()
        self._crew.delivered()
        self._progress.deliver(
            task.id,
            shard=result.shard,
            calls=result.calls,
            loaded=result.error is None,
            snapshot=result.snapshot,
        )
        self._resources.all_delivered = self._drained and not len(books.ledger)
        batch, error = result.batch, result.error
        task.result = result.batch = result.error = None  # batch_info needs the rest, and must not keep these alive
        self._last = (task, result)
        now = self._returned_ns = time.monotonic_ns()
        if error is not None:
            raise error
        books.recording.delivered(result.samples, result.nbytes)
        books.recording.waited(now - begun, self._lay_ready, now)
        if self._adapter is not None and not self._drained and not books.closing:
            step = self._adapter.delivered(now - begun, result.load_ns, now, self._prefetch)
            if step is not None:
                self._resize(step)
        return batch

    def _finish(self) -> None:
        self._progress.finish()
        self._resources.all_delivered = True
        self._resources.close_recording()
        if not self._persistent or self.once:
            self.close()

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

    # --- waiting

    def _turn(self, wait_s: float | None = None) -> bool:
        """One round of waiting and settling; whether anything was heard."""
        if self._recovery.local:
            return self._load_here() if wait_s is None else False
        crew = self._crew
        crew.start_due(self._start_details)
        if wait_s is None:
            wait_s = crew.next_due_s()
            if self._policy is None and self.timeout_s:
                wait_s = min(wait_s, self.timeout_s / 8)
        heard = False
        # Kept in a queue: where a signal handler of the user's raises in here, what was not seen to yet stays.
        self._happenings.extend(self._pool.wait(0.0 if self._happenings else wait_s))
        while self._happenings:
            happening = self._happenings.popleft()
            try:
                if isinstance(happening, Said):
                    heard = True
                    self._on_said(happening.worker, happening.frame)
                elif isinstance(happening, Died):
                    self._on_died(happening)
                elif isinstance(happening, Started):
                    self._on_started(happening.worker)
                elif self._crew.can_do_without(slot := self._crew.slots[happening.worker_id]):
                    self._do_without(slot, str(happening.error))
                else:
                    self._recovery.on_not_started(happening)
                    self._end_holding()
                    self._feed_all()
                    self._wake_orphan()
            except SampleError as error:  # the fault budget
                self._books.raise_once(error)
        self._pool.busy = False
        heard = self._take_pinned() or heard
        crew.watch(self._books.sample_in_hand, self._books.has_work)
        self._watch_memory()
        return heard

    def _on_died(self, died: Died) -> None:
        if died.worker.arena_lost:
            self._arena, self._no_arena = None, died.worker.arena_lost
            self._note_degraded(None, self._no_arena)
        if died.worker.dismissed:
            self._recovery.on_left(died.worker)
        else:
            self._recovery.on_died(died)
            self._note_ends()
            self._feed_all()
        self._end_holding()
        self._wake_orphan()
        self._top_up()

    def _note_ends(self) -> None:
        """A shard that ended because its processes died has ended for whoever resumes, too."""
        for slot, shard in zip(self._crew.slots, self._progress.shards, strict=False):
            if slot.ended and shard.final is None:
                shard.final = slot.batches

    def _on_started(self, worker: Worker) -> None:
        slot = self._crew.slot_of(worker)
        if slot.state != "starting":  # retired meanwhile
            self._pool.dismiss(worker)
            return
        self._crew.arrived(worker)
        if worker.run != self._books.run:
            self._resume(worker)

    def _take_pinned(self) -> bool:
        pinner = self._books.pinner
        if pinner is None:
            return False
        taken = pinner.take()
        for result, batch, error in taken:
            result.batch, result.pinned = batch, True
            if error is not None:
                where = f"in pin memory thread for device {torch.accelerator.current_device_index()}"
                result.batch = None
                result.error = rebuild(Raised.of(error, where), index=None, worker_id=None, pid=None)
        if not pinner.alive and not self.closed:
            self._books.raise_once(RuntimeError("Pin memory thread exited unexpectedly"))
        return bool(taken)

    def _note_degraded(self, worker_id: int | None, reason: str) -> None:
        """Tell, once per worker and epoch, that its batches take the slower way."""
        if worker_id not in self._degraded:
            self._degraded.add(worker_id)
            self._crew.emit(TransportDegraded(epoch=self._crew.recording.epoch, worker_id=worker_id, reason=reason))

    # --- settling what a worker said

    def _on_said(self, worker: Worker, frame: Frame) -> None:
        message = frame.message
        slot = self._crew.slot_of(worker)
        if isinstance(message, Fetched) and message.run == self._books.run:  # as a rule
            self._on_task_message(message, slot, worker, frame)
        elif isinstance(message, Ready):
            worker.ready = self._crew.anyone_ready = True
            slot.new = False
            if self._adapter is not None:
                self._widen()
        elif isinstance(message, StartFailed):
            self._on_start_failed(worker, message.raised)
            return
        elif isinstance(message, Resumed):
            if message.run == self._books.run:
                slot.rng = self._progress.shards[slot.worker_id].rng = message.rng
        elif isinstance(message, TrialPassed):
            worker.finished += 1
            self._recovery.on_trial_passed(slot)
            self._feed_all()
        elif isinstance(message, Trimmed):
            worker.trimming_until_ns = 0
        elif message.run == self._books.run:
            self._on_task_message(message, slot, worker, frame)
            self._end_holding()
        self._feed(slot)

    def _on_task_message(self, message: Any, slot: Slot, worker: Worker, frame: Frame) -> None:
        worker.finished += 1
        task = self._books.ledger.accept(message.task, worker.worker_id, worker.incarnation)
        if task is not None:
            if message.calls > slot.calls:
                slot.calls, slot.blame = message.calls, ShardBlame()
            self._settle(task, slot, worker, frame)

    def _settle(self, task: Task, slot: Slot, worker: Worker, frame: Frame) -> None:
        """Act on what became of a task; raises :class:`FaultBudgetError` after that."""
        books, message = self._books, frame.message
        if books.blame.open:
            books.blame.arrived(task.id, map(index_key, task.samples))
        report: Report | None = message.report
        if task.rounds == 1:  # a later round asks for the same samples again
            wanted = message.samples if isinstance(message, Fetched) else 0
            books.desk.budget.fetched(max(wanted, len(task.samples)))
        if isinstance(message, Fetched):
            self._on_fetched(task, slot, worker, message, frame)
        elif isinstance(message, Failed):
            index = report.faults[-1].index if report is not None and report.faults else None
            error = rebuild(message.raised, index=index, worker_id=worker.worker_id, pid=worker.pid)
            failed = Result(error=error, worker_id=worker.worker_id, report=report)
            failed.shard, failed.calls = slot.worker_id, message.calls
            books.arrive(task, failed)
        elif isinstance(message, Unfilled):
            self._on_unfilled(task, slot, message)
        elif isinstance(message, Exhausted):
            self._on_exhausted(slot, message.end)
        self._recovery.check_suspects()
        if report is not None:
            self._options.desk.take(
                report,
                books.recording,
                task=task.id,
                worker_id=worker.worker_id,
                pid=worker.pid,
                shard=slot.worker_id,
                batches=slot.batches,
            )

    def _on_fetched(self, task: Task, slot: Slot, worker: Worker, message: Fetched, frame: Frame) -> None:
        try:
            batch, nbytes = frame.batch(), frame.nbytes
        except Exception as error:  # a user's __setstate__
            self._on_undecodable(task, slot, worker, error)
            return
        slot.batches += 1
        if message.sent_ns <= self._asked_ns:  # it lay in the socket
            self._lay_ready += 1
        if message.trouble:
            self._note_degraded(worker.worker_id, message.trouble)
        self._books.recording.worker_task(
            worker.worker_id, message.samples, message.load_ns, message.rss_bytes, task.id, worker.pid, message.begun_ns
        )
        result = Result(
            batch=batch,
            samples=message.samples,
            nbytes=nbytes,
            load_ns=message.load_ns,
            worker_id=worker.worker_id,
            report=message.report,
            shard=slot.worker_id,
            calls=message.calls,
            snapshot=message.snapshot,
        )
        if isinstance(message.snapshot, bytes):
            slot.snapshot = message.snapshot
        self._books.arrive(task, result)
        if message.held_bytes:
            self._on_heavy(slot, worker, message.held_bytes)
        self._on_size_known(nbytes)

    def _on_undecodable(self, task: Task, slot: Slot, worker: Worker, error: Exception) -> None:
        """A batch arrived that cannot be unpickled here: find the sample, or do without the whole batch."""
        books, desk = self._books, self._options.desk
        raised = Raised.of(error, f"while decoding a batch of DataLoader worker process {worker.worker_id}")
        final = desk.policy.action == "raise" or self._options.iterable or len(task.avoid) == len(task.samples)
        if final or task.verify:
            action = "raised" if final else "replaced"
            fault = Fault("undecodable", None, -1, raised.error_type, raised.message, raised.traceback, 1, action)  # type: ignore[arg-type]
            desk.enter(fault, books.recording, task=task.id, worker_id=worker.worker_id, pid=worker.pid)
        if final:
            slot.batches += 1
            failed = Result(error=rebuild(raised, index=None, worker_id=worker.worker_id, pid=worker.pid))
            failed.shard, failed.calls = slot.worker_id, slot.calls
            books.arrive(task, failed)
            return
        if task.verify:  # each sample survives the crossing alone, the batch does not
            task.avoid = tuple(range(len(task.samples)))
        task.verify = True
        self._send_again(task, slot)

    def _on_unfilled(self, task: Task, slot: Slot, message: Unfilled) -> None:
        """The worker could not fill the batch with the spares it had: send it again with others."""
        if self._options.iterable:  # it only says how many faults there were, and reads on
            return
        task.avoid = tuple(sorted({*task.avoid, *message.avoid}))
        task.rounds += 1
        if task.rounds > MAX_ROUNDS:
            self._books.fail(task, _no_replacement(task))
            return
        self._look_ahead(task)
        self._send_again(task, slot)

    def _look_ahead(self, task: Task) -> None:
        """A task's later rounds draw from the tasks after it: read these from the sampler, earlier than torch would."""
        before = -1
        while before < self._books.ledger.next_id < task.id + task.rounds:
            before = self._books.ledger.next_id
            self._put()
            self._put_ahead += self._books.ledger.next_id - before

    def _send_again(self, task: Task, slot: Slot) -> None:
        """The same worker goes on with a task: no replay."""
        self._books.avoid_known(task)
        task.attempt -= 1
        self._give(task, slot)

    def _on_exhausted(self, slot: Slot, end: bytes | None) -> None:
        """This worker's share of an iterable dataset has ended."""
        slot.ended = True
        shard = self._progress.shards[slot.worker_id]
        shard.final, shard.end = slot.batches, end
        self._books.withdraw_stream(slot.worker_id)
        slot.orders.clear()
        if slot.worker is not None and (not self._persistent or self._recovery.orphans):
            self._pool.dismiss(slot.worker)
        self._put()

    def _on_start_failed(self, worker: Worker, raised: Raised) -> None:
        """A worker said why it cannot work. Of a first incarnation that is an error; a later one just died."""
        slot = self._crew.slot_of(worker)
        if slot.worker is worker and self._crew.can_do_without(slot):
            worker.dismissed = True
            self._do_without(slot, f"{raised.error_type}: {raised.message}")
            return
        worker.killed_for = "start"
        if (worker.incarnation > 0 or slot.new) and self._policy is not None:
            return
        worker.dismissed = True  # its end is no crash
        cause = rebuild(raised, index=None, worker_id=worker.worker_id, pid=worker.pid)
        if self._policy is None:
            self._books.raise_once(cause)
            return
        error = WorkerStartError(
            f"worker {worker.worker_id} (pid {worker.pid}) cannot start: {raised.error_type}: {raised.message}\n"
            f"Original {raised.traceback}",
            worker_id=worker.worker_id,
            pid=worker.pid,
        )
        error.__cause__ = cause
        self._books.raise_once(error)

    # --- memory

    def _on_heavy(self, slot: Slot, worker: Worker, held_bytes: int) -> None:
        """A worker holds more than it may: another takes its place once it has nothing to do."""
        verdict = plan_recycle(held_bytes=held_bytes, limit_bytes=self._max_worker_bytes, finished=worker.finished)
        if verdict == "too low":
            self._guard.recycling_is_vain(held_bytes)
        elif verdict == "recycle" and slot.worker is worker and not slot.leaving:
            slot.leaving, slot.held_bytes = "recycle", held_bytes

    def _on_size_known(self, nbytes: int) -> None:
        """A batch's size tells what the rest of the lookahead will take."""
        books = self._books
        try:
            plan = self._guard.batch_arrived(
                nbytes,
                prefetch_factor=self._prefetch,
                workers=self._crew.size,
                batches_here=books.ledger.ready,
                recording=books.recording,
            )
            if plan is not None:
                pids = [worker.pid for worker in self._pool.workers if worker.pid is not None]
                self._guard.check_shared_memory(pids, books.recording)
        except ResourceError as error:
            books.raise_once(error)
            return
        fits = plan is None or (plan.prefetch_factor, plan.workers) == (self._prefetch, self._crew.size)
        if plan is not None and plan.prefetch_factor < self._prefetch:
            self._lower_prefetch(plan.prefetch_factor)
        if plan is not None and plan.workers < self._crew.size:
            self._take_away(self._crew.size - plan.workers, "the batches of more workers do not fit into memory")
        self._end_holding(fits=fits)

    def _watch_memory(self) -> None:
        """Memory that becomes low in the middle of an epoch: give up lookahead and what it took, then workers."""
        now, guard, crew = time.monotonic_ns(), self._guard, self._crew
        if not guard.due(now) or self._recovery.local or self.closed:
            return
        under_way = self._put_ahead or any(slot.leaving for slot in crew.slots)
        under_way = under_way or any(now < worker.trimming_until_ns for worker in self._pool.workers)
        try:
            relief, reason = guard.look(
                now,
                prefetch_factor=self._prefetch,
                workers=crew.size,
                settled=not under_way,
                recording=self._books.recording,
            )
        except ResourceError as error:
            self._books.raise_once(error)
            return
        if relief == "prefetch":
            self._lower_prefetch(1)
        elif relief == "idle":
            self._pool.ask_to_trim()
        elif relief == "workers":
            self._take_away(1, reason)

    def _lower_prefetch(self, prefetch_factor: int) -> None:
        """Load fewer batches ahead: as many as there are too many under way are not asked for."""
        slots = [slot for slot in self._crew.slots if slot.counts]
        shards = sum(not slot.ended and slot.state not in ("retired", "ended") for slot in slots)
        self._put_ahead += (self._prefetch - prefetch_factor) * (shards if self._options.iterable else len(slots))
        self._prefetch = prefetch_factor

    def _take_away(self, workers: int, reason: str) -> None:
        """Let workers go once they have nothing to do, the last ones first, and their lookahead with them."""
        self._crew.memory_low = True
        if self._adapter is not None:
            self._adapter.cannot_exceed(max(1, self._crew.size - workers))
        for slot in [slot for slot in self._crew.slots if slot.takes_tasks][-workers:]:
            slot.leaving, slot.leaving_reason = "retire", reason
            self._put_ahead += self._prefetch
            self._feed(slot)

    # --- num_workers="auto"

    def _resize(self, step: Step) -> None:
        """Go on with more workers, or with fewer."""
        crew, adapter = self._crew, self._adapter
        assert adapter is not None
        if step.workers > crew.size:
            crew.grow(step.workers, step.reason)
        elif step.workers < crew.size:
            for slot in crew.lay_off(step.workers, step.reason):
                self._put_ahead += self._prefetch
                self._feed(slot)
        adapter.settle(len(self._books.ledger))

    def _widen(self) -> None:
        """Load as far ahead as is due to the workers there are now, no more and no less."""
        books, before = self._books, -1
        if books.error is not None:  # this is the end: there may be nobody to give anything to
            return
        wanted = self._prefetch * sum(slot.counts for slot in self._crew.slots)
        while len(books.ledger) < wanted and before < books.ledger.next_id:
            before = books.ledger.next_id
            self._put()
        self._put_ahead = max(0, len(books.ledger) - wanted)

    def _do_without(self, slot: Slot, error: str) -> None:
        """A process that the pool was to grow by cannot be had: that is no reason to stop, nor to try again."""
        self._crew.withdraw(slot, f"a further worker could not be started: {error}")
        self._recovery.hand_on_trials(slot)
        self._widen()
        if self._adapter is not None:
            self._adapter.cannot_exceed(self._crew.size)
        self._feed_all()  # who has inherited a suspect may be idle

    # --- shards without a process, and the training process as a worker

    def _wake_orphan(self) -> bool:
        """See to shards that lost their process; whether there are any."""
        if self._recovery.local:
            return bool(self._options.iterable and self._recovery.orphans)
        slot = self._recovery.next_orphan()
        if slot is not None:
            if self._stream_indices is None:
                self._stream_indices = self.next_indices()
            for _ in range(self._prefetch):
                self._ask(slot)
        return slot is not None or bool(self._recovery.orphans)

    def _load_here(self) -> bool:
        """Load one batch in this process: the oldest task, or the next of the first shard that waits.

        What user code or a signal handler raises in here passes through, and costs nothing: the next call begins the
        batch again, of a shard with a stream that is put where its last batch ended.
        """
        self._end_holding()
        if self._take_pinned():
            return True
        if not self._options.iterable:
            if not self._books.queue:
                return self._await_pinner()
            task, slot = self._books.queue.pop(0), None
        elif not self._recovery.orphans:
            return self._await_pinner()
        else:
            slot = self._recovery.orphans[0]
            if self._stream_indices is None:
                self._stream_indices = self.next_indices()
            task = self._books.open(self._stream_indices)
        stood = (slot.batches, slot.calls, slot.snapshot) if slot is not None else None
        task.attempt += 1
        try:
            if self._stand_in is None:
                self._stand_in = self._make_stand_in(slot)
            self._load_task(task, slot, self._stand_in)
        except FaultBudgetError as error:
            self._books.raise_once(error)
        except BaseException:
            if self._books.ledger.get(task.id) is task and not task.arrived:
                task.attempt -= 1
                if slot is None or stood is None:
                    self._books.requeue(task)
                else:
                    self._books.ledger.withdraw(task)
                    self._stand_in = None  # nobody knows how far it has read
                    slot.batches, slot.calls, slot.snapshot = stood
            raise
        return True

    def _make_stand_in(self, slot: Slot | None) -> StandIn:
        return StandIn(
            self._options,
            collate_fn=self.collate_fn,
            drop_last=self._drop_last,
            worker_init_fn=self._worker_init_fn,
            worker_id=slot.worker_id if slot is not None else 0,
            num_workers=self.num_workers,
            base_seed=self._stream_seed,
            skip=slot.calls - calls_of(slot.snapshot) if slot is not None else 0,
            rng=slot.rng if slot is not None else None,
            snapshot=slot.snapshot if slot is not None else None,
            indices=self._stream_indices,
        )

    def _await_pinner(self) -> bool:
        """Nothing is left to load: the pin thread has the rest, and wakes the pool when it has pinned a batch."""
        self._pool.wait(0.01)
        self._pool.busy = False
        return False

    def _load_task(self, task: Task, slot: Slot | None, stand_in: StandIn) -> None:
        books, desk = self._books, self._options.desk
        begun = time.monotonic_ns()
        desk.budget.fetched(len(task.samples))
        while True:
            outcome = stand_in.fetch(Fetch(books.run, task.id, task.indices, task.spares, task.avoid), books.epoch)
            desk.take(
                outcome.report,
                books.recording,
                task=task.id,
                worker_id=None,
                pid=os.getpid(),
                shard=slot.worker_id if slot is not None else 0,
                batches=slot.batches if slot is not None else 0,
            )
            if not isinstance(outcome, Short):
                break
            if slot is None:
                task.avoid = tuple(sorted({*task.avoid, *outcome.avoid}))
                task.rounds += 1
                if task.rounds > MAX_ROUNDS:
                    books.fail(task, _no_replacement(task))
                    return
                self._look_ahead(task)
                books.avoid_known(task)
        load_ns = time.monotonic_ns() - begun
        if slot is not None:
            slot.calls = stand_in.calls
        if isinstance(outcome, Ended):
            books.ledger.withdraw(task)
            ended = self._recovery.orphans.popleft()
            self._progress.shards[ended.worker_id].final = ended.batches
            self._stand_in = None
        elif isinstance(outcome, Broken):
            index = outcome.report.faults[-1].index if outcome.report.faults else None
            raised = Raised.of(outcome.error, "in the training process")
            books.fail(task, rebuild(raised, index=index, worker_id=None, pid=None))
            if slot is not None:
                task.result.shard, task.result.calls = slot.worker_id, stand_in.calls
        elif isinstance(outcome, Loaded):
            if slot is not None:
                slot.batches += 1
                desk.budget.fetched(outcome.samples)
            books.recording.worker_task(None, outcome.samples, load_ns, 0, task.id, None, begun)
            nbytes = batch_nbytes(outcome.batch, most=LOOKED_AT)
            result = Result(outcome.batch, None, outcome.samples, nbytes, load_ns, None, outcome.report)
            if slot is not None:
                result.shard, result.calls = slot.worker_id, stand_in.calls
                result.snapshot = stand_in.snapshot()
                if isinstance(result.snapshot, bytes):
                    slot.snapshot = result.snapshot
            books.arrive(task, result)

    # --- the end

    def _raise_error(self) -> None:
        if self._books.error is not None:
            self.close()
            raise self._books.error

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
        self.closed = True
        self._finalizer()


def _no_replacement(task: Task) -> SampleError:
    return SampleError(f"no replacement was found for {len(task.avoid)} samples of batch {task.id}")
