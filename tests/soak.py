"""Kill workers at random moments for as long as asked, over random configurations, and look for anything wrong.

Question: does a run of days lose, double or reorder a sample, convict a healthy one, or leak?
Method: cases are drawn from a seed: kind of dataset (streams are read again after a death, or have a state), start
method, workers, prefetch, order, seeding, transport, sizes from bytes to megabytes, how long a batch loads, persistent
workers over epochs, fixed pools and pools that shrink to nothing. A thread kills workers at seeded intervals. Each
batch is checked whole, byte by byte; after each case, processes, descriptors, threads and ``/dev/shm`` are what they
were; over all cases the trainer's own memory must not grow. With ``--convict``: four long runs, of 10 ms and of 200 ms
a sample, map-style and of a stream, with a kill a second; no sample may be blamed in the end, and no share of a stream
may end early.
Trap: which instruction a kill hits is the machine's timing, so a seed repeats the cases and not the moments.
Rerun: ``python -m tests.soak --seconds 1800 --seed 7 -o RESULT.json``; exit status 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import itertools
import logging
import random
import statistics
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import psutil
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from benchmarks.machine import describe
from benchmarks.tables import write_result
from robustloader import RecoveryPolicy, RobustDataLoader, ShardEnded, TelemetryPolicy, WorkerCrashed
from robustloader.policies import Transport
from robustloader.testing import WorkerKiller, no_leaks

TRANSPORTS = tuple(name for name in get_args(Transport) if name != "auto")
STUCK_S = 120.0
KILLS_S = 5.0
"""An epoch is spared from then on: a stream that is read again after each kill might else never end."""

SAMPLES_A_KILL = 16
"""At least so many samples are loaded between two kills: one that is hit six times in a row counts as poison."""

GROWTH_BYTES = 64 << 20
"""How much more memory of its own the trainer may have late in the run than early on."""


@dataclass(frozen=True)
class Case:
    """One configuration."""

    kind: str
    method: str
    transport: str
    workers: int
    prefetch: int
    in_order: bool
    seeding: str
    batch_size: int
    payload_bytes: int
    load_s: float
    batches: int
    epochs: int
    persistent: bool
    shrinks: bool
    kill_every_s: float
    seed: int

    @classmethod
    def draw(cls, rng: random.Random) -> Case:
        """Any of them."""
        method = rng.choices(["fork", "forkserver", "spawn"], [0.9, 0.06, 0.04])[0]
        batch_size = rng.choice([1, 2, 4, 16])
        batch_bytes = rng.choice([8, 1 << 10, 1 << 15, 1 << 18, 1 << 21, 1 << 23])
        kind = rng.choice(["map", "map", "iterable", "stateful"])
        slow_start, large = method != "fork", batch_bytes > 1 << 20
        kill_every_s = rng.choice([0.12, 0.25] if large else [0.03, 0.06, 0.12, 0.25])
        load_s = min(rng.choice([0.0, 0.002, 0.01]) / batch_size, kill_every_s / SAMPLES_A_KILL)
        return cls(
            kind=kind,
            method=method,
            transport=rng.choice(TRANSPORTS),
            workers=rng.randint(1, 2 if slow_start else 4),
            prefetch=rng.randint(1, 4),
            in_order=rng.random() < 0.7,
            seeding=rng.choice(["worker", "batch"]),
            batch_size=batch_size,
            payload_bytes=max(8, batch_bytes // batch_size),
            load_s=load_s,
            batches=rng.randint(20, 60) if slow_start or large or kind == "iterable" else rng.randint(60, 400),
            epochs=rng.choice([1, 1, 2, 3]),
            persistent=rng.random() < 0.5,
            shrinks=rng.random() < 0.15,
            kill_every_s=rng.uniform(1.0, 3.0) if slow_start else kill_every_s,
            seed=rng.getrandbits(32),
        )

    @property
    def recovery(self) -> RecoveryPolicy:
        """Enough credit for every kill, or so little that the pool shrinks, at last to nothing."""
        if self.shrinks:
            return RecoveryPolicy(backoff_s=0.01, max_backoff_s=0.1, max_restarts=4)
        return RecoveryPolicy(backoff_s=0.01, max_backoff_s=0.1, max_restarts=1_000_000)


def payload_of(index: int, nbytes: int) -> torch.Tensor:
    """The content of a sample; its first eight bytes are the index."""
    content = torch.full((nbytes // 8,), index * 0x9E3779B1, dtype=torch.int64)
    content[0] = index
    return content


class Samples(Dataset[torch.Tensor]):
    """Map-style; each sample takes ``seconds``."""

    def __init__(self, size: int, nbytes: int, seconds: float = 0.0) -> None:
        self.size, self.nbytes, self.seconds = size, nbytes, seconds

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.seconds:
            time.sleep(self.seconds)
        return payload_of(index, self.nbytes)


class Stream(IterableDataset[torch.Tensor]):
    """Iterable, shared out among the workers by stride; each sample takes ``seconds``."""

    def __init__(self, size: int, nbytes: int, seconds: float = 0.0) -> None:
        self.size, self.nbytes, self.seconds = size, nbytes, seconds

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info is not None else (0, 1)
        for index in range(first, self.size, step):
            if self.seconds:
                time.sleep(self.seconds)
            yield payload_of(index, self.nbytes)


class Stateful(Stream):
    """The same, with an iterator that can tell where it stands and be put there."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info is not None else (0, 1)
        return _Walk(self, first, step)


