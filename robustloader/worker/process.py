"""The worker process: start, loop, leave.

One thread does everything, pickling included, so that whatever goes wrong with a sample happens inside ``try`` and
under the beacon.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import pickle
import resource
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from robustloader.policies import FaultPolicy
from robustloader.system import host, torch_private
from robustloader.transport import codec
from robustloader.transport.arena import Arena, ArenaLimits
from robustloader.transport.channel import Channel, Frame
from robustloader.transport.messages import (
    Exhausted,
    Failed,
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
    Trim,
    Trimmed,
    Unfilled,
)
from robustloader.worker.beacon import ENCODE, INIT, Beacon
from robustloader.worker.collate import Stacker
from robustloader.worker.fetch import Broken, IterableFetcher, Loaded, MapFetcher, Outcome, Plan, Short, make_fetcher
from robustloader.worker.meter import MemoryMeter
from robustloader.worker.seeding import restore_rng, rng_states, seed_batch, seed_worker
from robustloader.worker.stateful import pickled_end, pickled_snapshot, restored_fetcher

__all__ = ["STACK_SIGNAL", "Cargo", "Setup", "run_worker"]

STACK_SIGNAL = signal.SIGRTMIN + 7
"""Asks a worker for its Python stacks. A real-time signal, so that it meets nobody's own use of SIGUSR1."""

_RSS_EVERY_NS = 20_000_000


class Cargo:
    """The user's objects on their way to a worker.

    Under fork they are simply there. Otherwise they are pickled inside the pickle that starts the process, so that
    what fails to *un*pickle fails in :func:`run_worker`, which reports it, and not in multiprocessing's start-up code,
    which can only die.
    """

    def __init__(
        self,
        dataset: Any,
        collate_fn: Callable[[Any], Any],
        worker_init_fn: Callable[[int], None] | None,
        faults: FaultPolicy,
    ) -> None:
        self._content: Any = (dataset, collate_fn, worker_init_fn, faults)
        self._sealed: bytes | None = None

    def open(self) -> tuple[Any, Callable[[Any], Any], Callable[[int], None] | None, FaultPolicy]:
        """The objects, in the order of the constructor. Raises what unpickling them raises."""
        if self._sealed is not None:
            self._content, self._sealed = ForkingPickler.loads(self._sealed), None
        content: tuple[Any, Callable[[Any], Any], Callable[[int], None] | None, FaultPolicy] = self._content
        return content

    def __reduce__(self) -> tuple[Any, ...]:
        return _sealed_cargo, (bytes(ForkingPickler.dumps(self._content)),)


def _sealed_cargo(sealed: bytes) -> Cargo:
    cargo = Cargo.__new__(Cargo)
    cargo._content, cargo._sealed = None, sealed
    return cargo


@dataclass(frozen=True, kw_only=True)
class Setup:
    """All a worker is told at its start.

    Attributes:
        end: the worker's end of the socket pair, not yet wrapped.
        skip: how often to read from an iterable dataset and throw the batch away, because a predecessor sent it.
        indices: one task's indices, for those.
        rng: random states to begin the stream with; None keeps those of the seed.
        arena: how large this worker's arena may get; None sends everything through the socket.
        max_worker_bytes: how much memory of its own the worker may hold before it says so; None does not look.
        snapshot: a pickled :class:`StreamSnapshot` to begin with; ``skip`` counts from there.
    """

    cargo: Cargo
    end: socket.socket
    page: host.SharedPage
    lifeline: host.InheritedFd
    stacks: host.InheritedFd
    worker_id: int
    incarnation: int
    num_workers: int
    base_seed: int
    epoch: int
    run: int
    seed_batches: bool
    iterable: bool
    batched: bool
    drop_last: bool
    skip: int = 0
    indices: Any = None
    rng: Any = None
    arena: ArenaLimits | None = None
    max_worker_bytes: int | None = None
    snapshot: bytes | None = None


def run_worker(setup: Setup) -> None:
    """Entry point of a worker process. Returns when told to stop or when the trainer is gone.

    What there is at the start stays. The garbage collector does not look at it: under fork that would copy the training
    process's pages and finalise its garbage here, and the end of a spawned process would take longer.
    """
    gc.freeze()
    host.hold_lifeline(setup.lifeline.take())
    host.prefer_to_be_killed()
    host.yield_to_others()
    beacon = Beacon(setup.page)
    beacon.enter(INIT)
    setup.end.setblocking(True)
    channel = Channel(setup.end)
    where = f"in DataLoader worker process {setup.worker_id}"
    try:
        worker = _Worker(setup, channel, beacon, where)
    except BaseException as error:  # user code: the dataset's unpickling, worker_init_fn, iter(dataset)
        channel.send(StartFailed(Raised.of(error, where)))
        return
    with worker.stacker.installed():
        worker.serve()


