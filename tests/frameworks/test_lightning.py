"""Lightning and Fabric: rebuilt loaders keep every option, a checkpoint is gone on from exactly."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.fabric.utilities.data as fabric_data
import lightning.pytorch.utilities.data as pytorch_data
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from robustloader import ElasticDistributedSampler, RobustDataLoader, RobustLoaderWarning
from robustloader.integrations.lightning import pytorch_lightning_callbacks, resume_callback
from tests.support.frameworks import OURS, TORCHS, Broken, Floats, Noisy, Stream, check_kept, make_loader

pytestmark = [
    # Lightning 2.6 asks torch 2.13 for a name of old.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    # A run that goes on writes its checkpoints elsewhere; a dataset with a length is read by one process.
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined:UserWarning"),
    # Its advice on how many workers to have, and on shuffled loaders.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]

REBUILD = {"pytorch": pytorch_data._update_dataloader, "fabric": fabric_data._update_dataloader}


class Model(LightningModule):
    """Notes what it is given, as (epoch, batch)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.trained: list[Any] = []
        self.validated: list[Any] = []

    def training_step(self, batch: Any, number: int) -> Any:
        self.trained.append((self.current_epoch, batch.tolist()))
        return self.layer(batch[:, :1]).sum()

    def validation_step(self, batch: Any, number: int) -> None:
        self.validated.append(batch.flatten().tolist())

    def predict_step(self, batch: Any, number: int) -> Any:
        return batch

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def make_trainer(**options: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(**{"max_epochs": 2, "accelerator": "cpu", "enable_checkpointing": False, **quiet, **options})


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REBUILD)
@pytest.mark.parametrize("case", ["plain", "context", "batch_sampler", "unbatched"])
def test_another_sampler_is_put_in(name: str, case: str) -> None:
    """A loader passed to Trainer.fit is rebuilt around a DistributedSampler, to what torch's would be rebuilt to."""
    more: dict[str, Any] = {
        "plain": {"batch_size": 2, "drop_last": True},
        "context": {"batch_size": 3, "multiprocessing_context": "fork", "shuffle": True},
        "batch_sampler": {"batch_sampler": BatchSampler(SequentialSampler(range(10)), 2, False)},
        "unbatched": {"batch_size": None},
    }[case]
    arguments = {"dataset": list(range(10)), **TORCHS, **more}
    sampler = DistributedSampler(arguments["dataset"], num_replicas=2, rank=1, shuffle=False)
    original = RobustDataLoader(**arguments, **OURS)
    rebuilt = REBUILD[name](original, sampler)
    check_kept(rebuilt, original)
    expected = REBUILD[name](DataLoader(**arguments), sampler)
    assert (rebuilt.batch_size, rebuilt.drop_last) == (expected.batch_size, expected.drop_last)
    assert list(rebuilt) == list(expected)


@pytest.mark.parametrize("stage", [RunningStage.TRAINING, RunningStage.PREDICTING])
def test_stages(stage: RunningStage) -> None:
    """Prediction always rebuilds, around a batch sampler that remembers its indices."""
    original = make_loader(seeding="worker")
    rebuilt = pytorch_data._update_dataloader(original, SequentialSampler(original.dataset), stage)
    check_kept(rebuilt, original)
    assert [list(batch) for batch in rebuilt] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_an_iterable_dataset() -> None:
    """There is no sampler to put in, and the options stay."""
    original = RobustDataLoader(Stream(4), batch_size=2, **TORCHS, **OURS)
    rebuilt = pytorch_data._update_dataloader(original, None)
    check_kept(rebuilt, original)
    assert [list(batch) for batch in rebuilt] == [[0, 1], [2, 3]]


def test_auto_stays_auto() -> None:
    """num_workers="auto" is still auto in the rebuilt loader."""
    original = RobustDataLoader(range(4), num_workers="auto")  # type: ignore[arg-type]
    rebuilt = pytorch_data._update_dataloader(original, SequentialSampler(original.dataset))
    assert rebuilt.num_workers == original.num_workers
    assert type(rebuilt.num_workers) is type(original.num_workers)


def test_the_class_is_wrapped_while_a_hook_runs() -> None:
    """A loader made inside train_dataloader() is made by a patched class and replayed from what was recorded."""
    with fabric_data._replace_dunder_methods(DataLoader, "dataset"):
        original = make_loader(batch_size=5)
        original.timeout = 55
    rebuilt = pytorch_data._update_dataloader(original, SequentialSampler(original.dataset))
    check_kept(rebuilt, original)
    assert rebuilt.timeout == 55
    assert [len(batch) for batch in rebuilt] == [5, 5]


# --- whole runs -------------------------------------------------------------------------------------------------------


