"""Accelerate: a prepared loader with ours inside, saved and loaded by ``save_state`` and ``load_state``.

Run it with ``python examples/accelerate_loop.py``. ``prepare`` makes a plain loader of whatever it is given; in the
block of ``robust_dataloaders`` it makes ours, with the options of the loader that it is given.
"""

import tempfile
import warnings

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from robustloader import RobustDataLoader
from robustloader.integrations.accelerate import robust_dataloaders


class Numbers(Dataset):
    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 13:
            raise ValueError("this file is damaged")
        return torch.tensor([float(index)])


def train(folder: str, *, stop: int | None = None, resume: bool = False) -> list[float]:
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = RobustDataLoader(Numbers(), batch_size=6, shuffle=True, num_workers=2, faults="skip")
    with robust_dataloaders(stateful=True):
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if resume:
        accelerator.load_state(folder)
    seen: list[float] = []
    for step, batch in enumerate(loader, 1):
        seen += batch.flatten().tolist()
        optimizer.zero_grad()
        accelerator.backward(model(batch / 60).square().mean())
        optimizer.step()
        if step == stop:
            accelerator.save_state(folder)
            break
    else:
        print(loader.summary())
    return seen


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        seen = train(folder, stop=4) + train(folder, resume=True)
    assert sorted(seen) == [number for number in range(60) if number != 13], "each sample once"
