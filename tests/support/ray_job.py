"""A training job of two processes on a local Ray cluster: ``python -m tests.support.ray_job FOLDER``.

Each process notes in ``FOLDER/RANK.jsonl`` what it is given; rank 1 kills itself once. ``FOLDER/prepared.json`` says
what Ray makes of loaders.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from robustloader import ElasticDistributedSampler, RobustDataLoader
from tests.support.datasets import note
from tests.support.frameworks import OURS, Flawed

SIZE, BATCH, EPOCHS, DIES_AT = 24, 3, 2, (1, 2)
"""Four steps an epoch on each of two ranks; rank 1 dies after a step, given as (epoch, step)."""


def make_loader(rank: int | None = None) -> RobustDataLoader[Any]:
    """The loader of the running rank, or of one of two where no process group is."""
    dataset = Flawed(SIZE)
    sampler = ElasticDistributedSampler(dataset, None if rank is None else 2, rank)
    generator = torch.Generator().manual_seed(1)
    return RobustDataLoader(
        dataset, BATCH, sampler=sampler, num_workers=1, seeding="batch", generator=generator, transport="pipe"
    )


def train(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    folder, rank = config["folder"], ray.train.get_context().get_world_rank()
    loader = ray.train.torch.prepare_data_loader(make_loader(), add_dist_sampler=False, move_to_device=False)
    first = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as saved:
            state = torch.load(f"{saved}/{rank}.pt", weights_only=True)
        first = state["epoch"]
        loader.load_state_dict(state["loader"])
    attempt = "again" if checkpoint is not None else "first"
    for epoch in range(first, EPOCHS):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            step = loader.state_dict()["delivered"]
            note(f"{folder}/{rank}.jsonl", json.dumps([attempt, epoch, step, batch.tolist()]))
            with tempfile.TemporaryDirectory() as saved:
                torch.save({"epoch": epoch, "loader": loader.state_dict()}, f"{saved}/{rank}.pt")
                ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(saved))
            if checkpoint is None and rank == 1 and (epoch, step) == DIES_AT:
                os.kill(os.getpid(), signal.SIGKILL)
    if rank == 0:
        note(f"{folder}/prepared.json", json.dumps(prepared()))
    note(f"{folder}/{rank}.jsonl", json.dumps(["summary", *summary(loader)]))


def summary(loader: Any) -> list[Any]:
    return [loader.summary().batches, loader.summary().replaced, [record.index for record in loader.fault_log]]


def prepared() -> dict[str, Any]:
    """What Ray makes of a loader: with torch's sampler it is kept, with the default one it is replaced."""
    from ray.train.torch import prepare_data_loader

    dataset = list(range(8))
    found = {}
    for name, sampler in {"distributed": DistributedSampler(dataset), "default": None}.items():
        loader = RobustDataLoader(dataset, 2, sampler=sampler, **OURS)
        inner = prepare_data_loader(loader, move_to_device=False)
        wrapped = prepare_data_loader(loader)
        found[name] = [type(inner).__name__, inner is loader, len(list(wrapped))]
    return found


def main(folder: str) -> None:
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    with tempfile.TemporaryDirectory(prefix="ray") as short:  # sockets are made there, whose paths must be short
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20, _temp_dir=short
        )
        try:
            TorchTrainer(
                train,
                train_loop_config={"folder": folder},
                scaling_config=ScalingConfig(num_workers=2),
                run_config=RunConfig(
                    name="job",
                    storage_path=folder,
                    failure_config=FailureConfig(max_failures=1),
                    checkpoint_config=CheckpointConfig(num_to_keep=2),
                ),
            ).fit()
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
