"""Shards of iterable datasets: what each of them begins with, ends with, and goes on from."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import threading
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from robustloader import RecoveryPolicy, RobustDataLoader, WorkerStartError


def numbers(batches: Any) -> list[int]:
    return [int(number) for batch in batches for number in batch]


class Shuffled(IterableDataset):
    """Each worker shuffles its share with the global generator, and nobody keeps a place."""

    def __iter__(self) -> Any:
        info = get_worker_info()
        assert info is not None
        share = list(range(info.id, 120, info.num_workers))
        random.shuffle(share)
        yield from share


@pytest.mark.parametrize("transport", ["arena", "pipe"])
@pytest.mark.parametrize("epochs", [0, 1, 2])
@pytest.mark.parametrize(("later", "persistent"), [(2, True), (2, False), (0, False)])
def test_a_later_epoch_of_persistent_workers_goes_on(epochs: int, later: int, persistent: bool, transport: Any) -> None:
    """Its streams began where the epoch before had left them, not at the seed: so does whoever reads them again."""
    ours = RobustDataLoader(Shuffled(), 3, num_workers=2, persistent_workers=True, transport=transport)
    for _ in range(epochs):
        list(ours)
    iterator = iter(ours)
    head = numbers(itertools.islice(iterator, 15))
    state = json.loads(json.dumps(ours.state_dict()))
    assert [bool(shard["streams"]) for shard in state["shards"]] == [epochs > 0] * 2
    other = RobustDataLoader(Shuffled(), 3, num_workers=later, persistent_workers=persistent, transport=transport)
    other.load_state_dict(state)
    rest = numbers(other)
    assert rest == numbers(iterator)
    assert sorted(head + rest) == list(range(120))


class Range(IterableDataset):
    """As torch's documentation has it: ``worker_init_fn`` narrows it to a worker's share. It holds a lock."""

    def __init__(self) -> None:
        self.bounds = {"start": 0, "end": 40}
        self.lock = threading.Lock()

    def __iter__(self) -> Any:
        with self.lock:
            return iter(range(self.bounds["start"], self.bounds["end"]))


class Unique(Range):
    """The same, and not to be copied."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("there is only one of it")


class Shared(Unique):
    """The same, and it asks which worker reads it."""

    def __iter__(self) -> Any:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        return iter(range(first, 40, step))


