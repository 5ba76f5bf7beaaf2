"""Measures loaders over the user's dataset without using up anything of the user's."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from torch.utils.data import IterableDataset, Sampler

from robustloader.decisions.tuning import Block
from robustloader.engine.inprocess import batch_nbytes
from robustloader.loader import RobustDataLoader
from robustloader.policies import FaultPolicy, TelemetryPolicy
from robustloader.system import torch_private
from robustloader.tuning.copying import copy_sharing_data

__all__ = ["Probe", "Walk", "Workbench", "without_side_effects"]

WARM_UP_BATCHES = 2
CROSSING_S = 0.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """One batch loaded in this process (in a worker, where ``in_process`` is False): seconds, processor seconds, size,
    and seconds to cross from a worker."""

    load_s: float
    cpu_s: float
    batch_bytes: int
    cross_s: float
    in_process: bool


class Walk(Sampler[int]):
    """Indices without end, for measuring: each ``iter()`` goes on where the one before it stopped, so that a cache of
    the storage helps no candidate more than another. Draws from a generator of its own."""

    def __init__(self, size: int, *, shuffle: bool) -> None:
        self._size = size
        self._chance = random.Random(0) if shuffle else None
        self._place = 0

    def __iter__(self) -> Iterator[int]:
        while self._size:
            if self._chance is not None:  # drawn, not shuffled: a list of all indices may be gigabytes
                yield self._chance.randrange(self._size)
                continue
            index, self._place = self._place, (self._place + 1) % self._size
            yield index


class _Constant:
    """The same batch again and again: all that its worker does is send it."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: int) -> Any:
        return self.batch


def _as_it_is(batch: Any) -> Any:
    return batch


