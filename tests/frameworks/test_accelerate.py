"""Accelerate: a prepared loader has ours inside, with its options; what a run saves, the next one goes on from."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard, prepare_data_loader
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

from robustloader import OptionError, RobustDataLoader, RobustLoaderWarning, StateError
from robustloader.integrations.accelerate import robust_dataloaders, robustify
from tests.support.frameworks import OURS, Broken, Floats, Noisy, Stream, check_kept, make_loader


def make_accelerator(**options: Any) -> Any:
    return accelerate.Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Accelerate keeps what it knows of the process in singletons."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def numbers(batches: Any) -> list[list[float]]:
    return [batch.flatten().tolist() for batch in batches]


# --- options ----------------------------------------------------------------------------------------------------------


def test_prepare_in_the_block_keeps_every_option() -> None:
    """Each loader its own, and what comes from a plain loader gets those of the block."""
    accelerator, original = make_accelerator(), make_loader(collate_fn=None)
    with robust_dataloaders(faults="skip", seeding="batch"):
        prepared, other = accelerator.prepare(original, DataLoader(range(6), batch_size=2))
    check_kept(prepared.base_dataloader, original)
    assert type(other.base_dataloader) is RobustDataLoader
    assert (other.faults, other.seeding) == ("skip", "batch")
    assert numbers(prepared) == numbers(original)
    assert numbers(other) == [[0, 1], [2, 3], [4, 5]]
    assert type(accelerator.prepare(DataLoader(range(6))).base_dataloader) is DataLoader  # after the block


def test_robustify_keeps_every_option() -> None:
    """In place, so that Accelerate's own list of loaders has it; options given by hand come first."""
    accelerator, original = make_accelerator(), make_loader(collate_fn=None)
    prepared = accelerator.prepare(original)
    assert robustify(prepared, like=original) is prepared
    check_kept(prepared.base_dataloader, original)
    assert isinstance(prepared, RobustDataLoader)
    assert accelerator._dataloaders == [prepared]
    assert numbers(prepared) == numbers(original)
    assert robustify(prepared, faults="raise").faults == "raise"
    assert prepared.seeding == "batch"


@pytest.mark.parametrize("kind", ["stream", "unbatched"])
def test_robustify_takes_every_kind_of_loader(kind: str) -> None:
    """Around the same samplers as Accelerate's own."""
    arguments: dict[str, Any] = {
        "stream": {"dataset": Stream(5), "batch_size": 2, "drop_last": True},
        "unbatched": {"dataset": torch.arange(5), "batch_size": None},
    }[kind]
    accelerator = make_accelerator(dispatch_batches=False)
    expected = [torch.as_tensor(batch).tolist() for batch in accelerator.prepare(DataLoader(**arguments))]
    prepared = robustify(accelerator.prepare(DataLoader(**arguments)), faults="skip")
    assert [torch.as_tensor(batch).tolist() for batch in prepared] == expected
    with robust_dataloaders():
        prepared = accelerator.prepare(DataLoader(**arguments))
    assert [torch.as_tensor(batch).tolist() for batch in prepared] == expected
    assert len(expected) > 1


def test_what_cannot_be_prepared_is_refused() -> None:
    """By name, before anything is changed."""
    with pytest.raises(OptionError, match=r"prepared must be a loader that Accelerator\.prepare"):
        robustify(DataLoader(range(3)))
    with pytest.raises(TypeError, match="'fault'"), robust_dataloaders(fault="skip"):
        pass
    with robust_dataloaders(faults="ignore"), pytest.raises(OptionError, match="faults"):
        make_accelerator().prepare(DataLoader(range(3)))
    assert accelerate.data_loader.DataLoader is DataLoader


# --- faults and summaries ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_sample_is_replaced_and_told_of(num_workers: int) -> None:
    """The summary and the fault log are read from the prepared loader."""
    accelerator = make_accelerator()
    with robust_dataloaders():
        prepared = accelerator.prepare(RobustDataLoader(Broken(8), batch_size=2, num_workers=num_workers))
    with pytest.warns(RobustLoaderWarning, match="sample 3 was replaced"):
        batches = numbers(prepared)
    assert [len(batch) for batch in batches] == [2, 2, 2, 2]
    assert batches[1][0] == 2 and batches[1][1] != 3
    assert [record.index for record in prepared.fault_log] == [3]
    assert (prepared.summary().replaced, prepared.summary().batches, prepared.summary().complete) == (1, 4, True)


