"""Situations in which a state is taken or loaded."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import random
import signal
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    get_worker_info,
)

from robustloader import (
    ElasticDistributedBatchSampler,
    ElasticDistributedSampler,
    FaultBudgetError,
    FaultPolicy,
    RecoveryPolicy,
    RobustDataLoader,
    RobustLoaderWarning,
    SampleError,
    ShardEnded,
    StateError,
    WorkerStartError,
)
from robustloader.system import torch_private
from tests.support.datasets import Deadly, Death, Numbers, Raising, Random, Stream, damaged
from tests.support.listener import Listener


def numbers(batches: Any) -> list[int]:
    return [int(number) for batch in batches for number in batch]


def flat(parts: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(parts))


class Positioned(Sampler[int]):
    """Draws its order from the system's own randomness and keeps it, and its place, in its state."""

    def __init__(self, size: int) -> None:
        self.order = random.SystemRandom().sample(range(size), size)
        self.place = 0

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Any:
        while self.place < len(self.order):
            self.place += 1
            yield self.order[self.place - 1]
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.place = state["order"], state["place"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("later", [0, 3])
def test_a_sampler_with_its_own_state(workers: int, later: int) -> None:
    """Its state is that of what was delivered, not of what was read ahead; nothing is walked through."""
    ours = RobustDataLoader(Numbers(40), 3, sampler=Positioned(40), num_workers=workers)
    iterator = iter(ours)
    head = numbers(itertools.islice(iterator, 4))
    state = ours.state_dict()
    rest = numbers(iterator)
    other = RobustDataLoader(Numbers(40), 3, sampler=Positioned(40), num_workers=later)
    other.load_state_dict(state)
    assert numbers(other) == rest
    assert numbers(other) == head + rest


@pytest.mark.parametrize("later", [0, 2])
def test_out_of_order(later: int) -> None:
    """Which batches were delivered is in the state: none is lost, none comes twice."""
    ours = RobustDataLoader(Numbers(60), 2, shuffle=True, num_workers=3, in_order=False)
    iterator = iter(ours)
    head = numbers(itertools.islice(iterator, 11))
    state = ours.state_dict()
    del iterator
    other = RobustDataLoader(Numbers(60), 2, shuffle=True, num_workers=later, in_order=False)
    other.load_state_dict(state)
    assert sorted(head + numbers(other)) == list(range(60))


def test_batches_delivered_ahead_are_passed_over() -> None:
    """A state with a gap: exactly the gap and what follows."""
    ours = RobustDataLoader(Numbers(20), 2, num_workers=2, in_order=False)
    iterator = iter(ours)
    next(iterator)
    state = ours.state_dict() | {"delivered": 1, "ahead": (2, 5)}
    del iterator
    for workers in (0, 2):
        other = RobustDataLoader(Numbers(20), 2, num_workers=workers)
        other.load_state_dict(state)
        assert numbers(other) == [n for n in range(2, 20) if n // 2 not in (2, 5)]


def test_while_a_worker_is_restarted(tmp_path: Any) -> None:
    """What a dead worker held was not delivered, so it is loaded by whoever goes on."""
    ours = RobustDataLoader(Numbers(60), 2, shuffle=True, num_workers=2)
    iterator = iter(ours)
    head = numbers(itertools.islice(iterator, 5))
    os.kill(iterator._workers[0].pid, signal.SIGKILL)
    state = ours.state_dict()
    other = RobustDataLoader(Numbers(60), 2, shuffle=True, num_workers=1)
    other.load_state_dict(state)
    assert numbers(other) == numbers(iterator)
    assert len(head) == 10


@pytest.mark.filterwarnings("ignore::robustloader.RobustLoaderWarning")
def test_quarantined_samples_stay_out(tmp_path: Any) -> None:
    """A sample that was convicted of killing workers is not tried again, not even in the training process."""
    death = Death(tmp_path, "SIGKILL", None)
    dataset = Deadly(30, death, at=4)
    ours = RobustDataLoader(dataset, 3, num_workers=2)
    iterator = iter(ours)
    head = numbers(itertools.islice(iterator, 3))
    state, deaths = ours.state_dict(), death.count
    rest = numbers(iterator)
    other = RobustDataLoader(dataset, 3, num_workers=0)
    other.load_state_dict(state)
    assert numbers(other) == rest
    assert 4 not in numbers(other)
    assert (death.count, death.seen_in_trainer) == (deaths, False)
    assert len(head) == 9


def test_the_last_batch_and_past_the_end() -> None:
    """After the last batch nothing is left of the epoch; past the end, the next one comes."""
    ours = RobustDataLoader(Numbers(12), 3, shuffle=True, generator=torch.Generator().manual_seed(1))
    iterator = iter(ours)
    first = numbers(itertools.islice(iterator, 4))
    last = ours.state_dict()
    assert next(iterator, None) is None
    over = ours.state_dict()
    second = numbers(ours)
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
    for state, epochs in ((last, [[], second]), (over, [second])):
        other = RobustDataLoader(Numbers(12), 3, shuffle=True, generator=torch.Generator())
        other.load_state_dict(state)
        assert [numbers(other) for _ in epochs] == epochs


def test_the_global_generators_are_left_alone() -> None:
    """Loading a state and going on draw nothing from them; a seed set afterwards is the user's word."""
    torch.manual_seed(3)
    ours = RobustDataLoader(Numbers(30), 3, shuffle=True)
    iterator = iter(ours)
    next(iterator)
    state = ours.state_dict()
    other = RobustDataLoader(Numbers(30), 3, shuffle=True)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    other.load_state_dict(state)
    rest = numbers(other)
    assert torch.equal(torch.get_rng_state(), before)
    assert rest == numbers(iterator)
    torch.manual_seed(4)
    one = numbers(other)
    torch.manual_seed(4)
    assert one == numbers(ours)


@pytest.mark.filterwarnings("ignore:get_state and legacy can only be used with the MT19937")
@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.Philox, np.random.SFC64])
def test_numpys_global_generator_may_be_another_one(kind: Any) -> None:
    """Its state may hold arrays then, and is the user's to keep; the order, which torch draws, is that of the run."""
    theirs = np.random.get_bit_generator()
    np.random.set_bit_generator(kind(3))
    try:
        ours, other = (RobustDataLoader(Numbers(12), 3, shuffle=True) for _ in range(2))
        iterator = iter(ours)
        head = numbers(itertools.islice(iterator, 1))
        other.load_state_dict(ours.state_dict())
        assert sorted(head + numbers(iterator)) == list(range(12))
        assert sorted(head + numbers(other)) == list(range(12))
    finally:
        np.random.set_bit_generator(theirs)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stop", [0, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_seed_between_loading_and_going_on_is_the_users_word(workers: int, stop: int, when: str) -> None:
    """Not for the rest of the epoch, whose order is what it was, but for the epochs after that."""

    def make() -> RobustDataLoader[Any]:
        return RobustDataLoader(Numbers(30), 3, shuffle=True, num_workers=workers)

    torch.manual_seed(3)
    ours = make()
    iterator = iter(ours)
    head = numbers(itertools.islice(iterator, stop))
    state = ours.state_dict()
    del iterator
    seeded, other = make(), make()
    torch.manual_seed(9)
    expected = numbers(seeded)
    other.load_state_dict(state)
    if when == "before":
        torch.manual_seed(9)
    assert sorted(head + numbers(other)) == list(range(30))
    if when == "after":
        torch.manual_seed(9)
    assert numbers(other) == expected


