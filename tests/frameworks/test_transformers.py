"""Hugging Face Trainer: its loaders are ours, and a checkpoint is gone on from exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from robustloader import RobustDataLoader, RobustLoaderWarning
from robustloader.integrations.transformers import RobustTrainerMixin
from tests.support.datasets import Numbers, Raising
from tests.support.frameworks import OURS, Stream


class Model(torch.nn.Module):
    """Notes what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.trained: list[Any] = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        if self.training:
            self.trained.append(x.tolist())
        return {"loss": self.layer(x[:, :1]).sum() * 0, "logits": x}


class Noisy(Numbers):
    """Sample ``i`` is ``i`` and a random number."""

    def load(self, index: int) -> Any:
        return {"x": torch.tensor([float(index), torch.rand(())]), "labels": torch.tensor(0)}


class Broken(Raising):
    """Sample 3 raises."""

    def __init__(self, size: int) -> None:
        super().__init__(size, {3: ValueError})

    def load(self, index: int) -> Any:
        return {"x": torch.tensor([float(super().load(index))]), "labels": torch.tensor(0)}


class Endless(Stream):
    """Has no length."""

    def __iter__(self) -> Any:
        for index in range(self.size):
            yield {"x": torch.tensor([float(index)]), "labels": torch.tensor(0)}


class RobustTrainer(RobustTrainerMixin, Trainer):
    """As users write it."""


def make_trainer(folder: Path, dataset: Any, *, loader_options: Any = None, **arguments: Any) -> RobustTrainer:
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    options = {"use_cpu": True, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, **quiet}
    options |= {"dataloader_pin_memory": False, "num_train_epochs": 2, "save_strategy": "no", **arguments}
    args = TrainingArguments(output_dir=str(folder), **options)
    return RobustTrainer(
        Model(), args, train_dataset=dataset, eval_dataset=Broken(6), loader_options=loader_options or {}
    )


def test_train_and_evaluate(tmp_path: Path) -> None:
    """Every loader of the Trainer is ours, with its options and torch's; bad samples are skipped and told of."""
    options = {**OURS, "telemetry": None, "faults": "skip"}
    trainer = make_trainer(tmp_path, Broken(6), loader_options=options, dataloader_num_workers=1)
    with pytest.warns(RobustLoaderWarning, match="sample 3 was skipped"):
        trainer.train()
    assert sum(map(len, trainer.model.trained)) == 2 * 5
    loader = trainer.train_loader.base_dataloader
    assert type(loader) is RobustDataLoader
    assert {name: getattr(loader, name) for name in options} == options
    assert loader.num_workers == 1
    with pytest.warns(RobustLoaderWarning, match="sample 3 was skipped"):
        metrics = trainer.evaluate()
    assert metrics["eval_loss"] == 0
    assert type(trainer.eval_loader.base_dataloader) is RobustDataLoader
    with pytest.warns(RobustLoaderWarning, match="sample 3 was skipped"):
        predicted = trainer.predict(Broken(6)).predictions
    assert predicted.flatten().tolist() == [0, 1, 2, 4, 5]
    assert [record.index for record in trainer.test_loader.fault_log] == [3]
    assert type(trainer.accelerator.prepare(DataLoader(range(3))).base_dataloader) is DataLoader  # nothing is left


def test_summaries(tmp_path: Path) -> None:
    """Of each epoch, from the loader that trained."""
    trainer = make_trainer(tmp_path, Broken(6), dataloader_num_workers=1)
    with pytest.warns(RobustLoaderWarning, match="sample 3 was replaced"):
        trainer.train()
    summaries = trainer.train_loader.summaries
    assert [(each.batches, each.replaced, each.complete) for each in summaries] == [(3, 1, True)] * 2


def test_a_misspelt_option_is_refused(tmp_path: Path) -> None:
    """When the trainer is made."""
    with pytest.raises(TypeError, match="'fault'"):
        make_trainer(tmp_path, Broken(6), loader_options={"fault": "skip"})


def run(folder: Path, stop: int = 0, **options: Any) -> list[Any]:
    """One process's part of a run of three epochs: what the model was trained on."""
    options = {"num_train_epochs": 3, **options}
    if stop:
        options |= {"max_steps": stop, "save_strategy": "steps", "save_steps": 1 + stop // 2}
    trainer = make_trainer(folder, Noisy(10), loader_options={"seeding": "batch"}, **options)
    trainer.train(resume_from_checkpoint=True if any(folder.glob("checkpoint-*")) else None)
    return list(trainer.model.trained)


@pytest.mark.parametrize("stop", [1, 4, 5, 8])
def test_a_checkpoint_is_gone_on_from(tmp_path: Path, stop: int) -> None:
    """Stopped anywhere, at the end of an epoch too, the rest of the run is what it would have been: the samples, their
    random augmentations, and with another number of workers."""
    unbroken = run(tmp_path / "unbroken")
    assert len(unbroken) == 15
    head = run(tmp_path / "stopped", stop=stop)
    assert head + run(tmp_path / "stopped", dataloader_num_workers=2) == unbroken


def test_gradient_accumulation(tmp_path: Path) -> None:
    """The Trainer takes several batches for a step; one epoch of five has a step of two, two and one."""
    options = {"gradient_accumulation_steps": 2}
    unbroken = run(tmp_path / "unbroken", **options)
    head = run(tmp_path / "stopped", stop=5, **options)
    assert len(head) == 9
    assert head + run(tmp_path / "stopped", **options) == unbroken


def test_without_the_file_the_trainer_skips(tmp_path: Path) -> None:
    """Also where the file does not fit what the Trainer counts: the order of samples is right, by a loader of ours."""
    unbroken = [[x[0] for x in batch] for batch in run(tmp_path / "unbroken")]
    run(tmp_path / "stopped", stop=7)
    file = tmp_path / "stopped" / "checkpoint-7" / "robustloader-0.pt"
    file.write_bytes((tmp_path / "stopped" / "checkpoint-4" / "robustloader-0.pt").read_bytes())
    with pytest.warns(RobustLoaderWarning, match="after batch 2 of its epoch"):
        rest = run(tmp_path / "stopped")
    assert [[x[0] for x in batch] for batch in rest] == unbroken[7:]
    file.unlink()
    assert [[x[0] for x in batch] for batch in run(tmp_path / "stopped")] == unbroken[7:]


def test_a_stream_without_a_length(tmp_path: Path) -> None:
    """Accelerate's dispatcher reads it; its place is saved as well."""

    def stream(stop: int) -> list[Any]:
        options = {"max_steps": stop, "save_strategy": "steps", "save_steps": 1}
        trainer = make_trainer(tmp_path, Endless(40), **options)
        trainer.train(resume_from_checkpoint=True if any(tmp_path.glob("checkpoint-*")) else None)
        return [int(x) for batch in trainer.model.trained for (x,) in batch]

    assert stream(3) + stream(7) == list(range(14))
