"""A user's program that uses the public face with full annotations: type checkers read it, and it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_type

import tenacity
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from robustloader import (
    BatchInfo,
    Comparison,
    ElasticDistributedBatchSampler,
    ElasticDistributedSampler,
    EpochFinished,
    EpochSummary,
    Event,
    FaultBudgetError,
    FaultLog,
    FaultPolicy,
    FaultRecord,
    HostReport,
    JsonlSink,
    MemoryPolicy,
    OptionError,
    RecoveryPolicy,
    Retry,
    RobustDataLoader,
    SampleFaulted,
    Sink,
    Statistics,
    TelemetryPolicy,
    TuningReport,
    WorkerCrashed,
    WorkerCrashError,
    compare,
    doctor,
    tune,
)
from robustloader.testing import Crash, InjectedDataset, Injector, Raise, WorkerKiller, no_leaks


class Squares(Dataset[Tensor]):
    """A map-style dataset."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index * index)


class Stream(IterableDataset[int]):
    """An iterable one."""

    def __iter__(self) -> Iterator[int]:
        yield from range(8)


class Counter:
    """A sink of the user's own."""

    def __init__(self) -> None:
        self.faults: list[FaultRecord] = []
        self.finished = 0

    def receive(self, event: Event) -> None:
        if isinstance(event, SampleFaulted):
            self.faults.append(event.fault)
        elif isinstance(event, EpochFinished):
            self.finished += 1
            assert_type(event.summary, EpochSummary)
        elif isinstance(event, WorkerCrashed):
            print(f"worker {event.worker_id} died of {event.signal}, {event.tasks} batches to load again")


def make_loader(counter: Counter, folder: Path) -> RobustDataLoader[Tensor]:
    """Every policy, with every kind of value that it takes."""
    sink: Sink = counter
    injector = Injector({5: Raise(times=1, error=ValueError), 9: Crash(times=1)}, folder=folder)
    return RobustDataLoader(
        InjectedDataset(Squares(), injector),
        batch_size=8,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
        generator=torch.Generator().manual_seed(3),
        faults=FaultPolicy(
            action="skip",
            retry=Retry(stop=tenacity.stop_after_attempt(2), wait=tenacity.wait_none(), on=(ValueError,)),
            fatal=(KeyError,),
            burst=4,
            max_fraction=0.1,
            quarantine=folder / "bad.jsonl",
        ),
        recovery=RecoveryPolicy(max_restarts=4, hang_after_s=60, poison_after=3),
        memory=MemoryPolicy(on_low="warn", max_worker_bytes=8 << 30),
        telemetry=TelemetryPolicy(sinks=(sink, JsonlSink(folder / "run.jsonl")), log_epochs=False),
        seeding="batch",
        transport="auto",
    )


def train(loader: RobustDataLoader[Tensor]) -> int:
    """One epoch, batch by batch, with what is known of each."""
    batches = iter(loader)
    total = 0
    for batch in batches:
        info: BatchInfo = batches.batch_info
        assert_type(info.indices, tuple[Any, ...])
        assert isinstance(batch, Tensor)
        total += int(batch.sum())
    return total


def inspect(loader: RobustDataLoader[Tensor]) -> None:
    """What a loader tells."""
    summary = assert_type(loader.summary(), EpochSummary)
    assert_type(summary.wait_p95_s, float)
    assert_type(loader.summaries, tuple[EpochSummary, ...])
    assert_type(loader.statistics(), Statistics)
    log = assert_type(loader.fault_log, FaultLog)
    kinds: dict[str, int] = log.by_kind()
    assert sum(kinds.values()) == log.total
    for record in log:
        assert_type(record, FaultRecord)
    alive: int = loader.active_workers
    print(f"{summary.batches} batches, {len(log)} faults, {alive} workers: {summary.verdict}")


def resume(loader: RobustDataLoader[Tensor], other: RobustDataLoader[Tensor]) -> None:
    """A state goes from one loader to another."""
    state: dict[str, Any] = loader.state_dict()
    other.load_state_dict(state)


def across_ranks() -> tuple[list[int], list[list[int]]]:
    """The samplers are torch's kind of samplers, and take part in states."""
    dataset = Squares()
    indices = ElasticDistributedSampler(dataset, num_replicas=2, rank=0, shuffle=True, seed=1)
    batches = ElasticDistributedBatchSampler(dataset, global_batch_size=8, num_replicas=2, rank=1)
    indices.set_epoch(1)
    return list(indices), list(batches)


def strict(dataset: Dataset[Tensor]) -> DataLoader[Any]:
    """A robust loader goes where torch's is asked for; "auto" is a number of workers."""
    return RobustDataLoader(
        dataset, num_workers="auto", faults="raise", recovery=None, memory=None, telemetry=None, transport="pipe"
    )


def measure() -> None:
    """The three functions."""
    report = assert_type(tune(Squares(), batch_size=4, candidates=[0, 1], seconds=0.5, progress=False), TuningReport)
    best: int = report.best
    found = assert_type(compare(Squares(), batches=2, batch_size=4, num_workers=0), Comparison)
    identical: bool = found.identical
    host = assert_type(doctor(num_workers=1), HostReport)
    print(best, identical, host.ok)


def refuse() -> str:
    """Errors carry facts."""
    try:
        FaultPolicy(burst=-1)
    except OptionError as error:
        return f"{error.field}: {error.value}"
    except FaultBudgetError as error:
        return str(error.faults)
    except WorkerCrashError as error:
        return f"{error.signal} {error.hint}"
    raise AssertionError


def main(folder: Path) -> None:
    """All of it."""
    counter = Counter()
    with no_leaks():
        loader = make_loader(counter, folder)
        killer = WorkerKiller(iter(loader), seed=1)
        assert_type(killer.kills, int)
        print(train(loader))
        inspect(loader)
        resume(loader, make_loader(Counter(), folder))
        print(len(list(RobustDataLoader(Stream(), batch_size=4))))
        del loader, killer
    print(across_ranks()[0][:2], type(strict(Squares())).__name__, refuse(), counter.finished)
    measure()


if __name__ == "__main__":
    import sys

    main(Path(sys.argv[1]))
