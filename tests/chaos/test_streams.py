"""Deaths of workers that read shares of an iterable dataset: each sample exactly once, whoever dies and how often."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import get_worker_info

from robustloader import (
    PoolShrunk,
    RecoveryPolicy,
    RestartBudgetError,
    RobustDataLoader,
    RobustLoaderWarning,
    ShardEnded,
    WorkerCrashed,
)
from robustloader.testing import Crash, InjectedStream, Injector
from tests.support.datasets import DEATHS, Death, Generated, Stream, Unshared, share_out
from tests.support.listener import Listener, flat
from tests.support.peek import pids
from tests.support.watch import kill

QUICK = RecoveryPolicy(backoff_s=0, max_restarts=100)
BROKE = RecoveryPolicy(backoff_s=0, max_restarts=1)

SHARED: dict[str, dict[str, Any]] = {
    "by get_worker_info": {"dataset": Stream},
    "by a generator": {"dataset": Generated},
    "by worker_init_fn": {"dataset": Unshared, "worker_init_fn": share_out},
}


def loader_of(
    shared: str, size: int = 60, *, stream: dict[str, Any] | None = None, **kwargs: Any
) -> RobustDataLoader[Any]:
    options = {**SHARED[shared], **kwargs}
    dataset = options.pop("dataset")(size, **(stream or {}))
    return RobustDataLoader(dataset, batch_size=4, num_workers=options.pop("num_workers", 2), **options)


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("after", [0, 1, 5, 13])
def test_a_kill_loses_nothing(shared: str, victim: int, after: int) -> None:
    """The same samples as without, each once, in the same order."""
    expected = flat(loader_of(shared))
    assert sorted(expected) == list(range(60))
    iterator = iter(loader_of(shared, recovery=QUICK))
    delivered = []
    for number in range(20):
        if number == after and len(pids(iterator)) > victim:
            kill(pids(iterator)[victim], signal.SIGKILL)
        if (batch := next(iterator, None)) is not None:
            delivered.append(batch)
    assert flat(delivered) == expected


@pytest.mark.parametrize("how", DEATHS)
@pytest.mark.parametrize("at", [0, 1, 22, 59])
def test_one_death_in_the_stream(how: str, at: int, tmp_path: Path) -> None:
    """At the first sample of a share, in the middle of a batch, at the last."""
    death = Death(tmp_path, how)
    loader = loader_of("by get_worker_info", stream={"death": death, "at": at}, recovery=QUICK)
    assert sorted(flat(loader)) == list(range(60))
    assert death.count == 1
    assert not death.seen_in_trainer


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_other_start_methods(method: str, tmp_path: Path) -> None:
    """The same."""
    death = Death(tmp_path, "SIGKILL")
    loader = loader_of(
        "by get_worker_info", stream={"death": death, "at": 22}, num_workers=1, multiprocessing_context=method
    )
    assert flat(loader) == list(range(60))
    assert death.count == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("workers", [1, 3])
def test_random_kills(seed: int, workers: int) -> None:
    """Dozens."""
    rng = random.Random(seed)
    loader = loader_of("by get_worker_info", 300, num_workers=workers, recovery=QUICK)
    iterator = iter(loader)
    delivered = []
    for batch in iterator:
        delivered.append(batch)
        if rng.random() < 0.3 and (alive := pids(iterator)):
            os.kill(rng.choice(alive), signal.SIGKILL)
    assert sorted(flat(delivered)) == list(range(300))
    for share in range(workers):  # each share in its own order
        mine = [sample for sample in flat(delivered) if sample % workers == share]
        assert mine == sorted(mine)


class Shuffled(Stream):
    """Each share in an order drawn from the worker's own generator."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None
        mine = torch.arange(info.id, self.size, info.num_workers)
        yield from mine[torch.randperm(len(mine))].tolist()


def test_a_shard_that_shuffles_is_replayed_in_its_own_order() -> None:
    """It starts again with its original seed, so that what was delivered can be skipped."""
    loader = RobustDataLoader(Shuffled(120), batch_size=4, num_workers=2, recovery=QUICK)
    iterator = iter(loader)
    delivered = []
    for number, batch in enumerate(iterator):
        delivered.append(batch)
        if number in (3, 9, 15):
            for pid in pids(iterator):
                kill(pid, signal.SIGKILL)
    assert sorted(flat(delivered)) == list(range(120))


