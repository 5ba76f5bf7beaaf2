"""Where replacements come from: the sampler's own indices, the same ones whoever loads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, Subset, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from robustloader import FaultPolicy, RobustDataLoader, SampleError
from tests.support.datasets import Raising, Shaped, WithItems, damaged, noted
from tests.support.listener import flat

pytestmark = pytest.mark.filterwarnings("ignore::robustloader.RobustLoaderWarning")

WORKERS = pytest.mark.parametrize("workers", [0, 2])
PLENTY = FaultPolicy(burst=10_000)

CASES: dict[str, Iterable[int]] = {
    "a few": (3, 17, 18, 40, 90),
    "the first sample": (0,),
    "the whole first batch": range(8),
    "a whole batch": range(24, 32),
    "most of a batch": range(25, 32),
    "two batches next to each other": range(16, 32),
    "the whole last batch": range(88, 96),
    "every other sample": range(0, 96, 2),
}


def run(bad: Iterable[int], workers: int, prefetch: int | None = None, **kwargs: Any) -> Any:
    loader = RobustDataLoader(
        kwargs.pop("dataset", Raising)(96, dict.fromkeys(bad, damaged)),
        batch_size=8,
        num_workers=workers,
        prefetch_factor=prefetch,
        generator=torch.Generator().manual_seed(5),
        faults=kwargs.pop("faults", PLENTY),
        **kwargs,
    )
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("bad", CASES.values(), ids=CASES.keys())
def test_the_same_whatever_the_workers_and_the_lookahead(bad: Iterable[int]) -> None:
    """Task t draws from the tasks before it and from itself, not from what happened to be read ahead."""
    alone = run(bad, 0)
    assert [len(batch) for batch in alone] == [8] * 12
    assert not set(flat(alone)) & set(bad)
    for workers, prefetch in ((1, 1), (1, 4), (3, 2)):
        assert run(bad, workers, prefetch) == alone, f"{workers} workers, prefetch_factor {prefetch}"


@pytest.mark.parametrize(
    "options", [{"shuffle": True}, {"dataset": WithItems}, {"seeding": "batch"}, {"faults": "skip"}]
)
def test_the_same_in_other_modes(options: dict[str, Any]) -> None:
    """Shuffled, with ``__getitems__``, seeded by batch, skipping."""
    alone = run((3, 17, 18, 40), 0, **options)
    assert run((3, 17, 18, 40), 1, **options) == alone
    assert run((3, 17, 18, 40), 3, **options) == alone


def test_odd_shapes_are_replaced_alike() -> None:
    """Also where only collate found them."""

    def load(workers: int) -> Any:
        loader = RobustDataLoader(Shaped(64, (5, 6, 33)), batch_size=8, num_workers=workers)
        torch.manual_seed(2)
        return [batch.tolist() for batch in loader]

    assert load(0) == load(1) == load(3)


def test_epochs_differ() -> None:
    """The next epoch draws other replacements, and the same ones again under the same seed."""
    loader = RobustDataLoader(Raising(96, dict.fromkeys(range(8, 96, 3), damaged)), batch_size=8, faults=PLENTY)

    def epochs() -> Any:
        torch.manual_seed(3)
        return [[batch.tolist() for batch in loader] for _ in range(2)]

    first, second = epochs()
    assert first != second


@WORKERS
@pytest.mark.parametrize("dataset", [Raising, WithItems])
def test_a_split_is_never_left(workers: int, dataset: Any, tmp_path: Path) -> None:
    """A training split must not see validation samples: nothing outside is even fetched."""
    inside = list(range(1, 100, 2))
    whole = dataset(100, dict.fromkeys((1, 3, 21, 23, 25, 99), damaged), log=tmp_path / "log")
    loader = RobustDataLoader(Subset(whole, inside), batch_size=5, shuffle=True, num_workers=workers)
    batches = [batch.tolist() for batch in loader]
    assert [len(batch) for batch in batches] == [5] * 10
    assert set(flat(batches)) <= set(inside)
    assert set(map(int, noted(tmp_path / "log"))) <= set(inside)


@WORKERS
@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_stays_in_its_share(workers: int, rank: int, tmp_path: Path) -> None:
    """A distributed sampler's other ranks load their own samples."""
    dataset = Raising(101, dict.fromkeys(range(0, 101, 7), damaged), log=tmp_path / "log")
    sampler = DistributedSampler(dataset, num_replicas=4, rank=rank, shuffle=True, seed=9)
    share = set(sampler)
    loader = RobustDataLoader(dataset, batch_size=4, sampler=sampler, num_workers=workers)
    batches = [batch.tolist() for batch in loader]
    assert [len(batch) for batch in batches] == [4] * 6 + [2]
    assert set(flat(batches)) <= share
    assert set(map(int, noted(tmp_path / "log"))) <= share


@WORKERS
@pytest.mark.parametrize("kind", ["batch_sampler", "weighted", "unbatched"])
def test_other_samplers(workers: int, kind: str, tmp_path: Path) -> None:
    """Whatever yields the indices, only what it yielded may come."""
    dataset = Raising(60, dict.fromkeys((4, 8, 30), damaged), log=tmp_path / "log")
    allowed = set(range(0, 60, 2))
    options: dict[str, Any] = {
        "batch_sampler": {"batch_sampler": BatchSampler(list(allowed), 6, False)},  # type: ignore[arg-type]
        "weighted": {
            "sampler": WeightedRandomSampler([float(index in allowed) for index in range(60)], 30),
            "batch_size": 6,
        },
        "unbatched": {"sampler": list(allowed), "batch_size": None},
    }[kind]
    loader = RobustDataLoader(dataset, num_workers=workers, **options)
    samples = [int(sample) for batch in loader for sample in batch.flatten()] if kind != "unbatched" else list(loader)
    assert len(samples) == 30
    assert set(samples) <= allowed - {4, 8, 30}
    assert set(map(int, noted(tmp_path / "log"))) <= allowed


@WORKERS
@pytest.mark.parametrize("action", ["replace", "skip"])
def test_nothing_to_draw_from(workers: int, action: Any) -> None:
    """Where every sample is bad there is an error, and no endless search."""
    dataset = Raising(12, dict.fromkeys(range(12), damaged))
    loader = RobustDataLoader(
        dataset, batch_size=4, num_workers=workers, faults=FaultPolicy(action=action, burst=10_000)
    )
    with pytest.raises(SampleError):
        list(loader)


@WORKERS
def test_a_single_batch(workers: int) -> None:
    """An epoch of one batch draws from that batch."""
    loader = RobustDataLoader(Raising(6, {2: damaged, 3: damaged}), batch_size=6, num_workers=workers)
    (batch,) = (batch.tolist() for batch in loader)
    assert len(batch) == 6
    assert set(batch) <= {0, 1, 4, 5}