class _Inbox:
    """What the training process has sent. Read when the worker waits for work, and before its arena takes more memory:
    extents are taken back as soon as they are seen, messages are served in their order."""

    def __init__(self, channel: Channel) -> None:
        self.arena: Arena | None = None
        self._channel = channel
        self._frames: deque[Frame] = deque()
        self._gone = False
        self._error: Exception | None = None

    def next(self) -> Frame | None:
        """The next frame, waiting for it; None once the training process has closed its end."""
        while not self._frames:
            if self._error is not None:
                raise self._error
            if self._gone:
                return None
            self._take(wait=True)
        return self._frames.popleft()

    def look(self) -> None:
        """Take in what is there by now. This is in the middle of a task: what goes wrong waits for :meth:`next`."""
        if self._gone or self._error is not None:
            return
        try:
            self._take(wait=False)
        except Exception as error:  # the unpickling of a user's indices
            self._error = error

    def calls_away(self) -> bool:
        """Whether the task in hand is nobody's concern any more: a new epoch has begun, or the channel is closed."""
        self.look()
        return self._gone or self._error is not None or any(isinstance(frame.message, Resume) for frame in self._frames)

    def _take(self, *, wait: bool) -> None:
        frames, self._gone = self._channel.receive(wait=wait)
        self._frames.extend(frames)
        if self.arena is not None:
            for frame in frames:
                self.arena.release(frame.released)


