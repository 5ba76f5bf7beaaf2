"""What does it cost to save a loader's state, and to load one? And is what follows the same, wherever it was taken?

Question: how long does ``state_dict()`` take for a dataset of 100 million samples, what does a sampler that keeps its
own state cost a batch, and how many indices a second does a resumed epoch walk through? Method: a dataset that only has
a length; the state is taken in mid-epoch, 200 times, the median is told; the walk is ``iter(loader)`` after
``load_state_dict()`` with no worker, minus the same for a state at the epoch's beginning (torch's own permutation,
which every epoch costs), the median of five; null where there is nothing to walk through. Trap: the permutation
dominates a shuffled resume; it is told apart.

``--cases`` runs the property of ``tests/state/test_stop_anywhere.py`` (stopped anywhere, twice, gone on with another
number of workers: the stream of an unbroken run) in pieces with a seed each, and goes on where it stopped: call it
again until it says that all are done.

Rerun: ``python -m benchmarks.resume --out benchmarks/results/resume.json``, then the same with ``--cases 1000``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from torch.utils.data import Sampler

from benchmarks import machine
from robustloader import ElasticDistributedSampler, RobustDataLoader

ROOT = Path(__file__).resolve().parent.parent
PROPERTY = "tests/state/test_stop_anywhere.py"
PIECE = 90
"""Cases of one piece: some tests of the property."""


class Lengthy:
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


class Heavy(Sampler[int]):
    """Keeps ``kept`` numbers in its state, as a sampler does that stores its permutation."""

    def __init__(self, size: int, kept: int) -> None:
        self.size, self.order, self.place = size, list(range(kept)), 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Any:
        for place in range(self.size):
            self.place = place
            yield place

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.place = state["order"], state["place"]


def begin(loader: Any, state: dict[str, Any]) -> float:
    """Seconds that ``iter()`` takes."""
    loader.load_state_dict(state)
    begun = time.perf_counter()
    iter(loader)
    return time.perf_counter() - begun


def state_cost(size: int, **options: Any) -> dict[str, Any]:
    """What taking a state costs in mid-epoch."""
    loader = RobustDataLoader(Lengthy(size), 64, **options)  # type: ignore[arg-type]
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    times = []
    for _ in range(200):
        begun = time.perf_counter()
        state = loader.state_dict()
        times.append(time.perf_counter() - begun)
    return {"samples": size, "state_ms": 1e3 * statistics.median(times), "state_bytes": len(json.dumps(state))}


def batch_cost(**options: Any) -> float:
    """Microseconds that a batch takes, without workers; the median of five runs of 2,000 batches."""
    times = []
    for _ in range(5):
        iterator = iter(RobustDataLoader(Lengthy(1_000_000), 8, **options))  # type: ignore[arg-type]
        next(iterator)
        begun = time.perf_counter()
        for _ in itertools.islice(iterator, 2000):
            pass
        times.append((time.perf_counter() - begun) / 2000)
    return 1e6 * statistics.median(times)


def walk_cost(size: int, faults: Any, **options: Any) -> dict[str, Any]:
    """How fast the indices of an epoch are walked through."""
    walked = size // 64
    loader = RobustDataLoader(Lengthy(walked * 64 + 64), 64, faults=faults, **options)  # type: ignore[arg-type]
    iterator = iter(loader)
    state = loader.state_dict()
    del iterator
    base = statistics.median(begin(loader, state) for _ in range(5))
    walk = statistics.median(begin(loader, state | {"delivered": walked}) for _ in range(5))
    return {
        "permutation_s": base,
        "indices_per_s": walked * 64 / (walk - base) if walk > base + 1e-3 else None,
        "indices_per_s_in_all": walked * 64 / walk,
    }


def measure(size: int) -> dict[str, Any]:
    """All of it but the property."""
    sampler = ElasticDistributedSampler(range(min(size, 5_000_000)), 8, 3)
    walked = min(size, 5_000_000)
    return {
        "state": state_cost(size),
        "state, ElasticDistributedSampler": state_cost(len(sampler.dataset), sampler=sampler),
        "batch_us": {
            "torch's sampler": batch_cost(),
            "a small state of its own": batch_cost(sampler=Heavy(1_000_000, 0)),
            "a million numbers in its state": batch_cost(sampler=Heavy(1_000_000, 1_000_000)),
        },
        "walk": {
            f"{name}, faults={faults}": walk_cost(walked, faults, **options)
            for name, options in {"sequential": {}, "shuffled": {"shuffle": True}}.items()
            for faults in ("raise", "replace")
        },
    }


def go_on(told: dict[str, Any], cases: int, seconds: float) -> dict[str, Any]:
    """Run further pieces of the property, for about so many seconds; of other code, from the first."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD:robustloader"]
    code = {"tree": subprocess.run(git, capture_output=True, text=True).stdout.strip(), "wanted": cases}
    if {name: told.get(name) for name in code} != code:
        commit = machine.describe()["commit"]
        told = {**code, "commit": commit, "cases": 0, "seconds": 0.0, "failed_seeds": []}
    begun = time.monotonic()
    while told["cases"] < cases and time.monotonic() - begun < seconds:
        seed, piece_begun = told["cases"] // PIECE, time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "-x", PROPERTY, f"--hypothesis-seed={seed}"]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "ROBUSTLOADER_RESUME_CASES": str(PIECE), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            told["failed_seeds"].append(seed)
            print(done.stdout[-4000:], file=sys.stderr)
        told["cases"] += PIECE
        told["seconds"] = round(told["seconds"] + time.monotonic() - piece_begun, 1)
    return told


def main(arguments: list[str] | None = None) -> int:
    """Measure, or go on with the property; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=100_000_000, help="length of the dataset")
    parser.add_argument("--cases", type=int, help="go on with the property until it has seen so many")
    parser.add_argument("--seconds", type=float, default=3600, help="how long to go on this time")
    parser.add_argument("--out", type=Path, help="the result file, gone on with where it exists")
    options = parser.parse_args(arguments)
    result = json.loads(options.out.read_text()) if options.out and options.out.exists() else {"schema": 1}
    if options.cases:
        result["stop anywhere"] = go_on(result.get("stop anywhere", {}), options.cases, options.seconds)
    else:
        result.update(machine.describe(), **measure(options.samples))
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    print(text)
    return int(bool(result.get("stop anywhere", {}).get("failed_seeds")))


if __name__ == "__main__":
    sys.exit(main())
