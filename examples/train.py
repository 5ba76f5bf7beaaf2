"""A plain training loop whose data is bad: some samples raise, and one crashes its worker.

Run it with ``python examples/train.py``. Nothing in the loop knows of faults; what happened is printed at the end.
"""

import os
import signal

import torch
from torch import nn
from torch.utils.data import Dataset

from robustloader import RobustDataLoader as DataLoader


class Points(Dataset):
    """2,000 points of the plane, labelled by the side of a line they lie on; every 400th is damaged."""

    def __init__(self) -> None:
        self.points = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index % 400 == 13:
            raise OSError(f"point-{index:04d} is truncated")
        if index == 777:
            os.kill(os.getpid(), signal.SIGSEGV)  # what a bug in a native decoder does
        point = self.points[index]
        return point, (point.sum() > 0).long()


def main() -> None:
    torch.manual_seed(0)
    loader = DataLoader(Points(), batch_size=50, shuffle=True, num_workers=2, persistent_workers=True)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for epoch in range(3):
        for points, labels in loader:
            loss = nn.functional.cross_entropy(model(points), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        summary = loader.summary()
        print(f"epoch {epoch}: loss {loss:.3f}, {summary.batches} batches, {summary.replaced} samples replaced")
        assert summary.batches == 40
        assert summary.samples == 2000
    print(loader.summaries[0])
    print(loader.fault_log)


if __name__ == "__main__":
    main()
