"""Objects that keep their own state: what was written for torchdata's loader works here, and ours there."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.stateful import Stateful as TorchStateful
from torch.utils.data import IterableDataset, Sampler, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import BatchSampler, RandomSampler, StatefulDistributedSampler
from torchdata.stateful_dataloader.stateful import Stateful

from robustloader import ElasticDistributedSampler, RobustDataLoader
from tests.support.datasets import Numbers

SIZE = 23
THEIRS = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 calls it


def numbers(batches: Any) -> list[int]:
    return [int(number) for batch in batches for number in batch]


def test_the_loader_and_its_samplers_follow_the_protocol() -> None:
    """torch's and torchdata's: whatever looks for stateful objects finds them."""
    for thing in (RobustDataLoader(Numbers(3)), ElasticDistributedSampler(range(3), 1, 0)):
        assert isinstance(thing, Stateful) and isinstance(thing, TorchStateful)


# --- samplers


def sampler(kind: str) -> dict[str, Any]:
    dataset = Numbers(SIZE)
    if kind == "distributed":
        return {"batch_size": 3, "sampler": StatefulDistributedSampler(dataset, 2, 1)}
    generator = torch.Generator().manual_seed(4)
    if kind == "random":
        return {"batch_size": 3, "sampler": RandomSampler(dataset, generator=generator)}
    if kind == "elastic":
        return {"batch_size": 3, "sampler": ElasticDistributedSampler(dataset, 2, 1)}
    return {"batch_sampler": BatchSampler(RandomSampler(dataset, generator=generator), 3, False)}


@pytest.mark.parametrize("stop", ["begun", "middle", "last", "ended", "next"])
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
@pytest.mark.parametrize("kind", ["distributed", "random", "batches", "elastic"])
def test_samplers_of_torchdata(kind: str, before: int, after: int, stop: str) -> None:
    """Whether the sampler keeps its state or its iterator does: the rest and the next epoch are the unbroken run's."""
    unbroken = RobustDataLoader(Numbers(SIZE), num_workers=before, **sampler(kind))
    epochs = [numbers(unbroken) for _ in range(3)]
    steps = len(unbroken)
    ours = RobustDataLoader(Numbers(SIZE), num_workers=before, **sampler(kind))
    iterator = iter(ours)
    taken = {"begun": 0, "middle": 2}.get(stop, steps)
    told = numbers(itertools.islice(iterator, taken))
    if stop in ("ended", "next"):
        assert next(iterator, None) is None
        assert told == epochs.pop(0)
        told = []
    if stop == "next":
        iterator = iter(ours)
    state = json.loads(json.dumps(ours.state_dict(), default=pickled))
    del iterator
    other = RobustDataLoader(Numbers(SIZE), num_workers=after, **sampler(kind))
    other.load_state_dict(state)
    assert [told + numbers(other), *(numbers(other) for _ in epochs[1:])] == epochs


def pickled(thing: Any) -> Any:
    raise AssertionError(f"the state holds a {type(thing).__name__}")


@THEIRS
def test_our_sampler_in_their_loader() -> None:
    """It goes on where it was, in mid-epoch."""

    def loader() -> Any:
        return StatefulDataLoader(Numbers(SIZE), 3, sampler=ElasticDistributedSampler(range(SIZE), 2, 0))

    theirs = loader()
    iterator = iter(theirs)
    numbers(itertools.islice(iterator, 2))
    state = pickle.loads(pickle.dumps(theirs.state_dict()))
    rest = numbers(iterator)
    other = loader()
    other.load_state_dict(state)
    assert numbers(other) == rest


class Counted(Sampler[int]):
    """Gives the numbers in order, says how often it was asked for its state, and of how many bytes that is."""

    def __init__(self, size: int, state_bytes: int) -> None:
        self.size, self.place, self.asked, self.ballast = size, 0, 0, "x" * state_bytes

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Any:
        while self.place < self.size:
            self.place += 1
            yield self.place - 1
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        self.asked += 1
        return {"place": self.place, "ballast": self.ballast}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class Counter(Counted):
    """The numbers are NumPy's, by themselves or in pairs."""

    def __init__(self, paired: bool) -> None:
        super().__init__(40, 0)
        self.paired = paired

    def __iter__(self) -> Any:
        for number in super().__iter__():
            yield (np.int64(number), np.int64(0)) if self.paired else np.int64(number)


class Kept(Sampler[int]):
    """Draws its order from a generator, and keeps where that stood before and how far it was read.

    At its end it says so, until the next epoch has begun: whoever loads that has nothing left.
    """

    def __init__(self, kind: str) -> None:
        self.kind, self.generator, self.read = kind, torch.Generator().manual_seed(4), 0
        self.stood = self.generator.get_state()
        self.loaded: dict[str, Any] | None = None

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Any:
        first = 0
        if self.loaded is not None:
            self.generator.set_state(self.loaded["generator"])
            first, self.loaded = self.loaded["read"], None
        self.stood = self.generator.get_state()
        order = torch.randperm(SIZE, generator=self.generator).tolist()
        for place in range(first, SIZE):
            self.read = place + 1
            yield order[place]

    def state_dict(self) -> dict[str, Any]:
        if self.loaded is not None:
            return self.loaded
        state: dict[str, Any] = {"read": self.read, "generator": self.stood}
        if self.kind == "cloned":
            state["generator"] = self.stood.clone()
        elif self.kind == "objects":
            state["more"] = np.array([Held(self.stood.clone()), {"here": (float("nan"),)}], dtype=object)
        elif self.kind == "shared":  # pickled, one object that is there twice differs from two that are equal
            name = f"{self.kind}-{SIZE}"
            state["more"] = [name, name if self.read % 2 else f"{self.kind}-{SIZE}", np.full(3, np.nan)]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


