"""How does throughput depend on num_workers, prefetch_factor and batch size, for seven kinds of dataset?

Question: where is the best number of workers, what does a crossing cost, what does oversubscription do; do ``tune()``
    and ``num_workers="auto"`` find it; and does the simulator tell the same curves?
Method: each kind with 0 to 8 workers, through this project's loader and torch's; every setting has a turn in each
    round, in an order that turns round (torch's loader in every other round). A turn is a fresh loader; as many batches
    of each worker as it may have under way are not counted, then whole turns of the workers are. Prefetch 1 to 8 and
    three batch sizes with the best number of workers. The simulator gets load times, processor times on both sides of a
    crossing, wake-ups and contention, which the training process alone and one or two workers show in turns of their
    own, spread over the same rounds; its error is |simulated − measured| / measured. ``tune()`` has a fifth of the time
    that the sweep of this loader took. Its choice and ``num_workers="auto"`` then meet the sweep's best in further
    rounds: the ratio of two turns of one round counts, not a rate against one that was measured minutes before. Of
    ``"auto"`` one epoch of ten seconds is measured: its last third, and the whole of it. Its workers are counted ten
    times a second.
Trap: turns follow each other on one machine that may slow down meanwhile: compare within a row. On a machine that
    does something else too, the figures mean nothing.
Rerun: ``python -m benchmarks.num_workers --out benchmarks/results/num_workers.json --plot docs/images`` (20 minutes on
    a quiet machine of two cores), or ``--quick`` for a form that proves that it runs, or ``--simulate`` after a change
    of the simulator only. Then
    ``python -m benchmarks.workers_page benchmarks/results/num_workers.json docs/guide/num-workers.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch.utils.data import DataLoader

from benchmarks import machine
from benchmarks.harness import chosen, close, note, turn_order
from benchmarks.memory import shared_memory, tree_memory
from benchmarks.stats import paired_ratio
from benchmarks.tables import write_result
from benchmarks.thresholds import Verdict, judge_study
from benchmarks.workloads import WORKLOADS, Workload
from robustloader import MemoryPolicy, RobustDataLoader, TelemetryPolicy, tune
from robustloader.decisions.processors import Scheduler
from robustloader.decisions.simulator import LoadTime, Setup, simulate
from robustloader.decisions.tuning import OVERSUBSCRIPTION
from robustloader.events import Event, TaskLoaded
from robustloader.system.limits import usable_cpus

KINDS = {
    "in memory": "tiny",
    "cheap transform": "paced",
    "heavy transform": "cpu",
    "JPEG files": "jpeg",
    "latency-bound": "io",
    "large samples": "image-f32",
    "skewed": "skewed",
}
"""The seven kinds, as workloads of ``workloads.py``."""

LOADERS = {"robustloader": RobustDataLoader, "torch": DataLoader}
OURS = "robustloader"
ENDLESS = 1 << 30
PREFETCH = 2
"""torch's default, and this loader's."""

KEPT_TIMES = 500
"""So many load times of each kind go to the simulator, and into the result."""

TUNE_SHARE = 0.85
"""``tune()`` is told so much of the time it may have: its last turn and the ends of its workers come on top."""

LOOK_EVERY_S = 0.1
"""How often the workers of ``"auto"`` are counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How much is measured.

    Attributes:
        workers: the numbers that are swept.
        rounds: of the sweep; torch's loader has every other one.
        turn_s: how long a turn counts.
        prefetch, batch_factors: swept with the best number of workers; factors of the workload's batch size.
        side_rounds: rounds of these two sweeps.
        matches: rounds in which the choices meet the sweep's best.
        match_s: how long a turn counts there.
        epochs: as many of these rounds have an epoch of ``num_workers="auto"`` too.
        auto_s: how long it is.
        simulated: batches per simulated epoch.
    """

    workers: tuple[int, ...] = tuple(range(9))
    rounds: int = 5
    turn_s: float = 0.4
    prefetch: tuple[int, ...] = (1, 2, 4, 8)
    batch_factors: tuple[float, ...] = (0.25, 1, 4)
    side_rounds: int = 3
    matches: int = 5
    match_s: float = 1.0
    epochs: int = 2
    auto_s: float = 10.0
    simulated: int = 2000


FULL = Form()
QUICK = Form(
    workers=(0, 1, 2),
    rounds=1,
    turn_s=0.05,
    prefetch=(1, 2),
    batch_factors=(1,),
    side_rounds=1,
    matches=1,
    match_s=0.1,
    epochs=1,
    auto_s=1.0,
    simulated=200,
)


# --- one turn ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """What a turn has shown.

    Attributes:
        batches_per_s: counted after the warm-up.
        first_batch_ms: from ``iter()``.
        trainer_ms, workers_ms: processor time a batch, of the training process and of all workers together.
        memory_mb: of the whole process tree, at the end; None where nobody asked.
    """

    batches_per_s: float
    first_batch_ms: float
    trainer_ms: float
    workers_ms: float
    memory_mb: float | None = None


def turn(
    workload: Workload,
    folder: Path,
    kind: str,
    workers: int,
    seconds: float,
    *,
    others: int | None = None,
    sinks: tuple[Any, ...] = (),
    device: torch.device | None = None,
    **options: Any,
) -> Turn:
    """A fresh loader's steady state.

    Args:
        kind: one of :data:`LOADERS`.
        workers: 0 loads in this process.
        seconds: how long to count.
        others: bytes of shared memory that others use on this machine; None for not looking at memory.
        sinks: of telemetry, for this project's loader.
        device: batches are copied there.
        options: of the loader.
    """
    gc.collect()
    begun = time.perf_counter()
    batches = iter(make(workload, folder, kind, workers, sinks=sinks, **options))
    move = (lambda batch: to_device(batch, device)) if device is not None else _leave
    try:
        move(next(batches))
        first_batch_ms = 1e3 * (time.perf_counter() - begun)
        under_way = options.get("prefetch_factor", PREFETCH) + 3
        for _ in range(max(2, workers * under_way)):
            move(next(batches))
        pids = children()
        before = processor_s(pids)
        begun, own, count = time.perf_counter(), time.process_time(), 0
        while True:
            for _ in range(max(1, workers) * workload.granule):
                move(next(batches))
                count += 1
            elapsed = time.perf_counter() - begun
            if elapsed >= seconds:
                break
        own = time.process_time() - own
        return Turn(
            batches_per_s=count / elapsed,
            first_batch_ms=first_batch_ms,
            trainer_ms=1e3 * own / count,
            workers_ms=1e3 * (processor_s(pids) - before) / count,
            memory_mb=None if others is None else tree_memory(psutil.Process(), others) / 1e6,
        )
    finally:
        close(batches)


def make(
    workload: Workload, folder: Path, kind: str, workers: Any, *, sinks: tuple[Any, ...] = (), **options: Any
) -> Any:
    """A loader whose epoch does not end while it is measured."""
    ours = {"telemetry": TelemetryPolicy(log_epochs=False, sinks=sinks)} if kind == OURS else {}
    if workers == 0:
        options.pop("prefetch_factor", None)
    size = options.pop("batch_size", workload.batch_size)
    return LOADERS[kind](
        workload.make(ENDLESS // workload.batch_size, folder),
        batch_size=size,
        num_workers=workers,
        collate_fn=workload.collate,
        multiprocessing_context="fork" if workers != 0 else None,
        **options,
        **ours,
    )


def _leave(batch: Any) -> Any:
    return batch


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch whose tensors are on the device, or on their way."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return [to_device(value, device) for value in batch] if isinstance(batch, list | tuple) else batch


def children() -> list[int]:
    """Process ids of this process's children that have not ended."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.append(child.pid)
    return found