class Table(Numbers):
    """Is asked for whole batches; one with a bad number in it cannot be had."""

    def __init__(self, bad: int) -> None:
        super().__init__(40)
        self.bad = bad

    def __getitem__(self, index: Any) -> Any:
        if self.bad in index:
            raise damaged(index)
        return torch.tensor(index)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:sample .* was replaced")
@pytest.mark.parametrize("order", [RandomSampler, SequentialSampler])
def test_batches_that_the_dataset_is_asked_for(order: Any, workers: int) -> None:
    """torch's bulk loading: an index is a whole batch, and so is what replaces one; after a resume it is the same."""

    def make() -> RobustDataLoader[Any]:
        drawn = {} if order is SequentialSampler else {"generator": torch.Generator().manual_seed(3)}
        sampler = BatchSampler(order(range(40), **drawn), 4, False)
        return RobustDataLoader(Table(bad), None, sampler=sampler, num_workers=workers)

    bad = -1
    bad = [batch.tolist() for batch in make()][7][0]
    ours = make()
    iterator = iter(ours)
    list(itertools.islice(iterator, 5))
    state = ours.state_dict()
    rest = [batch.tolist() for batch in iterator]
    assert list(map(len, rest)) == [4] * 5
    other = make()
    other.load_state_dict(state)
    assert [batch.tolist() for batch in other] == rest


