"""Loading in the training process: ``num_workers=0``, and what a pool without workers falls back to."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import pickle
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from robustloader.decisions.keys import as_list, count_indices, once_only, positions_of
from robustloader.decisions.spares import SpareReservoir
from robustloader.engine.books import MAX_ROUNDS, loaded_indices, spares_for
from robustloader.engine.faults import add_note, rebuild
from robustloader.engine.options import EngineOptions
from robustloader.engine.progress import Resumption, ShardProgress
from robustloader.engine.resume import shard_progress
from robustloader.engine.streams import Standing, own_generators
from robustloader.errors import SampleError, WorkerStartError, warnings_held
from robustloader.events import BatchInfo
from robustloader.state import LoaderState
from robustloader.system import host, torch_private
from robustloader.transport.messages import Fetch, Raised, Report
from robustloader.worker.collate import Stacker
from robustloader.worker.fetch import (
    Broken,
    Ended,
    IterableFetcher,
    Loaded,
    MapFetcher,
    Outcome,
    Plan,
    Short,
    make_fetcher,
)
from robustloader.worker.seeding import KeptStreams, RandomStreams, preserve_rng, restore_rng, seed_batch
from robustloader.worker.stateful import is_stateful, pickled_snapshot, restored_fetcher, take_snapshot

__all__ = ["LOOKED_AT", "InProcessIterator", "Shards", "StandIn", "batch_nbytes", "calls_of", "count_tensors"]


LOOKED_AT = 1_000
"""Parts of a batch, at each depth, that a running loop looks at for its size: statistics must not cost much."""

_DEPTH = 3
_ARRAYS = (torch.Tensor, np.ndarray)
_PLAIN = frozenset((int, float, str, bytes, bool, type(None)))


def batch_nbytes(batch: Any, most: int | None = None) -> int:
    """Size of a batch's tensors and arrays in bytes, as far as common containers show them.

    Args:
        most: how many parts to look at, at each depth; None looks at all.
    """
    return sum(map(_nbytes, _arrays(batch, most)))


def count_tensors(batch: Any) -> int:
    """How many tensors and arrays a batch holds, as far as common containers show them."""
    return sum(1 for _ in _arrays(batch))


def _arrays(batch: Any, most: int | None = None) -> Iterator[Any]:
    """The tensors and arrays in a batch, the outermost first. Goes by types alone: to ask an object of the user's for
    an attribute may raise, and has a lazily opened image decoded."""
    level = [batch]
    for _ in range(_DEPTH + 1):
        inner: list[Any] = []
        for part in level:
            kind = type(part)
            if kind in _PLAIN:
                continue
            if issubclass(kind, _ARRAYS):
                yield part
            elif issubclass(kind, list):
                inner += list.__getitem__(part, slice(most))
            elif issubclass(kind, tuple):
                inner += tuple.__getitem__(part, slice(most))
            elif issubclass(kind, dict):
                inner += itertools.islice(dict.values(part), most)
        if not inner:
            return
        level = inner[:most]


def _nbytes(array: Any) -> int:
    try:
        return int(array.numel() * array.element_size() if isinstance(array, torch.Tensor) else array.nbytes)
    except Exception:  # a subclass of the user's, or one whose size is not known yet (UninitializedParameter)
        return 0


class InProcessIterator(torch_private.LoaderIterator):
    """One epoch with ``num_workers=0``: everything happens in the thread that calls ``next()``.

    *Source*: ``_SingleProcessDataLoaderIter``, ``torch/utils/data/dataloader.py``, torch 2.13, for the order of calls.
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
        self.once = self.num_workers != 0  # the rest of an epoch that began otherwise
        if self.timeout_s != 0 and not self.once:
            raise AssertionError("_SingleProcessDataLoaderIter requires timeout == 0")
        self._options = options
        self._owner = os.getpid()
        self._desk = options.desk
        self.epoch = options.epochs.next()
        self._recording = options.recorder.begin_epoch(
            epoch=self.epoch, workers=0, usable_cpus=host.usable_cpus(), now_ns=time.monotonic_ns()
        )
        self._spares = SpareReservoir(seed=self.base_seed, epoch=self.epoch)
        self._task = 0
        self._taken: frozenset[int] = frozenset()
        if resume is not None:
            self._spares, self._task, self._taken = resume.spares, resume.state.delivered, frozenset(resume.state.ahead)
        self._generators = own_generators(loader)
        self._streams: KeptStreams | None = None
        self._returned_ns = 0
        self._ahead: list[Any] = []
        self._error: Exception | None = None
        self.batch_info: BatchInfo | None = None
        self.active_workers = 0
        plan = Plan(
            dataset=options.dataset,
            iterable=options.iterable,
            batched=options.batched,
            collate_fn=self.collate_fn,
            drop_last=loader.drop_last,
            faults=options.faults,
            where="in the training process",
        )
        self._progress = options.journal.begin(
            self,
            epoch=self.epoch,
            opening="is" if opened is None else opened.opening,
            iterable=options.iterable,
            sampler=options.stateful_sampler,
            batch_size=options.batch_size,
            resume=resume,
        )
        if resume is None:
            self._progress.read(-1, self._spares)
        self._fetcher: MapFetcher | IterableFetcher | Shards
        if resume is None or not options.iterable:
            self._fetcher = make_fetcher(plan)
        else:
            self._progress.shards = [shard_progress(shard) for shard in resume.state.shards]
            self._fetcher = self._resume_stream(loader, plan, resume)
        if not isinstance(self._fetcher, Shards):
            self._progress.stream = self._fetcher
        self._stream = self._fetcher if not isinstance(self._fetcher, MapFetcher) else None
        if isinstance(self._fetcher, IterableFetcher):
            self._fetcher.keeps = True
        if resume is None:
            self._progress.opened = Standing.of(self._generators)

    def _resume_stream(self, loader: DataLoader[Any], plan: Plan, resume: Resumption) -> IterableFetcher | Shards:
        shards, indices = self._progress.shards, self.next_indices()
        if resume.state.workers:
            return Shards(self._options, loader, self.collate_fn, shards, indices, resume.state)
        shard = shards[0]
        if shard.snapshot is not None:
            return restored_fetcher(plan, pickle.loads(shard.snapshot))
        # Read again as it was read, and from there on under streams of its own: whoever reads it again does the same.
        self._streams = KeptStreams(resume.opened.streams)
        with Standing.kept(self._generators):
            resume.opened.restore(self._generators)
            with self._streams.active():
                fetcher = IterableFetcher(plan)
                if resume.reading is not None:
                    resume.reading.restore(self._generators)
                for _ in range(shard.calls):
                    fetcher.fetch(Fetch(0, -1, indices))
        return fetcher

    def prime(self) -> None:
        """Read the sampler once now: what it draws then belongs to the beginning of the epoch."""
        self._look_ahead(self._task + 1)

    def next_batch(self) -> Any:
        """Load the next batch."""
        if self._error is not None:
            raise self._error
        begun = time.monotonic_ns()
        if self._returned_ns:
            self._recording.stepped(begun - self._returned_ns)
        try:
            batch = self._load()
        except StopIteration:
            self._progress.finish()
            self._close_recording(complete=True)
            raise
        now = time.monotonic_ns()
        self._recording.waited(now - begun, 0, now)
        if self._stream is not None and not warnings_held():  # one that is an error comes in place of the batch
            self._stream.let_go()
        self._returned_ns = time.monotonic_ns()
        return batch

    def _load(self) -> Any:
        indices = self._read()
        while self._task in self._taken:
            self._pass_over(indices)
            indices = self._read()
        task = self._task
        self._task += 1
        stream = self._stream
        if stream is None:
            return self._load_task(task, indices)
        stream.let_go()
        try:
            return self._load_task(task, indices)
        except Exception:  # the trainer's error; a state that is taken before the next batch has the samples
            raise
        except BaseException:  # Ctrl-C, say
            if not self._progress.delivers(task):
                stream.put_back()
                self._ahead.insert(0, indices)
                self._task = task
            raise

    def _load_task(self, task: int, indices: Any) -> Any:
        desk, batched = self._desk, self._options.batched
        samples: list[Any] = []
        avoid: tuple[int, ...] = ()
        spares: tuple[Any, ...] = ()
        refusal: Exception | None = None
        if not self._options.iterable and desk.repairs:
            samples = as_list(indices, batched=batched)
            if self._spares.observed <= task:
                self._spares.observe(task, samples)
                self._progress.read(task, self._spares, indices)
            avoid = positions_of(samples, desk.known_bad) if desk.known_bad else ()
            spares = spares_for(self._spares, desk, task, len(avoid))
            refusal = desk.refusal(samples)
            if avoid and refusal is None:
                desk.left_out([samples[p] for p in avoid], self._recording, task=task)
        elif not self._options.iterable:
            self._progress.read(task, self._spares, indices)
        begun = time.monotonic_ns()
        desk.budget.fetched(count_indices(indices) if batched else 1)
        outcome = Broken(refusal, Report()) if refusal else self._fetch(Fetch(0, task, indices, spares, avoid))
        rounds = 1
        while isinstance(outcome, Short):
            self._take(outcome.report, task)
            if self._options.iterable:  # the stream is further on: its end or the fault budget ends this
                outcome = self._fetch(Fetch(0, task, indices))
                continue
            rounds += 1
            if rounds > MAX_ROUNDS:
                none = SampleError(f"no replacement was found for {len(outcome.avoid)} samples of batch {task}")
                outcome = Broken(none, Report())
                break
            self._look_ahead(task + rounds)
            spares = spares_for(self._spares, desk, task, len(outcome.avoid), rounds)
            outcome = self._fetch(Fetch(0, task, indices, spares, outcome.avoid))
        load_ns = time.monotonic_ns() - begun
        self._spares.close(task)
        self._take(outcome.report, task)
        if isinstance(outcome, Ended):
            raise StopIteration
        batch, nbytes = None, 0
        if isinstance(outcome, Loaded):
            batch = torch_private.pin_memory(outcome.batch, self.pin_device) if self.pins else outcome.batch
            nbytes = batch_nbytes(batch, most=LOOKED_AT)
        sharded = isinstance(self._fetcher, Shards)
        self._progress.deliver(
            task,
            shard=self._fetcher.last if sharded else 0,  # type: ignore[union-attr]
            calls=self._fetcher.calls,
            loaded=isinstance(outcome, Loaded),
            snapshot=self._fetcher.snapshot() if sharded else None,  # type: ignore[union-attr]
        )
        if isinstance(outcome, Broken):
            self._raise(outcome)
        assert isinstance(outcome, Loaded)
        report = outcome.report or Report()
        self._recording.worker_task(None, outcome.samples, load_ns, 0, task, None, begun)
        self._recording.delivered(outcome.samples, nbytes)
        self.batch_info = BatchInfo(
            index=task,
            indices=() if self._options.iterable else loaded_indices(as_list(indices, batched=batched), report),
            replaced=dict(report.replaced),
            skipped=report.skipped,
            load_s=load_ns / 1e9,
        )
        return batch

    def _read(self) -> Any:
        return self._ahead.pop(0) if self._ahead else self._read_on()

    def _read_on(self) -> Any:
        if self._progress.opened is not None:  # the trainer may have drawn since
            self._progress.first_read(Standing.of(self._generators))
        try:
            return once_only(self.next_indices())
        except StopIteration:
            self._progress.reads += 1
            raise

    def _pass_over(self, indices: Any) -> None:
        """This task was delivered before the epoch was resumed."""
        if self._spares.observed <= self._task:
            self._spares.observe(self._task, as_list(indices, batched=self._options.batched))
            self._progress.read(self._task, self._spares, indices)
        self._spares.close(self._task)
        self._task += 1

    def _fetch(self, order: Fetch) -> Outcome:
        if self._options.seeding == "batch" and not self._options.iterable:
            with preserve_rng():
                seed_batch(self.base_seed, self.epoch, order.task)
                return self._fetcher.fetch(order)
        with self._streams.active() if self._streams is not None else contextlib.nullcontext():
            return self._fetcher.fetch(order)

    def _take(self, report: Report | None, task: int) -> None:
        try:
            shard, batches = self._fetcher.turn if isinstance(self._fetcher, Shards) else (0, task)
            self._desk.take(report, self._recording, task=task, worker_id=None, pid=None, shard=shard, batches=batches)
        except SampleError as error:
            self._error = error
            self._close_recording(complete=False)
            raise

    def _look_ahead(self, tasks: int) -> None:
        """Read indices until ``tasks`` tasks are known, so that there is something to draw spares from."""
        with contextlib.suppress(StopIteration):
            while not self._options.iterable and self._spares.observed < tasks:
                ahead = self._read_on()
                self._ahead.append(ahead)
                task = self._spares.observed
                self._spares.observe(task, as_list(ahead, batched=self._options.batched))
                self._progress.read(task, self._spares, ahead)

    def _raise(self, outcome: Broken) -> None:
        error = outcome.error
        index = outcome.report.faults[-1].index if outcome.report.faults else None
        if isinstance(error, StopIteration):
            # Passed on as it is, it would end the epoch early without a word.
            raise rebuild(Raised.of(error, "in the training process"), index=index, worker_id=None, pid=None) from error
        if index is not None:
            add_note(error, f"sample index {index!r}, in the training process")
        raise error

    def _close_recording(self, *, complete: bool) -> None:
        self._recording.close(complete=complete, workers_at_end=0, now_ns=time.monotonic_ns())

    def close(self) -> None:
        """End the epoch's recording. It is complete when all batches were taken, even if nobody asked for one more.
        Without effect in a forked process, which goes through it on its way out."""
        if os.getpid() != self._owner:
            return
        try:
            complete = self._task >= len(self)
        except Exception:  # a sampler without length, or whose __len__ raises
            complete = False
        self._close_recording(complete=complete)
        if self._progress.stream is not None and not self._progress.finished:
            with contextlib.suppress(Exception):  # a user's state_dict, where it can be told to nobody
                self._progress.settle()
                shard = self._progress.shards[0]
                taken = take_snapshot(self._progress.stream, with_rng=False, delivered=shard.calls)
                if taken is not None:
                    shard.snapshot = pickle.dumps(taken, pickle.HIGHEST_PROTOCOL)
        self._progress.stream = None

    def __del__(self) -> None:
        if hasattr(self, "_progress"):
            self.close()