def processor_s(pids: Iterable[int]) -> float:
    """Processor time of these processes' threads, from ``/proc/PID/task/TID/schedstat``, which counts nanoseconds."""
    total = 0
    for pid in pids:
        for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError, ValueError):
                total += int(path.read_text().split()[0])
    return total * 1e-9


@dataclasses.dataclass(frozen=True)
class Ticks:
    """Processor time so far, in seconds: of this machine, of it by this process and its children that have ended, and
    what the host took away. From ``/proc/stat``, which counts hundredths."""

    elapsed: float
    busy: float
    own: float
    steal: float

    @classmethod
    def read(cls) -> Ticks:
        """As it is now."""
        machine, own = psutil.cpu_times(), os.times()
        busy = machine.user + machine.nice + machine.system + machine.irq + machine.softirq
        return cls(time.monotonic() * os.cpu_count(), busy, sum(own[:4]), machine.steal)

    def since(self) -> dict[str, float]:
        """Shares of the machine's processors since then: of other processes, and of the host."""
        now = Ticks.read()
        elapsed = now.elapsed - self.elapsed
        others = max(0.0, now.busy - self.busy - (now.own - self.own))
        return {"others": others / elapsed, "steal": (now.steal - self.steal) / elapsed}


# --- sweeps -----------------------------------------------------------------------------------------------------------