class Slices:
    """Batches are slices of one iterator, shuffled when it is first read."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Any:
        numbers = self.order()
        for _ in range(len(self)):
            yield itertools.islice(numbers, 4)

    def order(self) -> Any:
        yield from torch.randperm(40, generator=self.generator).tolist()


class KeptSlices(Slices):
    """Keeps its place in its state, which is too large to be asked for after each batch."""

    def __init__(self) -> None:
        self.read, self.loaded, self.ballast = 0, 0, "x" * 9000

    def order(self) -> Any:
        first, self.loaded = self.loaded, 0
        for self.read in range(first + 1, 41):
            yield self.read - 1

    def __iter__(self) -> Any:
        numbers = self.order()
        for _ in range(self.loaded // 4, len(self)):
            yield itertools.islice(numbers, 4)

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read, "ballast": self.ballast}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.read = self.loaded = state["read"]


@pytest.mark.parametrize("faults", ["raise", FaultPolicy()])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", [{"batch_sampler": Slices}, {"batch_sampler": KeptSlices}, {"sampler": Slices}])
@pytest.mark.parametrize("stop", [0, 1, 5, 6, 10])
def test_batches_of_indices_that_can_be_read_once(
    how: dict[str, Any], workers: int, stop: int, faults: str | FaultPolicy
) -> None:
    """What was delivered is read to its end before what follows: no sample is lost, none comes twice."""

    def make() -> RobustDataLoader[Any]:
        options: dict[str, Any] = {name: kind() for name, kind in how.items()}
        if "sampler" in options:
            options["batch_size"] = None
        dataset = Table(-1) if "sampler" in options else Numbers(40)
        return RobustDataLoader(dataset, num_workers=workers, faults=faults, **options)

    unbroken = make()
    epochs = [[batch.tolist() for batch in unbroken] for _ in range(2)]
    ours = make()
    iterator = iter(ours)
    head = [batch.tolist() for batch in itertools.islice(iterator, stop)]
    state = ours.state_dict()
    del iterator
    other = make()
    other.load_state_dict(state)
    assert head + [batch.tolist() for batch in other] == epochs[0]
    assert [batch.tolist() for batch in other] == epochs[1]


def test_an_abandoned_epoch_goes_on() -> None:
    """The state outlives the iterator, and taking it starts nothing."""
    ours = RobustDataLoader(Numbers(30), 3, shuffle=True, num_workers=2)
    head = []
    for batch in ours:
        head += batch.tolist()
        if len(head) == 12:
            break
    state = ours.state_dict()
    assert ours.active_workers == 0
    ours.load_state_dict(state)
    assert ours.state_dict() == state
    assert sorted(head + numbers(ours)) == list(range(30))


def drawing(kind: str) -> tuple[RobustDataLoader[Any], RobustDataLoader[Any]]:
    """Two loaders without workers that draw from the same generator."""
    generator = torch.Generator().manual_seed(8) if kind == "shared" else None
    one, other = (RobustDataLoader(Numbers(30), 3, shuffle=True, generator=generator) for _ in range(2))
    return one, other


@pytest.mark.parametrize("kind", ["global", "shared"])
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_others_draw_between_iter_and_the_first_batch(kind: str, stop: int) -> None:
    """Without workers, a sampler draws when the first batch is asked for: ``zip`` begins another loader before that."""
    torch.manual_seed(2)
    ours, other = drawing(kind)
    if stop:
        pairs = zip(ours, other, strict=True)
        head = numbers(pair[0] for pair in itertools.islice(pairs, stop))
        state = ours.state_dict()
        rest = numbers(pair[0] for pair in pairs)
    else:
        iterator = iter(ours)
        iter(other)
        torch.rand(3)
        state, head = ours.state_dict(), []
        rest = numbers(iterator)
    for further in (2, 0):  # resumed, stopped and resumed again
        ours, _ = drawing(kind)
        ours.load_state_dict(state)
        iterator = iter(ours)
        torch.rand(5)
        told = numbers(itertools.islice(iterator, further))
        state = ours.state_dict()
        assert told + numbers(iterator) == rest
        head, rest = head + told, rest[len(told) :]
    assert sorted(head + rest) == list(range(30))


class Shuffled(IterableDataset):
    """Draws its order in ``iter()``, when it is first read, or (``buffer``) sample by sample."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __iter__(self) -> Any:
        return iter(torch.randperm(60).tolist()) if self.kind == "iter" else self.read()

    def read(self) -> Any:
        if self.kind == "first":
            yield from torch.randperm(60).tolist()
            return
        held: list[int] = []
        for number in range(60):
            held.append(number)
            if len(held) == 12:
                yield held.pop(random.randrange(12))
        while held:
            yield held.pop(random.randrange(len(held)))


@pytest.mark.parametrize("kind", ["iter", "first", "buffer"])
@pytest.mark.parametrize("drawn", [0, 3])
@pytest.mark.parametrize("stop", [0, 1, 6])
def test_a_stream_that_shuffles_in_the_training_process(kind: str, drawn: int, stop: int) -> None:
    """Stopped again and again, in this epoch and the next, whatever was drawn in between: no sample is lost."""
    torch.manual_seed(4)
    random.seed(4)
    ours = RobustDataLoader(Shuffled(kind), 3)
    for _ in range(2):
        iterator = iter(ours)
        torch.rand(drawn)
        told = numbers(itertools.islice(iterator, stop))
        state, whole = ours.state_dict(), told + numbers(iterator)
        for further in (0, 4, 5):
            torch.manual_seed(drawn)
            random.seed(drawn)
            ours = RobustDataLoader(Shuffled(kind), 3)
            ours.load_state_dict(state)
            iterator = iter(ours)
            torch.rand(5)
            told += numbers(itertools.islice(iterator, further))
            state = ours.state_dict()
        before = random.getstate(), torch.get_rng_state().tolist()
        told += numbers(iterator)
        assert (random.getstate(), torch.get_rng_state().tolist()) == before
        assert told == whole
        assert sorted(told) == list(range(60))


class Keeper(Sampler[int]):
    """Shuffles with a generator of its own; ``seeded``: makes it anew for each epoch."""

    def __init__(self, kind: Any, seeded: bool) -> None:
        self.kind, self.rng, self.seeded = kind, kind(3), seeded

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Any:
        if self.seeded:
            self.rng = self.kind(5)
        order = list(range(12))
        self.rng.shuffle(order)
        return iter(order)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("kind", [np.random.default_rng, np.random.RandomState, random.Random])
def test_a_generator_that_no_state_holds(kind: Any, seeded: bool, workers: int) -> None:
    """A sampler that draws its order from one cannot be followed: a resumed run says so."""

    def make() -> RobustDataLoader[Any]:
        return RobustDataLoader(Numbers(12), 3, sampler=Keeper(kind, seeded), num_workers=workers)

    ours = make()
    list(ours)
    iterator = iter(ours)
    next(iterator)
    state = ours.state_dict()
    del iterator
    other = make()
    other.load_state_dict(state)
    told = contextlib.nullcontext() if seeded else pytest.warns(RobustLoaderWarning, match=r"from Keeper\.rng")
    with told:
        rest = numbers(other)
    assert len(rest) == 9


class Told(BaseException):
    """What a signal handler raises to leave the loop."""


class Counting:
    """An iterator that counts."""

    def __init__(self, alarm: int | None, bad: int | None = None) -> None:
        self.place, self.alarm, self.bad = 0, alarm, bad

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> int:
        if self.place == self.alarm:
            self.alarm = None
            signal.raise_signal(signal.SIGUSR1)
        if self.place == 40:
            raise StopIteration
        self.place += 1
        if self.place - 1 == self.bad:
            raise damaged(self.bad)
        return self.place - 1