def narrow(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    size = 40 // info.num_workers
    info.dataset.bounds["start"], info.dataset.bounds["end"] = worker * size, (worker + 1) * size


@pytest.mark.filterwarnings("ignore::robustloader.RobustLoaderWarning")
@pytest.mark.parametrize("way", ["killed", "resumed"])
@pytest.mark.parametrize(("dataset", "init"), [(Range, narrow), (Unique, narrow), (Shared, None)])
def test_the_training_process_takes_over_shards(dataset: Any, init: Any, way: str) -> None:
    """Its own dataset stays whole: it narrows copies, and refuses where there can be none."""

    def make(workers: int) -> RobustDataLoader[Any]:
        policy = RecoveryPolicy(max_restarts=0)
        return RobustDataLoader(dataset(), 4, num_workers=workers, worker_init_fn=init, recovery=policy)

    ours = make(2)
    iterator = iter(ours)
    head = numbers(itertools.islice(iterator, 3))
    if way == "killed":
        for process in iterator.processes():
            os.kill(process.pid, signal.SIGKILL)
        resumed = ours
    else:
        resumed = make(0)
        resumed.load_state_dict(ours.state_dict())
    if dataset is Unique:
        with pytest.raises(WorkerStartError, match="only one of it"):
            list(iterator if way == "killed" else resumed)
    else:
        assert sorted(head + numbers(iterator if way == "killed" else resumed)) == list(range(40))
    assert resumed.dataset.bounds == {"start": 0, "end": 40}


class Asked(IterableDataset):
    """As torchdata has it, too: a loaded place waits until the dataset is read. The first worker has less."""

    def __init__(self) -> None:
        self.place = 0
        self.wanted: int | None = None

    def __iter__(self) -> Any:
        info = get_worker_info()
        start, self.wanted = self.wanted or 0, None
        for self.place in range(start + 1, 11 if info is not None and info.id == 0 else 39):
            yield self.place

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.wanted = state["place"]


class Epochs(IterableDataset):
    """One order for all workers, another one in each epoch; it keeps its epoch and its place."""

    def __init__(self) -> None:
        self.epoch = self.place = 0

    def __iter__(self) -> Any:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        order = random.Random(self.epoch).sample(range(50), 50)[first::step]
        while self.place < len(order):
            self.place += 1
            yield order[self.place - 1]
        self.epoch, self.place = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.place = state["epoch"], state["place"]


def lists(batches: Any) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


@pytest.mark.parametrize("place", ["begun", "middle", -4, -2, -1, "last", "past"])
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("dataset", [Asked, Epochs])
def test_what_a_dataset_keeps_outlasts_the_end_of_its_shard(dataset: Any, workers: int, place: str | int) -> None:
    """Stopped anywhere in the third epoch, with some shards at their end and some not: it and all later epochs are
    those of the unbroken run."""

    def make() -> RobustDataLoader[Any]:
        return RobustDataLoader(dataset(), 5, num_workers=workers, persistent_workers=workers > 0)

    unbroken = make()
    epochs = [lists(unbroken) for _ in range(5)]
    ours = make()
    assert [lists(ours) for _ in range(2)] == epochs[:2]
    size = len(epochs[2])
    places = {"begun": 0, "middle": 4, "last": size, "past": size + 1}
    steps = size + place if isinstance(place, int) else places[place]
    iterator = iter(ours)
    head = lists(itertools.islice(iterator, steps))
    state = json.loads(json.dumps(ours.state_dict()))
    assert state["begun"] == (place != "past")
    other = make()
    other.load_state_dict(state)
    told = [head + lists(other)] if state["begun"] else [head]
    assert told + [lists(other) for _ in range(2)] == epochs[2:]


@pytest.mark.parametrize("taken", [0, 9, 13])
def test_what_a_dataset_keeps_outlasts_its_process(taken: int) -> None:
    """Whoever takes the place of a process that died, at its shard's beginning, in it or after it, knows the epoch."""
    ours = RobustDataLoader(Epochs(), 5, num_workers=3, persistent_workers=True)
    unbroken = RobustDataLoader(Epochs(), 5, num_workers=3, persistent_workers=True)
    for _ in range(2):
        assert numbers(ours) == numbers(unbroken)
    iterator = iter(ours)
    head = numbers(itertools.islice(iterator, taken))
    for process in iterator.processes():
        os.kill(process.pid, signal.SIGKILL)
    assert head + numbers(iterator) == numbers(unbroken)
    for _ in range(2):
        assert numbers(ours) == numbers(unbroken)


class Revised(Dataset):
    """Map-style, and each process counts what it loaded."""

    def __init__(self) -> None:
        self.loaded = 0

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> int:
        self.loaded += 1
        return 100 * self.loaded + index

    def state_dict(self) -> dict[str, Any]:
        return {"loaded": self.loaded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state["loaded"]


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("dataset", [Asked, Epochs, Revised])
def test_a_run_that_goes_back(dataset: Any, epochs: int) -> None:
    """A state of between two epochs, loaded while workers of later ones persist: it goes on as a fresh loader does."""

    def make() -> RobustDataLoader[Any]:
        shuffle = True if dataset is Revised else None
        return RobustDataLoader(dataset(), 5, shuffle, num_workers=2, persistent_workers=True)

    torch.manual_seed(3)
    ours = make()
    for _ in range(epochs):
        list(ours)
    state = json.loads(json.dumps(ours.state_dict()))
    for _ in range(2):
        list(ours)
    fresh = make()
    for loader in (ours, fresh):
        torch.manual_seed(4)
        loader.load_state_dict(state)
    assert [lists(ours) for _ in range(3)] == [lists(fresh) for _ in range(3)]


class Halves(IterableDataset):
    """Each of two workers yields twenty numbers of its own."""

    def __iter__(self) -> Any:
        info = get_worker_info()
        assert info is not None
        yield from range(20 * info.id, 20 * info.id + 20)


def test_an_interruption_before_a_shard_is_asked_changes_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C as the training process, which loads for both workers, is about to ask the next of them."""
    ours = RobustDataLoader(Halves(), 4, num_workers=2)
    iterator = iter(ours)
    head = [next(iterator).tolist() for _ in range(3)]
    state = ours.state_dict()
    other = RobustDataLoader(Halves(), 4, num_workers=0)
    other.load_state_dict(state)
    resumed = iter(other)
    rest = [next(resumed).tolist()]
    with monkeypatch.context() as patch:
        patch.setattr(other._desk.budget, "fetched", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(resumed)
    rest += [batch.tolist() for batch in resumed]
    assert head + rest == [list(range(first, first + 4)) for four in range(0, 20, 4) for first in (four, four + 20)]


def _interrupt(samples: int) -> None:
    raise KeyboardInterrupt