# --- going on ---------------------------------------------------------------------------------------------------------


def test_skip_first_batches_keeps_the_options() -> None:
    """In the block it makes one of ours again; outside it, a plain loader."""
    accelerator, original = make_accelerator(), make_loader(collate_fn=None)
    with robust_dataloaders():
        prepared = accelerator.prepare(original)
        skipped = accelerate.skip_first_batches(prepared, 2)
        bare = accelerate.skip_first_batches(original, 3)
    check_kept(skipped.base_dataloader, original)
    check_kept(bare, original)
    assert numbers(skipped) == [[4, 5], [6, 7], [8, 9]]
    assert numbers(bare) == [[6, 7], [8, 9]]
    assert skipped.summary().batches == 3
    assert type(accelerate.skip_first_batches(prepared, 2).base_dataloader) is DataLoader


def test_skipping_after_load_state(tmp_path: Path) -> None:
    """The way without a state, as Accelerate's own documentation has it: the same order, then whole epochs."""
    accelerator, loader = shuffled(seedable=True, how="nothing", folder=tmp_path)
    unbroken = [[x[0] for x in batch.tolist()] for _ in range(2) for batch in loader]
    accelerator, loader = shuffled(seedable=True, how="nothing", folder=tmp_path)
    head = [[x[0] for x in batch.tolist()] for batch in itertools.islice(loader, 3)]
    accelerator.save_state(str(tmp_path / "saved"))
    accelerator, loader = shuffled(seedable=True, how="nothing", folder=tmp_path)
    accelerator.load_state(str(tmp_path / "saved"))
    with robust_dataloaders():
        skipped = accelerator.skip_first_batches(loader, 3)
    rest = [[x[0] for x in batch.tolist()] for batch in skipped]
    loader.set_epoch(1)
    assert head + rest + [[x[0] for x in batch.tolist()] for batch in loader] == unbroken


def shuffled(*, seedable: bool, how: str, folder: Path, num_workers: int = 0) -> tuple[Any, Any]:
    """An accelerator and a shuffled loader that it keeps the state of, as a fresh process would make them."""
    torch.manual_seed(11)
    accelerator = make_accelerator(use_seedable_sampler=seedable, use_stateful_dataloader=how == "switch")
    original = RobustDataLoader(Noisy(20), batch_size=3, shuffle=True, seeding="batch", num_workers=num_workers)
    if how == "robustify":
        return accelerator, robustify(accelerator.prepare(original), like=original, stateful=True)
    with robust_dataloaders(stateful=True if how == "block" else None):
        return accelerator, accelerator.prepare(original)


@pytest.mark.parametrize("seedable", [False, True])
@pytest.mark.parametrize("how", ["block", "robustify", "switch"])
@pytest.mark.parametrize("stop", [0, 4, 7, 9])
def test_save_state_and_load_state(tmp_path: Path, seedable: bool, how: str, stop: int) -> None:
    """Stopped anywhere (at the end of an epoch, and in the second one too), the rest of the run is what it would have
    been, to the augmentations: the batches that Accelerate had read ahead are neither lost nor repeated."""
    accelerator, loader = shuffled(seedable=seedable, how=how, folder=tmp_path)
    unbroken = [batch.tolist() for _ in range(3) for batch in loader]
    assert len(unbroken) == 21

    accelerator, loader = shuffled(seedable=seedable, how=how, folder=tmp_path)
    endless = itertools.chain.from_iterable(loader for _ in range(3))
    taken = [batch.tolist() for batch in itertools.islice(endless, stop)]
    accelerator.save_state(str(tmp_path / "saved"))

    accelerator, loader = shuffled(seedable=seedable, how=how, folder=tmp_path)
    accelerator.load_state(str(tmp_path / "saved"))
    epochs_left = 2 if stop >= 7 else 3
    rest = [batch.tolist() for _ in range(epochs_left) for batch in loader]
    assert taken + rest == unbroken