class Keeping(Counting):
    """The same with a state."""

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class Counted(IterableDataset):
    """Its iterator is a ``kind``; a signal comes at sample ``alarm``, and sample ``bad`` raises."""

    def __init__(self, kind: type[Counting], alarm: int | None = None, bad: int | None = None) -> None:
        self.kind, self.alarm, self.bad = kind, alarm, bad

    def __iter__(self) -> Any:
        return self.kind(self.alarm, self.bad)


class Alarming:
    """Collates, but not before a signal came, once, at sample ``alarm``."""

    def __init__(self, alarm: int) -> None:
        self.alarm: int | None = alarm

    def __call__(self, samples: list[int]) -> torch.Tensor:
        if self.alarm in samples:
            self.alarm = None
            signal.raise_signal(signal.SIGUSR1)
        return torch.tensor(samples)


@pytest.mark.parametrize("kind", [Counting, Keeping])
@pytest.mark.parametrize("where", ["read", "collate"])
@pytest.mark.parametrize("further", [0, 2])
def test_a_signal_handler_that_raises_in_a_batch(kind: type[Counting], where: str, further: int) -> None:
    """Without workers it leaves ``next()`` with half a batch read: neither the run, if it goes on, nor its state loses
    these samples."""

    def tell(*_: Any) -> None:
        raise Told

    before = signal.signal(signal.SIGUSR1, tell)
    try:
        collate: dict[str, Any] = {} if where == "read" else {"collate_fn": Alarming(22)}
        ours = RobustDataLoader(Counted(kind, 22 if where == "read" else None), 4, **collate)
        iterator = iter(ours)
        head = numbers(itertools.islice(iterator, 5))
        with pytest.raises(Told):
            next(iterator)
    finally:
        signal.signal(signal.SIGUSR1, before)
    head += numbers(itertools.islice(iterator, further))
    state = json.loads(json.dumps(ours.state_dict()))
    other = RobustDataLoader(Counted(kind), 4)
    other.load_state_dict(state)
    assert head + numbers(iterator) == list(range(40))
    assert head + numbers(other) == list(range(40))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 3, 8, 9])
def test_a_generator_that_loaders_share(workers: int, stop: int) -> None:
    """A validation in the middle of the epoch draws from it: the next epochs are those of the saved run all the same,
    wherever it was stopped, also where workers have read the sampler to its end."""

    def make() -> list[RobustDataLoader[Any]]:
        generator = torch.Generator().manual_seed(8)
        return [
            RobustDataLoader(Numbers(30), 3, shuffle=True, generator=generator, num_workers=workers),
            RobustDataLoader(Numbers(6), 3, generator=generator),
        ]

    def epochs(training: Any, validation: Any, steps: int) -> list[list[int]]:
        told = []
        for epoch in range(3):
            told.append([])
            for step, batch in enumerate(training, start=0 if epoch else steps):
                if step == 2:
                    list(validation)
                told[-1] += batch.tolist()
        return told

    training, validation = make()
    whole = epochs(training, validation, 0)
    training, validation = make()
    head = []
    iterator = iter(training)
    for step in range(stop):
        batch = next(iterator)
        if step == 2:
            list(validation)
        head += batch.tolist()
    states = training.state_dict(), validation.state_dict()
    del iterator
    training, validation = make()
    training.load_state_dict(states[0])
    validation.load_state_dict(states[1])
    told = epochs(training, validation, stop)
    assert [head + told[0], *told[1:]] == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_of_version_0_1(workers: int) -> None:
    """It has no word of when the sampler was read, and is loaded as it was then."""
    ours = RobustDataLoader(Numbers(30), 3, shuffle=True, generator=torch.Generator().manual_seed(8))
    iterator = iter(ours)
    next(iterator)
    state = ours.state_dict()
    del state["reading"], state["sampler_reads"]
    other = RobustDataLoader(
        Numbers(30), 3, shuffle=True, generator=torch.Generator().manual_seed(9), num_workers=workers
    )
    other.load_state_dict(state)
    assert numbers(other) == numbers(iterator)
    assert numbers(other) == numbers(ours)


class Uneven(IterableDataset):
    """One sample for the first worker, 20 for the second."""

    def __iter__(self) -> Any:
        info = get_worker_info()
        return iter([0] if info is not None and info.id == 0 else range(1, 21))


@pytest.mark.parametrize("recovery", [None, RecoveryPolicy()])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_shard_that_had_ended(recovery: RecoveryPolicy | None, persistent: bool) -> None:
    """It gets no process until the next epoch, which is a whole one."""

    def make() -> RobustDataLoader[Any]:
        return RobustDataLoader(Uneven(), 2, num_workers=2, recovery=recovery, persistent_workers=persistent)

    ours = make()
    iterator = iter(ours)
    head = numbers(itertools.islice(iterator, 5))
    state = ours.state_dict()
    assert [shard["ended"] for shard in state["shards"]] == [True, False]
    other = make()
    other.load_state_dict(state)
    resumed = iter(other)
    assert [process.is_alive() for process in resumed.processes()] == [True]
    assert sorted(head + numbers(resumed)) == list(range(21))
    assert sorted(numbers(other)) == list(range(21))
    assert sorted(numbers(iterator)) == sorted(set(range(21)) - set(head))