class _Worker:
    def __init__(self, setup: Setup, channel: Channel, beacon: Beacon, where: str) -> None:
        self.setup = setup
        self.channel = channel
        self.beacon = beacon
        self.where = where
        self.run = setup.run
        self.epoch = setup.epoch
        self.base_seed = setup.base_seed
        self._rss = self._rss_due_ns = 0
        self.inbox = _Inbox(channel)
        self.arena = Arena(setup.arena, self.inbox.look) if setup.arena is not None else None
        self.inbox.arena = self.arena
        self.stacker = Stacker(self.arena)
        self.meter = MemoryMeter(setup.max_worker_bytes)
        self._quiet_signals()
        torch.set_num_threads(1)
        # Unpickling may draw random numbers; under torch it happens before the seeds are set, so it does here.
        dataset, collate_fn, worker_init_fn, faults = setup.cargo.open()
        stream = 0 if setup.iterable else setup.incarnation
        seed = seed_worker(setup.base_seed, setup.worker_id, stream)
        info = torch_private.enter_worker(
            worker_id=setup.worker_id, num_workers=setup.num_workers, seed=seed, dataset=dataset
        )
        if worker_init_fn is not None:
            worker_init_fn(setup.worker_id)
        if setup.rng is not None:
            restore_rng(setup.rng)
        self.plan = Plan(
            dataset=info.dataset,
            iterable=setup.iterable,
            batched=setup.batched,
            collate_fn=self.stacker.around(collate_fn),
            drop_last=setup.drop_last,
            faults=faults,
            catches=BaseException,
            where=where,
            beacon=beacon,
            encode=codec.dumps,
            decode=_decode,
        )
        self.fetcher: MapFetcher | IterableFetcher
        if setup.snapshot is None:
            self.fetcher = make_fetcher(self.plan)
        else:
            self.fetcher = restored_fetcher(self.plan, pickle.loads(setup.snapshot))

    def _quiet_signals(self) -> None:
        """A preempted job still takes its last batches: SIGTERM and Ctrl-C sent to everyone are the trainer's business.

        Handlers that do nothing, not SIG_IGN, which the worker's own subprocesses would inherit.
        """
        torch_private.prepare_worker_process()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _do_nothing)
        host.release_signals()
        with contextlib.suppress(ValueError, OSError, RuntimeError):
            faulthandler.register(STACK_SIGNAL, file=self.setup.stacks.take(), all_threads=True, chain=False)

    def serve(self) -> None:
        """Take messages until told to stop."""
        self.channel.send(Ready(os.getpid()))
        for _ in range(self.setup.skip):
            self.fetcher.fetch(Fetch(self.run, -1, self.setup.indices))
        self.beacon.finish()
        while (frame := self.inbox.next()) is not None:
            if self.beacon.dismissed:
                return
            message = frame.message
            if self.arena is not None and (frame.renew or self.arena.wasteful):
                self.arena.renew()
            if isinstance(message, Fetch):
                self._serve_fetch(message)
            elif isinstance(message, Resume):
                if not self._resume(message):
                    return
            elif isinstance(message, Trial):
                self.fetcher.trial(message)
                self.beacon.finish()
                self.channel.send(TrialPassed(message.run, message.task, message.position))
            elif isinstance(message, Trim):
                if self.arena is not None:
                    self.arena.trim()
                self.channel.send(Trimmed())

    def _resume(self, message: Resume) -> bool:
        self.run, self.epoch, self.base_seed = message.run, message.epoch, message.base_seed
        if self.setup.iterable:
            self.channel.send(Resumed(message.run, rng_states()))
            try:
                self.fetcher = make_fetcher(self.plan)
            except BaseException as error:
                self.channel.send(StartFailed(Raised.of(error, self.where)))
                return False
        return True

    def _serve_fetch(self, order: Fetch) -> None:
        if self.setup.seed_batches:
            seed_batch(self.base_seed, self.epoch, order.task)
        begun = time.monotonic_ns()
        outcome = self._go_on(order, self.fetcher.fetch(order))
        if order.careful and self.setup.seed_batches and isinstance(outcome, Loaded) and outcome.report is None:
            # Proved sample by sample; the batch itself must draw its random numbers in the usual order.
            seed_batch(self.base_seed, self.epoch, order.task)
            outcome = self.fetcher.fetch(order._replace(careful=False))
        load_ns = time.monotonic_ns() - begun
        tries = 0
        while isinstance(outcome, Loaded) and tries < 2:
            self.beacon.enter(ENCODE, run=order.run, task=order.task, count=outcome.samples)
            try:
                parcel = codec.dumps(outcome.batch)
            except BaseException as error:
                if not self.setup.iterable or not self._tell(order, outcome.report):
                    tries += 1
                outcome = self._go_on(order, self.fetcher.repair_unpicklable(order, error))
                continue
            snapshot = pickled_snapshot(self.fetcher) if self.setup.iterable else None
            fd, trouble = None, ""
            if self.arena is not None:
                parcel = self.arena.place(parcel)
                fd, trouble = self.arena.take_descriptor(), self.arena.take_trouble()
            self.beacon.finish()
            now = time.monotonic_ns()
            if now >= self._rss_due_ns:  # a system call that costs as much as a small batch takes to encode
                self._rss_due_ns = now + _RSS_EVERY_NS
                self._rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            calls, rss = self.fetcher.calls, self._rss
            held = self.meter.excess_bytes(rss)
            samples, report = outcome.samples, outcome.report
            reply = Fetched(
                order.run, order.task, samples, load_ns, rss, report, calls, trouble, begun, now, held, snapshot
            )
            self.channel.send(reply, parcel, arena_fd=fd)
            if fd is not None:
                os.close(fd)
            return
        self.beacon.finish()
        self.channel.send(self._reply(order, outcome))

    def _go_on(self, order: Fetch, outcome: Outcome) -> Outcome:
        """After a report of many faults, read on in the stream for the same task: a later one, which may be on its way
        already, would take the samples that this one has so far. A map-style task waits for other spares."""
        if self.setup.iterable:
            while isinstance(outcome, Short) and not self.beacon.dismissed and not self.inbox.calls_away():
                self.beacon.finish()
                self.channel.send(self._reply(order, outcome))
                outcome = self.fetcher.fetch(order)
        return outcome

    def _tell(self, order: Fetch, report: Report | None) -> bool:
        """A stream's batch cannot be encoded: tell the faults so far, so that their budget ends what never can; whether
        to try again. The batch itself is still to be read by a successor."""
        if report is not None:
            self.channel.send(Unfilled(order.run, order.task, (), report, self.fetcher.calls - 1))
        return not self.beacon.dismissed and not self.inbox.calls_away()

    def _reply(self, order: Fetch, outcome: Outcome) -> Any:
        calls = self.fetcher.calls
        if isinstance(outcome, Short):
            return Unfilled(order.run, order.task, outcome.avoid, outcome.report, calls)
        if isinstance(outcome, Broken):
            return Failed(order.run, order.task, Raised.of(outcome.error, self.where), outcome.report, calls)
        if isinstance(outcome, Loaded):  # encoded twice in vain, though each part can be: collate_fn is at fault
            error = TypeError("collate_fn returned something that cannot be pickled")
            return Failed(order.run, order.task, Raised.of(error, self.where), outcome.report or Report(), calls)
        return Exhausted(order.run, order.task, outcome.report, calls, pickled_end(self.fetcher))


def _decode(parcel: codec.Parcel) -> Any:
    """What the training process will do with a parcel."""
    blocks = []
    for buffer in parcel.buffers:
        assert isinstance(buffer, codec.Buffer)
        block = torch.empty(buffer.memory.nbytes, dtype=torch.uint8, device="cpu")
        block.numpy().data[:] = buffer.memory
        blocks.append((buffer.low, block))
    assert not isinstance(parcel.pickled, codec.Placed)
    return codec.loads(parcel.pickled, blocks)


def _do_nothing(number: int, frame: Any) -> None:
    return None