class Held:
    """Cannot be compared."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        raise TypeError("compare what I hold")

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("stop", ["ended", "next"])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["tensor", "cloned", "objects", "shared"])
def test_an_epoch_that_is_over_is_known_by_any_state(kind: str, workers: int, stop: str) -> None:
    """Also where two pickles of one state differ, as those of a tensor do: the next epoch is whole."""

    def make() -> RobustDataLoader[Any]:
        return RobustDataLoader(Numbers(SIZE), 4, sampler=Kept(kind), num_workers=workers)

    unbroken = make()
    epochs = [numbers(unbroken) for _ in range(3)]
    ours = make()
    assert numbers(ours) == epochs[0]
    iterator = iter(ours) if stop == "next" else None
    states = [ours.state_dict() for _ in range(2)]
    del iterator
    for state in states:
        other = make()
        other.load_state_dict(state)
        assert [numbers(other), numbers(other)] == epochs[1:]
    onward = make()
    onward.load_state_dict(states[0])
    iterator = iter(onward)  # goes on from a state between two epochs, and is stopped before its first batch
    other = make()
    other.load_state_dict(onward.state_dict())
    del iterator
    assert numbers(other) == epochs[1]


class Pairs(Numbers):
    """Takes indices of one or two numbers."""

    def __getitem__(self, index: Any) -> Any:
        return int(index[0]) if isinstance(index, tuple) else int(index)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_indices_of_numpy_make_a_plain_state(tmp_path: Path, workers: int, paired: bool) -> None:
    """``torch.load`` takes it as it is by default, and so does JSON."""
    ours = RobustDataLoader(Pairs(40), 4, sampler=Counter(paired), num_workers=workers)
    iterator = iter(ours)
    head = numbers(itertools.islice(iterator, 5))
    state = ours.state_dict()
    assert json.loads(json.dumps(state))["spares"]
    torch.save(state, tmp_path / "state.pt")
    other = RobustDataLoader(Pairs(40), 4, sampler=Counter(paired), num_workers=workers)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert head + numbers(other) == list(range(40))


@pytest.mark.parametrize(("state_bytes", "most"), [(0, 103), (40_000, 13), (10_000_000, 3)])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_large_state_is_seldom_asked_for(workers: int, state_bytes: int, most: int) -> None:
    """A sampler that keeps its permutation in its state costs no more per batch; the state is as exact."""
    own = Counted(400, state_bytes)
    ours = RobustDataLoader(Numbers(400), 4, sampler=own, num_workers=workers)
    iterator = iter(ours)
    head = numbers(itertools.islice(iterator, 57))
    state = ours.state_dict()
    rest = numbers(iterator)
    assert own.asked <= most
    other = RobustDataLoader(Numbers(400), 4, sampler=Counted(400, state_bytes))
    other.load_state_dict(state)
    assert numbers(other) == rest
    assert head + rest == list(range(400))


# --- datasets


class Written(IterableDataset):
    """As torchdata's documentation has it: the dataset keeps its place, shared out among the workers."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Any:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        while first + self.place * step < SIZE:
            self.place += 1
            yield first + (self.place - 1) * step
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class ReadOn:
    """An iterator that keeps its own place."""

    def __init__(self) -> None:
        info = get_worker_info()
        self.next, self.step = (info.id, info.num_workers) if info else (0, 1)

    def __iter__(self) -> ReadOn:
        return self

    def __next__(self) -> int:
        if self.next >= SIZE:
            raise StopIteration
        self.next += self.step
        return self.next - self.step

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


class Iterated(IterableDataset):
    """As torchdata's documentation has it, too: what ``iter(dataset)`` returns keeps the place."""

    def __iter__(self) -> Any:
        return ReadOn()


@THEIRS
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Written, Iterated])
def test_datasets_of_torchdata(dataset: Any, workers: int) -> None:
    """The same rest as in torchdata's own loader, and the next epoch is whole."""
    rests = []
    for kind in (StatefulDataLoader, RobustDataLoader):
        first = kind(dataset(), 3, num_workers=workers)
        iterator = iter(first)
        numbers(itertools.islice(iterator, 3))
        state = first.state_dict()
        del iterator
        second: Any = kind(dataset(), 3, num_workers=workers)
        second.load_state_dict(state)
        rests.append(numbers(second))
    assert rests[0] == rests[1]
    assert sorted(numbers(second)) == list(range(SIZE))


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_order_is_the_same_under_any_default_device(shuffle: bool) -> None:
    """Indices are drawn on the CPU, also where a script makes its tensors elsewhere."""
    sampler = ElasticDistributedSampler(range(9), 1, 0, shuffle=shuffle)
    expected = list(sampler)
    with torch.device("meta"):
        assert list(sampler) == expected