class Placed(IterableDataset):
    """Wide samples; keeps its place, and notes in ``folder`` how often it was put somewhere."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder, 0

    def __iter__(self) -> Any:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        while first + self.place * step < 90:
            number = first + self.place * step
            self.place += 1
            yield torch.full((20_000,), number)
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]
        (self.folder / f"{os.getpid()}").touch()


@pytest.mark.parametrize("transport", ["arena", "pipe"])
@pytest.mark.parametrize("later", [0, 2, 3])
def test_a_worker_dies_in_a_stream_that_keeps_its_place(tmp_path: Path, transport: Any, later: int) -> None:
    """Its successor is put where the dead one's results end; so is whoever goes on from the state."""

    def make(workers: int) -> RobustDataLoader[Any]:
        return RobustDataLoader(Placed(tmp_path), 3, num_workers=workers, transport=transport)

    whole = [batch[:, -1].tolist() for batch in make(2)]
    assert not list(tmp_path.iterdir())
    ours = make(2)
    iterator = iter(ours)
    head = [batch[:, -1].tolist() for batch in itertools.islice(iterator, 9)]
    state = ours.state_dict()
    os.kill(iterator._workers[1].pid, signal.SIGKILL)
    rest = [batch[:, -1].tolist() for batch in iterator]
    assert head + rest == whole
    assert len(list(tmp_path.iterdir())) == 1
    other = make(later)
    other.load_state_dict(state)
    assert [batch[:, -1].tolist() for batch in other] == rest


@pytest.mark.filterwarnings("ignore::robustloader.RobustLoaderWarning")
@pytest.mark.parametrize("later", [0, 2])
def test_a_shard_that_died_out(tmp_path: Path, later: int) -> None:
    """A shard that ended because it killed its processes is not begun again, least of all in the training process."""
    death = Death(tmp_path, "SIGSEGV", None)
    dataset = Stream(40, death=death, at=8)  # shard 0 yields 0, 2, 4, 6
    ours = RobustDataLoader(dataset, 2, num_workers=2)
    iterator = iter(ours)
    head = numbers(itertools.islice(iterator, 7))
    state, deaths = ours.state_dict(), death.count
    assert [shard["ended"] for shard in state["shards"]] == [True, False]
    rest = numbers(iterator)
    assert sorted(head + rest) == sorted([0, 2, 4, 6, *range(1, 40, 2)])
    other = RobustDataLoader(dataset, 2, num_workers=later)
    other.load_state_dict(state)
    assert numbers(other) == rest
    assert (death.count, death.seen_in_trainer) == (deaths, False)


class Generated(IterableDataset):
    """Shared out among the workers; the generator of one of them raises."""

    def __init__(self, bad: int) -> None:
        self.bad = bad

    def __iter__(self) -> Any:
        info = get_worker_info()
        assert info is not None
        for number in range(info.id, 40, info.num_workers):
            if number == self.bad:
                raise damaged(number)
            yield number


@pytest.mark.parametrize("bad", [12, 13, 16, 17])
@pytest.mark.parametrize("later", [0, 2])
def test_a_share_that_ends_early_says_so(later: int, bad: int) -> None:
    """Also where the training process loads the rest for several workers, and the other shares go on."""
    listener = Listener()
    ours = RobustDataLoader(Generated(bad), 4, num_workers=2, prefetch_factor=1)
    iterator = iter(ours)
    head = numbers([next(iterator)])
    other = RobustDataLoader(Generated(bad), 4, num_workers=later, telemetry=listener.policy)
    other.load_state_dict(ours.state_dict())
    with pytest.warns(RobustLoaderWarning) as caught:
        rest = numbers(other)
    assert sorted(head + rest) == sorted([*range(bad % 2, bad, 2), *range(1 - bad % 2, 40, 2)])
    (event,) = listener.of(ShardEnded)
    assert (event.worker_id, event.batches) == (bad % 2, 2)
    assert [fault.error_type for fault in other.fault_log] == ["Damaged"]
    assert any("ended early" in str(warning.message) for warning in caught)


class Speechless(IterableDataset):
    """Has a state, but cannot tell it."""

    def __iter__(self) -> Any:
        return iter(range(8))

    def state_dict(self) -> Any:
        raise RuntimeError("speechless")

    def load_state_dict(self, state: Any) -> None: ...


class SpeechlessSampler(Positioned):
    """The same of a sampler."""

    def state_dict(self) -> Any:
        raise RuntimeError("speechless")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("dataset", [Speechless(), Numbers(8)])
def test_a_state_that_cannot_be_told_ends_no_run(dataset: Any, workers: int) -> None:
    """Only whoever asks for it hears of it."""
    sampler = None if isinstance(dataset, Speechless) else SpeechlessSampler(8)
    ours = RobustDataLoader(dataset, 2, sampler=sampler, num_workers=workers)
    iterator = iter(ours)
    head = numbers(itertools.islice(iterator, 2))
    with pytest.raises((StateError, RuntimeError), match="speechless"):
        ours.state_dict()
    assert sorted(head + numbers(iterator)) == list(range(8))


