"""What a running epoch tells, how often, and to whom."""

from __future__ import annotations

import selectors
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robustloader import (
    BatchDelivered,
    EpochFinished,
    EpochProgressed,
    RobustDataLoader,
    RobustLoaderWarning,
    TaskLoaded,
    TelemetryPolicy,
)
from robustloader.engine.pool import Pool
from robustloader.telemetry import EpochRecording, Recorder
from tests.support.datasets import Numbers
from tests.support.listener import Listener
from tests.support.peek import await_bytes
from tests.support.telemetry import BATCHES, run_epoch
from tests.support.watch import Gate, wait_at

SECOND = 1_000_000_000


class Gated(Numbers):
    """Each sample but the first ``free`` ones waits at the gate."""

    def __init__(self, size: int, gate: Gate, free: int = 0) -> None:
        super().__init__(size)
        self.gate = str(gate.path)
        self.free = free

    def load(self, index: int) -> Any:
        if index >= self.free:
            wait_at(self.gate)
        return index


class TaskListener(Listener):
    """Hears of every task."""

    wants_tasks = True


def deliver(recording: EpochRecording, now_ns: int, ready: int = 3) -> None:
    begun_ns = now_ns - 2_000
    recording.worker_task(0, 8, 1_000, 7, recording.batches, 99, begun_ns)
    recording.delivered(8, 80)
    recording.waited(2_000, ready, now_ns)


def begin(*sinks: Any, progress_s: float | None = 5.0) -> EpochRecording:
    policy = TelemetryPolicy(sinks=sinks, progress_s=progress_s)
    return Recorder(policy).begin_epoch(epoch=4, workers=2, usable_cpus=4, now_ns=0)


@pytest.mark.parametrize("kind", [Listener, TaskListener])
def test_progress_comes_at_most_so_often(kind: Callable[[], Listener]) -> None:
    """A batch every second, progress every five: counted up to and with the batch that was just delivered."""
    listener = kind()
    recording = begin(listener)
    for second in range(1, 13):
        deliver(recording, second * SECOND, ready=second)
    told = listener.of(EpochProgressed)
    assert [event.statistics["batches"] for event in told] == [5, 10]
    assert [event.statistics["elapsed_s"] for event in told] == pytest.approx([5, 10])
    assert [event.ready for event in told] == [5, 10]
    assert told[0].epoch == told[0].statistics["epoch"] == 4
    assert told[0].workers == [
        {
            "worker_id": 0,
            "tasks": 5,
            "samples": 40,
            "busy_s": pytest.approx(5e-6),
            "load_p95_s": pytest.approx(1e-6, rel=0.1),
            "peak_rss_bytes": 7,
            "restarts": 0,
        }
    ]


def test_a_pause_is_no_reason_to_catch_up() -> None:
    """After a validation of a minute there is one event, not twelve."""
    listener = Listener()
    recording = begin(listener)
    for second in (1, 61, 62, 65, 66):
        deliver(recording, second * SECOND)
    assert [event.statistics["elapsed_s"] for event in listener.of(EpochProgressed)] == pytest.approx([61, 66])


def test_progress_can_be_off() -> None:
    """With None, and without a sink: then a batch is never due."""
    listener = Listener()
    recording = begin(listener, progress_s=None)
    deliver(recording, 10**6 * SECOND)
    assert listener.events == []
    assert begin()._due_ns > 200 * 365 * 86_400 * SECOND


def test_tasks_are_told_only_to_those_who_ask() -> None:
    """Which worker, when, how many samples; and how long the loop waited."""
    asked, plain = TaskListener(), Listener()
    recording = begin(asked, plain)
    deliver(recording, SECOND, ready=2)
    assert plain.events == []
    task, batch = asked.events
    assert isinstance(task, TaskLoaded) and isinstance(batch, BatchDelivered)
    assert (task.epoch, task.task, task.worker_id, task.pid, task.samples) == (4, 0, 0, 99, 8)
    assert (task.begin_ns, task.end_ns) == (SECOND - 2_000, SECOND - 1_000)
    assert (batch.batch, batch.begin_ns, batch.end_ns, batch.ready) == (0, SECOND - 2_000, SECOND, 2)