class Hooks(Model):
    """Makes its loaders itself."""

    def train_dataloader(self) -> Any:
        return RobustDataLoader(Broken(6), batch_size=2, shuffle=True, num_workers=1, faults="skip")

    def val_dataloader(self) -> Any:
        return RobustDataLoader(Floats(4), batch_size=2, num_workers=1, seeding="batch")

    def predict_dataloader(self) -> Any:
        return RobustDataLoader(Floats(5), batch_size=2, transport="pipe")


class Data(LightningDataModule):
    """The same, of a data module."""

    train_dataloader = Hooks.train_dataloader
    val_dataloader = Hooks.val_dataloader
    predict_dataloader = Hooks.predict_dataloader


@pytest.mark.parametrize("where", ["passed", "module", "data module"])
def test_fit_validate_and_predict(where: str) -> None:
    """As many steps as batches, wherever the loaders are made; a bad sample is skipped and told of."""
    trainer, hooks = make_trainer(num_sanity_val_steps=1), Hooks()
    model = hooks if where == "module" else Model()
    train: Any = {"passed": (hooks.train_dataloader(), hooks.val_dataloader()), "data module": (Data(),)}.get(where, ())
    keywords = {"train_dataloaders": train[0], "val_dataloaders": train[1]} if where == "passed" else {}
    if where == "data module":
        keywords = {"datamodule": train[0]}
    with pytest.warns(RobustLoaderWarning, match="sample 3 was skipped"):
        trainer.fit(model, **keywords)
    assert [epoch for epoch, _ in model.trained] == [0] * 3 + [1] * 3
    assert sum(len(batch) for _, batch in model.trained) == 2 * 5
    assert model.validated == [[0, 1]] + [[0, 1], [2, 3]] * 2
    loader = trainer.train_dataloader
    assert (type(loader), loader.faults) == (RobustDataLoader, "skip")
    assert [(summary.batches, summary.skipped, summary.complete) for summary in loader.summaries] == [(3, 1, True)] * 2
    assert [record.index for record in loader.fault_log] == [3, 3]
    assert trainer.val_dataloaders.seeding == "batch"

    model.validated.clear()
    trainer.validate(model, **({"dataloaders": train[1]} if where == "passed" else keywords))
    assert model.validated == [[0, 1], [2, 3]]
    if where == "passed":
        keywords = {"dataloaders": hooks.predict_dataloader()}
    predicted = trainer.predict(model, **keywords)
    assert [batch.flatten().tolist() for batch in predicted] == [[0, 1], [2, 3], [4]]
    rebuilt = trainer.predict_dataloaders
    assert (type(rebuilt), rebuilt.transport, rebuilt.summary().batches) == (RobustDataLoader, "pipe", 3)


def test_overfit_batches() -> None:
    """The loader is rebuilt without shuffling: the same few batches again and again, by a loader of the same kind."""
    trainer, model = make_trainer(overfit_batches=2, max_epochs=3), Model()
    with pytest.warns(UserWarning, match="turning off the train dataloader shuffling"):
        trainer.fit(model, RobustDataLoader(Floats(20), batch_size=2, shuffle=True, num_workers=1, seeding="batch"))
    assert [batch for _, batch in model.trained] == [[[0.0], [1.0]], [[2.0], [3.0]]] * 3
    assert (type(trainer.train_dataloader), trainer.train_dataloader.seeding) == (RobustDataLoader, "batch")


# --- going on ---------------------------------------------------------------------------------------------------------


def shuffled(workers: int = 0) -> RobustDataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    return RobustDataLoader(
        Noisy(20), batch_size=3, shuffle=True, generator=generator, seeding="batch", num_workers=workers
    )


def distributed() -> RobustDataLoader[Any]:
    """torch's sampler does not keep the number of the epoch, and Lightning tells it too late when it goes on."""
    return RobustDataLoader(
        Noisy(20),
        batch_size=2,
        sampler=DistributedSampler(Noisy(20), 2, 1),
        generator=torch.Generator(),
        seeding="batch",
    )


def elastic() -> RobustDataLoader[Any]:
    return RobustDataLoader(
        Noisy(20),
        batch_size=2,
        sampler=ElasticDistributedSampler(Noisy(20), 2, 1),
        generator=torch.Generator(),
        seeding="batch",
    )


class Sized(Stream):
    """Lightning reads ahead unless it knows the length."""

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Any:
        yield from torch.arange(float(self.size))[:, None]


def sized() -> RobustDataLoader[Any]:
    return RobustDataLoader(Sized(20), batch_size=3)


def fit(make: Callable[..., Any], folder: Path, *, ckpt_path: Any = None, **options: Any) -> Model:
    """One process's part of a run: the model as it was when training ended."""
    torch.manual_seed(1)
    model, every = Model(), options.pop("every", {"every_n_train_steps": 1})
    checkpoint = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{step}", **every)
    trainer = make_trainer(max_epochs=3, enable_checkpointing=True, callbacks=[checkpoint], **options)
    trainer.fit(model, make(), RobustDataLoader(Floats(4), batch_size=2), ckpt_path=ckpt_path, weights_only=True)
    return model