@pytest.mark.parametrize("generator", [False, True])
@pytest.mark.parametrize(
    ("before", "after"), [((2, True), (0, False)), ((0, False), (2, True)), ((2, True), (2, True))]
)
def test_later_epochs_are_those_of_the_saved_run(
    before: tuple[int, bool], after: tuple[int, bool], generator: bool
) -> None:
    """torch's persistent workers draw no base seed for later epochs and others do: whoever goes on does as was done,
    for as long as the run lasts."""

    def make(workers: int, persistent: bool) -> RobustDataLoader[Any]:
        return RobustDataLoader(
            Numbers(30),
            4,
            shuffle=True,
            generator=torch.Generator().manual_seed(6) if generator else None,
            num_workers=workers,
            persistent_workers=persistent,
        )

    torch.manual_seed(1)
    unbroken = make(*before)
    epochs = [numbers(unbroken) for _ in range(5)]
    torch.manual_seed(1)
    ours = make(*before)
    told = [numbers(ours)]
    iterator = iter(ours)
    head = numbers(itertools.islice(iterator, 3))
    state = ours.state_dict()
    del iterator
    torch.manual_seed(99)
    other = make(*after)
    other.load_state_dict(state)
    told += [head + numbers(other), numbers(other)]
    state = other.state_dict()
    third = make(*before)
    third.load_state_dict(state)
    told += [numbers(third) for _ in range(2)]
    assert told == epochs


def test_workers_draw_new_numbers_in_each_epoch_that_has_the_old_base_seed() -> None:
    """Workers that are not persistent, in a run that was: their random streams must not repeat."""
    ours = RobustDataLoader(Random(8), 4, num_workers=1, persistent_workers=True)
    list(ours)
    other = RobustDataLoader(Random(8), 4, num_workers=1)
    other.load_state_dict(ours.state_dict())
    drawn = [int(number) for _ in range(3) for _, noise in other for number in noise]
    assert len(set(drawn)) == len(drawn) == 24


def outcomes(iterator: Any) -> list[Any]:
    """What each step comes to: the numbers of its batch, or the type of its error."""
    found: list[Any] = []
    while True:
        try:
            found.append(numbers([next(iterator)]))
        except StopIteration:
            return found
        except SampleError as error:
            found.append(type(error))


@pytest.mark.filterwarnings("ignore::robustloader.RobustLoaderWarning")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("steps", [1, 9, 30])
def test_batches_without_replacement_count_as_delivered(workers: int, steps: int) -> None:
    """The trainer had their errors: a resumed run does not come to them again."""

    def loader() -> RobustDataLoader[Any]:
        policy = FaultPolicy(burst=100_000, retry=None)
        return RobustDataLoader(Raising(160, dict.fromkeys(range(60), damaged)), 4, num_workers=workers, faults=policy)

    torch.manual_seed(4)
    whole = outcomes(iter(loader()))
    assert len(whole) == 40
    assert SampleError in whole
    torch.manual_seed(4)
    ours = loader()
    iterator = iter(ours)
    for _ in range(steps):
        with contextlib.suppress(SampleError):
            next(iterator)
    state = ours.state_dict()
    assert (state["delivered"], len(state["ahead"])) == (steps, 0)
    later = loader()
    later.load_state_dict(state)
    assert outcomes(iter(later)) == whole[steps:]


@pytest.mark.filterwarnings("ignore::robustloader.RobustLoaderWarning")
@pytest.mark.parametrize(("workers", "later"), [(0, 0), (1, 1), (1, 0), (2, 2), (2, 0)])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_in_a_stream_with_a_long_damage(workers: int, later: int, steps: int) -> None:
    """More faults than one report tells of, in the middle of a batch: no sample is lost, and none comes twice."""
    shares = max(1, workers)

    def loader(workers: int) -> RobustDataLoader[Any]:
        stream = Stream(210 * shares, errors=dict.fromkeys(range(3 * shares, 200 * shares), damaged))
        return RobustDataLoader(stream, 2, num_workers=workers, faults=FaultPolicy(burst=100_000))

    whole = [batch.tolist() for batch in loader(workers)]
    assert sorted(flat(whole)) == [*range(3 * shares), *range(200 * shares, 210 * shares)]
    ours = loader(workers)
    iterator = iter(ours)
    head = [batch.tolist() for batch in itertools.islice(iterator, steps)]
    rest = loader(later)
    rest.load_state_dict(ours.state_dict())
    assert head + [batch.tolist() for batch in rest] == whole


class Pinned:
    """A batch that is pinned as the user says: a signal comes meanwhile, once, at sample ``alarm``."""

    def __init__(self, samples: list[int], alarm: Alarming) -> None:
        self.samples, self.alarm = samples, alarm

    def pin_memory(self) -> torch.Tensor:
        return self.alarm(self.samples)


