"""Wherever a run is stopped, and with however many workers it goes on: the whole is that of the run nobody stopped."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset, RandomSampler, Sampler, SequentialSampler, get_worker_info

from robustloader import ElasticDistributedSampler, FaultPolicy, RobustDataLoader

CASES = int(os.environ.get("ROBUSTLOADER_RESUME_CASES", "60"))
"""1,000 take some minutes: ROBUSTLOADER_RESUME_CASES=1000 pytest tests/state/test_stop_anywhere.py"""

PART = 30
"""Cases of one test: few enough for the slowest machine, where each one takes a second or two."""


class Noisy(Dataset):
    """Each sample comes with a random number; some raise, and are replaced."""

    def __init__(self, size: int, bad: int) -> None:
        self.size, self.bad = size, bad if size > 9 else 0  # or there may be nothing to replace it

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        if self.bad and index % self.bad == 1:
            raise ValueError(index)
        return index, torch.rand(())


class Stream(IterableDataset):
    """Shared out unevenly among the workers; ``stateful`` keeps its own place."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Any:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        for number in range(first, self.size, step):
            yield number, torch.rand(()) if info else torch.tensor(0.5)


class StatefulStream(Stream):
    """The same, but never read again from its beginning: it keeps its place."""

    place = 0

    def __iter__(self) -> Any:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        while first + self.place * step < self.size:
            number = first + self.place * step
            self.place += 1
            yield number, torch.rand(()) if info else torch.tensor(0.5)
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class Eager(Sampler[int]):
    """Draws its permutation from the global generators in ``iter()`` itself, which torch calls twice with workers."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Any:
        return iter(torch.randperm(self.size).tolist())


class Kept(Eager):
    """Keeps its whole order, its place and as many ``padding`` bytes in its state; each epoch turns the order."""

    def __init__(self, size: int, padding: int) -> None:
        super().__init__(size)
        self.order, self.place, self.padding = list(range(size)), 0, padding

    def __iter__(self) -> Any:
        while self.place < self.size:
            self.place += 1
            yield self.order[self.place - 1]
        self.order, self.place = self.order[1:] + self.order[:1], 0

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "place": self.place, "padding": "x" * self.padding}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.place = state["order"], state["place"]


@dataclass(frozen=True)
class Case:
    style: str
    size: int
    batch_size: int | None
    drop_last: bool
    sampler: str
    generator: bool
    bad: int
    before: int
    after: int
    persistent: bool
    stop: int
    again: int
    past: bool = False

    def loader(self, workers: int) -> RobustDataLoader[Any]:
        generator = torch.Generator().manual_seed(11) if self.generator else None
        options: dict[str, Any] = {"drop_last": self.drop_last} if self.batch_size is not None else {}
        # An epoch must have good samples enough to stand in for a whole batch: a rank of three reads a third of them.
        share = self.size // 3 if self.sampler == "elastic" else self.size
        dataset: Any = Noisy(self.size, self.bad if share >= 3 * (self.batch_size or 1) else 0)
        if self.style != "map":
            dataset = {"stream": Stream, "stateful": StatefulStream}[self.style](self.size)
        elif self.sampler == "replacement":
            options["sampler"] = RandomSampler(dataset, replacement=True, num_samples=self.size, generator=generator)
        elif self.sampler == "sequential":
            options["sampler"] = SequentialSampler(dataset)
        elif self.sampler == "eager":
            options["sampler"] = Eager(self.size)
        elif self.sampler == "kept":
            options["sampler"] = Kept(self.size, padding=0)
        elif self.sampler == "kept, large":
            options["sampler"] = Kept(self.size, padding=20_000)
        elif self.sampler == "elastic":
            options["sampler"] = ElasticDistributedSampler(dataset, 3, 1, drop_last=self.drop_last)
        else:
            options["shuffle"] = True
        return RobustDataLoader(
            dataset,
            self.batch_size,
            num_workers=workers,
            generator=generator,
            persistent_workers=self.persistent and workers > 0,
            seeding="batch",
            faults=FaultPolicy(burst=1 << 30),
            **options,
        )


cases = st.builds(
    Case,
    style=st.sampled_from(["map", "map", "map", "stream", "stateful"]),
    size=st.integers(1, 40),
    batch_size=st.sampled_from([None, 1, 2, 3, 7]),
    drop_last=st.booleans(),
    sampler=st.sampled_from(["random", "replacement", "sequential", "eager", "kept", "kept, large", "elastic"]),
    generator=st.booleans(),
    bad=st.sampled_from([0, 0, 3, 5]),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
    persistent=st.booleans(),
    stop=st.integers(0, 45),
    again=st.integers(0, 5),
    past=st.booleans(),
)


def read(batches: Any) -> list[Any]:
    """Everything, down to the random numbers."""
    return [[torch.as_tensor(part).tolist() for part in batch] for batch in batches]


@pytest.mark.parametrize("part", range(-(-CASES // PART)))
# Not shrunk: the loaders of thousands of failing attempts, kept by their tracebacks, would take all memory.
@settings(
    max_examples=PART,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=[Phase.explicit, Phase.generate],
)
@given(case=cases)
@example(case=Case("map", 20, 3, False, "random", False, 3, 0, 2, False, 0, 0))
@example(case=Case("map", 20, 3, False, "random", False, 0, 2, 0, True, 7, 1, past=True))
@example(case=Case("map", 20, None, False, "eager", False, 0, 0, 2, True, 5, 2))
@example(case=Case("map", 20, 3, False, "kept, large", False, 3, 2, 1, True, 4, 0))
@example(case=Case("map", 20, 2, False, "elastic", False, 3, 0, 2, False, 3, 0))
@example(case=Case("stateful", 6, 1, False, "random", False, 0, 0, 0, False, 0, 1))
@example(case=Case("stateful", 20, 3, False, "random", True, 0, 3, 0, False, 4, 1))
def test_stop_anywhere(case: Case, part: int) -> None:
    """Stopped after ``stop`` batches (or ``past`` the end) and, ``again`` later, once more: head, middle and rest are
    the unbroken epoch, and the next epochs are those of the run that nobody stopped."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        unbroken = case.loader(case.before)
        whole, *following = [read(unbroken) for _ in range(2 + case.past)]
        stop = min(case.stop, len(whole))  # without reading the end
        torch.manual_seed(5)
        first = case.loader(case.before)
        iterator = iter(first)
        told = read(itertools.islice(iterator, stop))
        if case.past and case.style == "map" and stop == len(whole):
            assert next(iterator, None) is None
            assert told == whole
            told, whole = [], following.pop(0)
        state = json.loads(json.dumps(first.state_dict()))
        del iterator, first
        torch.manual_seed(77)
        second = case.loader(case.after)
        second.load_state_dict(state)
        iterator = iter(second)
        told += read(itertools.islice(iterator, min(case.again, len(whole) - len(told))))
        state = second.state_dict()
        del iterator, second
        third = case.loader(case.before)
        third.load_state_dict(state)
        told += read(third)
        assert told == whole
        if case.style == "map":
            assert [read(third) for _ in following] == following