def test_a_task_sink_that_raises_is_dropped() -> None:
    """With one warning, and the others hear on."""

    class Broken(TaskListener):
        def receive(self, event: Any) -> None:
            raise OSError("no space left on device")

    other = TaskListener()
    recording = begin(Broken(), other)
    with pytest.warns(RobustLoaderWarning, match="no space left") as caught:
        deliver(recording, SECOND)
        deliver(recording, 2 * SECOND)
    assert len(caught) == 1
    assert len(other.events) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_real_epoch(workers: int) -> None:
    """Every batch is loaded once, delivered once, and loaded before it is delivered; the last progress is the end."""
    listener = TaskListener()
    summary = run_epoch(listener, workers=workers)
    tasks, batches = listener.of(TaskLoaded), listener.of(BatchDelivered)
    assert sorted(event.task for event in tasks) == [event.batch for event in batches] == list(range(BATCHES))
    loaded = {event.task: event for event in tasks}
    for event in batches:
        task = loaded[event.batch]
        assert task.begin_ns < task.end_ns <= event.end_ns and event.begin_ns <= event.end_ns
    assert {task.worker_id for task in tasks} == ({0, 1} if workers else {None})
    (finished,) = listener.of(EpochFinished)
    assert finished.summary == summary
    last = listener.of(EpochProgressed)[-1]
    assert last.statistics["batches"] == summary.batches == BATCHES
    assert last.loader == finished.loader
    assert [worker["tasks"] for worker in last.workers] == [worker.tasks for worker in summary.workers]


def test_what_comes_while_the_loop_waits_did_not_lie_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate opens only once the loop waits, and it waits with one system call."""
    wait, select, calls = Pool.wait, selectors.DefaultSelector.select, []

    def open_then_wait(pool: Pool, timeout_s: float | None) -> Any:
        if timeout_s != 0:
            gate.open()
        before = len(calls)
        happenings = wait(pool, timeout_s)
        assert len(calls) == before + 1
        return happenings

    def count(selector: Any, timeout_s: float | None = None) -> Any:
        calls.append(timeout_s)
        return select(selector, timeout_s)

    monkeypatch.setattr(Pool, "wait", open_then_wait)
    monkeypatch.setattr(selectors.DefaultSelector, "select", count)
    listener = TaskListener()
    with Gate(tmp_path / "gate") as gate:
        loader: RobustDataLoader[int] = RobustDataLoader(
            Gated(1, gate), batch_size=1, num_workers=1, telemetry=TelemetryPolicy(sinks=(listener,))
        )
        assert len(list(loader)) == 1
    assert [event.ready for event in listener.of(BatchDelivered)] == [0]
    assert loader.summary().ready_depth_mean == 0


def test_what_lies_in_the_socket_when_the_loop_asks_lies_ready(tmp_path: Path) -> None:
    """Though the training process has not read it yet."""
    listener = TaskListener()
    with Gate(tmp_path / "gate") as gate:
        loader: RobustDataLoader[int] = RobustDataLoader(
            Gated(2, gate, free=1), batch_size=1, num_workers=1, telemetry=TelemetryPolicy(sinks=(listener,))
        )
        batches = iter(loader)
        next(batches)
        gate.open()
        await_bytes(batches, 0)
        assert len(list(batches)) == 1
    assert [event.ready for event in listener.of(BatchDelivered)][1] == 1


def test_loaders_that_share_a_sink_are_told_apart() -> None:
    listener = Listener()
    run_epoch(listener, workers=0)
    run_epoch(listener, workers=0)
    assert len({event.loader for event in listener.of(EpochProgressed)}) == 2
    assert len({event.loader for event in listener.of(EpochFinished)}) == 2
