"""Two ranks train one model. Rank 0 meets damaged samples, rank 1 loses a worker; both take the same number of steps.

Run it with ``torchrun --standalone --nproc-per-node 2 examples/ddp.py``, or with ``python examples/ddp.py``, which does
just that. The loader sends nothing to other ranks: the summaries are gathered by this script.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from robustloader import ElasticDistributedSampler, RobustDataLoader, merge_summaries
from robustloader.testing import WorkerKiller


class Points(Dataset):
    """2,000 points of the plane, labelled by the side of a line that they lie on; some are damaged for rank 0."""

    def __len__(self) -> int:
        return 2000

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index % 100 == 7 and os.environ["RANK"] == "0":
            raise OSError(f"point-{index:04d} is truncated")
        point = torch.randn(2, generator=torch.Generator().manual_seed(index))
        return point, int(point.sum() > 0)


def main() -> None:
    dist.init_process_group("gloo")
    sampler = ElasticDistributedSampler(Points())
    loader = RobustDataLoader(Points(), batch_size=50, sampler=sampler, num_workers=2)
    model = DistributedDataParallel(nn.Linear(2, 2))
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for step, (points, labels) in enumerate(batches := iter(loader)):
            if (dist.get_rank(), epoch, step) == (1, 1, 5):
                WorkerKiller(batches, seed=0).strike()
            nn.functional.cross_entropy(model(points), labels).backward()  # waits for the other rank
        summaries = [None] * dist.get_world_size()
        dist.all_gather_object(summaries, loader.summary())
        merged = merge_summaries(summaries)
        assert merged.in_step, merged
        if dist.get_rank() == 0:
            print(merged, end="\n\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" not in os.environ:
        os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
        os.execv(sys.executable, [sys.executable, *launch, __file__])
    main()