class StandIn:
    """The training process doing a worker's work: its ``get_worker_info()``, its ``worker_init_fn``, its collate
    semantics, and random streams that leave the training process's own where they were.

    A map-style dataset is the trainer's own, as with ``num_workers=0``. Of an iterable one it takes a copy, because
    ``worker_init_fn`` may change it to this worker's share.

    Raises:
        WorkerStartError: the dataset cannot be copied, and something is about to change it.
    """

    def __init__(
        self,
        options: EngineOptions,
        *,
        collate_fn: Any,
        drop_last: bool,
        worker_init_fn: Any,
        worker_id: int,
        num_workers: int,
        base_seed: int,
        skip: int = 0,
        indices: Any = None,
        rng: Any = None,
        snapshot: bytes | None = None,
        keeps: bool = False,
    ) -> None:
        self._options = options
        self._base_seed = base_seed
        dataset = options.dataset
        if options.iterable:
            try:
                dataset = _copied(dataset)
            except Exception as error:
                if worker_init_fn is not None or is_stateful(dataset):
                    raise WorkerStartError(
                        f"the training process cannot stand in for worker {worker_id}, because the dataset cannot be "
                        f"copied ({type(error).__name__}: {error}) and would itself be narrowed to a worker's share: "
                        "give it a __copy__, or load with as many worker processes as the epoch began with",
                        worker_id=worker_id,
                    ) from error
        # A map-style stand-in follows an unknown number of incarnations; no worker ever gets this one's stream.
        self._streams = RandomStreams(base_seed, worker_id, 0 if options.iterable else 1 << 20)
        self._info = torch_private.new_worker_info(
            worker_id=worker_id, num_workers=num_workers, seed=self._streams.seed, dataset=dataset
        )
        with self._as_worker():
            if worker_init_fn is not None:
                worker_init_fn(worker_id)
            if rng is not None:
                restore_rng(rng)
            plan = Plan(
                dataset=dataset,
                iterable=options.iterable,
                batched=options.batched,
                collate_fn=collate_fn,
                drop_last=drop_last,
                faults=options.faults,
                where="in the training process",
            )
            self._fetcher = make_fetcher(plan) if snapshot is None else restored_fetcher(plan, pickle.loads(snapshot))
            for _ in range(skip):
                self._fetcher.fetch(Fetch(0, -1, indices))
        if isinstance(self._fetcher, IterableFetcher):
            self._fetcher.keeps = keeps

    def put_back(self) -> bool:
        """The batch of a stream that was loaded last got nowhere: the next call makes it again. False where there is
        none."""
        return isinstance(self._fetcher, IterableFetcher) and self._fetcher.put_back()

    def let_go(self) -> None:
        """It will not be put back."""
        if isinstance(self._fetcher, IterableFetcher):
            self._fetcher.let_go()

    @property
    def calls(self) -> int:
        """How often the stream was read."""
        return self._fetcher.calls

    def snapshot(self) -> bytes | str | None:
        """Where the stream stands, pickled; None where neither it nor its dataset can tell, a string on failure."""
        with self._as_worker():
            return pickled_snapshot(self._fetcher)

    @contextlib.contextmanager
    def _as_worker(self) -> Iterator[None]:
        with self._streams.active(), torch_private.worker_info(self._info), Stacker().installed():
            yield

    def fetch(self, order: Fetch, epoch: int) -> Outcome:
        """Load one task here and now."""
        with self._as_worker():
            if self._options.seeding == "batch" and not self._options.iterable:
                seed_batch(self._base_seed, epoch, order.task)
            return self._fetcher.fetch(order)