def test_saving_right_after_loading(tmp_path: Path) -> None:
    """A run that is stopped before it has taken a batch loses nothing; another number of workers may go on."""
    accelerator, loader = shuffled(seedable=True, how="block", folder=tmp_path)
    unbroken = numbers(loader)
    accelerator, loader = shuffled(seedable=True, how="block", folder=tmp_path, num_workers=2)
    taken = numbers(itertools.islice(loader, 2))
    for step in range(2):
        accelerator.save_state(str(tmp_path / f"{step}"))
        accelerator, loader = shuffled(seedable=True, how="block", folder=tmp_path)
        accelerator.load_state(str(tmp_path / f"{step}"))
    assert taken + numbers(loader) == unbroken


@pytest.mark.parametrize("rank", [0, 1])
def test_the_share_of_a_rank_goes_on(rank: int) -> None:
    """Accelerate hides the sampler's generator behind a batch sampler of its own: its state is saved all the same."""
    make_accelerator()

    def make() -> Any:
        original = RobustDataLoader(Floats(20), batch_size=2, shuffle=True)
        with robust_dataloaders(stateful=True):
            return prepare_data_loader(original, num_processes=2, process_index=rank, rng_types=["generator"])

    torch.manual_seed(5)
    loader = make()
    unbroken = numbers(loader) + numbers(loader)
    torch.manual_seed(5)
    loader = make()
    taken = numbers(itertools.islice(loader, 2))
    state = loader.state_dict()
    torch.manual_seed(99)
    loader = make()
    loader.load_state_dict(state)
    assert taken + numbers(loader) + numbers(loader) == unbroken


def test_one_rank_that_reads_for_all_has_no_state() -> None:
    """With several processes the reader's state is that of no trainer, which it says."""
    with robust_dataloaders(stateful=True):
        loader = prepare_data_loader(
            DataLoader(Stream(8), batch_size=2), put_on_device=True, device=torch.device("cpu"), dispatch_batches=True
        )
    assert type(loader) is DataLoaderDispatcher
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    loader.state = type("State", (), {"num_processes": 2})()
    with pytest.raises(StateError, match="dispatch_batches=False"):
        loader.state_dict()
    del batches, loader
    with robust_dataloaders(stateful=True):
        loader = prepare_data_loader(
            DataLoader(Stream(8), batch_size=2), put_on_device=True, device=torch.device("cpu"), dispatch_batches=True
        )
    loader.load_state_dict(state)
    assert numbers(loader) == [[2, 3], [4, 5], [6, 7]]


def test_a_loader_that_keeps_no_state_says_so() -> None:
    """Nor does it cost anything: the loader inside is not asked."""
    with robust_dataloaders():
        prepared = make_accelerator().prepare(RobustDataLoader(range(6), batch_size=2))
    assert numbers(prepared) == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(StateError, match="stateful=True"):
        prepared.state_dict()


def test_a_sampler_whose_state_cannot_be_had_ends_no_run() -> None:
    """Accelerate asks before each batch; the error is for who wants the state."""

    class Sampler(torch.utils.data.SequentialSampler):
        def state_dict(self) -> Any:
            raise RuntimeError("no")

        def load_state_dict(self, state: Any) -> None:
            pass

    with robust_dataloaders(stateful=True):
        prepared = make_accelerator().prepare(RobustDataLoader(Floats(4), sampler=Sampler(Floats(4)), batch_size=2))
    batches = iter(prepared)
    assert next(batches).flatten().tolist() == [0, 1]
    with pytest.raises(StateError, match="RuntimeError: no"):
        prepared.state_dict()
    assert numbers(batches) == [[2, 3]]


def test_copies_stand_on_their_own() -> None:
    """A copy, pickled or deep, saves where it stands itself."""
    with robust_dataloaders(stateful=True):
        prepared = make_accelerator().prepare(RobustDataLoader(Floats(6), batch_size=2, **OURS))
    for twin in (pickle.loads(pickle.dumps(prepared)), copy.deepcopy(prepared)):
        assert type(twin) is DataLoaderShard
        batches = iter(twin)
        next(batches)
        assert (twin.state_dict()["delivered"], prepared.state_dict()["delivered"]) == (1, 0)
        del batches
