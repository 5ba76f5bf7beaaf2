"""Deaths with persistent workers, without order, and after a ``break``."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from robustloader import RecoveryPolicy, RobustDataLoader, WorkerRestarted
from tests.support.datasets import Deadly, Death, Numbers, Stream
from tests.support.listener import Listener, flat
from tests.support.peek import pids
from tests.support.watch import kill

QUICK = RecoveryPolicy(backoff_s=0, max_restarts=100)


def persistent(dataset: Any, **kwargs: Any) -> RobustDataLoader[Any]:
    return RobustDataLoader(dataset, batch_size=4, num_workers=2, persistent_workers=True, recovery=QUICK, **kwargs)


@pytest.mark.parametrize("victims", [1, 2])
@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_between_epochs(victims: int, kind: str) -> None:
    """Found dead at the next epoch's beginning, replaced, nothing lost."""
    listener = Listener()
    loader = persistent(Numbers(48) if kind == "map" else Stream(48), telemetry=listener.policy)
    for _ in range(3):
        iterator = iter(loader)
        assert sorted(flat(iterator)) == list(range(48))
        for pid in pids(iterator)[:victims]:
            kill(pid, signal.SIGKILL)
    assert len(listener.of(WorkerRestarted)) >= 2
    iterator._shutdown_workers()


@pytest.mark.parametrize("kind", ["map", "iterable"])
@pytest.mark.parametrize("at", [0, 1, 5, 11])
def test_in_the_second_epoch(kind: str, at: int) -> None:
    """Before its first batch, in its middle, near its end."""
    loader = persistent(Numbers(48) if kind == "map" else Stream(48))
    assert sorted(flat(loader)) == list(range(48))
    iterator = iter(loader)
    delivered = []
    for number in range(13):
        if number == at:
            for pid in pids(iterator):
                kill(pid, signal.SIGKILL)
        if (batch := next(iterator, None)) is not None:
            delivered.append(batch)
    assert sorted(flat(delivered)) == list(range(48))
    assert sorted(flat(loader)) == list(range(48))
    iterator._shutdown_workers()


@pytest.mark.parametrize("kind", ["map", "iterable"])
@pytest.mark.parametrize("taken", [1, 3])
def test_after_a_break(kind: str, taken: int) -> None:
    """The next epoch is whole, and holds nothing of the one before."""
    loader = persistent(Numbers(48) if kind == "map" else Stream(48))
    for _ in range(3):
        iterator = iter(loader)
        for _ in range(taken):
            next(iterator)
        for pid in pids(iterator)[:1]:
            kill(pid, signal.SIGKILL)
    delivered = flat(loader)
    assert (delivered if kind == "map" else sorted(delivered)) == list(range(48))
    iterator._shutdown_workers()


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSEGV"])
def test_a_death_in_a_batch_that_nobody_takes(how: str, tmp_path: Path) -> None:
    """Prefetched before a ``break``, in hand when the worker died: no blame in the next epoch, and nothing lost."""
    death = Death(tmp_path, how, times=1)
    loader = persistent(Deadly(48, death, at=9))
    iterator = iter(loader)
    next(iterator)
    assert flat(loader) == list(range(48))
    assert death.count == 1
    assert not loader.fault_log
    iterator._shutdown_workers()


def test_random_kills_over_epochs() -> None:
    """Dozens, in three epochs, abandoned and whole ones."""
    rng = random.Random(4)
    loader = persistent(Numbers(160))
    for epoch in range(4):
        iterator = iter(loader)
        delivered = []
        for batch in iterator:
            delivered.append(batch)
            if epoch % 2 and len(delivered) == 20:
                break
            if rng.random() < 0.2 and (alive := pids(iterator)):
                os.kill(rng.choice(alive), signal.SIGKILL)
        assert flat(delivered) == list(range(80 if epoch % 2 else 160))
    assert not loader.fault_log
    iterator._shutdown_workers()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_in_any_order(seed: int, kind: str) -> None:
    """Exactly once as a multiset, and ``batch_info.index`` tells which batch it is."""
    rng = random.Random(seed)
    loader = RobustDataLoader(
        Numbers(240) if kind == "map" else Stream(240), batch_size=4, num_workers=3, in_order=False, recovery=QUICK
    )
    iterator = iter(loader)
    delivered, numbers = [], []
    for batch in iterator:
        delivered.append(batch)
        numbers.append(iterator.batch_info.index)
        if rng.random() < 0.15 and (alive := pids(iterator)):
            os.kill(rng.choice(alive), signal.SIGKILL)
    assert sorted(flat(delivered)) == list(range(240))
    assert len(set(numbers)) == len(numbers) == 60
    if kind == "map":
        assert all(batch[0] == 4 * number for batch, number in zip(delivered, numbers, strict=True))


@pytest.mark.parametrize(
    "options", [{"seeding": "batch"}, {"batch_size": None}, {"drop_last": True}, {"pin_memory": False}]
)
def test_other_options(options: dict[str, Any]) -> None:
    """Each with a kill of everybody in the middle."""
    kwargs: dict[str, Any] = {"batch_size": 4, "num_workers": 2, "recovery": QUICK, **options}
    loader = RobustDataLoader(Numbers(42), **kwargs)
    iterator = iter(loader)
    delivered = []
    for number, batch in enumerate(iterator):
        delivered.append(batch)
        if number == 2:
            for pid in pids(iterator):
                kill(pid, signal.SIGKILL)
    samples = flat(delivered) if options.get("batch_size", 4) else [int(sample) for sample in delivered]
    assert samples == list(range(40 if options.get("drop_last") else 42))
