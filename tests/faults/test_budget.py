"""The fault budget: survived faults are bounded, and the error tells what happened."""

from __future__ import annotations

from typing import Any

import pytest

from robustloader import FaultBudgetError, FaultPolicy, RobustDataLoader
from tests.support.datasets import Raising, Shaped, damaged
from tests.support.listener import flat

pytestmark = pytest.mark.filterwarnings("ignore::robustloader.RobustLoaderWarning")

WORKERS = pytest.mark.parametrize("workers", [0, 2])
ACTIONS = pytest.mark.parametrize("action", ["replace", "skip"])


def loader_of(bad: Any, workers: int, **policy: Any) -> RobustDataLoader[Any]:
    return RobustDataLoader(
        Raising(400, dict.fromkeys(bad, damaged)), batch_size=4, num_workers=workers, faults=FaultPolicy(**policy)
    )


@WORKERS
@ACTIONS
def test_within_the_budget(workers: int, action: Any) -> None:
    """Exactly as many faults as are allowed are survived."""
    # All in the last batch: a bad sample that is drawn as a spare first would count twice.
    loader = loader_of((396, 397, 398), workers, action=action, burst=3, max_fraction=0)
    assert len(list(loader)) == 100
    assert loader.summary().faults == 3


@WORKERS
@ACTIONS
def test_one_too_many(workers: int, action: Any) -> None:
    """The error counts, shows the commonest cause and the first tracebacks, and holds the records."""
    loader = loader_of(range(0, 40, 4), workers, action=action, burst=3, max_fraction=0)
    iterator = iter(loader)
    with pytest.raises(FaultBudgetError) as caught:
        list(iterator)
    error = caught.value
    assert error.faults == 4
    assert 0 <= error.samples <= 400
    assert len(error.records) == 4
    assert all(record.error_type == "Damaged" for record in error.records)
    assert all("Traceback" in record.traceback for record in error.records)
    assert error.index == error.records[-1].index
    for part in ("4 of", "Damaged (4)", "burst=3", "max_fraction", "cannot decode", "Traceback"):
        assert part in str(error)
    with pytest.raises(FaultBudgetError):
        next(iterator)


@WORKERS
def test_the_fraction_counts(workers: int) -> None:
    """One in twenty may fail for ever, when the burst has room for what is read ahead."""
    loader = loader_of(range(0, 400, 40), workers, burst=4, max_fraction=0.05)
    assert len(flat(loader)) == 400


@WORKERS
def test_the_default_stops_a_wrong_path_soon(workers: int) -> None:
    """Every sample bad: an error after dozens of samples, not after millions."""
    with pytest.raises(FaultBudgetError) as caught:
        list(loader_of(range(400), workers))
    assert caught.value.faults < 100


@WORKERS
def test_over_epochs(workers: int) -> None:
    """The budget is the loader's, over all its epochs."""
    loader = loader_of(range(0, 12, 4), workers, burst=5, max_fraction=0)
    assert len(list(loader)) == 100
    with pytest.raises(FaultBudgetError):
        list(loader)


@WORKERS
def test_collate_faults_count(workers: int) -> None:
    """Odd samples are faults like others."""
    loader = RobustDataLoader(
        Shaped(64, range(0, 64, 8)), batch_size=8, num_workers=workers, faults=FaultPolicy(burst=3, max_fraction=0)
    )
    with pytest.raises(FaultBudgetError):
        list(loader)


@WORKERS
def test_raise_has_no_budget(workers: int) -> None:
    """Each one is raised, however many."""
    iterator = iter(loader_of(range(0, 400, 4), workers, action="raise", burst=0, max_fraction=0))
    for _ in range(30):
        with pytest.raises(Exception, match="cannot decode"):
            next(iterator)
    iterator._shutdown_workers()