@pytest.mark.parametrize("shared", SHARED)
def test_fewer_processes_than_shards(shared: str) -> None:
    """When the pool shrinks, a share without a process waits for another's end: the shares stay what they were."""
    listener = Listener()
    loader = loader_of(shared, 120, num_workers=3, recovery=BROKE, telemetry=listener.policy)
    iterator = iter(loader)
    delivered = []
    for number, batch in enumerate(iterator):
        delivered.append(batch)
        if number in (2, 5) and pids(iterator):
            kill(pids(iterator)[0], signal.SIGKILL)
    assert sorted(flat(delivered)) == list(range(120))
    assert [event.workers for event in listener.of(PoolShrunk)] == [2]


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("workers", [1, 3])
def test_no_processes_at_all(shared: str, workers: int) -> None:
    """The training process reads the rest of every share itself."""
    listener = Listener()
    loader = loader_of(shared, 120, num_workers=workers, recovery=BROKE, telemetry=listener.policy)
    for _ in range(2):
        iterator = iter(loader)
        delivered = []
        for batch in iterator:
            delivered.append(batch)
            for pid in pids(iterator):
                kill(pid, signal.SIGKILL)
        assert sorted(flat(delivered)) == list(range(120))
    assert listener.of(PoolShrunk)[-1].workers == 0
    assert get_worker_info() is None
    assert getattr(loader.dataset, "share", None) is None, "the trainer's own dataset was made one worker's share"


def test_no_processes_and_not_in_process() -> None:
    """An error with the history."""
    recovery = RecoveryPolicy(backoff_s=0, max_restarts=1, in_process=False)
    iterator = iter(loader_of("by get_worker_info", 120, recovery=recovery))
    delivered = []
    with pytest.raises(RestartBudgetError):
        for batch in iterator:
            delivered.append(batch)
            for pid in pids(iterator):
                kill(pid, signal.SIGKILL)
    assert len(set(flat(delivered))) == len(flat(delivered))


@pytest.mark.parametrize("how", ["SIGSEGV", "exit 0"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_stream_that_kills_at_one_place_ends_there(how: str, workers: int, tmp_path: Path) -> None:
    """It cannot be jumped: the share ends with an event and a warning, the others are delivered, the training process
    never comes to that place."""
    listener, death = Listener(), Death(tmp_path, how, times=None)
    loader = loader_of(
        "by get_worker_info",
        stream={"death": death, "at": 20},
        num_workers=workers,
        recovery=RecoveryPolicy(backoff_s=0),
        telemetry=listener.policy,
    )
    with pytest.warns(RobustLoaderWarning):
        delivered = sorted(flat(loader))
    lost = set(range(60)) - set(delivered)
    assert len(delivered) == len(set(delivered))
    assert all(number >= 20 - 4 * workers and number % workers == 0 for number in lost)
    assert 20 in lost
    (event,) = listener.of(ShardEnded)
    assert event.worker_id == 0
    assert not death.seen_in_trainer
    assert death.count <= 8


def test_kills_all_over_one_batch_end_no_share() -> None:
    """SIGKILL three times at each of its samples, so that it dies twelve times before it comes: that was chance."""
    injector = Injector({number: Crash(signal=signal.SIGKILL, times=3) for number in range(4, 8)})
    loader = RobustDataLoader(InjectedStream(Stream(12), injector), batch_size=4, num_workers=1, recovery=QUICK)
    assert flat(loader) == list(range(12))
    assert injector.count() == 12
    assert not loader.fault_log


def test_batches_that_arrived_before_the_death_are_not_skipped_twice() -> None:
    """Killed after every batch, with a deep lookahead."""
    loader = loader_of("by get_worker_info", 100, num_workers=1, prefetch_factor=6, recovery=QUICK)
    iterator = iter(loader)
    delivered = []
    for batch in iterator:
        delivered.append(batch)
        for pid in pids(iterator):
            kill(pid, signal.SIGKILL)
    assert flat(delivered) == list(range(100))


def test_deaths_are_told(tmp_path: Path) -> None:
    """With their facts."""
    listener = Listener()
    death = Death(tmp_path, "SIGABRT")
    loader = loader_of("by get_worker_info", stream={"death": death, "at": 21}, telemetry=listener.policy)
    assert sorted(flat(loader)) == list(range(60))
    (crash,) = listener.of(WorkerCrashed)
    assert (crash.worker_id, crash.signal, crash.cause, crash.index) == (1, "SIGABRT", "crash", None)
