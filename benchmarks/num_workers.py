"""How does throughput depend on num_workers, prefetch_factor and batch size, for seven kinds of dataset?

Question: where is the best number of workers, what does a crossing cost, what does oversubscription do, and how
    near are ``tune()``'s choice and the simulator to what is measured?
Method: each kind with 0 to 8 workers, through this project's loader and torch's; every setting has a turn in each
    round, in an order that turns round. Prefetch 1 to 8 and three batch sizes with the best number of workers. A
    turn is a fresh loader; a batch of each worker, and two at least, are not counted, then whole turns of the
    workers are. The simulator gets the load time, processor time and crossing time that one process shows, and its
    error is |simulated − measured| / measured. ``tune()`` has a fifth of the time that the sweep of this loader
    took.
Trap: turns follow each other on one machine that may slow down meanwhile: compare within a row. On a machine that
    does something else too, the figures mean nothing.
Rerun: ``python -m benchmarks.num_workers --out benchmarks/results/num_workers.json --plot docs/images`` (half an
    hour on a quiet machine), or ``--quick`` for a form that proves that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks import machine
from benchmarks.harness import close, note, turn_order
from benchmarks.workloads import WORKLOADS, Workload
from robustloader import RobustDataLoader, TelemetryPolicy, tune
from robustloader.decisions.simulator import LoadTime, Setup, simulate
from robustloader.system.limits import usable_cpus
from robustloader.tuning.measure import Workbench

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
ENDLESS = 1 << 20


def turn(workload: Workload, folder: Path, kind: str, workers: int, seconds: float, **options: Any) -> float:
    """Batches per second of a fresh loader."""
    ours = {"telemetry": TelemetryPolicy(log_epochs=False)} if kind == "robustloader" else {}
    if not workers:
        options.pop("prefetch_factor", None)
    size = options.pop("batch_size", workload.batch_size)
    batches = iter(
        LOADERS[kind](
            workload.make(ENDLESS // workload.batch_size, folder),
            batch_size=size,
            num_workers=workers,
            collate_fn=workload.collate,
            multiprocessing_context="fork" if workers else None,
            **options,
            **ours,
        )
    )
    try:
        for _ in range(max(2, workers)):
            next(batches)
        begun, count = time.perf_counter(), 0
        while True:
            for _ in range(max(1, workers) * workload.granule):
                next(batches)
                count += 1
            elapsed = time.perf_counter() - begun
            if elapsed >= seconds:
                return count / elapsed
    finally:
        close(batches)


def sweep(
    workload: Workload, folder: Path, settings: Sequence[dict[str, Any]], rounds: int, seconds: float
) -> list[Any]:
    """Each setting with each loader, interleaved; rows with medians and every round."""
    entrants = [(kind, number) for number in range(len(settings)) for kind in LOADERS]
    rates: dict[tuple[str, int], list[float]] = {entrant: [] for entrant in entrants}
    spent = dict.fromkeys(LOADERS, 0.0)
    for round_number in range(rounds):
        for kind, number in turn_order(entrants, round_number):
            begun = time.perf_counter()
            rate = turn(workload, folder, kind, seconds=seconds, **settings[number])
            spent[kind] += time.perf_counter() - begun
            rates[kind, number].append(rate)
    return [
        {
            **setting,
            **{
                kind: {"batches_per_s": statistics.median(rates[kind, n]), "rounds": rates[kind, n]} for kind in LOADERS
            },
            "spent_s": spent,
        }
        for n, setting in enumerate(settings)
    ]


def simulated(workload: Workload, folder: Path, workers: Sequence[int]) -> tuple[dict[str, float], dict[int, float]]:
    """What one process shows, and the batches per second that the simulator makes of it."""
    dataset = workload.make(ENDLESS // workload.batch_size, folder)
    options = {"collate_fn": workload.collate, "multiprocessing_context": "fork"}
    bench = Workbench(dataset, batch_size=workload.batch_size, step_s=0.0, loader_kwargs=options)
    probe = bench.probe(1.0)
    load_s = max(probe.load_s, 1e-6)
    load = LoadTime(mean_s=load_s, work_fraction=probe.cpu_s / load_s)
    rates = {}
    for number in workers:
        setup = Setup(workers=number, load=load, cores=usable_cpus(), cross_s=probe.cross_s)
        rates[number] = simulate(setup, 2000).batches_per_s
    return {"load_s": probe.load_s, "cpu_s": probe.cpu_s, "cross_s": probe.cross_s}, rates


def study(
    kind: str, folder: Path, *, workers: Sequence[int], rounds: int, seconds: float, quick: bool
) -> dict[str, Any]:
    """Everything about one kind."""
    workload = WORKLOADS[KINDS[kind]]
    probe, expected = simulated(workload, folder, workers)
    begun = time.perf_counter()
    by_workers = sweep(workload, folder, [{"workers": number} for number in workers], rounds, seconds)
    swept_s = by_workers[0]["spent_s"]["robustloader"]
    note(f"{kind}: {time.perf_counter() - begun:.0f} s")
    ours = {row["workers"]: row["robustloader"]["batches_per_s"] for row in by_workers}
    best = max(ours, key=lambda number: ours[number])
    some = max(1, best)
    prefetch = [{"workers": some, "prefetch_factor": number} for number in ((1, 2) if quick else (1, 2, 4, 8))]
    sizes = [
        {"workers": some, "batch_size": max(1, int(workload.batch_size * factor))}
        for factor in ((1,) if quick else (0.25, 1, 4))
    ]
    report = tune(
        workload.make(ENDLESS // workload.batch_size, folder),
        batch_size=workload.batch_size,
        seconds=max(1.0, swept_s / 5),
        progress=False,
        collate_fn=workload.collate,
        multiprocessing_context="fork",
    )
    errors = {number: abs(expected[number] - ours[number]) / ours[number] for number in workers}
    return {
        "what": workload.what,
        "probe": probe,
        "workers": by_workers,
        "prefetch": sweep(workload, folder, prefetch, rounds, seconds),
        "batch_size": sweep(workload, folder, sizes, rounds, seconds),
        "simulated": {str(number): rate for number, rate in expected.items()},
        "simulator_error": {str(number): error for number, error in errors.items()},
        "best": best,
        "tuned": {
            "best": report.best,
            "of_the_best": ours[report.best] / ours[best] if report.best in ours else None,
            "seconds": max(1.0, swept_s / 5),
            "sweep_s": swept_s,
        },
    }


def draw(result: dict[str, Any], folder: Path) -> None:
    """One panel per kind: both loaders, the simulator, tune()'s choice."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "none"})
    folder.mkdir(parents=True, exist_ok=True)
    kinds = result["kinds"]
    figure, panels = plt.subplots(2, 4, figsize=(14, 6.5), layout="constrained")
    for axes, (kind, made) in zip(panels.flat, kinds.items(), strict=False):
        numbers = [row["workers"] for row in made["workers"]]
        for name, colour in (("robustloader", "#2166ac"), ("torch", "#ee4c2c")):
            rates = [row[name]["batches_per_s"] for row in made["workers"]]
            axes.plot(numbers, rates, marker="o", color=colour, label=name)
        axes.plot(numbers, [made["simulated"][str(n)] for n in numbers], ":", color="black", label="simulated")
        axes.axvline(made["tuned"]["best"], color="#4d9221", linewidth=6, alpha=0.25, label="tune()")
        worst = max(made["simulator_error"].values())
        axes.set_title(f"{kind} (simulator off by up to {worst:.0%})", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    for axes in list(panels.flat)[len(kinds) :]:
        axes.set_visible(False)
    panels.flat[0].legend(frameon=False, fontsize=8)
    figure.supxlabel("num_workers")
    figure.supylabel("batches/s")
    figure.savefig(folder / "num-workers.svg", metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="0 to 2 workers, one short round: proves that it runs")
    parser.add_argument("--only", help="kinds, with commas between: " + ", ".join(KINDS))
    parser.add_argument("--out", type=Path, default=Path("build/num_workers.json"))
    parser.add_argument("--plot", type=Path, metavar="FOLDER")
    options = parser.parse_args(argv)
    chosen = options.only.split(",") if options.only else list(KINDS)
    unknown = set(chosen) - set(KINDS)
    if unknown:
        parser.error(f"no such kind: {', '.join(sorted(unknown))}")
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    torch.set_num_threads(1)
    workers, rounds, seconds = ((0, 1, 2), 1, 0.05) if options.quick else (tuple(range(9)), 5, 1.0)
    result: dict[str, Any] = {
        "form": "quick" if options.quick else "full",
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine.describe(),
        "kinds": {},
    }
    with tempfile.TemporaryDirectory() as name:
        for kind in chosen:
            made = study(kind, Path(name), workers=workers, rounds=rounds, seconds=seconds, quick=options.quick)
            result["kinds"][kind] = made
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        draw(result, options.plot)
    for kind, made in result["kinds"].items():
        print(
            f"{kind}: best {made['best']} workers, tune() {made['tuned']['best']} "
            f"({made['tuned']['of_the_best'] or 0:.0%} of the best), simulator off by up to "
            f"{max(made['simulator_error'].values()):.0%}"
        )


if __name__ == "__main__":
    main()
