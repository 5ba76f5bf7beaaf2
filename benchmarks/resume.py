"""What does it cost to save a loader's state, and to load one?

Question: how long does ``state_dict()`` take for a dataset of 100 million samples, and how many indices a second does a
resumed epoch walk through? Method: a dataset that only has a length; the state is taken in mid-epoch, 200 times, the
median is told; the walk is ``iter(loader)`` after ``load_state_dict()`` with no worker, minus the same for a state at
the epoch's beginning (torch's own permutation, which every epoch costs). Trap: the permutation dominates a shuffled
resume; it is told apart. Rerun: ``python benchmarks/resume.py [samples]``.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch

from robustloader import RobustDataLoader


class Lengthy:
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def begin(loader: Any, state: dict[str, Any]) -> float:
    """Seconds that ``iter()`` takes."""
    loader.load_state_dict(state)
    begun = time.perf_counter()
    iter(loader)
    return time.perf_counter() - begun


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000_000
    rows: dict[str, Any] = {"torch": torch.__version__}
    loader = RobustDataLoader(Lengthy(size), 64)
    iterator = iter(loader)
    next(iterator)
    times = []
    for _ in range(200):
        begun = time.perf_counter()
        state = loader.state_dict()
        times.append(time.perf_counter() - begun)
    rows["samples"], rows["state_ms"] = size, 1e3 * statistics.median(times)
    rows["state_bytes"] = len(json.dumps(state))
    walked = min(size, 5_000_000) // 64
    for name, options in {"sequential": {}, "shuffled": {"shuffle": True}}.items():
        for faults in ("raise", "replace"):
            loader = RobustDataLoader(Lengthy(walked * 64 + 64), 64, faults=faults, **options)  # type: ignore[arg-type]
            iterator = iter(loader)
            state = loader.state_dict()
            base = begin(loader, state)
            walk = begin(loader, state | {"delivered": walked})
            rows[f"{name}, faults={faults}"] = {
                "permutation_s": base,
                "indices_per_s": walked * 64 / max(1e-9, walk - base),
                "indices_per_s_in_all": walked * 64 / walk,
            }
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
