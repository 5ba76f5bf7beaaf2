"""Loading in the training process: ``num_workers=0``, and what a pool without workers falls back to."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from robustloader.decisions.keys import as_list, count_indices, once_only, positions_of
from robustloader.decisions.spares import SpareReservoir
from robustloader.engine.books import MAX_ROUNDS, loaded_indices, spares_for
from robustloader.engine.faults import add_note, rebuild
from robustloader.engine.options import EngineOptions
from robustloader.errors import SampleError
from robustloader.events import BatchInfo
from robustloader.system import host, torch_private
from robustloader.transport.messages import Fetch, Raised, Report
from robustloader.worker.collate import Stacker
from robustloader.worker.fetch import Broken, Ended, Loaded, Outcome, Plan, Short, make_fetcher
from robustloader.worker.seeding import RandomStreams, preserve_rng, restore_rng, seed_batch

__all__ = ["InProcessIterator", "StandIn", "batch_nbytes", "count_tensors"]


def batch_nbytes(batch: Any, depth: int = 3) -> int:
    """Size of a batch's tensors and arrays in bytes, as far as common containers show them."""
    if isinstance(batch, torch.Tensor):
        return batch.numel() * batch.element_size()
    if depth and isinstance(batch, dict):
        return sum(batch_nbytes(value, depth - 1) for value in batch.values())
    if depth and isinstance(batch, (list, tuple)):
        return sum(batch_nbytes(value, depth - 1) for value in batch)
    return int(getattr(batch, "nbytes", 0)) if hasattr(batch, "__array_interface__") else 0


def count_tensors(batch: Any, depth: int = 3) -> int:
    """How many tensors and arrays a batch holds, as far as common containers show them."""
    if depth and isinstance(batch, dict):
        return sum(count_tensors(value, depth - 1) for value in batch.values())
    if depth and isinstance(batch, (list, tuple)):
        return sum(count_tensors(value, depth - 1) for value in batch)
    return int(isinstance(batch, torch.Tensor) or hasattr(batch, "__array_interface__"))


