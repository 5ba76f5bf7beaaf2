"""What frameworks do to a loader, done by the frameworks themselves, keeps every option of ours."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from robustloader import FaultPolicy, MemoryPolicy, RecoveryPolicy, RobustDataLoader, TelemetryPolicy
from tests.support import parity_data as data

pytestmark = [
    # What the frameworks and their own dependencies warn of when imported or run is not our business.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
]

OURS: dict[str, Any] = {
    "faults": FaultPolicy(action="skip", burst=3),
    "recovery": RecoveryPolicy(max_restarts=1),
    "memory": MemoryPolicy(on_low="warn"),
    "telemetry": TelemetryPolicy(history=2),
    "seeding": "batch",
    "transport": "pipe",
}
TORCHS: dict[str, Any] = {
    "num_workers": 1,
    "collate_fn": data.identity,
    "prefetch_factor": 3,
    "persistent_workers": True,
    "in_order": False,
    "timeout": 77,
    "worker_init_fn": data.reseed_in_init,
}
KEPT = (*OURS, *TORCHS)


def make_loader(**more: Any) -> RobustDataLoader[Any]:
    """A loader with no option at its default."""
    return RobustDataLoader(list(range(10)), **({"batch_size": 2, **TORCHS, **OURS} | more))


def check_kept(rebuilt: Any, original: Any) -> None:
    """The rebuilt loader is ours, with every option as it was given."""
    assert type(rebuilt) is RobustDataLoader
    assert rebuilt is not original
    for name in KEPT:
        assert getattr(rebuilt, name) is getattr(original, name), name
    assert rebuilt.multiprocessing_context is original.multiprocessing_context


class Numbers(IterableDataset[int]):
    """An iterable dataset."""

    def __iter__(self) -> Any:
        yield from range(4)


# --- Lightning --------------------------------------------------------------------------------------------------------


def lightning_rebuild(name: str) -> Any:
    """Lightning's own function that gives a loader another sampler."""
    module = pytest.importorskip(f"lightning.{name}")
    return module._update_dataloader


@pytest.mark.parametrize("name", ["pytorch.utilities.data", "fabric.utilities.data"])
@pytest.mark.parametrize("case", ["plain", "context", "batch_sampler", "unbatched"])
def test_lightning_puts_in_another_sampler(name: str, case: str) -> None:
    """A loader passed to Trainer.fit is rebuilt around a DistributedSampler, to what torch's would be rebuilt to."""
    rebuild = lightning_rebuild(name)
    more = {
        "plain": {"batch_size": 2, "drop_last": True},
        "context": {"batch_size": 3, "multiprocessing_context": "fork", "shuffle": True},
        "batch_sampler": {"batch_sampler": BatchSampler(SequentialSampler(range(10)), 2, False)},
        "unbatched": {"batch_size": None},
    }[case]
    arguments = {"dataset": list(range(10)), **TORCHS, **more}
    sampler = DistributedSampler(arguments["dataset"], num_replicas=2, rank=1, shuffle=False)
    original = RobustDataLoader(**arguments, **OURS)
    rebuilt = rebuild(original, sampler)
    check_kept(rebuilt, original)
    expected = rebuild(DataLoader(**arguments), sampler)
    assert (rebuilt.batch_size, rebuilt.drop_last) == (expected.batch_size, expected.drop_last)
    assert list(rebuilt) == list(expected)


@pytest.mark.parametrize("mode", ["training", "predicting"])
def test_lightnings_stages(mode: str) -> None:
    """Prediction always rebuilds, around a batch sampler that remembers its indices."""
    rebuild = lightning_rebuild("pytorch.utilities.data")
    states = pytest.importorskip("lightning.pytorch.trainer.states")
    stage = states.RunningStage.TRAINING if mode == "training" else states.RunningStage.PREDICTING
    original = make_loader(seeding="worker")
    rebuilt = rebuild(original, SequentialSampler(original.dataset), stage)
    check_kept(rebuilt, original)
    assert [list(batch) for batch in rebuilt] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_lightning_rebuilds_an_iterable_dataset() -> None:
    """There is no sampler to put in, and the options stay."""
    rebuild = lightning_rebuild("pytorch.utilities.data")
    original = RobustDataLoader(Numbers(), batch_size=2, **TORCHS, **OURS)
    rebuilt = rebuild(original, None)
    check_kept(rebuilt, original)
    assert [list(batch) for batch in rebuilt] == [[0, 1], [2, 3]]


def test_lightning_keeps_auto() -> None:
    """num_workers="auto" is still auto in the rebuilt loader."""
    rebuild = lightning_rebuild("pytorch.utilities.data")
    original = RobustDataLoader(range(4), num_workers="auto")  # type: ignore[arg-type]
    rebuilt = rebuild(original, SequentialSampler(original.dataset))
    assert rebuilt.num_workers == original.num_workers
    assert type(rebuilt.num_workers) is type(original.num_workers)


