"""Workers that hold too much memory are replaced between two tasks, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import warnings
from typing import Any

import psutil
import pytest
import torch

from robustloader import (
    Event,
    MemoryPolicy,
    RecoveryPolicy,
    RobustDataLoader,
    RobustLoaderWarning,
    TaskReplayed,
    WorkerCrashed,
    WorkerRecycled,
    WorkerRestarted,
)
from tests.support.limited import MIB, Large, Leaky, LeakyStream
from tests.support.listener import Listener, flat
from tests.support.peek import await_idle
from tests.support.watch import kill

LIMIT = 400 * MIB
"""Well above what a forked process holds to begin with, and after its first few tasks here."""

SPAWNED_LIMIT = 600 * MIB
"""The same for a spawned one, which has imported torch (300 MiB and more, and 40 MiB a task)."""


@pytest.mark.parametrize(("method", "samples", "limit"), [("fork", 64, LIMIT), ("spawn", 40, SPAWNED_LIMIT)])
@pytest.mark.parametrize("recovery", [RecoveryPolicy(max_restarts=0), None])
def test_a_worker_that_leaks_is_replaced(
    method: str, samples: int, limit: int, recovery: RecoveryPolicy | None
) -> None:
    """Every sample comes once and in order; it costs no restart credit, replays nothing and is told of."""
    listener = Listener()
    loader: Any = RobustDataLoader(
        Leaky(samples, 40 * MIB),
        batch_size=1,
        num_workers=2,
        multiprocessing_context=method,
        recovery=recovery,
        memory=MemoryPolicy(max_worker_bytes=limit),
        telemetry=listener.policy,
    )
    assert flat(loader) == list(range(samples))
    recycled = listener.of(WorkerRecycled)
    assert recycled
    assert all(event.used_bytes > event.limit_bytes == limit for event in recycled)
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


class Killer(Listener):
    """Kills the process that is being replaced, at that moment, and then each one that took its place, once."""

    def __init__(self) -> None:
        super().__init__()
        self.iterator: Any = None
        self.killed: list[int] = []

    def receive(self, event: Event) -> None:
        super().receive(event)
        if isinstance(event, WorkerRecycled) and event.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it may have left already
                os.kill(event.pid, signal.SIGKILL)

    def kill_successor(self) -> None:
        """The newest worker process, started in a recycled one's place: it may not even be ready."""
        recycled = self.of(WorkerRecycled)
        if len(recycled) > len(self.killed):
            worker_id = recycled[-1].worker_id
            for worker in self.iterator._pool.workers:
                if worker.worker_id == worker_id and not worker.dismissed and worker.pid not in self.killed:
                    self.killed.append(worker.pid)
                    kill(worker.pid, signal.SIGKILL)
                    return


@pytest.mark.parametrize("workers", [1, 2])
def test_deaths_while_a_worker_is_replaced(workers: int) -> None:
    """The one that leaves is killed, which is no crash; the one that comes is killed, which is one. Nothing is lost."""
    killer = Killer()
    loader: Any = RobustDataLoader(
        Leaky(64, 40 * MIB),
        batch_size=1,
        num_workers=workers,
        memory=MemoryPolicy(max_worker_bytes=LIMIT),
        telemetry=killer.policy,
    )
    killer.iterator = iter(loader)
    loaded = []
    for batch in killer.iterator:
        loaded.append(int(batch))
        killer.kill_successor()
    assert loaded == list(range(64))
    assert killer.killed
    crashes = killer.of(WorkerCrashed)
    recycled = {event.pid for event in killer.of(WorkerRecycled)}
    assert {event.pid for event in crashes} <= set(killer.killed) and crashes
    assert not recycled & {event.pid for event in crashes}
    assert loader.summary().recycled == len(recycled) >= 2
    del killer.iterator


def test_batches_in_the_arena_are_not_the_workers_own() -> None:
    """However many lie ready: the loop has not touched their pages, so to the kernel they are the worker's alone."""
    listener = Listener()
    loader: Any = RobustDataLoader(
        Large(24, 64 * MIB),
        batch_size=None,
        num_workers=1,
        prefetch_factor=6,
        memory=MemoryPolicy(max_worker_bytes=LIMIT, headroom_fraction=0.01),
        telemetry=listener.policy,
    )
    batches = iter(loader)
    next(batches)
    await_idle(batches, 0, done=7)  # six batches of 64 MiB lie in the arena
    assert sum(1 for _ in batches) == 23
    assert loader.summary().peak_worker_bytes > LIMIT  # with the arena, so that it was looked at
    assert not listener.of(WorkerRecycled)


def test_streams_are_left_alone() -> None:
    """A shard would have to be read again from its beginning, and leak again."""
    listener = Listener()
    loader: Any = RobustDataLoader(
        LeakyStream(32, 8 * MIB), num_workers=2, memory=MemoryPolicy(max_worker_bytes=1), telemetry=listener.policy
    )
    assert sorted(flat(loader)) == list(range(32))
    assert not listener.of(WorkerRecycled)


class Lingering(Leaky):
    """Each worker that loads it has a thread that never ends, as a storage client's may."""

    thread: threading.Thread | None = None

    def __getitem__(self, index: int) -> torch.Tensor:
        if Lingering.thread is None:
            Lingering.thread = threading.Thread(target=threading.Event().wait)
            Lingering.thread.start()
        return super().__getitem__(index)


def test_a_worker_that_does_not_leave_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python waits for such a thread at the end of a process: the memory would never come back."""
    monkeypatch.setattr("robustloader.engine.pool.STOP_WITHIN_S", 0.5)
    listener = Listener()
    loader: Any = RobustDataLoader(
        Lingering(1 << 20, 40 * MIB),
        num_workers=1,
        multiprocessing_context="fork",
        memory=MemoryPolicy(max_worker_bytes=LIMIT),
        telemetry=listener.policy,
    )
    for number, batch in enumerate(loader):
        assert int(batch) == number
        first = [event.pid for event in listener.of(WorkerRecycled)[:2]]
        if len(first) == 2 and not any(pid and psutil.pid_exists(pid) for pid in first):
            break
    assert not [*listener.of(WorkerCrashed), *listener.of(WorkerRestarted), *listener.of(TaskReplayed)]
