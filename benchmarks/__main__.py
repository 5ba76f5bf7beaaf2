"""How fast do batches cross, compared with everybody else, and how far is it from the limit?

Question: on each workload, how many milliseconds does a batch take, through this project's loader and through its
    peers, and how many would it take if nothing had to cross between processes?
Method: see ``harness.py``. Medians over rounds; ratios from blocks of the same round, with a 95 % bootstrap interval.
Trap: the loop does nothing with a batch. A training step that computes hides what is faster than itself; these are the
    most that a loader can deliver. torch runs with one thread in the training process, so that the limit uses one core.
Rerun: ``make bench`` (everything, results committed) or ``make bench-quick``; ``python -m benchmarks --help``.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.contenders import OURS, WORKERS, peers, policy_pair, silence_peers, telemetry_pair
from benchmarks.harness import Form, chosen, compare, compare_anew, measurement, note, start_up
from benchmarks.memory import peak_of
from benchmarks.tables import write_result
from benchmarks.thresholds import judge
from benchmarks.workloads import WORKLOADS

FULL = Form(rounds=24, block_s=0.25, budget_s=40, fine_starts=14, fine_rounds=6)
QUICK = Form(
    rounds=5, block_s=0.04, budget_s=3, min_rounds=2, min_batches=4, max_batches=500, fine_starts=2, fine_rounds=3
)

SPECIAL = ("first-batch", "memory", "policies", "policies-tiny", "telemetry")
"""Measurements that are not simply a workload; ``first-batch`` yields ``short-epoch`` as well."""

NAMES = (*(name for name in WORKLOADS if name != "paced"), *SPECIAL)


def measure(name: str, form: Form, folder: Path, *, quick: bool, transport: str) -> dict[str, dict[str, Any]]:
    """The measurements that go under a name."""
    pair = {
        "policies": (WORKLOADS["image-u8"], policy_pair),
        "policies-tiny": (WORKLOADS["tiny"], policy_pair),
        "telemetry": (WORKLOADS["paced"], telemetry_pair),
    }
    if name in pair:
        workload, make = pair[name]
        two = make(transport)
        results = compare_anew(workload, two, form, folder)
        what = f"{two[0].name} against {two[1].name}: {workload.what}"
        return {name: measurement(what, "ms a batch", results, two[0].name)}
    if name == "first-batch":
        workload = WORKLOADS["tiny"]
        firsts, epochs = start_up(workload, peers(transport), folder, rounds=form.rounds)
        return {
            name: measurement("iter() to the first batch", "ms", firsts, OURS, per_second=False),
            "short-epoch": measurement("an epoch of 10 batches", "ms", epochs, OURS, per_second=False),
        }
    if name == "memory":
        return {name: measure_memory(quick=quick, transport=transport)}
    workload = WORKLOADS[name]
    results = compare(workload, peers(transport), form, folder, rounds=form.rounds)
    return {name: measurement(workload.what, "ms a batch", results, OURS)}


def measure_memory(*, quick: bool, transport: str) -> dict[str, Any]:
    """Peaks of every loader, in turn; in the quick form, of torch's and this project's."""
    rounds, batches, many = (1, 24, 2) if quick else (4, 120, 4)
    results: dict[str, list[float] | str] = {}
    before: dict[str, float] = {}
    for _ in range(rounds):
        for contender in peers(transport)[:many]:
            so_far = results.setdefault(contender.name, [])
            if isinstance(so_far, str):
                continue
            peak = peak_of(contender.name, "image-f32", batches=batches, transport=transport)
            if isinstance(peak, str):
                results[contender.name] = peak
            else:
                so_far.append(peak.peak_mb)
                before[contender.name] = peak.before_mb
    what = f"peak of the process tree: {WORKLOADS['image-f32'].what}"
    made = measurement(what, "MB", results, OURS, per_second=False)
    for name, megabytes in before.items():
        made["loaders"][name]["before_mb"] = megabytes
    return made


def run(names: tuple[str, ...], form: Form, out: Path, *, quick: bool, transport: str) -> dict[str, Any]:
    """Measure what is named; the result as plain JSON, written after each measurement: a run that is cut short keeps
    what it had."""
    torch.set_num_threads(1)
    raise_descriptor_limit()
    begun = time.monotonic()
    measurements: dict[str, Any] = {}
    result = {
        "schema": 1,
        "form": "quick" if quick else "full",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "took_s": 0.0,
        "workers": WORKERS,
        "transport": transport,
        **machine.describe(),
        "measurements": measurements,
        "verdicts": [],
    }
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        for number, name in enumerate(names, 1):
            note(f"[{number}/{len(names)}] {name}, {time.monotonic() - begun:.0f} s so far")
            home = Path(folder) / name
            home.mkdir()
            for key, made in measure(name, form, home, quick=quick, transport=transport).items():
                measurements[key] = made
                note(describe(key, made))
            result["took_s"] = round(time.monotonic() - begun, 1)
            result["verdicts"] = [verdict.to_dict() for verdict in judge(measurements)]
            write_result(result, out)
    return result


def raise_descriptor_limit() -> None:
    """torch keeps a descriptor open for each tensor of a batch; let it have them."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def describe(name: str, made: dict[str, Any]) -> str:
    """A measurement in a few lines."""
    lines = []
    for loader, figures in made["loaders"].items():
        if "cannot" in figures:
            lines.append(f"    {loader:14} cannot: {figures['cannot']}")
            continue
        ratio = made["ratios"].get(loader)
        told = f"  {ratio['median']:6.2f} × ours ({ratio['low']:.3f} to {ratio['high']:.3f})" if ratio else ""
        quartiles = f"{figures['low']:.3f} to {figures['high']:.3f}"
        lines.append(f"    {loader:14} {figures['median']:9.3f} {made['unit']} ({quartiles}){told}")
    if made["of_limit"] is not None:
        lines.append(f"    {made['of_limit']:.2f} of the limit is reached")
    return "\n".join([f"  {name}: {made['what']}", *lines])


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the result, print the verdicts; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds of everything, in less than two minutes")
    parser.add_argument("--only", metavar="NAMES", help=f"some of: {','.join(NAMES)}")
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"), help="where the result goes")
    parser.add_argument("--rounds", type=int, help="rounds, whatever the form says")
    parser.add_argument("--transport", default="auto", help="ours: auto, arena or pipe (default: auto)")
    parser.add_argument("--strict", action="store_true", help="exit status 1 where something falls short")
    options = parser.parse_args(arguments)
    names = chosen(parser, options.only, NAMES)
    form = QUICK if options.quick else FULL
    if options.rounds:
        form = Form(**{**vars(form), "rounds": options.rounds, "fine_starts": options.rounds})
    with warnings.catch_warnings():
        silence_peers()
        result = run(names, form, options.out, quick=options.quick, transport=options.transport)
    verdicts = list(judge(result["measurements"]))
    print("\n".join(map(str, verdicts)))
    short = sum(verdict.passed is False for verdict in verdicts)
    print(f"{len(verdicts)} lines, {short} fall short; {options.out}, {result['took_s']:.0f} s")
    return 1 if short and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
