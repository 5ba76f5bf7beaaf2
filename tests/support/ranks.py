"""Training programs of several ranks: ``torchrun ... -m tests.support.ranks NAME FOLDER OPTIONS``.

Each rank trains in step with the others (an ``all_reduce`` per batch, over gloo on the loopback interface) and leaves
what it has to tell as ``FOLDER/NAME-RANK.json``.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.utils.data import DistributedSampler

from robustloader import (
    ElasticDistributedSampler,
    EpochSummary,
    FaultPolicy,
    RobustDataLoader,
    TelemetryPolicy,
    WorkerCrashed,
    merge_summaries,
)
from tests.support.datasets import Damaged, Death, Numbers
from tests.support.listener import Listener

SAMPLERS = {"torch": DistributedSampler, "elastic": ElasticDistributedSampler}


class Uneven(Numbers):
    """``bad`` samples raise on rank 0; on rank 1, loading sample ``deadly`` kills its worker once."""

    def __init__(self, size: int, rank: int, folder: Path, *, bad: range, deadly: int, nbytes: int = 8) -> None:
        super().__init__(size)
        self.bad = set(bad) if rank == 0 else set()
        self.deadly = deadly if rank == 1 else -1
        folder.mkdir()
        self.death = Death(folder, "SIGKILL")
        self.width = nbytes // 8

    def load(self, index: int) -> Any:
        if index == self.deadly:
            self.death.strike()
        if index in self.bad:
            raise Damaged(f"cannot decode {index}")
        return torch.full((self.width,), index)


class Group:
    """The process group, and how many collectives its ranks have issued."""

    def __init__(self) -> None:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.calls = 0

    @property
    def counted(self) -> int:
        """What the process group itself has counted: whoever issued a collective, it is in here."""
        return int(dist.group.WORLD._get_sequence_number_for_group())  # type: ignore[union-attr]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        dist.all_reduce(tensor)
        return tensor

    def gather(self, thing: Any) -> list[Any]:
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things


def tell(folder: Path, name: str, rank: int, **facts: Any) -> None:
    (folder / f"{name}-{rank}.json").write_text(json.dumps(facts))


def epoch_in_step(group: Group, loader: Any, label: int) -> list[list[int]]:
    """An epoch, with a collective in each step that only comes out right where all ranks are at the same one."""
    told = []
    for step, batch in enumerate(loader):
        sum_of_steps = int(group.sum(torch.tensor([1000 * label + step])))
        assert sum_of_steps == group.size * (1000 * label + step), "a rank is at another step"
        told.append([int(number) for number in batch[:, 0]])
    return told


def steps(folder: Path, size: int, batch_size: int, workers: int, nbytes: int = 8) -> None:
    """Equal step counts, with each sampler and each way to deal with bad samples."""
    group = Group()
    facts: dict[str, Any] = {"cases": {}, "alone": 0}
    if group.rank == 0:  # an epoch, a state and a summary that no other rank takes part in
        loader: Any = RobustDataLoader(Numbers(20), 4, num_workers=1, sampler=DistributedSampler(range(20)))
        batches = iter(loader)
        facts["alone"] = len(next(batches)) + sum(map(len, batches))
        loader.load_state_dict(loader.state_dict())
        assert loader.summary().samples == facts["alone"]
    group.sum(torch.zeros(1))
    for number, (name, action) in enumerate((name, action) for name in SAMPLERS for action in ("replace", "skip")):
        share = range(0, size, group.size)  # rank 0 reads these in order: a whole batch of it is bad, and a few more
        bad = range(share[batch_size], share[2 * batch_size + 2], group.size)
        dataset = Uneven(
            size, group.rank, folder / f"{number}-{group.rank}", bad=bad, deadly=share[3] + 1, nbytes=nbytes
        )
        listener = Listener()
        loader = RobustDataLoader(
            dataset,
            batch_size,
            sampler=SAMPLERS[name](dataset, shuffle=False),
            num_workers=workers,
            faults=FaultPolicy(action=action, burst=100),  # type: ignore[arg-type]
            telemetry=TelemetryPolicy(sinks=(listener,)),
        )
        calls, counted = group.calls, group.counted
        told = epoch_in_step(group, loader, number)
        ours, all_of_them = group.calls - calls, group.counted - counted
        summary: EpochSummary = loader.summary()
        merged = merge_summaries(group.gather(summary))
        facts["cases"][f"{name}, {action}"] = {
            "batches": told,
            "length": len(loader),
            "deaths": len(listener.of(WorkerCrashed)),
            "faults": summary.faults,
            "collectives": [ours, all_of_them],
            "merged": merged.to_dict(),
            "printed": str(merged),
        }
        group.sum(torch.zeros(1))
    tell(folder, "steps", group.rank, **facts)
    dist.destroy_process_group()


def train(folder: Path, size: int, kill_at: int = -1, stop_at: int = -1, dcp_folder: str = "") -> None:
    """Count every sample as a model is trained: in step, with checkpoints, going on from the last one.

    Args:
        kill_at: rank 1 kills itself before this step, if the job was not restarted yet.
        stop_at: the job saves and ends before this step.
        dcp_folder: where ``torch.distributed.checkpoint`` keeps the checkpoint; files of our own without.
    """
    group, restarts = Group(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    dataset = Uneven(
        size, group.rank, folder / f"data-{group.size}-{group.rank}-{restarts}", bad=range(0), deadly=size // 3
    )
    loader: Any = RobustDataLoader(
        dataset, 2, sampler=ElasticDistributedSampler(dataset, seed=3), num_workers=2, seeding="batch"
    )
    model, latest = torch.zeros(size), folder / "latest.json"
    step = began_at = 0
    if latest.exists():
        saved = json.loads(latest.read_text())
        step = began_at = saved["step"]
        part = f"loader{group.rank % saved['ranks']}"
        if dcp_folder:
            state = {"model": model, part: loader}
            dcp.load(state, checkpoint_id=dcp_folder)
        else:
            state = torch.load(folder / saved["folder"] / f"{part}.pt")
            model = state["model"]
            loader.load_state_dict(state["loader"])

    def save() -> None:
        name = f"step-{step}"
        if dcp_folder:
            dcp.save({"model": model, f"loader{group.rank}": loader}, checkpoint_id=dcp_folder)
        else:
            (folder / name).mkdir(exist_ok=True)
            state = {"model": model, "loader": loader.state_dict()}
            torch.save(state, folder / name / f"loader{group.rank}.pt")
        dist.barrier()
        if group.rank == 0:
            draft = folder / "draft.json"
            draft.write_text(json.dumps({"step": step, "ranks": group.size, "folder": name}))
            draft.replace(latest)
        dist.barrier()

    batches = iter(loader)
    for batch in batches:
        step += 1
        model += group.sum(torch.zeros(size).index_put_((batch[:, 0],), torch.ones(len(batch)), accumulate=True))
        if step % 3 == 0:
            save()
        if step == kill_at and group.rank == 1 and not restarts:
            pids = [process.pid for process in batches._workers]
            (folder / "killed.json").write_text(json.dumps({"pid": os.getpid(), "workers": pids}))
            os.kill(os.getpid(), signal.SIGKILL)
        if step == stop_at:
            save()
            break
    del batches
    tell(
        folder, f"train-{group.size}", group.rank,
        model=model.tolist(), restarts=restarts, began_at=began_at, step=step, crashes=loader.summary().crashes,
    )  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "This DataLoader will create")
    warnings.filterwarnings("ignore", module="torch")
    programs = {"steps": steps, "train": train}
    programs[sys.argv[1]](Path(sys.argv[2]), **json.loads(sys.argv[3]))