@pytest.mark.parametrize(
    ("make", "stops"),
    [(shuffled, (1, 6, 7, 10, 14)), (distributed, (3, 5, 8)), (elastic, (3, 5, 8)), (sized, (2, 7, 9))],
    ids=["shuffled", "distributed", "elastic", "iterable"],
)
def test_a_checkpoint_is_gone_on_from(make: Any, stops: tuple[int, ...], tmp_path: Path) -> None:
    """Stopped anywhere, at the end of an epoch too, the rest of the run is what it would have been."""
    unbroken = fit(make, tmp_path / "unbroken").trained
    assert [epoch for epoch, _ in unbroken] == sorted(len(unbroken) // 3 * [0, 1, 2])
    for stop in stops:
        head = fit(make, tmp_path / f"{stop}", max_steps=stop).trained
        rest = fit(make, tmp_path / f"rest {stop}", ckpt_path=tmp_path / f"{stop}" / f"step={stop}.ckpt").trained
        assert len(head) == stop
        assert [batch for _, batch in head + rest] == [batch for _, batch in unbroken], stop


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 4}], ids=["whole epochs", "limited"])
def test_a_checkpoint_of_the_end_of_an_epoch(options: dict[str, Any], tmp_path: Path) -> None:
    """As ModelCheckpoint makes them when nothing else is said. Whole epochs go on with another number of workers; in
    those that are cut short, how far the sampler has been read depends on it."""
    every: dict[str, Any] = {"every": {}, **options}
    unbroken = fit(shuffled, tmp_path / "unbroken", **every).trained
    steps = len(unbroken) // 3
    assert steps == options.get("limit_train_batches", 7)
    saved = tmp_path / "unbroken" / f"step={steps}.ckpt"
    workers = 0 if options else 2
    rest = fit(lambda: shuffled(workers), tmp_path / "rest", ckpt_path=saved, **every).trained
    assert rest == unbroken[steps:]


def test_the_trainer_finds_the_callback() -> None:
    """Through the entry point of the installed package; both packages' trainers."""
    found = [type(callback).__name__ for callback in make_trainer().callbacks]
    assert found.count("RobustLoaderResume") == 1
    assert isinstance(resume_callback(), Callback)
    (callback,) = pytorch_lightning_callbacks()
    assert isinstance(callback, importlib.import_module("pytorch_lightning").Callback)


def test_states_of_other_loaders_stay_as_they_are() -> None:
    """Only a state of ours of an epoch that has been read is changed."""
    theirs, fresh = {"position": 3}, RobustDataLoader(Floats(4)).state_dict()
    over: dict[str, Any] = {"is_last_batch": True}
    checkpoint = {"loops": {"fit_loop": {"state_dict": {"combined_loader": [theirs, fresh]}}}}
    checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"] = over
    resume_callback().on_load_checkpoint(None, None, checkpoint)
    assert checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [theirs, fresh]
    resume_callback().on_load_checkpoint(None, None, {})


# --- Fabric -----------------------------------------------------------------------------------------------------------


def test_fabric_keeps_every_option() -> None:
    """Its wrapper has the loader inside; a bad sample is replaced, and the summary is the inner loader's."""
    fabric = Fabric(accelerator="cpu", devices=1)
    original = RobustDataLoader(Broken(8), batch_size=2, num_workers=1, seeding="batch")
    wrapped = fabric.setup_dataloaders(original)
    with pytest.warns(RobustLoaderWarning, match="sample 3 was replaced"):
        batches = list(wrapped)
    assert [len(batch) for batch in batches] == [2, 2, 2, 2]
    assert wrapped.seeding == "batch"
    assert original.summary().replaced == 1


@pytest.mark.parametrize("make", [shuffled, distributed, elastic])
def test_fabric_saves_and_loads(make: Any, tmp_path: Path) -> None:
    """``fabric.save`` asks the loader inside the wrapper; an epoch in the middle of a run is gone on with."""

    def epochs(count: int) -> tuple[Fabric, Any, Iterator[Any]]:
        fabric = Fabric(accelerator="cpu", devices=1)
        loader = fabric.setup_dataloaders(make(), use_distributed_sampler=False)
        return fabric, loader, (batch.tolist() for _ in range(count) for batch in loader)

    _, loader, batches = epochs(2)
    unbroken = list(batches)
    fabric, loader, batches = epochs(2)
    stop = len(loader) + 2
    head = [next(batches) for _ in range(stop)]
    fabric.save(tmp_path / "saved", {"loader": loader})
    fabric, loader, batches = epochs(1)
    loader._num_iter_calls = 1  # Fabric itself does not save which epoch it is in
    fabric.load(tmp_path / "saved", {"loader": loader})
    assert head + list(batches) == unbroken
