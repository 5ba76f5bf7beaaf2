"""Hugging Face Trainer: its loaders made by this package, and its checkpoints with what they stand at.

The ``Trainer`` makes its loaders itself, through Accelerate, and has no hook for another kind. When it goes on from a
checkpoint it reads the indices of the epoch again and drops those that it has trained on: the order is right, but
random augmentations, the number of the epoch and what has failed so far are those of a new loader. The mixin gives it
``RobustDataLoader`` objects and saves their states.

*Source*: ``transformers/trainer.py``, transformers 5.24.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from robustloader.errors import warn_user
from robustloader.integrations.accelerate import robust_dataloaders
from robustloader.telemetry.labels import require

__all__ = ["RobustTrainerMixin"]


class RobustTrainerMixin:
    """Makes a ``transformers.Trainer`` load its data with ``RobustDataLoader``: stand it first among the bases.

    ``class RobustTrainer(RobustTrainerMixin, Trainer): ...``

    Args:
        loader_options: our keyword arguments of ``RobustDataLoader`` (``faults``, ``recovery`` and so on) for all
            loaders. What torch's loader takes comes from ``TrainingArguments`` (``dataloader_num_workers`` and so on).

    Attributes:
        train_loader, eval_loader, test_loader: the loader of each kind that was made last, as Accelerate has prepared
            it; ``print(trainer.train_loader.summary())``.

    Each checkpoint gets a file ``robustloader-RANK.pt``. ``train(resume_from_checkpoint=...)`` goes on from it: the
    rest of the run has the samples that it would have had, with ``loader_options={"seeding": "batch"}`` the
    augmentations too. Without such a file, or where the ``Trainer`` counts otherwise, it skips as always; with
    ``ignore_data_skip`` the epoch begins anew.

    Raises:
        ImportError: transformers or Accelerate is not installed (``robustloader[transformers]``).
    """

    def __init__(self, *args: Any, loader_options: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        require("transformers", "RobustTrainerMixin", "transformers")
        self.loader_options = dict(loader_options or {})
        self.train_loader: Any = None
        self.eval_loader: Any = None
        self.test_loader: Any = None
        with self._robust():  # options that do not exist are refused here
            super().__init__(*args, **kwargs)
        base = importlib.import_module("transformers").TrainerCallback
        callback = type("RobustLoaderCheckpoint", (_Checkpoints, base), {"__module__": __name__})
        self._checkpoints = callback()
        self.add_callback(self._checkpoints)  # type: ignore[attr-defined]

    def _robust(self) -> contextlib.AbstractContextManager[None]:
        return robust_dataloaders(stateful=True, **self.loader_options)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The ``Trainer``'s."""
        self._checkpoints.resume_from = self._checkpoint(resume_from_checkpoint)
        with self._robust(), _skip_once():
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _checkpoint(self, given: Any) -> str | None:
        """The folder to go on from, as the ``Trainer`` finds it."""
        if given is True:
            utils = importlib.import_module("transformers.trainer_utils")
            given = utils.get_last_checkpoint(self.args.output_dir)  # type: ignore[attr-defined]
        return str(given) if given else None

    def get_train_dataloader(self) -> Any:
        """The ``Trainer``'s, made by this package."""
        with self._robust():
            self.train_loader = super().get_train_dataloader()  # type: ignore[misc]
        return self.train_loader

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The ``Trainer``'s, made by this package."""
        with self._robust():
            self.eval_loader = super().get_eval_dataloader(*args, **kwargs)  # type: ignore[misc]
        return self.eval_loader

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The ``Trainer``'s, made by this package."""
        with self._robust():
            self.test_loader = super().get_test_dataloader(*args, **kwargs)  # type: ignore[misc]
        return self.test_loader


class _Checkpoints:
    """The part of the callback that is ours. *Runs in* the training process."""

    resume_from: str | None = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint has been written."""
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        if os.path.isdir(folder) and not args.save_only_model:
            torch.save(kwargs["train_dataloader"].state_dict(), _file_in(folder, args))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The loader has been made, and the ``Trainer`` knows where to go on."""
        folder, self.resume_from = self.resume_from, None
        if folder is None or args.ignore_data_skip or not os.path.exists(_file_in(folder, args)):
            return
        loader = kwargs["train_dataloader"]
        saved = torch.load(_file_in(folder, args), weights_only=True)
        wanted = _batches_of_the_epoch(loader, args, state)
        if wanted == (saved["delivered"] if saved["begun"] else 0):
            loader.load_state_dict(saved)
            loader.goes_on = wanted > 0
        else:
            warn_user(
                f"the Trainer goes on after batch {wanted} of its epoch, the loader's state in {folder} is that of "
                f"batch {saved['delivered']}: it is not used, the order of samples is right all the same"
            )


def _file_in(folder: str, args: Any) -> str:
    return os.path.join(folder, f"robustloader-{args.process_index}.pt")


def _batches_of_the_epoch(loader: Any, args: Any, state: Any) -> int:
    """How many batches of the running epoch the ``Trainer`` has trained on, as it counts itself."""
    per_step = args.gradient_accumulation_steps
    try:
        steps = max(math.ceil(len(loader) / per_step), 1)
    except TypeError:  # no length: one long epoch
        steps = state.max_steps
    return int(state.global_step % steps) * int(per_step)


@contextlib.contextmanager
def _skip_once() -> Iterator[None]:
    """A loader that has been given its state is past what the ``Trainer`` wants to skip."""
    module: Any = importlib.import_module("transformers.trainer")
    skip = module.skip_first_batches

    def skip_first_batches(loader: Any, num_batches: int = 0) -> Any:
        if getattr(loader, "goes_on", False):
            loader.goes_on = False
            return loader
        return skip(loader, num_batches)

    module.skip_first_batches = skip_first_batches
    try:
        yield
    finally:
        module.skip_first_batches = skip