def _copied(dataset: Any) -> Any:
    """A dataset of the same content. What cannot be copied in it (a lock, an open file) is shared."""
    try:
        return copy.deepcopy(dataset)
    except Exception:  # a user's __deepcopy__, or that of an attribute
        twin = copy.copy(dataset)
    memo = {id(dataset): twin}
    for name, value in getattr(twin, "__dict__", {}).items():
        with contextlib.suppress(Exception):
            twin.__dict__[name] = copy.deepcopy(value, memo)
    return twin


class Shards:
    """Stand-ins for all the workers that an iterable epoch began with, read in turn: the rest of it is what they would
    have loaded, in their order.

    Attributes:
        last: the shard that was read last; ``calls``: how often.
    """

    def __init__(
        self,
        options: EngineOptions,
        loader: DataLoader[Any],
        collate_fn: Any,
        shards: list[ShardProgress],
        indices: Any,
        state: LoaderState,
    ) -> None:
        self._epoch = state.epoch
        self._shards = shards
        self._stand_ins: list[StandIn | None] = [
            None
            if shard.final is not None
            else StandIn(
                options,
                collate_fn=collate_fn,
                drop_last=loader.drop_last,
                worker_init_fn=loader.worker_init_fn,
                worker_id=number,
                num_workers=state.workers,
                base_seed=state.base_seed,
                skip=shard.calls - calls_of(shard.snapshot),
                indices=indices,
                rng=shard.rng,
                snapshot=shard.snapshot,
                keeps=True,
            )
            for number, shard in enumerate(shards)
        ]
        self._batches = [shard.batches for shard in shards]
        self.last = (state.next_shard - 1) % len(shards)
        self.calls = 0
        self._again = False  # whether that shard's turn is not over
        self._begun = False  # whether that shard has been asked for the batch that is being made

    def fetch(self, order: Fetch) -> Outcome:
        """Load the next batch of the shard whose turn it is."""
        while any(self._stand_ins):
            if not self._again:
                self.last = (self.last + 1) % len(self._stand_ins)
            self._again, self._begun = False, True
            stand_in = self._stand_ins[self.last]
            if stand_in is None:
                continue
            outcome = stand_in.fetch(order, self._epoch)
            self.calls = stand_in.calls
            if isinstance(outcome, Short):
                self._again = True
                return outcome
            if not isinstance(outcome, Ended):
                self._batches[self.last] += isinstance(outcome, Loaded)
                return outcome
            self._stand_ins[self.last] = None
            self._shards[self.last].final = 0
            if outcome.report is not None:  # the next call goes on with the others
                return Short((), outcome.report)
        return Ended(None)

    def put_back(self) -> None:
        """The batch that was loaded last got nowhere: the next call makes it again."""
        stand_in = self._stand_ins[self.last]
        if stand_in is not None and self._begun:
            self._batches[self.last] -= stand_in.put_back()
            self._again = True

    def let_go(self) -> None:
        """It will not be put back."""
        self._begun = False
        stand_in = self._stand_ins[self.last]
        if stand_in is not None:
            stand_in.let_go()

    @property
    def turn(self) -> tuple[int, int]:
        """The shard that was read last, and how many batches it has given."""
        return self.last, self._batches[self.last]

    def snapshot(self) -> bytes | str | None:
        """Where the stream of the last shard stands."""
        stand_in = self._stand_ins[self.last]
        return None if stand_in is None else stand_in.snapshot()


def calls_of(snapshot: bytes | None) -> int:
    """How often a stream had been read when its snapshot was taken."""
    return 0 if snapshot is None else int(pickle.loads(snapshot).calls)
