"""Workers that hold too much memory are replaced between two tasks, and nothing is lost."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from robustloader import (
    MemoryPolicy,
    RecoveryPolicy,
    RobustDataLoader,
    RobustLoaderWarning,
    TaskReplayed,
    WorkerCrashed,
    WorkerRecycled,
    WorkerRestarted,
)
from tests.support.limited import MIB, Leaky, LeakyStream
from tests.support.listener import Listener, flat

LIMIT = 400 * MIB
"""Above what a spawned process holds after importing torch."""


@pytest.mark.parametrize(("method", "samples"), [("fork", 64), ("spawn", 40)])
@pytest.mark.parametrize("recovery", [RecoveryPolicy(max_restarts=0), None])
def test_a_worker_that_leaks_is_replaced(method: str, samples: int, recovery: RecoveryPolicy | None) -> None:
    """Every sample comes once and in order; it costs no restart credit, replays nothing and is told of."""
    listener = Listener()
    loader: Any = RobustDataLoader(
        Leaky(samples, 40 * MIB),
        batch_size=1,
        num_workers=2,
        multiprocessing_context=method,
        recovery=recovery,
        memory=MemoryPolicy(max_worker_bytes=LIMIT),
        telemetry=listener.policy,
    )
    assert flat(loader) == list(range(samples))
    recycled = listener.of(WorkerRecycled)
    assert recycled
    assert all(event.used_bytes > event.limit_bytes == LIMIT for event in recycled)
    assert len({event.pid for event in recycled}) == len(recycled)
    assert not [*listener.of(WorkerCrashed), *listener.of(WorkerRestarted), *listener.of(TaskReplayed)]
    summary = loader.summary()
    assert (summary.recycled, summary.restarts, summary.workers_at_end) == (len(recycled), 0, 2)
    assert f"{len(recycled)} recycled" in str(summary)


def test_only_one_worker() -> None:
    """While it is replaced nobody loads, and the tasks wait."""
    listener = Listener()
    loader: Any = RobustDataLoader(
        Leaky(40, 40 * MIB),
        num_workers=1,
        memory=MemoryPolicy(max_worker_bytes=LIMIT),
        telemetry=listener.policy,
    )
    assert flat(loader) == list(range(40))
    assert len(listener.of(WorkerRecycled)) >= 2


def test_across_epochs_of_persistent_workers() -> None:
    """What one epoch has leaked counts in the next."""
    listener = Listener()
    loader: Any = RobustDataLoader(
        Leaky(16, 40 * MIB),
        num_workers=2,
        persistent_workers=True,
        memory=MemoryPolicy(max_worker_bytes=LIMIT),
        telemetry=listener.policy,
    )
    for _ in range(3):
        assert flat(loader) == list(range(16))
    assert listener.of(WorkerRecycled)
    del loader


def test_a_worker_that_does_not_leak_stays() -> None:
    """However many batches it loads."""
    listener = Listener()
    policy = MemoryPolicy(max_worker_bytes=LIMIT)
    loader: Any = RobustDataLoader(Leaky(400, 0), num_workers=2, memory=policy, telemetry=listener.policy)
    assert flat(loader) == list(range(400))
    assert not listener.of(WorkerRecycled)


def test_a_bound_that_a_fresh_worker_is_above() -> None:
    """It is said once; workers are still not replaced for every batch."""
    listener = Listener()
    loader: Any = RobustDataLoader(
        Leaky(64, 0), num_workers=2, memory=MemoryPolicy(max_worker_bytes=1), telemetry=listener.policy
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RobustLoaderWarning)
        assert flat(loader) == list(range(64))
    assert [str(warning.message).count("max_worker_bytes=1") for warning in caught] == [1]
    assert 0 < len(listener.of(WorkerRecycled)) <= 64 // 8


def test_streams_are_left_alone() -> None:
    """A shard would have to be read again from its beginning, and leak again."""
    listener = Listener()
    loader: Any = RobustDataLoader(
        LeakyStream(32, 8 * MIB), num_workers=2, memory=MemoryPolicy(max_worker_bytes=1), telemetry=listener.policy
    )
    assert sorted(flat(loader)) == list(range(32))
    assert not listener.of(WorkerRecycled)
