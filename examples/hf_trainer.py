"""Hugging Face Trainer: training over damaged data, stopped in the middle of an epoch and gone on with.

Run it with ``python examples/hf_trainer.py``. The Trainer makes its loaders itself; with the mixin they are ours.
"""

import tempfile
import warnings

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from robustloader.integrations.transformers import RobustTrainerMixin


class Numbers(Dataset):
    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 13:
            raise ValueError("this file is damaged")
        return {"x": torch.tensor([float(index)])}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[float] = []

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen += x.flatten().tolist()
        return {"loss": self.layer(x / 60).square().mean()}


class RobustTrainer(RobustTrainerMixin, Trainer):
    """The Trainer, with loaders of ours."""


def train(folder: str, resume: bool = False, **limit: int) -> list[float]:
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    save = {"save_strategy": "steps", "save_steps": 4, "dataloader_num_workers": 2, "dataloader_pin_memory": False}
    args = TrainingArguments(folder, per_device_train_batch_size=6, **quiet, **save, **limit)
    trainer = RobustTrainer(Model(), args, train_dataset=Numbers(), loader_options={"faults": "skip"})
    trainer.train(resume_from_checkpoint=resume)
    print(trainer.train_loader.summary())
    return trainer.model.seen


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        seen = train(folder, max_steps=4) + train(folder, resume=True, num_train_epochs=1)
    assert sorted(seen) == [number for number in range(60) if number != 13], "each sample once"