def test_lightning_wraps_the_class_while_a_hook_runs() -> None:
    """A loader made inside train_dataloader() is made by a patched class and replayed from what was recorded."""
    rebuild = lightning_rebuild("pytorch.utilities.data")
    fabric = pytest.importorskip("lightning.fabric.utilities.data")
    with fabric._replace_dunder_methods(DataLoader, "dataset"):
        original = make_loader(batch_size=5)
        original.timeout = 55
    rebuilt = rebuild(original, SequentialSampler(original.dataset))
    check_kept(rebuilt, original)
    assert rebuilt.timeout == 55
    assert [len(batch) for batch in rebuilt] == [5, 5]


def test_lightning_trains_and_validates(tmp_path: Any) -> None:
    """A whole fit: as many steps as batches, in training and in validation, and a prediction."""
    pytest.importorskip("lightning.pytorch")
    from lightning.pytorch import LightningModule, Trainer

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.seen: dict[str, int] = {"train": 0, "val": 0}

        def training_step(self, batch: Any, number: int) -> Any:
            self.seen["train"] += 1
            return self.layer(batch.float()[:, None]).sum()

        def validation_step(self, batch: Any, number: int) -> None:
            self.seen["val"] += 1

        def predict_step(self, batch: Any, number: int) -> Any:
            return batch

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=1,
    )
    model = Model()
    train = RobustDataLoader(list(range(6)), batch_size=2, num_workers=1, persistent_workers=True, shuffle=True)
    val = RobustDataLoader(list(range(4)), batch_size=2, num_workers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, train, val)
        predicted = trainer.predict(model, RobustDataLoader(list(range(5)), batch_size=2))
    assert model.seen == {"train": 6, "val": 1 + 4}
    assert [batch.tolist() for batch in predicted] == [[0, 1], [2, 3], [4]]
    assert [summary.batches for summary in train.summaries] == [3, 3]


# --- ignite -----------------------------------------------------------------------------------------------------------


def test_ignite_passes_every_public_attribute() -> None:
    """update_dataloader() hands all of vars() to the constructor, with another batch sampler."""
    deterministic = pytest.importorskip("ignite.engine.deterministic")
    original = make_loader()
    resumable = deterministic.ReproducibleBatchSampler(original.batch_sampler)
    rebuilt = deterministic.update_dataloader(original, resumable)
    check_kept(rebuilt, original)
    assert rebuilt.batch_sampler is resumable
    assert [list(batch) for batch in rebuilt] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_ignite_runs_an_engine() -> None:
    """Two epochs, and the same again from a deterministic engine."""
    engine = pytest.importorskip("ignite.engine")
    seen: list[Any] = []
    for kind in (engine.Engine, pytest.importorskip("ignite.engine.deterministic").DeterministicEngine):
        seen.clear()
        runner = kind(lambda _, batch: seen.append(batch.tolist()))
        runner.run(RobustDataLoader(list(range(5)), batch_size=2, num_workers=1), max_epochs=2)
        assert seen == [[0, 1], [2, 3], [4]] * 2


# --- Accelerate -------------------------------------------------------------------------------------------------------


def test_accelerate_prepares_a_loader() -> None:
    """Accelerate always builds a plain DataLoader of its own from attributes, which therefore hold what torch takes."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    original = make_loader(collate_fn=None, in_order=True)
    prepared = accelerator.prepare(original)
    assert isinstance(prepared, DataLoader)
    assert [batch.tolist() for batch in prepared] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert prepared.num_workers == 1
    assert prepared.prefetch_factor == 3
    skipped = accelerate.skip_first_batches(prepared, 2)
    assert [batch.tolist() for batch in skipped] == [[4, 5], [6, 7], [8, 9]]


# --- everyone ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("persistent", [False, True])
def test_an_epoch_whose_batches_were_all_taken_is_complete(num_workers: int, persistent: bool) -> None:
    """Lightning and others take ``len()`` batches and never ask for the end: such an epoch was not abandoned."""
    if persistent and not num_workers:
        pytest.skip("there are no workers to keep")
    loader = RobustDataLoader(range(6), batch_size=2, num_workers=num_workers, persistent_workers=persistent)
    for _ in range(2):
        iterator = iter(loader)
        for _ in range(len(loader)):
            next(iterator)
    del iterator
    summary = loader.summary(0)
    assert (summary.batches, summary.complete) == (3, True)


def test_a_loader_survives_a_copy_in_the_middle_of_an_epoch() -> None:
    """Frameworks deepcopy what holds a loader, whatever it is doing: the copy has the same options."""
    original = make_loader(seeding="worker", persistent_workers=False)
    iterator = iter(original)
    next(iterator)
    twin = copy.deepcopy(original)
    assert all(getattr(twin, name) == getattr(original, name) for name in KEPT)
    assert [sorted(batch) for batch in twin] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