class _Walk:
    def __init__(self, stream: Stream, first: int, step: int) -> None:
        self.stream, self.index, self.step = stream, first, step

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        if self.index >= self.stream.size:
            raise StopIteration
        if self.stream.seconds:
            time.sleep(self.stream.seconds)
        self.index += self.step
        return payload_of(self.index - self.step, self.stream.nbytes)

    def state_dict(self) -> dict[str, int]:
        return {"index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.index = state["index"]


KINDS = {"map": Samples, "iterable": Stream, "stateful": Stateful}


class Witness:
    """A sink that counts what kills led to."""

    def __init__(self) -> None:
        self.crashes = 0
        self.ended_shards = 0
        self.phases: Counter[str] = Counter()

    def receive(self, event: Any) -> None:
        if isinstance(event, WorkerCrashed):
            self.crashes += 1
            self.phases[event.phase] += 1
        self.ended_shards += isinstance(event, ShardEnded)


class Totals:
    """What a soak has seen so far."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.phases: Counter[str] = Counter()
        self.own_bytes: list[int] = []
        self.failures: list[dict[str, Any]] = []

    def problem(self, case: Any, what: str) -> None:
        """Note what was wrong."""
        print(f"PROBLEM: {what} in {case}", flush=True)
        self.failures.append({"case": asdict(case) if isinstance(case, Case) else case, "problem": what})


def check_batch(batch: torch.Tensor, nbytes: int) -> list[int]:
    """The indices in a batch, every byte of which must be right."""
    indices = batch[:, 0].tolist()
    wanted = torch.stack([payload_of(index, nbytes) for index in indices])
    assert torch.equal(batch, wanted), f"the content of samples {indices} is damaged"
    return indices


def check_epoch(case: Case, delivered: list[list[int]], numbers: list[int]) -> None:
    """Nothing lost, nothing doubled, and in order where order was asked for."""
    size = case.batches * case.batch_size
    counts = Counter(index for batch in delivered for index in batch)
    assert not [index for index, count in counts.items() if count > 1], "samples were delivered twice"
    assert len(counts) == size, f"{size - len(counts)} of {size} samples were lost"
    if case.kind == "map":
        for number, batch in zip(numbers, delivered, strict=True):
            first = number * case.batch_size
            assert batch == list(range(first, first + case.batch_size)), f"batch {number} holds {batch}"
        assert not case.in_order or numbers == list(range(case.batches)), "batches came out of order"
        return
    if case.in_order or case.workers == 1:
        for share in range(case.workers):
            mine = [index for batch in delivered for index in batch if index % case.workers == share]
            assert mine == sorted(mine), f"share {share} came out of order"


@contextlib.contextmanager
def later(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Call something after so long, from another thread, unless the block has ended by then."""
    timer = threading.Timer(seconds, call)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def run_case(case: Case, totals: Totals) -> None:
    """One loader, some epochs of it, and kills all the time."""
    size = case.batches * case.batch_size
    witness = Witness()
    dataset: Any = KINDS[case.kind](size, case.payload_bytes, case.load_s)
    loader: Any = RobustDataLoader(
        dataset,
        batch_size=case.batch_size,
        num_workers=case.workers,
        prefetch_factor=case.prefetch,
        persistent_workers=case.persistent,
        multiprocessing_context=case.method,
        in_order=case.in_order,
        recovery=case.recovery,
        memory=None,
        telemetry=TelemetryPolicy(sinks=(witness,), log_epochs=False),
        seeding=case.seeding,  # type: ignore[arg-type]
        transport=case.transport,  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(case.seed),
    )
    iterator: Any = None
    try:
        for epoch in range(case.epochs):
            faulthandler.dump_traceback_later(STUCK_S, exit=True)
            iterator = iter(loader)
            delivered, numbers = [], []
            with (
                WorkerKiller(iterator, seed=case.seed + epoch, every_s=case.kill_every_s) as killer,
                later(KILLS_S, killer.stop),
            ):
                for batch in iterator:
                    delivered.append(check_batch(batch, case.payload_bytes))
                    numbers.append(iterator.batch_info.index)
            totals.counts["kills"] += killer.kills
            totals.counts["batches"] += len(delivered)
            totals.counts["samples"] += sum(map(len, delivered))
            check_epoch(case, delivered, numbers)
            assert not loader.fault_log, f"healthy samples were blamed: {list(loader.fault_log)}"
            assert not witness.ended_shards
    finally:
        faulthandler.cancel_dump_traceback_later()
        totals.counts["deaths"] += witness.crashes
        totals.phases.update(witness.phases)
        if iterator is not None:
            iterator._shutdown_workers()


def own_bytes() -> int:
    """Memory that belongs to this process alone."""
    gc.collect()
    uss: int = psutil.Process().memory_full_info().uss
    return uss


def soak(seconds: float, seed: int, totals: Totals) -> None:
    """Case after case until the time is over."""
    rng = random.Random(seed)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        case = Case.draw(rng)
        try:
            with no_leaks():
                run_case(case, totals)
        except Exception as error:
            totals.problem(case, f"{type(error).__name__}: {error}")
        totals.counts["cases"] += 1
        totals.counts[f"cases: {case.kind}, {case.method}, {case.transport}"] += 1
        totals.own_bytes.append(own_bytes())
    growth = growth_bytes(totals.own_bytes)
    if growth > GROWTH_BYTES:
        totals.problem("all cases", f"the trainer's own memory grew by {growth >> 20} MiB")


def growth_bytes(readings: list[int]) -> int:
    """From the median of the second quarter (the first one warms up) to that of the last."""
    quarter = len(readings) // 4
    if quarter < 3:
        return 0
    return int(statistics.median(readings[-quarter:]) - statistics.median(readings[quarter : 2 * quarter]))


def convict(seconds: float, seed: int, totals: Totals) -> None:
    """A kill a second for ``seconds``, in four equal parts."""
    for kind, load_s in itertools.product(("map", "stateful"), (0.010, 0.200)):
        name = f"{kind}, {1000 * load_s:.0f} ms a sample"
        witness = Witness()
        loader: Any = RobustDataLoader(
            KINDS[kind](10_000_000, 64, load_s),
            batch_size=4,
            num_workers=2,
            recovery=RecoveryPolicy(max_restarts=1_000_000),
            memory=None,
            telemetry=TelemetryPolicy(sinks=(witness,), log_epochs=False),
        )
        iterator: Any = iter(loader)
        deadline = time.monotonic() + seconds / 4
        delivered = 0
        wanted = {0: 0} if kind == "map" else {0: 0, 1: 1}
        try:
            with WorkerKiller(iterator, seed=seed, every_s=1.0) as killer:
                while time.monotonic() < deadline:
                    faulthandler.dump_traceback_later(STUCK_S, exit=True)
                    for index in check_batch(next(iterator), 64):
                        share = index % len(wanted)
                        assert index == wanted[share], f"sample {index} came instead of {wanted[share]}"
                        wanted[share] += len(wanted)
                        delivered += 1
        except Exception as error:
            totals.problem(name, f"{type(error).__name__}: {error}")
        finally:
            faulthandler.cancel_dump_traceback_later()
            iterator._shutdown_workers()
        totals.counts["kills"] += killer.kills
        totals.counts["deaths"] += witness.crashes
        totals.counts["samples"] += delivered
        totals.counts[f"kills: {name}"] += killer.kills
        totals.counts[f"samples: {name}"] += delivered
        totals.phases.update(witness.phases)
        if len(loader.fault_log) or witness.ended_shards:
            totals.problem(name, f"healthy samples were blamed: {list(loader.fault_log)}")


def result_of(options: argparse.Namespace, setting: dict[str, Any], totals: Totals, wall_s: float) -> dict[str, Any]:
    """Everything, for a file; ``setting`` is where and with what it ran, as it was at the start."""
    readings = totals.own_bytes
    return {
        "what": "convict" if options.convict else "soak",
        **setting,
        "seconds": round(wall_s, 1),
        "seed": options.seed,
        "counts": dict(sorted(totals.counts.items())),
        "phase_at_death": dict(sorted(totals.phases.items())),
        "own_bytes": {"first": readings[0], "last": readings[-1], "growth": growth_bytes(readings)} if readings else {},
        "problems": totals.failures,
        "ok": not totals.failures,
    }


def main(argv: list[str] | None = None) -> int:
    """Run, print, write; the exit status says whether all was well."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long, in seconds")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--convict", action="store_true", help="long runs of slow samples, a kill a second")
    parser.add_argument("-o", "--output", type=Path, help="write the result as JSON")
    options = parser.parse_args(argv)
    setting, totals = describe(":/tests"), Totals()
    logging.getLogger("robustloader").setLevel(logging.ERROR)  # every pool that shrinks, as it must
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        (convict if options.convict else soak)(options.seconds, options.seed, totals)
    result = result_of(options, setting, totals, time.monotonic() - began)
    for name, count in result["counts"].items():
        print(f"{name:40} {count:>12,}")
    print(f"{'problems':40} {len(totals.failures):>12,}")
    if options.output is not None:
        write_result(result, options.output)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
