"""Errors of the user's code that say that the machine has run out of something are not the sample's fault."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from tenacity import stop_after_attempt, wait_none

from robustloader import FaultBudgetError, FaultPolicy, Retry, RobustDataLoader, RobustLoaderWarning
from tests.support.limited import Exhausting, Hoarder
from tests.support.listener import flat

QUICK = Retry(stop=stop_after_attempt(3), wait=wait_none(), on=())
"""No type is named: what the machine ran out of is retried all the same."""

HINTS = [
    (errno.EMFILE, "ulimit -n"),
    (errno.ENFILE, "fs.file-max"),
    (errno.ENOSPC, "--shm-size"),
    (errno.ENOMEM, "fewer workers"),
]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [number for number, _ in HINTS])
def test_it_passes(workers: int, number: int) -> None:
    """A moment later the sample loads."""
    dataset = Exhausting(16, {3, 9}, number, times=2)
    loader: Any = RobustDataLoader(dataset, batch_size=4, num_workers=workers, faults=FaultPolicy(retry=QUICK))
    assert flat(loader) == list(range(16))
    assert [(record.action, record.attempts) for record in loader.fault_log] == [("retried", 3)] * 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("number", "hint"), HINTS)
def test_it_stays(tmp_path: Path, workers: int, number: int, hint: str) -> None:
    """The sample is replaced, with the remedy in the warning and the log; it is not left out for good."""
    file = tmp_path / "bad.jsonl"
    policy = FaultPolicy(retry=QUICK, quarantine=file)
    loader: Any = RobustDataLoader(
        Exhausting(16, {9}, number), batch_size=4, num_workers=workers, shuffle=False, faults=policy
    )
    with pytest.warns(RobustLoaderWarning, match=hint.replace("-", ".")):
        assert len(flat(loader)) == 16
    (record,) = loader.fault_log
    assert (record.index, record.action, record.attempts) == (9, "replaced", 3)
    assert hint in record.message
    assert not file.exists() or not file.read_text()
    other = RobustDataLoader(Exhausting(16, set()), batch_size=4, num_workers=workers, faults=policy)
    assert flat(other) == list(range(16))


def test_the_budget_error_does_not_blame_the_data() -> None:
    """It names what ran out and the remedy."""
    policy = FaultPolicy(retry=None, burst=4, max_fraction=0)
    loader = RobustDataLoader(Exhausting(32, set(range(32))), batch_size=4, num_workers=2, faults=policy)
    with pytest.warns(RobustLoaderWarning), pytest.raises(FaultBudgetError, match="ulimit -n") as caught:
        list(loader)
    assert "the data is not at fault" in str(caught.value)
    assert "Mend the data" not in str(caught.value)


def test_other_faults_are_still_the_datas() -> None:
    """A missing file is."""
    policy = FaultPolicy(retry=None, burst=4, max_fraction=0)
    loader = RobustDataLoader(Exhausting(32, set(range(32)), errno.ENOENT), batch_size=4, num_workers=2, faults=policy)
    with pytest.warns(RobustLoaderWarning), pytest.raises(FaultBudgetError, match="Mend the data"):
        list(loader)


def test_descriptors_that_really_run_out() -> None:
    """A dataset that keeps its files open meets the limit of its worker, and the error says which and what to do."""
    policy = FaultPolicy(action="raise", retry=QUICK)
    loader = RobustDataLoader(Hoarder(64), batch_size=4, num_workers=1, faults=policy)
    with pytest.raises(OSError, match="Too many open files") as caught:
        list(loader)
    assert "ulimit -n" in str(caught.value)


def test_strict_mode_says_what_torch_says() -> None:
    """Nothing is added."""
    loader = RobustDataLoader(Exhausting(8, {3}), batch_size=4, num_workers=1, faults="raise", recovery=None)
    with pytest.raises(OSError, match="Too many open files") as caught:
        list(loader)
    assert "ulimit" not in str(caught.value)
