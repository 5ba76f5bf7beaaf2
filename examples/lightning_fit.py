"""Lightning: a fit over damaged data that is stopped in the middle of an epoch and gone on with.

Run it with ``python examples/lightning_fit.py``. Nothing but the loader's class is ours: Lightning keeps its options,
saves its state with each checkpoint and loads it again.
"""

import logging
import tempfile
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset

from robustloader import RobustDataLoader


class Numbers(Dataset):
    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 13:
            raise ValueError("this file is damaged")
        return torch.tensor([float(index)])


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[float] = []

    def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor:
        self.seen += batch.flatten().tolist()
        return self.layer(batch / 60).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: str, resume: str | None = None, **limit: int) -> tuple[list[float], RobustDataLoader]:
    loader = RobustDataLoader(Numbers(), batch_size=6, shuffle=True, num_workers=2, faults="skip")
    options = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    saver = ModelCheckpoint(folder, "saved", every_n_train_steps=1, enable_version_counter=False)
    trainer, model = Trainer(accelerator="cpu", callbacks=[saver], **options, **limit), Model()
    trainer.fit(model, loader, ckpt_path=resume)
    return model.seen, loader


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        head, _ = fit(folder, max_steps=4)
        rest, loader = fit(folder, resume=f"{folder}/saved.ckpt", max_epochs=1)
    print(loader.summary())
    assert sorted(head + rest) == [number for number in range(60) if number != 13], "each sample once"