def sweep(
    workload: Workload,
    folder: Path,
    settings: Sequence[dict[str, Any]],
    rounds: int,
    seconds: float,
    *,
    between: Callable[[], None] = lambda: None,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Each setting with each loader, interleaved; rows with medians and every round, and the seconds spent on each
    loader.

    Args:
        between: called once in each round.
    """
    others = shared_memory()
    turns: dict[tuple[str, int], list[Turn]] = {}
    spent = dict.fromkeys(LOADERS, 0.0)
    for round_number in range(rounds):
        kinds = list(LOADERS) if round_number % 2 == 0 else [OURS]
        for kind, number in turn_order([(kind, n) for n in range(len(settings)) for kind in kinds], round_number):
            begun = time.perf_counter()
            look = others if not round_number else None
            made = turn(workload, folder, kind, seconds=seconds, others=look, **settings[number])
            spent[kind] += time.perf_counter() - begun
            turns.setdefault((kind, number), []).append(made)
        between()
    rows = [
        {**setting, **{kind: summary(turns[kind, number]) for kind in LOADERS}}
        for number, setting in enumerate(settings)
    ]
    return rows, spent


def summary(turns: Sequence[Turn]) -> dict[str, Any]:
    """Medians, and the rate of every round."""
    middle = {
        name: statistics.median(getattr(one, name) for one in turns)
        for name in ("batches_per_s", "first_batch_ms", "trainer_ms", "workers_ms")
    }
    return {**middle, "memory_mb": turns[0].memory_mb, "rounds": [one.batches_per_s for one in turns]}


# --- the simulator ----------------------------------------------------------------------------------------------------


class _Times:
    """A sink that keeps how long each batch took to load."""

    wants_tasks = True

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def receive(self, event: Event) -> None:
        if isinstance(event, TaskLoaded):
            self.times_s.append((event.end_ns - event.begin_ns) * 1e-9)


@dataclasses.dataclass(kw_only=True)
class Calibration:
    """What the simulator is told: turns of the training process alone, of one worker, of one that may not load ahead,
    and of two. Of one worker one more is watched by a sink, which costs time, and gives load times only.

    Attributes:
        alone: turns without workers.
        one, two: turns with so many workers.
        shallow: turns with one worker and ``prefetch_factor=1``: worker and training process sleep in turn.
        times_s: load times, as the worker saw them.
    """

    workload: Workload
    folder: Path
    seconds: float
    alone: list[Turn] = dataclasses.field(default_factory=list)
    one: list[Turn] = dataclasses.field(default_factory=list)
    two: list[Turn] = dataclasses.field(default_factory=list)
    shallow: list[Turn] = dataclasses.field(default_factory=list)
    times_s: list[float] = dataclasses.field(default_factory=list)

    def measure(self) -> None:
        """Once more."""
        for turns, workers, prefetch in (
            (self.alone, 0, PREFETCH),
            (self.one, 1, PREFETCH),
            (self.shallow, 1, 1),
            (self.two, 2, PREFETCH),
        ):
            turns.append(turn(self.workload, self.folder, OURS, workers, self.seconds, prefetch_factor=prefetch))
        watch = _Times()
        turn(self.workload, self.folder, OURS, 1, self.seconds, sinks=(watch,))
        self.times_s += watch.times_s[PREFETCH + 2 :]

    def facts(self) -> dict[str, float]:
        """Seconds a batch, but for ``contention``, a share.

        * ``alone_s``: loading without workers.
        * ``load_s``, ``wait_s``: loading in a worker; of it, what is more than its processor time.
        * ``send_s``: the worker's processor time beyond loading.
        * ``cross_s``: the training process's processor time.
        * ``wake_s``: half of what is left of a period in which each has waited for the other.
        * ``contention``: how much more processor time a batch takes with two workers at once.
        """
        worker_s = 1e-3 * statistics.median(one.workers_ms for one in self.one)
        load_s = statistics.fmean(self.times_s)
        wait_s = max(0.0, load_s - worker_s)
        idle_s = statistics.median(
            1 / one.batches_per_s - 1e-3 * (one.trainer_ms + one.workers_ms) for one in self.shallow
        )
        return {
            "alone_s": 1 / statistics.median(one.batches_per_s for one in self.alone),
            "load_s": load_s,
            "wait_s": wait_s,
            "send_s": max(0.0, worker_s - load_s),
            "cross_s": 1e-3 * statistics.median(one.trainer_ms for one in self.one),
            "wake_s": max(0.0, (idle_s - wait_s) / 2),
            "contention": max(0.0, 1e-3 * statistics.median(two.workers_ms for two in self.two) / worker_s - 1),
        }


def simulated(
    facts: Mapping[str, float],
    times_s: Sequence[float],
    workers: Sequence[int],
    *,
    cores: float,
    batches: int,
) -> dict[int, float]:
    """Batches per second, by workers."""
    share = 1 - facts["wait_s"] / facts["load_s"]
    load = LoadTime.observed(tuple(times_s), work_fraction=share)
    alone = LoadTime(mean_s=facts["alone_s"])
    rates = {}
    for number in workers:
        setup = Setup(
            workers=number,
            load=load if number else alone,
            cores=cores,
            scheduler=Scheduler.linux(int(cores)) if float(cores).is_integer() else None,
            prefetch_factor=PREFETCH,
            **{name: facts[name] for name in ("send_s", "cross_s", "wake_s", "contention")},
        )
        rates[number] = simulate(setup, batches).batches_per_s
    return rates


def validation(
    facts: Mapping[str, float],
    times_s: Sequence[float],
    by_workers: Sequence[Mapping[str, Any]],
    *,
    cores: float,
    batches: int,
) -> dict[str, Any]:
    """The simulated curve, and how far it is from the one that was measured, as they stand in the result."""
    ours = {row["workers"]: row[OURS]["batches_per_s"] for row in by_workers}
    rates = simulated(facts, times_s, tuple(ours), cores=cores, batches=batches)
    return {
        "simulated": {str(number): rate for number, rate in rates.items()},
        "simulator_error": {str(number): abs(rate - ours[number]) / ours[number] for number, rate in rates.items()},
    }


# --- the choices ------------------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """What a look at an epoch of ``"auto"`` shows: how many workers there are, the share of memory that is free, and
    of the machine's processors the seconds so far, and those spent working."""

    at_s: float
    workers: int
    free: float
    processors_s: float
    busy_s: float

    @classmethod
    def now(cls, at_s: float) -> Look:
        """As it is ``at_s`` seconds after the first batch."""
        ticks = Ticks.read()
        return cls(at_s, len(children()), free_share(), ticks.elapsed, ticks.busy)


def least_idle(looks: Sequence[Look], cores: int) -> float | None:
    """The smallest share of the processors that was idle while there were so many workers, before there were more: of
    those times that there was a worker for each of ``cores`` already; None where there never came more."""
    shares, since = [], looks[0]
    for before, look in itertools.pairwise(looks):
        if look.workers == before.workers:
            continue
        if look.workers > before.workers >= cores and before.processors_s > since.processors_s:
            shares.append(1 - (before.busy_s - since.busy_s) / (before.processors_s - since.processors_s))
        since = look
    return min(shares, default=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Epoch:
    """An epoch of ``num_workers="auto"``.

    Attributes:
        batches_per_s: in its last third.
        whole_batches_per_s: from the first batch on.
        first_workers, last_workers, most_workers: processes at its first batch, at its end, and at most.
        least_idle: see :func:`least_idle`.
        least_free: smallest share of memory that was free.
    """

    batches_per_s: float
    whole_batches_per_s: float
    first_workers: int
    last_workers: int
    most_workers: int
    least_idle: float | None
    least_free: float


def auto_epoch(workload: Workload, folder: Path, seconds: float) -> Epoch:
    """One epoch of so many seconds."""
    gc.collect()
    batches = iter(make(workload, folder, OURS, "auto"))
    try:
        next(batches)
        begun = time.perf_counter()
        looks = [Look.now(0.0)]
        count = late = 0
        late_s = seconds  # when the last third began
        while True:
            next(batches)
            count += 1
            elapsed = time.perf_counter() - begun
            if not late and elapsed >= seconds * 2 / 3:
                late, late_s = count, elapsed
            if elapsed >= looks[-1].at_s + LOOK_EVERY_S:
                looks.append(Look.now(elapsed))
            if elapsed >= seconds and late and count > late:
                break
        workers = [look.workers for look in looks]
        return Epoch(
            batches_per_s=(count - late) / (elapsed - late_s),
            whole_batches_per_s=count / elapsed,
            first_workers=workers[0],
            last_workers=workers[-1],
            most_workers=max(workers),
            least_idle=least_idle(looks, usable_cpus()),
            least_free=min(look.free for look in looks),
        )
    finally:
        close(batches)


def free_share() -> float:
    """Share of the memory that is free."""
    memory = psutil.virtual_memory()
    return memory.available / memory.total


def choices(
    workload: Workload, folder: Path, form: Form, *, best: int, tuned: int, ceiling: int
) -> tuple[dict[str, Any], ...]:
    """What ``tune()`` chose, and ``"auto"``, against the sweep's best, in the same rounds."""
    rates: dict[str, list[float]] = {"best": [], "tuned": []}
    epochs: list[Epoch] = []
    for number in range(form.matches):
        for name in turn_order(["best", "tuned", "auto"], number):
            if name == "auto":
                if number < form.epochs:
                    epochs.append(auto_epoch(workload, folder, form.auto_s))
            elif name == "best" or tuned != best:
                made = turn(workload, folder, OURS, best if name == "best" else tuned, form.match_s)
                rates[name].append(made.batches_per_s)
    # The same setting is as fast as itself: nothing to measure.
    ratio = paired_ratio(rates["tuned"], rates["best"]) if tuned != best else paired_ratio([1.0], [1.0])
    paired = rates["best"][: len(epochs)]
    return (
        {"of_the_best": ratio._asdict(), "rounds": rates},
        {
            "of_the_best": paired_ratio([one.batches_per_s for one in epochs], paired)._asdict(),
            "whole_of_the_best": paired_ratio([one.whole_batches_per_s for one in epochs], paired)._asdict(),
            "epoch_s": form.auto_s,
            "most_workers": max(one.most_workers for one in epochs),
            "ceiling": ceiling,
            "allowed": OVERSUBSCRIPTION * usable_cpus(),
            "least_idle": min((one.least_idle for one in epochs if one.least_idle is not None), default=None),
            "least_free": min(one.least_free for one in epochs),
            "headroom": MemoryPolicy().headroom_fraction,
            "epochs": [dataclasses.asdict(one) for one in epochs],
        },
    )


# --- the study --------------------------------------------------------------------------------------------------------


def study(kind: str, folder: Path, form: Form) -> dict[str, Any]:
    """Everything about one kind."""
    workload = WORKLOADS[KINDS[kind]]
    begun, ticks = time.perf_counter(), Ticks.read()
    calibration = Calibration(workload=workload, folder=folder, seconds=form.turn_s)
    settings = [{"workers": number} for number in form.workers]
    by_workers, spent = sweep(workload, folder, settings, form.rounds, form.turn_s, between=calibration.measure)
    facts, times_s = calibration.facts(), [round(time_s, 7) for time_s in calibration.times_s[:KEPT_TIMES]]
    curve = validation(facts, times_s, by_workers, cores=usable_cpus(), batches=form.simulated)
    ours = {row["workers"]: row[OURS]["batches_per_s"] for row in by_workers}
    best = max(ours, key=lambda number: ours[number])
    some = max(1, best)
    note(f"{kind}: best {best}, {time.perf_counter() - begun:.0f} s")
    prefetch, _ = sweep(
        workload,
        folder,
        [{"workers": some, "prefetch_factor": number} for number in form.prefetch],
        form.side_rounds,
        form.turn_s,
    )
    sizes, _ = sweep(
        workload,
        folder,
        [{"workers": some, "batch_size": size} for size in batch_sizes(workload, form)],
        form.side_rounds,
        form.turn_s,
    )
    note(f"{kind}: prefetch_factor and batch sizes, {time.perf_counter() - begun:.0f} s")
    allowed_s = spent[OURS] / 5
    tuning = time.perf_counter()
    report = tune(
        workload.make(ENDLESS // workload.batch_size, folder),
        batch_size=workload.batch_size,
        seconds=TUNE_SHARE * allowed_s,
        progress=False,
        collate_fn=workload.collate,
        multiprocessing_context="fork",
    )
    tuning = time.perf_counter() - tuning
    tuned, auto = choices(workload, folder, form, best=best, tuned=report.best, ceiling=report.ceiling)
    note(
        f"{kind}: tune() {report.best}, auto {auto['epochs'][-1]['last_workers']}, {time.perf_counter() - begun:.0f} s"
    )
    return {
        "what": workload.what,
        "batch_size": workload.batch_size,
        "workers": by_workers,
        "prefetch": prefetch,
        "batch_sizes": sizes,
        "pin_memory": pinning(workload, folder, some, form),
        "calibration": facts,
        "load_times_s": times_s,
        **curve,
        "best": best,
        "tuned": {**tuned, "workers": report.best, "took_s": tuning, "sweep_s": spent[OURS], "reason": report.reason},
        "auto": auto,
        "disturbance": ticks.since(),
    }


def batch_sizes(workload: Workload, form: Form) -> list[int]:
    """Ascending, the workload's own among them."""
    return sorted({max(1, int(workload.batch_size * factor)) for factor in form.batch_factors})


def pinning(workload: Workload, folder: Path, workers: int, form: Form) -> list[dict[str, Any]] | None:
    """With and without ``pin_memory``, batches copied to the device; None without one."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return None
    settings = [{"workers": workers, "pin_memory": pins, "device": device} for pins in (False, True)]
    rows, _ = sweep(workload, folder, settings, form.side_rounds, form.turn_s)
    return [{**row, "device": str(device)} for row in rows]


def draw(result: dict[str, Any], folder: Path) -> None:
    """Two figures: throughput against workers, one panel per kind; and what prefetch_factor and batch size do."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    plt.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "none"})
    folder.mkdir(parents=True, exist_ok=True)
    kinds = result["kinds"]
    colours = {OURS: "#2166ac", "torch": "#ee4c2c"}
    figure, panels = plt.subplots(2, 4, figsize=(14, 6.5), layout="constrained")
    for axes, (kind, made) in zip(panels.flat, kinds.items(), strict=False):
        numbers = [row["workers"] for row in made["workers"]]
        for name, colour in colours.items():
            rates = [row[name]["batches_per_s"] for row in made["workers"]]
            low = [rate - min(row[name]["rounds"]) for rate, row in zip(rates, made["workers"], strict=True)]
            high = [max(row[name]["rounds"]) - rate for rate, row in zip(rates, made["workers"], strict=True)]
            axes.errorbar(numbers, rates, yerr=(low, high), marker="o", capsize=2, color=colour, label=name)
        axes.plot(numbers, [made["simulated"][str(n)] for n in numbers], ":", color="black", label="simulated")
        axes.axvline(made["tuned"]["workers"], color="#4d9221", linewidth=6, alpha=0.25, label="tune()")
        worst = max(made["simulator_error"].values())
        axes.set_title(f"{kind} (simulator off by up to {worst:.0%})", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in list(panels.flat)[len(kinds) :]:
        axes.set_visible(False)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="lower right", bbox_to_anchor=(0.97, 0.2))
    figure.supxlabel("num_workers")
    figure.supylabel("batches/s")
    _finish(figure, panels.flat, folder / "num-workers.svg")

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for kind, made in kinds.items():
        usual = next(row for row in made["prefetch"] if row["prefetch_factor"] == PREFETCH)[OURS]["batches_per_s"]
        places = [row["prefetch_factor"] for row in made["prefetch"]]
        left.plot(places, [row[OURS]["batches_per_s"] / usual for row in made["prefetch"]], marker="o", label=kind)
        sizes = made["batch_sizes"]
        usual = next(row for row in sizes if row["batch_size"] == made["batch_size"])
        usual = usual[OURS]["batches_per_s"] * made["batch_size"]
        places = [row["batch_size"] / made["batch_size"] for row in sizes]
        rates = [row[OURS]["batches_per_s"] * row["batch_size"] / usual for row in sizes]
        right.plot(places, rates, marker="o", label=kind)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    left.set_xlabel("prefetch_factor")
    left.set_ylabel("throughput, × that with prefetch_factor=2")
    right.set_xlabel("batch size, × the usual one")
    right.set_ylabel("samples/s, × those with the usual one")
    left.set_ylim(bottom=0)
    right.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8)
    _finish(figure, (left, right), folder / "num-workers-batches.svg")


def _finish(figure: Any, panels: Iterable[Any], path: Path) -> None:
    from matplotlib import pyplot as plt

    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def simulate_anew(result: dict[str, Any]) -> None:
    """The simulated curves, from what was measured for them."""
    form = QUICK if result["form"] == "quick" else FULL
    for made in result["kinds"].values():
        made |= validation(
            made["calibration"],
            made["load_times_s"],
            made["workers"],
            cores=result["machine"]["usable_cores"],
            batches=form.simulated,
        )
    result["simulated_at"] = machine.describe()["commit"]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write, draw, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="0 to 2 workers, one short round: proves that it runs")
    parser.add_argument("--only", help="kinds, with commas between: " + ", ".join(KINDS))
    parser.add_argument("--out", type=Path, default=Path("build/num_workers.json"))
    parser.add_argument("--plot", type=Path, metavar="FOLDER")
    parser.add_argument("--keep", action="store_true", help="kinds in the result that are not measured now stay there")
    parser.add_argument(
        "--simulate", action="store_true", help="measure nothing: only the result's simulated curves anew"
    )
    options = parser.parse_args(argv)
    if options.simulate:
        if not options.out.exists():
            parser.error(f"{options.out} does not exist: measure first, or name a result with --out")
        result = json.loads(options.out.read_text())
        simulate_anew(result)
        finish(result, judged(result, options.out), options.out, options.plot)
        return
    kinds = chosen(parser, options.only, KINDS)
    torch.set_num_threads(1)
    begun = time.monotonic()
    result = {
        "schema": 1,
        "form": "quick" if options.quick else "full",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "took_s": 0.0,
        **machine.describe(),
        "kinds": {},
        "verdicts": [],
    }
    before = (
        json.loads(options.out.read_text()) if options.keep and options.out.exists() else {"kinds": {}, "took_s": 0}
    )
    if before.get("form", result["form"]) != result["form"]:
        parser.error(f"{options.out} is a result of the {before['form']} form: nothing of it can be kept")
    kept = {kind: made for kind, made in before["kinds"].items() if kind not in kinds}
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        for kind in kinds:
            kept[kind] = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
            kept[kind] |= study(kind, Path(name), QUICK if options.quick else FULL)
            result["kinds"] = {kind: kept[kind] for kind in KINDS if kind in kept}
            result["took_s"] = round(before["took_s"] + time.monotonic() - begun, 1)
            verdicts = judged(result, options.out)
    finish(result, verdicts, options.out, options.plot)


def judged(result: dict[str, Any], path: Path) -> list[Verdict]:
    """Judge and write what there is."""
    verdicts = list(judge_study(result["kinds"]))
    result["verdicts"] = [verdict.to_dict() for verdict in verdicts]
    write_result(result, path)
    return verdicts


def finish(result: dict[str, Any], verdicts: Sequence[Verdict], path: Path, plots: Path | None) -> None:
    """Draw, and say how it went."""
    if plots:
        draw(result, plots)
    print("\n".join(map(str, verdicts)))
    short = sum(verdict.passed is False for verdict in verdicts)
    print(f"{len(verdicts)} lines, {short} fall short; {path}, {result['took_s']:.0f} s")


if __name__ == "__main__":
    main()
