"""Runs as JSON lines, made up: long ones, many ranks, faults and deaths, without a training job."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEGIN = 1_780_000_000.0


def envelope(event: str, at: float, rank: str | None, epoch: int = 0, **fields: Any) -> dict[str, Any]:
    labels = {} if rank is None else {"rank": rank}
    head = {"schema": 1, "event": event, "time": at, "epoch": epoch, "labels": labels, "pid": 4_242, "host": "node-a"}
    return {**head, **fields}


def started(at: float, rank: str | None) -> dict[str, Any]:
    versions = {"python": "3.11.2", "torch": "2.13.0", "robustloader": "0.1.0"}
    return envelope("RunStarted", at, rank, versions=versions, cpus=16)


def fault(at: float, rank: str | None, epoch: int, index: Any, kind: str = "exception", **more: Any) -> dict[str, Any]:
    record = {
        "kind": kind,
        "index": index,
        "error_type": "PIL.UnidentifiedImageError" if kind == "exception" else "",
        "message": f"cannot identify image file '/data/train/{index}.jpg'",
        "traceback": f'Traceback (most recent call last):\n  File "dataset.py", line 41, in __getitem__\n    {index}',
        "action": "replaced",
        **more,
    }
    return envelope("SampleFaulted", at, rank, epoch, fault=record)


def made_run(
    *,
    rank: str | None = "0",
    epochs: int = 12,
    epoch_s: float = 120.0,
    step_s: float = 0.1,
    wait_s: float = 0.02,
    workers: int = 8,
    every_s: float = 5.0,
    seed: int = 0,
    faults: int = 40,
    deaths: int = 4,
    finish: bool = True,
) -> Iterator[dict[str, Any]]:
    """One rank's lines in order of time: progress every ``every_s``, faults and deaths at random times."""
    chance = random.Random(f"{seed} {rank}")
    at = BEGIN
    yield started(at, rank)
    ill = {chance.randrange(epochs) for _ in range(deaths)} if deaths else set()
    for epoch in range(epochs):
        state = {"batches": 0, "samples": 0, "bytes": 0, "elapsed_s": 0.0, "wait_s": 0.0, "step_s": 0.0, "faults": 0}
        lanes = [
            {
                "worker_id": w,
                "tasks": 0,
                "samples": 0,
                "busy_s": 0.0,
                "load_p95_s": 0.2,
                "peak_rss_bytes": 0,
                "restarts": 0,
            }
            for w in range(workers)
        ]
        alive, first_wait = workers, 2.5
        state["wait_s"] = first_wait
        state["elapsed_s"] = first_wait
        at += first_wait
        dying = chance.randrange(workers) if epoch in ill else None
        steps = max(1, round(epoch_s / every_s))
        for step in range(steps):
            span = epoch_s / steps
            slow = 1 + 0.6 * chance.random() * (1 + (dying is not None and step > steps // 3))
            wait = wait_s * slow
            batches = max(1, int(span / (step_s + wait)))
            state["batches"] += batches
            state["samples"] += 64 * batches
            state["bytes"] += 64 * batches * 602_112
            state["elapsed_s"] += span
            state["wait_s"] += span * wait / (step_s + wait)
            state["step_s"] += span * step_s / (step_s + wait)
            at += span
            for lane in lanes:
                share = min(0.98, 0.45 + 0.3 * chance.random() + 0.2 * (lane["worker_id"] == 3))
                lane["busy_s"] += span * share
                lane["tasks"] += batches // workers
                lane["samples"] += 64 * (batches // workers)
                lane["peak_rss_bytes"] = int(2**20 * (610 + 8 * lane["worker_id"] + 40 * step / steps + 3 * epoch))
            if chance.random() < faults / (epochs * steps):
                index = f"n{chance.randrange(12):08d}_{chance.randrange(9)}"
                kind = chance.choice(["exception", "exception", "exception", "collate", "undecodable"])
                state["faults"] += 1
                yield fault(at - 1, rank, epoch, index, kind)
            if dying is not None and step == steps // 3:
                yield envelope(
                    "WorkerCrashed", at - 0.5, rank, epoch, worker_id=dying, incarnation=0, worker_pid=77, exitcode=-11,
                    signal="SIGSEGV", cause="crash", phase="item", index=81_220, tasks=2,
                )  # fmt: skip
                yield envelope(
                    "WorkerRestarted", at, rank, epoch, worker_id=dying, incarnation=1, worker_pid=78, waited_s=0.0
                )
                lanes[dying]["restarts"] += 1
            if dying is not None and step == 2 * steps // 3 and alive > 2:
                alive -= 1
                yield envelope("PoolShrunk", at, rank, epoch, workers=alive, reason="the restart credit is spent")
            statistics = {
                "epoch": epoch,
                **state,
                "wait_fraction": state["wait_s"] / (state["wait_s"] + state["step_s"]),
                "samples_per_s": state["samples"] / state["elapsed_s"],
                "active_workers": alive,
            }
            told = [dict(lane) for lane in lanes]
            if step < steps - 1 or not finish:
                yield envelope(
                    "EpochProgressed", at, rank, epoch, loader=0, statistics=statistics, ready=3, workers=told
                )
        if not finish and epoch == epochs - 1:
            return
        if alive < workers:
            yield envelope("PoolHealed", at, rank, epoch, workers=workers)
        elapsed, loop = state["elapsed_s"], state["wait_s"] + state["step_s"]
        summary = {
            **state,
            "epoch": epoch,
            "complete": True,
            "duration_s": elapsed,
            "wait_fraction": state["wait_s"] / loop,
            "samples_per_s": state["samples"] / elapsed,
            "batches_per_s": state["batches"] / elapsed,
            "bytes_per_s": state["bytes"] / elapsed,
            "crashes": int(dying is not None),
            "restarts": int(dying is not None),
            "workers_requested": workers,
            "workers_at_end": alive,
            "peak_worker_bytes": max(lane["peak_rss_bytes"] for lane in lanes),
            "workers": [dict(lane) for lane in lanes],
            "verdict": "balanced" if state["wait_s"] / loop < 0.2 else "input-bound",
            "advice": "More workers.",
            "first_wait_s": first_wait,
        }
        yield envelope("EpochFinished", at, rank, epoch, loader=0, summary=summary)
        at += 0.2 if every_s > 1 else 0.05


def write_run(path: Path, **options: Any) -> Path:
    """``made_run`` as a file."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in made_run(**options))
    return path


def main(folder: str) -> None:
    """Write the runs that the screenshots show."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    write_run(root / "run.jsonl")
    write_run(root / "slow.jsonl", wait_s=0.05, rank=None)
    write_run(root / "long.jsonl", epochs=1_000, epoch_s=1_800, every_s=120, deaths=90, faults=900)
    for rank in range(4):
        write_run(
            root / f"rank{rank}.jsonl",
            rank=str(rank),
            wait_s=0.012 + 0.02 * (rank == 2),
            step_s=0.11 - 0.02 * (rank == 2),
        )
    for rank in range(64):
        write_run(root / f"many{rank}.jsonl", rank=str(rank), epochs=6)
    (root / "empty.jsonl").write_text("")


if __name__ == "__main__":
    main(sys.argv[1])
