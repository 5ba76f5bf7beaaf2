"""Several ranks under torchrun, over gloo: they take the same number of steps whatever fails on one of them, and a job
that is killed, or goes on with another number of ranks, trains on every sample exactly once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.watch import await_gone

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 110
"""Two of these fit into what a test may take."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    # Otherwise the ranks of a restarted job find the addresses of those before them in the store (torch 2.13).
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def torchrun(
    ranks: int, name: str, folder: Path, *, restarts: int = 0, prefix: tuple[str, ...] = (), **options: Any
) -> list[Any]:
    """Run a program of ``tests.support.ranks``; what each rank told, or a failed test. Nothing but loopback is used."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    launcher += ["--nproc-per-node", str(ranks), "--max-restarts", str(restarts), "--monitor-interval", "0.2"]
    done = subprocess.run(
        [*prefix, *launcher, "-m", "tests.support.ranks", name, str(folder), json.dumps(options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    told = sorted(folder.glob(f"{name}*-*.json"), key=lambda path: int(path.stem.rpartition("-")[2]))
    ours = [json.loads(path.read_text()) for path in told if name == "steps" or f"-{ranks}-" in path.name]
    assert len(ours) == ranks
    return ours


def check_steps(told: list[Any], *, size: int, batch_size: int) -> None:
    """Equal steps on every rank; the failures were real; and the loader issued no collective."""
    share = -(-size // len(told))
    for case in told[0]["cases"]:
        each = [rank["cases"][case] for rank in told]
        action = case.split()[-1]
        assert {len(rank["batches"]) for rank in each} == {rank["length"] for rank in each} == {share // batch_size}
        for rank in each:
            ours, counted = rank["collectives"]
            assert ours == counted == len(rank["batches"]), case
        widths = {len(batch) for batch in each[0]["batches"]}
        assert widths == {batch_size} if action == "replace" else min(widths) == 1, case
        assert each[0]["faults"] >= batch_size + 2, case
        assert all(len(batch) == batch_size for rank in each[1:] for batch in rank["batches"]), case
        assert [rank["deaths"] for rank in each] == [0, 1] + [0] * (len(told) - 2), case
        assert all(rank["merged"] == each[0]["merged"] for rank in each)
        merged = each[0]["merged"]
        assert (merged["ranks"], merged["in_step"], merged["crashes"]) == (len(told), True, 1)
        assert merged["faults"] == each[0]["faults"] and merged["spreads"]["faults"]["highest_rank"] == 0
        assert f"epoch 0 of {len(told)} ranks: {share // batch_size} batches each" in each[0]["printed"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_all_ranks_take_the_same_steps(tmp_path: Path, ranks: int) -> None:
    """Bad samples on rank 0 (a whole batch of them, too) and a killed worker on rank 1; a collective in every step."""
    told = torchrun(ranks, "steps", tmp_path, size=30 * ranks, batch_size=3, workers=2)
    check_steps(told, size=30 * ranks, batch_size=3)
    assert told[0]["alone"] == 20 // ranks, "rank 0 had an epoch of its own, while the others waited"


@pytest.mark.slow
def test_few_open_files_and_a_small_dev_shm(tmp_path: Path) -> None:
    """256 open files and 64 MiB of /dev/shm, with more than that in batches under way, as in a container."""
    limits = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && ulimit -n 256 && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", limits, "sh")
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("needs root, and unshare(1) to mount a small /dev/shm")
    nbytes = 4 << 20  # batches of 12 MiB; 2 ranks, 2 workers each, 2 batches ahead: 96 MiB
    told = torchrun(2, "steps", tmp_path, prefix=prefix, size=48, batch_size=3, workers=2, nbytes=nbytes)
    check_steps(told, size=48, batch_size=3)


@pytest.mark.slow
def test_a_killed_rank(tmp_path: Path) -> None:
    """torchrun starts all ranks anew; they go on from the last checkpoint, and the model has seen each sample once."""
    told = torchrun(2, "train", tmp_path, restarts=1, size=60, kill_at=8)
    for rank in told:
        assert (rank["restarts"], rank["began_at"], rank["step"]) == (1, 6, 15)
        assert rank["model"] == [1] * 60
    killed = json.loads((tmp_path / "killed.json").read_text())
    assert len(killed["workers"]) == 2
    await_gone([psutil.Process(pid) for pid in killed["workers"] if psutil.pid_exists(pid)])


@pytest.mark.slow
def test_another_number_of_ranks(tmp_path: Path) -> None:
    """Saved by 4 ranks in mid-epoch, through torch.distributed.checkpoint; gone on with by 2."""
    options: dict[str, Any] = {"size": 72, "dcp_folder": str(tmp_path / "checkpoint")}
    first = torchrun(4, "train", tmp_path, stop_at=4, **options)
    assert all(sum(rank["model"]) == 32 and max(rank["model"]) == 1 for rank in first)
    for rank in torchrun(2, "train", tmp_path, **options):
        assert (rank["began_at"], rank["step"]) == (4, 4 + (72 - 32) / (2 * 2))
        assert rank["model"] == [1] * 72
