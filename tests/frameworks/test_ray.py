"""Ray Train: two processes on a real local cluster go on after one of them has been killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from robustloader import RobustLoaderWarning
from tests.support import ray_job

ROOT = Path(__file__).resolve().parents[2]
QUIET = {
    # A slow machine takes its time to start the processes; nothing else of Ray's is needed here.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "280",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
}


def expected(rank: int) -> list[list[Any]]:
    """What an unbroken run gives that rank, as [epoch, step, batch]."""
    loader, steps = ray_job.make_loader(rank), []
    for epoch in range(ray_job.EPOCHS):
        loader.sampler.set_epoch(epoch)
        steps += [[epoch, step, batch.tolist()] for step, batch in enumerate(loader, 1)]
    return steps


@pytest.mark.deadline(300)
def test_a_killed_worker(tmp_path: Path) -> None:
    """Both processes go on from the last checkpoint: taken together, each step was made with the samples, and the
    augmentations, that it would have had. Prepared by Ray, a loader with a distributed sampler stays ours."""
    job = subprocess.Popen(
        [sys.executable, "-m", "tests.support.ray_job", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | QUIET | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])},
    )
    try:
        _, errors = job.communicate()
    finally:
        family = psutil.Process().children(recursive=True)
        for process in family:
            process.kill()
        job.wait()
    assert job.returncode == 0, errors
    assert json.loads((tmp_path / "prepared.json").read_text()) == {
        "distributed": ["RobustDataLoader", True, 2],
        "default": ["DataLoader", False, 2],
    }
    summaries = []
    for rank in range(2):
        *lines, summary = map(json.loads, (tmp_path / f"{rank}.jsonl").read_text().splitlines())
        assert {line[0] for line in lines} == {"first", "again"}
        made = {(epoch, step): [epoch, step, batch] for _, epoch, step, batch in lines}  # a step made twice counts once
        with pytest.warns(RobustLoaderWarning, match="sample 3 was replaced"):
            assert list(made.values()) == expected(rank)
        assert (
            len(lines) <= len(made) + 3
        )  # Ray takes checkpoints with a delay of a step or two, and went on from the last
        summaries.append(summary)
    assert [(replaced, indices) for _, _, replaced, indices in summaries] == [(0, []), (1, [3])]
