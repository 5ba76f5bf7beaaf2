"""Lightning Fabric: a loop of one's own, whose loader is saved and loaded with the model.

Run it with ``python examples/fabric_loop.py``. Fabric's wrapper has the loader inside; ``fabric.save`` asks it for its
state, ``fabric.load`` gives it back.
"""

import logging
import tempfile
import warnings

import torch
from lightning.fabric import Fabric
from torch.utils.data import Dataset

from robustloader import RobustDataLoader


class Numbers(Dataset):
    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 13:
            raise ValueError("this file is damaged")
        return torch.tensor([float(index)])


def train(file: str, *, stop: int | None = None, resume: bool = False) -> list[float]:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = torch.nn.Linear(1, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loader = RobustDataLoader(Numbers(), batch_size=6, shuffle=True, num_workers=2, faults="skip")
    batches = fabric.setup_dataloaders(loader)
    state = {"model": model, "optimizer": optimizer, "loader": batches}
    if resume:
        fabric.load(file, state)
    seen: list[float] = []
    for step, batch in enumerate(batches, 1):
        seen += batch.flatten().tolist()
        optimizer.zero_grad()
        fabric.backward(model(batch / 60).square().mean())
        optimizer.step()
        if step == stop:
            fabric.save(file, state)
            break
    else:
        print(loader.summary())
    return seen


if __name__ == "__main__":
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        seen = train(f"{folder}/saved", stop=4) + train(f"{folder}/saved", resume=True)
    assert sorted(seen) == [number for number in range(60) if number != 13], "each sample once"