@pytest.mark.parametrize("way", ["kept", "gone", "goes on"])
@pytest.mark.parametrize("saved", [0, 2])
@pytest.mark.parametrize("kind", [Counting, Keeping])
def test_a_signal_handler_that_raises_while_a_batch_is_on_its_way(
    kind: type[Counting], saved: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without workers, also where the rest is that of two: what was loaded, and given to nobody, is not lost."""
    monkeypatch.setattr(torch_private, "pin_memory", lambda batch, device: batch.pin_memory())
    alarm, end = Alarming(18), 40 * max(1, saved)

    def tell(*_: Any) -> None:
        raise Told

    def make(workers: int) -> RobustDataLoader[Any]:
        return RobustDataLoader(Counted(kind), 4, num_workers=workers, collate_fn=lambda part: Pinned(part, alarm))

    state: dict[str, Any] = make(saved).state_dict()
    head: list[int] = []
    if saved:
        begun = RobustDataLoader(Counted(kind), 4, num_workers=saved)
        iterator = iter(begun)
        head, state = numbers([next(iterator)]), begun.state_dict()
        del iterator
    ours = make(0)
    ours.load_state_dict(state)
    iterator = iter(ours)
    iterator.pins = True
    before = signal.signal(signal.SIGUSR1, tell)
    try:
        with pytest.raises(Told):
            for batch in iterator:
                head += numbers([batch])
    finally:
        signal.signal(signal.SIGUSR1, before)
    if way == "goes on":
        assert sorted(head + numbers(iterator)) == sorted([*range(40)] * max(1, saved))
        return
    if way == "gone":
        del iterator
        gc.collect()
    state = json.loads(json.dumps(ours.state_dict()))
    assert state["delivered"] == len(head) // 4
    other = RobustDataLoader(Counted(kind), 4)
    other.load_state_dict(state)
    rest = numbers(other)
    assert len(head + rest) == end
    assert sorted(head + rest) == sorted([*range(40)] * max(1, saved))


@pytest.mark.parametrize("gone", [False, True])
def test_a_budget_that_is_spent_loses_nothing(gone: bool) -> None:
    """Without workers: its error comes in place of a batch, which is the first one of whoever goes on."""
    ours = RobustDataLoader(Counted(Keeping, bad=9), 4, faults=FaultPolicy(action="skip", burst=0, max_fraction=0))
    iterator = iter(ours)
    head = numbers(itertools.islice(iterator, 2))
    with pytest.warns(RobustLoaderWarning), pytest.raises(FaultBudgetError):
        next(iterator)
    if gone:
        del iterator
        gc.collect()
    other = RobustDataLoader(Counted(Keeping, bad=9), 4)
    other.load_state_dict(json.loads(json.dumps(ours.state_dict())))
    assert head + numbers(other) == [number for number in range(40) if number != 9]


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("dataset", [Raising(24, {9: damaged}), Counted(Keeping, bad=9), Counted(Counting, bad=9)])
def test_a_warning_that_is_an_error(dataset: Any, workers: int, gone: bool) -> None:
    """It comes in place of a batch, which is the next to come: of the iterator, or of whoever goes on instead."""

    def make() -> RobustDataLoader[Any]:
        ahead = 1 if workers else None
        return RobustDataLoader(dataset, 4, num_workers=workers, prefetch_factor=ahead, faults="skip")

    ours = make()
    iterator = iter(ours)
    head: list[int] = []
    with pytest.raises(RobustLoaderWarning, match="cannot decode 9"):
        head += numbers([next(iterator)])
        head += numbers([next(iterator)])
        head += numbers([next(iterator)])
    if gone:
        del iterator
        gc.collect()
    state = json.loads(json.dumps(ours.state_dict()))
    assert state["delivered"] == 2
    other = make()
    other.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rest = numbers(other)
        assert head == list(range(8))
        assert gone or numbers(iterator) == rest
    assert sorted({*rest, 9}) == list(range(8, 24 if isinstance(dataset, Raising) else 40))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_taken_before_the_next_batch(workers: int, steps: int) -> None:
    """Stopped again right after it went on, without a batch: nothing is lost, with a sampler's own state too."""
    whole = list(ElasticDistributedSampler(range(30), 2, 0))
    state: dict[str, Any] = {}
    head: list[int] = []
    for _ in range(3):
        ours = RobustDataLoader(Numbers(30), 3, sampler=ElasticDistributedSampler(range(30), 2, 0), num_workers=workers)
        if state:
            ours.load_state_dict(state)
        iterator = iter(ours)
        head = head or numbers(itertools.islice(iterator, steps))
        state = ours.state_dict()
        assert head + numbers(iterator) == whole


class Mounted:
    """Lets workers start once its file is there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, worker: int) -> None:
        if not self.path.exists():
            raise OSError("not mounted yet")


@pytest.mark.parametrize(
    ("kind", "before", "later"),
    [("shuffled", 1, 1), ("elastic", 2, 2), ("stream", 2, 2), ("stream", 2, 0)],
)
def test_a_beginning_that_fails_uses_nothing_up(tmp_path: Path, kind: str, before: int, later: int) -> None:
    """``worker_init_fn`` raises out of ``iter()``: whoever tries again goes on with the state that was loaded."""
    mounted = Mounted(tmp_path / "mounted")

    def make(workers: int) -> RobustDataLoader[Any]:
        dataset: Any = Stream(30) if kind == "stream" else Numbers(30)
        sampler = ElasticDistributedSampler(dataset, 1, 0) if kind == "elastic" else None
        shuffle = True if kind == "shuffled" else None
        return RobustDataLoader(
            dataset, 3, shuffle=shuffle, sampler=sampler, num_workers=workers, worker_init_fn=mounted
        )

    mounted.path.touch()
    ours = make(before)
    iterator = iter(ours)
    head = numbers(itertools.islice(iterator, 4))
    state = ours.state_dict()
    other = make(later)
    other.load_state_dict(state)
    mounted.path.unlink()
    for _ in range(2):
        with pytest.raises((WorkerStartError, OSError), match="not mounted yet"):
            iter(other)
        assert other.state_dict() == state
    mounted.path.touch()
    assert numbers(other) == numbers(iterator)
    assert len(head) == 12
    assert sorted(numbers(other)) == list(range(30))


def test_epochs_go_on_counting() -> None:
    """A resumed epoch has its number, and so has the next."""
    ours = RobustDataLoader(Numbers(9), 3)
    list(ours)
    next(iter(ours))
    other = RobustDataLoader(Numbers(9), 3)
    other.load_state_dict(ours.state_dict())
    assert (len(list(other)), len(list(other))) == (2, 3)
    assert [summary.epoch for summary in other.summaries] == [1, 2]


# --- ranks


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("size", "ranks"), [(100, 8), (96, 8), (3, 8), (1, 1)])
def test_the_elastic_sampler_is_torchs(size: int, ranks: int, shuffle: bool, drop_last: bool) -> None:
    """Index for index, on every rank and in every epoch."""
    for rank in range(ranks):
        options: dict[str, Any] = {"num_replicas": ranks, "rank": rank, "shuffle": shuffle, "drop_last": drop_last}
        ours = ElasticDistributedSampler(range(size), **options)
        theirs = DistributedSampler(range(size), **options)
        for epoch in (0, 3):
            ours.set_epoch(epoch)
            theirs.set_epoch(epoch)
            assert (list(ours), len(ours)) == (list(theirs), len(theirs))


@pytest.mark.parametrize("kind", [DistributedSampler, ElasticDistributedSampler])
@pytest.mark.parametrize("told", [None, 0])
def test_the_epoch_that_a_sampler_was_told_is_kept(kind: Any, told: int | None) -> None:
    """torch's sampler does not keep it: whoever resumes may forget it, or say another, before the epoch goes on."""
    data = RobustDataLoader(Numbers(20), 3, sampler=kind(range(20), 2, 1))
    data.sampler.set_epoch(5)
    iterator = iter(data)
    head = numbers(itertools.islice(iterator, 2))
    resumed = RobustDataLoader(Numbers(20), 3, sampler=kind(range(20), 2, 1))
    resumed.load_state_dict(data.state_dict())
    if told is not None:
        resumed.sampler.set_epoch(told)
    rest = numbers(resumed)
    assert rest == numbers(iterator)
    assert len(head + rest) == 10
    assert resumed.sampler.epoch == 5


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("taken", [2, 5])
def test_an_elastic_sampler_told_other_epochs_is_where_it_was(taken: int, workers: int) -> None:
    """There and back again, as a framework does that begins at 0: the epoch that goes on is still the saved one."""

    def make() -> RobustDataLoader[Any]:
        return RobustDataLoader(Numbers(30), 3, sampler=ElasticDistributedSampler(range(30), 2, 0), num_workers=workers)

    ours = make()
    ours.sampler.set_epoch(3)
    iterator = iter(ours)
    head = numbers(itertools.islice(iterator, taken))
    state = ours.state_dict()
    for told in ([0], [4], [0, 3]):
        resumed = make()
        resumed.load_state_dict(state)
        for epoch in told:
            resumed.sampler.set_epoch(epoch)
        assert head + numbers(resumed) == numbers(ours)
        resumed.sampler.set_epoch(4)
        whole = numbers(resumed)
        assert len(whole) == 15 and whole != head


@pytest.mark.parametrize(("later", "workers"), [(1, 0), (6, 0), (16, 0), (6, 1)])
def test_a_job_goes_on_with_another_number_of_ranks(later: int, workers: int) -> None:
    """Saved by 8 ranks: the others read what is left of the global order, each sample once."""
    size = 8 * 5 * 3 + 96

    def loaders(ranks: int) -> list[RobustDataLoader[Any]]:
        samplers = [ElasticDistributedSampler(range(size), ranks, rank, seed=2) for rank in range(ranks)]
        for sampler in samplers:
            sampler.set_epoch(1)
        return [RobustDataLoader(Numbers(size), 3, sampler=sampler, num_workers=workers) for sampler in samplers]

    before = loaders(8)
    iterators = [iter(each) for each in before]
    read = [number for each in iterators for number in numbers(itertools.islice(each, 5))]
    states = [each.state_dict() for each in before]
    del iterators
    after = loaders(later)
    for rank, each in enumerate(after):
        each.load_state_dict(states[rank % 8])
    rest = [numbers(each) for each in after]
    assert sorted(read + flat(rest)) == list(range(size))
    assert len({len(share) for share in rest}) == 1
    assert set(flat(numbers(each) for each in after)) == set(range(size))


@pytest.mark.parametrize("later", [1, 3, 16])
def test_the_steps_of_the_batch_form_do_not_depend_on_the_ranks(later: int) -> None:
    """Each step's samples are the same, before and after; every rank has a share in each."""

    def steps(ranks: int) -> list[ElasticDistributedBatchSampler]:
        return [ElasticDistributedBatchSampler(range(100), 16, ranks, rank) for rank in range(ranks)]

    whole = [sorted(batch) for batch in steps(1)[0]]
    before = steps(8)
    readers = [iter(each) for each in before]
    read = [sorted(flat(next(reader) for reader in readers)) for _ in range(3)]
    state = before[0].state_dict()
    assert state["position"] == 48
    loaders = []
    for each in steps(later):
        each.load_state_dict(state)
        loaders.append(RobustDataLoader(Numbers(100), batch_sampler=each))
    shares = [[batch.tolist() for batch in loader] for loader in loaders]
    rest = [sorted(flat(parts)) for parts in zip(*shares, strict=True)]
    assert read + rest[:-1] == whole[:-1]
    assert len(rest[-1]) == max(4, later)  # filled up, where there are more ranks than samples
    assert set(whole[-1]) <= set(rest[-1])


def test_an_abandoned_elastic_epoch_leaves_nothing_behind() -> None:
    """Whoever begins again reads a whole epoch, and its state says so."""
    sampler = ElasticDistributedSampler(range(20), 2, 0)
    ours = RobustDataLoader(Numbers(20), 2, sampler=sampler)
    next(iter(ours))
    iterator = iter(ours)
    state = ours.state_dict()
    del iterator
    ours.load_state_dict(state)
    assert len(numbers(ours)) == 10
    assert isinstance(ours.batch_sampler, BatchSampler)