class InProcessIterator(torch_private.LoaderIterator):
    """One epoch with ``num_workers=0``: everything happens in the thread that calls ``next()``.

    *Source*: ``_SingleProcessDataLoaderIter``, ``torch/utils/data/dataloader.py``, torch 2.13, for the order of calls.
    """

    def __init__(self, loader: DataLoader[Any], options: EngineOptions) -> None:
        super().__init__(loader)
        if self.timeout_s != 0:
            raise AssertionError("_SingleProcessDataLoaderIter requires timeout == 0")
        self._options = options
        self._desk = options.desk
        self.epoch = options.epochs.next()
        self._recording = options.recorder.begin_epoch(
            epoch=self.epoch, workers=0, usable_cpus=host.usable_cpus(), now_ns=time.monotonic_ns()
        )
        self._spares = SpareReservoir(seed=self.base_seed, epoch=self.epoch)
        self._task = 0
        self._returned_ns = 0
        self._ahead: list[Any] = []
        self._error: Exception | None = None
        self.batch_info: BatchInfo | None = None
        self.active_workers = 0
        self._fetcher = make_fetcher(
            Plan(
                dataset=options.dataset,
                iterable=options.iterable,
                batched=options.batched,
                collate_fn=self.collate_fn,
                drop_last=loader.drop_last,
                faults=options.faults,
                where="in the training process",
            )
        )

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
            self._close_recording(complete=True)
            raise
        now = time.monotonic_ns()
        self._recording.waited(now - begun, 0, now)
        self._returned_ns = time.monotonic_ns()
        return batch

    def _load(self) -> Any:
        desk, task, batched = self._desk, self._task, self._options.batched
        indices = self._ahead.pop(0) if self._ahead else once_only(self.next_indices())
        self._task += 1
        samples: list[Any] = []
        avoid: tuple[int, ...] = ()
        spares: tuple[Any, ...] = ()
        if not self._options.iterable and desk.repairs:
            samples = as_list(indices, batched=batched)
            if self._spares.observed <= task:
                self._spares.observe(task, samples)
            avoid = positions_of(samples, desk.known_bad) if desk.known_bad else ()
            spares = spares_for(self._spares, desk, task, len(avoid))
            if avoid:
                desk.left_out([samples[p] for p in avoid], self._recording, task=task)
        begun = time.monotonic_ns()
        desk.budget.fetched(count_indices(indices) if batched else 1)
        outcome = self._fetch(Fetch(0, task, indices, spares, avoid))
        rounds = 1
        while isinstance(outcome, Short):
            self._take(outcome.report, task)
            rounds += 1
            if rounds > MAX_ROUNDS:
                raise SampleError(f"no replacement was found for {len(outcome.avoid)} samples of batch {task}")
            self._look_ahead(task + rounds)
            spares = spares_for(self._spares, desk, task, len(outcome.avoid), rounds)
            outcome = self._fetch(Fetch(0, task, indices, spares, outcome.avoid))
        load_ns = time.monotonic_ns() - begun
        self._spares.close(task)
        self._take(outcome.report, task)
        if isinstance(outcome, Ended):
            raise StopIteration
        if isinstance(outcome, Broken):
            self._raise(outcome)
        assert isinstance(outcome, Loaded)
        report = outcome.report or Report()
        self._recording.worker_task(None, outcome.samples, load_ns, 0, task, None, begun)
        batch = outcome.batch
        self._recording.delivered(outcome.samples, batch_nbytes(batch))
        self.batch_info = BatchInfo(
            index=task,
            indices=() if self._options.iterable else loaded_indices(as_list(indices, batched=batched), report),
            replaced=dict(report.replaced),
            skipped=report.skipped,
            load_s=load_ns / 1e9,
        )
        return torch_private.pin_memory(batch, self.pin_device) if self.pins else batch

    def _fetch(self, order: Fetch) -> Outcome:
        if self._options.seeding == "batch" and not self._options.iterable:
            with preserve_rng():
                seed_batch(self.base_seed, self.epoch, order.task)
                return self._fetcher.fetch(order)
        return self._fetcher.fetch(order)

    def _take(self, report: Report | None, task: int) -> None:
        try:
            self._desk.take(report, self._recording, task=task, worker_id=None, pid=None, batches=task)
        except SampleError as error:
            self._error = error
            self._close_recording(complete=False)
            raise

    def _look_ahead(self, tasks: int) -> None:
        """Read indices until ``tasks`` tasks are known, so that there is something to draw spares from."""
        with contextlib.suppress(StopIteration):
            while not self._options.iterable and self._spares.observed < tasks:
                ahead = once_only(self.next_indices())
                self._ahead.append(ahead)
                self._spares.observe(self._spares.observed, as_list(ahead, batched=self._options.batched))

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
        """End the epoch's recording. It is complete when all batches were taken, even if nobody asked for one more."""
        try:
            complete = self._task >= len(self)
        except (TypeError, NotImplementedError):  # a sampler without length
            complete = False
        self._close_recording(complete=complete)

    def __del__(self) -> None:
        if hasattr(self, "_recording"):
            self.close()


class StandIn:
    """The training process doing a worker's work: its ``get_worker_info()``, its ``worker_init_fn``, its collate
    semantics, and random streams that leave the training process's own where they were.

    A map-style dataset is the trainer's own, as with ``num_workers=0``. Of an iterable one it takes a copy where it
    can, because ``worker_init_fn`` may change it to this worker's share.
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
    ) -> None:
        self._options = options
        self._base_seed = base_seed
        dataset = options.dataset
        if options.iterable:
            with contextlib.suppress(Exception):  # a user's __deepcopy__, or an open file: then it is the original
                dataset = copy.deepcopy(dataset)
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
            self._fetcher = make_fetcher(
                Plan(
                    dataset=dataset,
                    iterable=options.iterable,
                    batched=options.batched,
                    collate_fn=collate_fn,
                    drop_last=drop_last,
                    faults=options.faults,
                    where="in the training process",
                )
            )
            for _ in range(skip):
                self._fetcher.fetch(Fetch(0, -1, indices))

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