def without_side_effects(loader_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The user's arguments without what measuring would use up or write to: samplers, generators, sinks, files."""
    kept = {
        name: value
        for name, value in loader_kwargs.items()
        if name not in ("sampler", "shuffle", "generator", "persistent_workers", "telemetry")
    }
    faults = kept.get("faults")
    if isinstance(faults, FaultPolicy):
        kept["faults"] = dataclasses.replace(faults, quarantine=None)
    return kept


class Workbench:
    """Loads from one dataset with any number of workers, a fresh loader for each block.

    *Runs in* the training process. Random streams are the caller's to preserve.

    Attributes:
        batch_size: samples in a batch, at most an epoch's; None where the dataset makes its own batches.
        why_no_copy: what the dataset raised when it was copied; empty where there is a copy.
        notes: what the reader of a report should know of how it is measured.

    Raises:
        ValueError: an epoch has no batch of that size, and shorter ones are dropped.
    """

    def __init__(self, dataset: Any, *, batch_size: int | None, step_s: float, loader_kwargs: dict[str, Any]) -> None:
        self._dataset = dataset
        self.batch_size = batch_size
        self.notes: list[str] = []
        self._step_s = step_s
        self._iterable = isinstance(dataset, IterableDataset)
        shuffle = bool(loader_kwargs.get("shuffle")) or loader_kwargs.get("sampler") is not None
        self._kwargs = without_side_effects(loader_kwargs)
        self._prefetch = self._kwargs.pop("prefetch_factor", None)
        self._walk = None if self._iterable else Walk(len(dataset), shuffle=shuffle)
        if not self._iterable:
            self._limit_batch(_epoch_samples(dataset, loader_kwargs.get("sampler")))
        self._copy: Any = None
        self.why_no_copy = ""
        try:
            self._copy = copy_sharing_data(dataset)
        except Exception as error:  # the user's dataset, whatever it raises when pickled
            self.why_no_copy = f"{type(error).__name__}: {error}"
        self._collate_copy = self._kwargs.get("collate_fn")
        with contextlib.suppress(Exception):  # a lambda: then it is the original
            self._collate_copy = copy_sharing_data(self._collate_copy)

    def _limit_batch(self, samples: int) -> None:
        """The walk has no end: a batch larger than an epoch would be one that no training ever gets."""
        if self.batch_size is None or not 0 < samples < self.batch_size:
            return
        if self._kwargs.get("drop_last"):
            raise ValueError(
                f"an epoch has {samples:,} samples: with batch_size={self.batch_size} and drop_last there is no batch"
            )
        self.notes.append(f"an epoch is one batch of {samples:,} samples, fewer than batch_size={self.batch_size}")
        self.batch_size = samples

    @property
    def can_load_in_process(self) -> bool:
        """Whether there is a copy to load from in this process."""
        return self._copy is not None

    def probe(self, seconds: float) -> Probe:
        """Load some batches in one process, and let one cross.

        Raises:
            ValueError: there is no batch.
        """
        in_process = self.can_load_in_process
        batches = iter(self._loader(int(not in_process)))
        with contextlib.closing(batches):
            batch = _first(batches)
            periods: list[float] = []
            processor: list[float] = []
            until = time.perf_counter() + seconds / 2
            while len(periods) < 2 or time.perf_counter() < until:
                begun, cpu = time.perf_counter(), time.process_time()
                batch = next(batches, None)
                if batch is None:
                    break
                periods.append(time.perf_counter() - begun)
                processor.append(time.process_time() - cpu)
                if sum(periods) > seconds:
                    break
        if batch is None:
            with contextlib.closing(iter(self._loader(int(not in_process)))) as again:
                begun, cpu = time.perf_counter(), time.process_time()
                batch = _first(again)
                periods.append(time.perf_counter() - begun)
                processor.append(time.process_time() - cpu)
        load_s = sum(periods) / len(periods)
        # What a worker's processor does cannot be seen from here: it counts as busy all the time.
        cpu_s = min(load_s, sum(processor) / len(processor)) if in_process else load_s
        return Probe(
            load_s=load_s,
            cpu_s=cpu_s,
            batch_bytes=batch_nbytes(batch),
            cross_s=self._crossing_s(batch),
            in_process=in_process,
        )

    def measure(self, workers: int, seconds: float, goes_on: Callable[[], bool] = lambda: True) -> Block | None:
        """One turn of a candidate; None where its epoch is too short to count anything.

        The warm-up is one batch of each worker, and two at least. Batches are counted in whole turns of the workers:
        their batches come together.

        Args:
            workers: 0 loads in this process.
            seconds: how long to count.
            goes_on: asked after each batch; False ends the block early.
        """
        begun = time.perf_counter()
        loader = self._loader(workers)
        batches = iter(loader)
        with contextlib.closing(batches):
            if next(batches, None) is None:
                return None
            first_batch_s = time.perf_counter() - begun
            self._step()
            for _ in range(max(WARM_UP_BATCHES, workers) - 1):
                if next(batches, None) is None:
                    return None
                self._step()
            counted = whole = 0
            begun = time.perf_counter()
            elapsed_s = whole_s = 0.0
            while whole_s < seconds:
                if next(batches, None) is None:
                    break
                self._step()
                counted += 1
                elapsed_s = time.perf_counter() - begun
                if counted % max(1, workers) == 0:
                    whole, whole_s = counted, elapsed_s
                    if not goes_on():
                        break
            worker_bytes = _largest_worker(batches)
            seen = loader.statistics()
        if not whole:
            whole, whole_s = counted, elapsed_s
        if not whole or whole_s <= 0:
            return None
        failed = [record for record in loader.fault_log if record.action != "retried"]
        return Block(
            batches=whole,
            elapsed_s=whole_s,
            first_batch_s=first_batch_s,
            worker_bytes=worker_bytes,
            samples=seen.samples,
            faults=seen.faults + seen.quarantined,
            deaths=seen.crashes + seen.hangs,
            fault_causes=frozenset(record.error_type or record.kind for record in failed),
            death_causes=frozenset(record.signal for record in failed if record.signal),
        )

    def _step(self) -> None:
        if self._step_s:
            time.sleep(self._step_s)

    def _loader(self, workers: int) -> RobustDataLoader[Any]:
        options = dict(self._kwargs)
        if workers and self._prefetch is not None:
            options["prefetch_factor"] = self._prefetch
        if not workers:
            # torch refuses these without workers; they mean nothing there.
            options = {k: v for k, v in options.items() if k not in ("timeout", "multiprocessing_context")}
            if "collate_fn" in options:
                options["collate_fn"] = self._collate_copy
            if self._iterable:  # it may go on where its last reader stopped
                self._copy = copy_sharing_data(self._dataset)
        return RobustDataLoader(
            self._dataset if workers else self._copy,
            batch_size=self.batch_size,
            sampler=self._walk,
            num_workers=workers,
            generator=torch.Generator().manual_seed(0),
            telemetry=TelemetryPolicy(log_epochs=False),
            **options,
        )

    def _crossing_s(self, batch: Any) -> float:
        """Seconds for a batch to cross, one after the other."""
        context = self._kwargs.get("multiprocessing_context")
        loader: RobustDataLoader[Any] = RobustDataLoader(
            _Constant(batch),  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=1,
            multiprocessing_context=context,
            generator=torch.Generator().manual_seed(0),
            telemetry=TelemetryPolicy(log_epochs=False),
            transport=self._kwargs.get("transport", "auto"),
        )
        with contextlib.closing(iter(loader)) as batches:
            for _ in range(4):
                next(batches)
            begun, count = time.perf_counter(), 0
            while time.perf_counter() - begun < CROSSING_S:
                next(batches)
                count += 1
            return (time.perf_counter() - begun) / count


def _epoch_samples(dataset: Any, sampler: Any) -> int:
    """How many indices an epoch has: a sampler's, where it says so, else the dataset's."""
    if sampler is not None:
        with contextlib.suppress(TypeError, NotImplementedError):  # many samplers have no length
            return len(sampler)
    return len(dataset)


def _first(batches: Any) -> Any:
    batch = next(batches, None)
    if batch is None:
        raise ValueError("the dataset is empty: there is no batch to measure")
    return batch


def _largest_worker(batches: Any) -> int:
    """Bytes that the largest worker of an iterator has for itself."""
    largest = 0
    for process in torch_private.worker_processes(batches):
        with contextlib.suppress(psutil.Error, OSError):
            largest = max(largest, int(psutil.Process(process.pid).memory_full_info().uss))
    return largest
