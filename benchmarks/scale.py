"""What would happen with 8 to 256 workers, and on thousands of ranks? Simulated, not measured.

Question: where is the knee for a rank with many processors; how many jobs does a loader without recovery lose,
    given the mean time between deaths of a worker; and what do the deaths cost where it recovers?
Method: ``robustloader.decisions.simulator``, which its unit tests hold against closed forms. A batch takes 0.4 s to
    load, 1 % of them ten times as long; half of that is work for 32 processors; crossing takes 2 ms, a step 20 ms.
    What a death costs is the difference between a run with deaths and one without, same seed, over the number of
    deaths. A job needs all of its ranks, and they step together: each death stalls all.
Trap: nothing here was measured on such a machine. Deaths are independent and exponential; real ones come in groups.
Rerun: ``python -m benchmarks.scale --out benchmarks/results/scale.json --plot docs/images`` (a minute).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import write_result
from robustloader.decisions.simulator import LoadTime, Setup, simulate, survive

WORKERS = (8, 16, 32, 64, 128, 256)
RANKS = (8, 64, 512, 4096)
WORKERS_PER_RANK = 8
DEATH_EVERY_H = (1e3, 1e4, 1e5, 1e6)
"""Mean hours between the deaths of one worker."""

JOB_H = 72.0
RESTART_S = 1.0
LOAD = LoadTime(mean_s=0.4, kind="skewed", slow_fraction=0.01, slow_factor=10, work_fraction=0.5)
BASE = Setup(workers=8, load=LOAD, cores=32, cross_s=0.002, step_s=0.02, start_s=0.5)


def knee(batches: int) -> list[dict[str, Any]]:
    """Throughput of one rank, by workers and lookahead."""
    rows = []
    for workers in WORKERS:
        for prefetch in (1, 2, 8):
            setup = dataclasses.replace(BASE, workers=workers, prefetch_factor=prefetch)
            found = simulate(setup, batches, seed=1)
            rows.append(
                {
                    "workers": workers,
                    "prefetch_factor": prefetch,
                    "batches_per_s": found.batches_per_s,
                    "wait_fraction": found.wait_s / found.duration_s,
                    "first_batch_s": found.first_batch_s,
                }
            )
    return rows


def stall_per_death_s(batches: int) -> dict[str, Any]:
    """What a death costs a rank whose loader recovers: with as many workers as keep the trainer just busy, and with
    deaths far more often than anybody sees them, so that there are enough to count."""
    setup = dataclasses.replace(BASE, workers=WORKERS_PER_RANK, step_s=0.08, prefetch_factor=2)
    calm = simulate(setup, batches, seed=1)
    stormy = simulate(dataclasses.replace(setup, death_every_s=600.0, restart_s=RESTART_S), batches, seed=1)
    return {
        "deaths": stormy.deaths,
        "stall_s": max(0.0, stormy.duration_s - calm.duration_s) / max(1, stormy.deaths),
        "restart_s": RESTART_S,
        "wait_fraction_without_deaths": calm.wait_s / calm.duration_s,
    }


def survival(jobs: int, stall_s: float) -> list[dict[str, Any]]:
    """Jobs lost without recovery, and hours lost with it."""
    rows = []
    for ranks in RANKS:
        for hours in DEATH_EVERY_H:
            # Where a job has thousands of deaths a few jobs tell as much.
            expected = ranks * WORKERS_PER_RANK * JOB_H / hours
            found = survive(
                ranks=ranks,
                workers=WORKERS_PER_RANK,
                death_every_s=hours * 3600,
                duration_s=JOB_H * 3600,
                stall_s=stall_s,
                jobs=max(20, min(jobs, int(1e5 / max(1.0, expected)))),
            )
            rows.append({"ranks": ranks, "death_every_h": hours, **dataclasses.asdict(found)})
    return rows


def draw(result: dict[str, Any], folder: Path) -> None:
    """Two figures."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "none"})
    folder.mkdir(parents=True, exist_ok=True)
    figure, (speed, lost) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for prefetch in (1, 2, 8):
        rows = [row for row in result["knee"] if row["prefetch_factor"] == prefetch]
        label = f"prefetch_factor={prefetch}"
        speed.plot([row["workers"] for row in rows], [row["batches_per_s"] for row in rows], marker="o", label=label)
    speed.axhline(
        1 / (BASE.step_s + BASE.cross_s), color="black", linestyle="--", linewidth=0.8, label="step + crossing"
    )
    speed.set_xscale("log", base=2)
    speed.set_xticks(WORKERS, [str(number) for number in WORKERS])
    speed.set_ylim(bottom=0)
    speed.set_xlabel("workers of a rank")
    speed.set_ylabel("batches/s (simulated)")
    for hours in DEATH_EVERY_H:
        rows = [row for row in result["survival"] if row["death_every_h"] == hours]
        share = [100 * row["lost_expected"] for row in rows]
        (line,) = lost.plot([row["ranks"] for row in rows], share, label=f"a worker dies every {hours:,.0f} h")
        lost.plot(
            [row["ranks"] for row in rows],
            [100 * row["lost"] / row["jobs"] for row in rows],
            "o",
            color=line.get_color(),
        )
    lost.set_xscale("log", base=2)
    lost.set_xticks(RANKS, [f"{number:,}" for number in RANKS])
    lost.set_xlabel(f"ranks, {WORKERS_PER_RANK} workers each")
    lost.set_ylabel(f"jobs of {JOB_H:.0f} h lost without recovery, %")
    for axes in (speed, lost):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "scale.svg", metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate, write, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few batches and jobs")
    parser.add_argument("--out", type=Path, default=Path("build/scale.json"))
    parser.add_argument("--plot", type=Path, metavar="FOLDER")
    options = parser.parse_args(argv)
    batches, jobs = (500, 100) if options.quick else (20_000, 1000)
    stall = stall_per_death_s(5 * batches)
    result = {
        "simulated": True,
        "form": "quick" if options.quick else "full",
        "base": dataclasses.asdict(BASE),
        "job_h": JOB_H,
        "workers_per_rank": WORKERS_PER_RANK,
        "knee": knee(batches),
        "stall": stall,
        "survival": survival(jobs, stall["stall_s"]),
    }
    write_result(result, options.out)
    if options.plot:
        draw(result, options.plot)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
