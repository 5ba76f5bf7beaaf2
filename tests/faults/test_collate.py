"""A collate that raises, and ``__getitems__``: the samples at fault are found, the others stay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Subset, default_collate

from robustloader import FaultPolicy, RobustDataLoader
from tests.support.datasets import Damaged, Flaky, Numbers, Shaped, WithItems, damaged, noted
from tests.support.hostile import Moody

pytestmark = pytest.mark.filterwarnings("ignore::robustloader.RobustLoaderWarning")

WORKERS = pytest.mark.parametrize("workers", [0, 2])

ODD = {
    "one": (5,),
    "the first of a batch": (8,),
    "the last of a batch": (15,),
    "the first sample of all": (0,),
    "the first two": (8, 9),
    "several": (9, 11, 14),
    "in every batch": (1, 9, 17, 25),
}


@WORKERS
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_odd_shapes_are_replaced(workers: int, odd: Sequence[int], seed: int) -> None:
    """Samples that do not stack with the others are found, whichever they are, and nobody else suffers."""
    generator = torch.Generator().manual_seed(seed)
    loader = RobustDataLoader(Shaped(32, odd), batch_size=8, num_workers=workers, generator=generator)
    iterator = iter(loader)
    samples, replaced = [], {}
    for number, batch in enumerate(iterator):
        assert tuple(batch.shape) == (8, 2)
        samples += [int(row[0]) for row in batch]
        replaced |= {8 * number + place: pair for place, pair in iterator.batch_info.replaced.items()}
    assert len(samples) == 32
    assert replaced == {index: (index, samples[index]) for index in odd}
    assert not set(samples) & set(odd)
    assert all(samples[place] == place for place in range(32) if place not in odd)
    # A spare that does not fit either is recorded as well.
    assert {record.index for record in loader.fault_log} == set(odd)
    assert {record.kind for record in loader.fault_log} == {"collate"}
    assert {record.error_type for record in loader.fault_log} == {"RuntimeError"}


@WORKERS
def test_odd_shapes_are_skipped(workers: int) -> None:
    """The rest of the batch stays."""
    loader = RobustDataLoader(Shaped(32, (8, 11)), batch_size=8, num_workers=workers, faults="skip")
    assert [len(batch) for batch in loader] == [8, 6, 8, 8]
    assert sorted(record.index for record in loader.fault_log) == [8, 11]


@WORKERS
@pytest.mark.parametrize("faults", ["raise", FaultPolicy(action="raise")])
def test_odd_shapes_are_raised(workers: int, faults: Any) -> None:
    """With the error that collate raised."""
    loader = RobustDataLoader(Shaped(32, (11,)), batch_size=8, num_workers=workers, faults=faults)
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(RuntimeError, match="stack"):
        next(iterator)
    assert len(list(iterator)) == 2


class Dislikes:
    """A ``collate_fn`` that raises on some samples."""

    def __init__(self, *samples: int, kind: type[Exception] = Damaged) -> None:
        self.samples = samples
        self.kind = kind

    def __call__(self, batch: Any) -> Any:
        members = batch if isinstance(batch, list) else [batch]
        if any(sample in self.samples for sample in members):
            raise self.kind(f"no {members}")
        return default_collate(batch) if isinstance(batch, list) else batch


@WORKERS
@pytest.mark.parametrize("action", ["replace", "skip"])
@pytest.mark.parametrize("batch_size", [1, None])
def test_a_batch_of_one(workers: int, action: Any, batch_size: int | None) -> None:
    """The one sample is at fault, and replaced under either action."""
    loader = RobustDataLoader(
        Numbers(8),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=Dislikes(3),
        faults=FaultPolicy(action=action),
    )
    samples = [int(batch) for batch in loader]
    assert len(samples) == 8
    assert samples[3] != 3
    assert [record.index for record in loader.fault_log] == [3]


@WORKERS
def test_a_spare_that_does_not_fit_is_replaced_too(workers: int) -> None:
    """Until the batch holds together."""
    loader = RobustDataLoader(
        Shaped(24, (*range(8), 9)), batch_size=8, num_workers=workers, faults=FaultPolicy(burst=1_000)
    )
    batches = list(loader)
    assert [len(batch) for batch in batches] == [8, 8, 8]


@WORKERS
def test_a_fatal_error_in_collate_raises(workers: int) -> None:
    """A misspelt name in collate fails on every batch."""
    loader = RobustDataLoader(Numbers(8), batch_size=4, num_workers=workers, collate_fn=Dislikes(1, kind=NameError))
    with pytest.raises(NameError):
        list(loader)


@WORKERS
@pytest.mark.parametrize("action", ["replace", "skip"])
def test_a_collate_that_fails_in_rhythm_with_the_search(workers: int, action: Any) -> None:
    """The search finds nobody at fault, and the batch that it has made on the way is the batch."""
    loader = RobustDataLoader(
        Numbers(32), batch_size=8, num_workers=workers, collate_fn=Moody(), faults=FaultPolicy(action=action)
    )
    assert [batch.tolist() for batch in loader] == [list(range(start, start + 8)) for start in range(0, 32, 8)]
    assert not loader.fault_log


@WORKERS
def test_a_collate_that_never_works_ends(workers: int) -> None:
    """With an error, not with an endless search."""
    dataset, collate = Numbers(32), Dislikes(*range(32))
    loader = RobustDataLoader(dataset, batch_size=8, num_workers=workers, collate_fn=collate)
    with pytest.raises(RuntimeError) as caught:
        list(loader)
    assert "Damaged" in str(caught.value) or "replacement" in str(caught.value)


@WORKERS
@pytest.mark.parametrize("subset", [False, True])
def test_getitems_is_tried_whole_then_sample_by_sample(workers: int, subset: bool, tmp_path: Path) -> None:
    """Only the bad ones are lost."""
    dataset: Any = WithItems(32, {9: damaged, 12: damaged}, log=tmp_path / "log")
    if subset:
        dataset = Subset(dataset, range(32))
    loader = RobustDataLoader(dataset, batch_size=8, num_workers=workers)
    samples = [int(sample) for batch in loader for sample in batch]
    assert len(samples) == 32
    assert all(samples[place] == place for place in range(32) if place not in (9, 12))
    assert sorted(record.index for record in loader.fault_log) == [9, 12]
    fetched = noted(tmp_path / "log")
    assert all(fetched.count(str(index)) >= 1 for index in range(32))
    assert all(fetched.count(str(index)) <= 2 for index in (0, 7, 16, 31) if str(index) not in ("9", "12"))


class WholeOnlyFails(Numbers):
    """``__getitems__`` fails on more than one index: a server that has trouble with large requests."""

    def __getitems__(self, indices: list[int]) -> list[int]:
        if len(indices) > 1:
            raise Damaged("too much at once")
        return list(indices)


@WORKERS
def test_a_whole_that_fails_without_a_bad_sample(workers: int) -> None:
    """Nothing is lost when each sample loads by itself."""
    loader = RobustDataLoader(WholeOnlyFails(16), batch_size=8, num_workers=workers)
    assert [batch.tolist() for batch in loader] == [list(range(8)), list(range(8, 16))]


class Lies(Numbers):
    """Returns fewer samples than asked for."""

    def __getitems__(self, indices: list[int]) -> list[int]:
        return list(indices)[:-1]


@WORKERS
def test_a_short_answer_is_the_datasets_own_business(workers: int) -> None:
    """As with torch, what ``__getitems__`` returns is collated."""
    assert [len(batch) for batch in RobustDataLoader(Lies(16), batch_size=8, num_workers=workers)] == [7, 7]


class FlakyItems(Flaky):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


@WORKERS
def test_a_passing_failure_in_getitems(workers: int, tmp_path: Path) -> None:
    """The second try, sample by sample, finds everything well."""
    loader = RobustDataLoader(FlakyItems(16, (3,), 1, tmp_path), batch_size=8, num_workers=workers)
    assert [batch.tolist() for batch in loader] == [list(range(8)), list(range(8, 16))]


@WORKERS
def test_collate_gets_tensors_it_may_keep(workers: int) -> None:
    """Searching for the odd one leaves nothing of itself in the batch."""

    class Adds:
        def __call__(self, samples: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack(samples) + 0

    loader = RobustDataLoader(Shaped(16, (4,)), batch_size=8, num_workers=workers, collate_fn=Adds())
    batches = list(loader)
    assert [tuple(batch.shape) for batch in batches] == [(8, 2), (8, 2)]
    assert batches[1][:, 0].tolist() == list(range(8, 16))


def test_raising_and_odd_in_one_batch() -> None:
    """Both kinds are told apart."""

    class Both(Shaped):
        def load(self, index: int) -> Any:
            if index == 2:
                raise Damaged("bad")
            return super().load(index)

    loader = RobustDataLoader(Both(16, (5,)), batch_size=8)
    assert [tuple(batch.shape) for batch in loader] == [(8, 2), (8, 2)]
    # A set: 5 may be drawn as the spare for 2 before it is known, and is then told of in both places.
    assert {(record.index, record.kind) for record in loader.fault_log} == {(2, "exception"), (5, "collate")}
