"""Ray Train: two processes on a local cluster, each with its own loader, state and summary.

Run it with ``python examples/ray_train.py``; starting Ray takes most of its time. ``ElasticDistributedSampler`` shares
the samples out, so Ray need not put a sampler in. After a failure Ray starts the processes again, and each goes on from
the checkpoint that it is handed.
"""

import os
import tempfile

import torch
from torch.utils.data import Dataset

from robustloader import ElasticDistributedSampler, RobustDataLoader


class Numbers(Dataset):
    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 13:
            raise ValueError("this file is damaged")
        return torch.tensor([float(index)])


def train() -> None:
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    dataset = Numbers()
    sampler = ElasticDistributedSampler(dataset)
    loader = RobustDataLoader(dataset, batch_size=6, sampler=sampler, num_workers=1, faults="skip")
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as saved:
            loader.load_state_dict(torch.load(f"{saved}/{rank}.pt"))
    for batch in loader:
        with tempfile.TemporaryDirectory() as saved:
            torch.save(loader.state_dict(), f"{saved}/{rank}.pt")
            ray.train.report({"mean": batch.mean().item()}, checkpoint=ray.train.Checkpoint.from_directory(saved))
    if rank == 0:
        print(loader.summary())


if __name__ == "__main__":
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "300"  # for a slow machine
    import ray.train.torch

    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, _temp_dir=f"{folder}/s")
        config = ray.train.RunConfig(storage_path=folder, failure_config=ray.train.FailureConfig(max_failures=1))
        scaling = ray.train.ScalingConfig(num_workers=2)
        ray.train.torch.TorchTrainer(train, scaling_config=scaling, run_config=config).fit()
        ray.shutdown()
