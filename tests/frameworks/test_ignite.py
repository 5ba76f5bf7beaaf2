"""ignite: a rebuilt loader keeps every option; either way of resuming gives the rest of the run."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from robustloader import RobustDataLoader, RobustLoaderWarning
from tests.support.frameworks import Broken, Floats, Noisy, check_kept, make_loader

with warnings.catch_warnings():
    # Importing ignite imports parts of torch that torch itself deprecates.
    warnings.filterwarnings("ignore", r"`torch.jit.\w+` is deprecated", DeprecationWarning)
    from ignite.engine import Engine, Events
    from ignite.engine.deterministic import DeterministicEngine, ReproducibleBatchSampler, update_dataloader


def test_every_public_attribute_is_passed() -> None:
    """update_dataloader() hands all of vars() to the constructor, with another batch sampler."""
    original = make_loader()
    resumable = ReproducibleBatchSampler(original.batch_sampler)
    rebuilt = update_dataloader(original, resumable)
    check_kept(rebuilt, original)
    assert rebuilt.batch_sampler is resumable
    assert [list(batch) for batch in rebuilt] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


@pytest.mark.parametrize("kind", [Engine, DeterministicEngine])
def test_an_engine_runs(kind: Any) -> None:
    """Two epochs; a bad sample is replaced, and the summaries are those of the loader that the engine has."""
    seen: list[Any] = []
    engine = kind(lambda _, batch: seen.append(batch.flatten().tolist()))
    with pytest.warns(RobustLoaderWarning, match="sample 3 was replaced"):
        engine.run(RobustDataLoader(Broken(5), batch_size=2, num_workers=1), max_epochs=2)
    assert [len(batch) for batch in seen] == [2, 2, 1] * 2
    loader = engine.state.dataloader
    assert type(loader) is RobustDataLoader
    assert [(summary.batches, summary.replaced, summary.complete) for summary in loader.summaries] == [(3, 1, True)] * 2


def run(kind: Any, data: Any, seen: list[Any], *, stop: int = 0, saved: dict[str, Any] | None = None) -> dict[str, Any]:
    """One process's part of a run of three epochs; what it saves after ``stop`` iterations, when it ends."""
    torch.manual_seed(7)
    engine = kind(lambda _, batch: seen.append(batch.tolist()))
    keeps: dict[str, Any] = {}

    @engine.on(Events.ITERATION_COMPLETED(lambda _, number: number == stop))
    def save() -> None:
        keeps.update(engine=engine.state_dict(), loader=engine.state.dataloader.state_dict())
        engine.terminate()

    if saved is not None:
        engine.load_state_dict(saved["engine"])
        if kind is Engine:
            data.load_state_dict(saved["loader"])
    engine.run(data, **({"max_epochs": 3} if saved is None else {}))
    return keeps


@pytest.mark.parametrize("stop", [2, 5, 7, 13])
def test_a_deterministic_engine_goes_on(stop: int) -> None:
    """It finds the place itself; the order is that of the unbroken run. Without workers it is not, in the middle of an
    epoch, with torch's loader neither: the engine restores the generators before the sampler is read."""

    def loader() -> RobustDataLoader[Any]:
        return RobustDataLoader(Floats(10), batch_size=2, shuffle=True, num_workers=2)

    unbroken: list[Any] = []
    run(DeterministicEngine, loader(), unbroken)
    seen: list[Any] = []
    saved = run(DeterministicEngine, loader(), seen, stop=stop)
    run(DeterministicEngine, loader(), seen, saved=saved)
    assert seen == unbroken
    assert len(seen) == 15


@pytest.mark.parametrize("stop", [2, 5, 7, 13])
def test_an_engine_goes_on_from_the_loaders_state(stop: int) -> None:
    """The loader finds the place, with other workers too; random augmentations are those of the unbroken run."""

    def loader(workers: int = 0) -> RobustDataLoader[Any]:
        generator = torch.Generator().manual_seed(3)
        options: dict[str, Any] = {"generator": generator, "num_workers": workers, "seeding": "batch"}
        return RobustDataLoader(Noisy(10), batch_size=2, shuffle=True, **options)

    unbroken: list[Any] = []
    run(Engine, loader(), unbroken)
    seen: list[Any] = []
    saved = run(Engine, loader(), seen, stop=stop)
    run(Engine, loader(workers=2), seen, saved=saved)
    assert seen == unbroken
    assert len(seen) == 15
