"""What the recorder counts, keeps and tells."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustloader import telemetry
from robustloader.errors import OptionError, RobustLoaderWarning
from robustloader.events import (
    EpochFinished,
    Event,
    FaultRecord,
    MemoryLow,
    PoolHealed,
    PoolShrunk,
    SampleFaulted,
    SampleReplaced,
    TaskReplayed,
    WorkerCrashed,
    WorkerHung,
    WorkerRecycled,
    WorkerRestarted,
)
from robustloader.policies import TelemetryPolicy
from robustloader.telemetry import EpochRecording, EpochSummary, FaultLog, Recorder, Statistics, WorkerSummary

SECOND = 1_000_000_000
MILLISECOND = 1_000_000


class Listener:
    """A sink that keeps what it hears; with a thread lock, so that it cannot be pickled."""

    def __init__(self) -> None:
        self.heard: list[Event] = []
        self.lock = threading.Lock()

    def receive(self, event: Event) -> None:
        self.heard.append(event)


class Broken:
    def __init__(self) -> None:
        self.calls = 0

    def receive(self, event: Event) -> None:
        self.calls += 1
        raise ConnectionError("no route to host")

    def __repr__(self) -> str:
        return "Broken()"


class Ending:
    """Ends an epoch when it goes, as an iterator does."""

    def __init__(self, recording: EpochRecording) -> None:
        self.recording = recording

    def __del__(self) -> None:
        self.recording.close(complete=False, workers_at_end=2, now_ns=SECOND)


def begin(recorder: Recorder, epoch: int = 0, workers: int = 2, now_ns: int = 0) -> EpochRecording:
    return recorder.begin_epoch(epoch=epoch, workers=workers, usable_cpus=4, now_ns=now_ns)


def run_epoch(recorder: Recorder, epoch: int = 0, batches: int = 20, workers: int = 2) -> EpochSummary | None:
    """An epoch of 20 ms a batch: 10 ms of waiting, 10 ms of computing."""
    recording = begin(recorder, epoch, workers)
    for batch in range(batches):
        recording.worker_task(batch % workers if workers else None, 8, 30 * MILLISECOND, (100 + batch) << 20)
        recording.waited(10 * MILLISECOND, ready=3)
        recording.delivered(8, 1 << 20)
        recording.stepped(10 * MILLISECOND)
    return recording.close(complete=True, workers_at_end=workers, now_ns=batches * 20 * MILLISECOND)


def crashed(cause: str = "crash") -> WorkerCrashed:
    return WorkerCrashed(
        worker_id=1,
        incarnation=0,
        pid=7,
        exitcode=-11,
        signal="SIGSEGV",
        cause=cause,
        phase="item",
        index=3,
        tasks=2,
    )


class TestSummary:
    def test_numbers_of_an_epoch(self) -> None:
        summary = run_epoch(Recorder(TelemetryPolicy()))
        assert summary is not None
        assert (summary.epoch, summary.complete, summary.batches, summary.samples) == (0, True, 20, 160)
        assert summary.bytes == 20 << 20
        assert summary.duration_s == pytest.approx(0.4)
        assert summary.wait_s == summary.step_s == pytest.approx(0.2)
        assert summary.wait_fraction == pytest.approx(0.5)
        assert summary.samples_per_s == pytest.approx(400)
        assert summary.batches_per_s == pytest.approx(50)
        assert summary.bytes_per_s == pytest.approx((20 << 20) / 0.4)
        assert summary.wait_p50_s == summary.wait_p99_s == pytest.approx(0.01, rel=0.032)
        assert summary.load_p50_s == summary.load_p95_s == pytest.approx(0.03, rel=0.032)
        assert summary.ready_depth_mean == 3
        assert summary.first_wait_s == pytest.approx(0.01)
        assert summary.peak_worker_bytes == 119 << 20
        assert (summary.workers_requested, summary.workers_at_end) == (2, 2)
        assert [worker.worker_id for worker in summary.workers] == [0, 1]
        first = summary.workers[0]
        assert (first.tasks, first.samples, first.peak_rss_bytes, first.restarts) == (10, 80, 118 << 20, 0)
        assert first.busy_s == pytest.approx(0.3)
        assert first.load_p95_s == pytest.approx(0.03, rel=0.032)
        assert summary.verdict == "input-bound"
        assert "num_workers=4" in summary.advice

    def test_loading_in_the_training_process_is_worker_none(self) -> None:
        summary = run_epoch(Recorder(TelemetryPolicy()), workers=0)
        assert summary is not None
        assert [worker.worker_id for worker in summary.workers] == [None]
        assert summary.peak_worker_bytes == 0
        assert "main" in str(summary)

    def test_field_order_is_the_documented_one(self) -> None:
        documented = [
            "epoch",
            "complete",
            "batches",
            "samples",
            "bytes",
            "duration_s",
            "wait_s",
            "step_s",
            "wait_fraction",
            "samples_per_s",
            "batches_per_s",
            "bytes_per_s",
            "wait_p50_s",
            "wait_p95_s",
            "wait_p99_s",
            "load_p50_s",
            "load_p95_s",
            "load_p99_s",
            "ready_depth_mean",
            "faults",
            "retries",
            "replaced",
            "skipped",
            "quarantined",
            "crashes",
            "hangs",
            "restarts",
            "replayed_tasks",
            "recycled",
            "workers_requested",
            "workers_at_end",
            "peak_worker_bytes",
            "workers",
            "verdict",
            "advice",
        ]
        assert [field.name for field in fields(EpochSummary)][: len(documented)] == documented

    @pytest.mark.parametrize("kind", [EpochSummary, WorkerSummary, Statistics])
    def test_every_field_is_documented(self, kind: type) -> None:
        for field in fields(kind):
            assert f"\n    {field.name}: " in inspect.cleandoc(kind.__doc__ or "")

    def test_summaries_are_frozen(self) -> None:
        summary = run_epoch(Recorder(TelemetryPolicy()))
        with pytest.raises(FrozenInstanceError):
            summary.batches = 3  # type: ignore[misc, union-attr]

    def test_to_dict_survives_json(self) -> None:
        summary = run_epoch(Recorder(TelemetryPolicy()))
        assert summary is not None
        plain = summary.to_dict()
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain
        rebuilt = EpochSummary(**{**plain, "workers": tuple(WorkerSummary(**worker) for worker in plain["workers"])})
        assert rebuilt == summary

    def test_an_empty_epoch_divides_by_nothing(self) -> None:
        recorder = Recorder(TelemetryPolicy())
        summary = begin(recorder).close(complete=True, workers_at_end=2, now_ns=0)
        assert summary is not None
        assert json.dumps(summary.to_dict(), allow_nan=False)
        assert summary.verdict == "warm-up"

    def test_busy_share_and_stragglers(self) -> None:
        """Of the epoch's duration; a worker twice as slow as the others is named."""
        recording = begin(Recorder(TelemetryPolicy()), workers=3)
        for _ in range(10):
            for worker, load_ms in enumerate((10, 10, 40)):
                recording.worker_task(worker, 8, load_ms * MILLISECOND, 0)
        summary = recording.close(complete=True, workers_at_end=3, now_ns=SECOND)
        assert summary is not None
        assert [worker.busy_fraction for worker in summary.workers] == pytest.approx([0.1, 0.1, 0.4])
        assert [worker.straggler for worker in summary.workers] == [False, False, True]
        assert summary.stragglers == (2,)
        assert "workers    3   stragglers 2" in str(summary)
        assert "40.0 %" in str(summary)

    def test_the_trainers_memory_is_told(self) -> None:
        """It has torch in it, and does not fit into a hundredth of a gigabyte."""
        summary = run_epoch(Recorder(TelemetryPolicy()))
        assert summary is not None
        assert 10 << 20 < summary.peak_trainer_bytes < 1 << 40
        assert "the largest worker" in str(summary) and "the training process" in str(summary)

    def test_64_workers_with_every_trouble_fit_the_screen(self) -> None:
        """Thirty lines of a hundred columns, and every kind of failure is on it."""
        recorder = Recorder(TelemetryPolicy())
        recording = begin(recorder, workers=64)
        for task in range(64 * 12):
            recording.worker_task(task % 64, 8, (900 if task % 64 < 5 else 10) * MILLISECOND, 900 << 30)
            recording.delivered(8, 1 << 30)
            recording.waited(10 * MILLISECOND, 128)
            recording.stepped(MILLISECOND)
        for action in ("retried", "replaced", "skipped", "raised", "quarantined"):
            for _ in range(12_345):
                recording._count(SampleFaulted(fault=FaultRecord(kind="exception", index=0, action=action)))
        for event in (
            SampleReplaced(task=0, position=1, wanted=2, used=3),
            crashed(),
            WorkerHung(worker_id=0, incarnation=0, pid=1, phase="item", index=0, silent_s=9.0, stack=""),
            WorkerRestarted(worker_id=1, incarnation=1, pid=2, waited_s=0.0),
            TaskReplayed(task=4, worker_id=1, attempt=2),
            WorkerRecycled(worker_id=0, pid=1, used_bytes=9, limit_bytes=8),
            PoolShrunk(workers=3, reason="memory"),
        ):
            recording.emit(event)
        text = str(recording.close(complete=False, workers_at_end=3, now_ns=10_000 * SECOND))
        lines = text.splitlines()
        assert len(lines) <= 30 and max(map(len, lines)) <= 100 and "…" not in text
        for word in ("replaced", "skipped", "retried", "quarantined", "hangs", "restarts", "replayed", "recycled"):
            assert word in text
        assert "stragglers 0, 1, 2, 3 and 1 more" in text and "64 at the start, 3 at the end" in text
        assert "and 57 faster ones" in text


class TestTable:
    def test_a_clean_epoch_says_so_in_one_line(self) -> None:
        text = str(run_epoch(Recorder(TelemetryPolicy())))
        assert "faults none, crashes none" in text
        assert "hangs" not in text
        assert "400 samples/s" in text
        assert "20.0 MiB" in text
        verdict, advice = text.splitlines()[-2:]
        assert verdict.split() == ["verdict", "input-bound"]
        assert advice.startswith("advice ")

    def test_failures_are_named_where_there_are_any(self) -> None:
        recorder = Recorder(TelemetryPolicy())
        recording = begin(recorder)
        recording.fault(FaultRecord(kind="exception", index=1, action="replaced"))
        recording.fault(FaultRecord(kind="exception", index=2, action="retried"))
        recording.emit(SampleReplaced(task=0, position=1, wanted=1, used=3))
        recording.emit(crashed())
        recording.emit(WorkerRestarted(worker_id=1, incarnation=1, pid=8, waited_s=0.0))
        text = str(recording.close(complete=False, workers_at_end=1, now_ns=SECOND))
        assert "faults     1   1 replaced   1 retried" in text
        assert "crashes    1   1 restarts" in text
        assert "skipped" not in text
        assert "not complete" in text
        assert "2 at the start, 1 at the end" in text

    @pytest.mark.parametrize(("workers", "rows"), [(0, 0), (1, 1), (8, 8), (9, 8), (64, 8)])
    def test_many_workers_are_folded(self, workers: int, rows: int) -> None:
        recorder = Recorder(TelemetryPolicy())
        recording = begin(recorder, workers=workers)
        for worker in range(workers):
            recording.worker_task(worker, 8, worker * MILLISECOND, 0)
        text = str(recording.close(complete=True, workers_at_end=workers, now_ns=SECOND))
        lines = text.splitlines()
        table = lines[next((n for n, line in enumerate(lines) if "load p95" in line), len(lines) - 3) + 1 : -2]
        assert len(table) == rows
        if workers > 8:
            assert table[0].split()[0] == str(workers - 1), "the slowest comes first"
            assert f"and {workers - 7} faster ones" in table[-1]

    counts = st.integers(0, 10**15)
    amounts = st.floats(0, 1e15) | st.sampled_from([float("inf"), float("nan"), 1e-12])

    @given(st.data(), st.sampled_from([0, 1, 8, 9, 64]))
    def test_wild_values_fit_the_screen(self, data: st.DataObject, workers: int) -> None:
        """At most 30 lines of at most 100 columns, whatever the numbers."""
        kinds: dict[str, st.SearchStrategy[Any]] = {
            "int": self.counts,
            "float": self.amounts,
            "bool": st.booleans(),
            "str": st.text(max_size=2000),
            "Verdict": st.just("balanced"),
            "int | None": st.none() | st.integers(0, 1000),
            "tuple[str, ...]": st.lists(st.text(max_size=2000), max_size=32).map(tuple),
        }

        def draw(kind: type, **given: Any) -> Any:
            drawn = {f.name: data.draw(kinds[str(f.type)]) for f in fields(kind) if f.name not in given}
            return kind(**drawn, **given)

        worker = draw(WorkerSummary)
        summary = draw(EpochSummary, workers=(worker,) * (workers // 2) + (draw(WorkerSummary),) * (-(-workers // 2)))
        lines = str(summary).split("\n")
        assert len(lines) <= 30
        assert max(map(len, lines)) <= 100
        assert "\n" not in summary.headline()


class TestCounting:
    def test_events_and_actions(self) -> None:
        listener = Listener()
        recorder = Recorder(TelemetryPolicy(sinks=(listener,)))
        recording = begin(recorder)
        for action in ("retried", "replaced", "skipped", "raised", "quarantined"):
            recording.fault(FaultRecord(kind="exception", index=0, action=action))
        events = [
            SampleReplaced(task=0, position=1, wanted=2, used=3),
            crashed(),
            WorkerHung(worker_id=0, incarnation=0, pid=1, phase="item", index=0, silent_s=9.0, stack=""),
            crashed(cause="hang"),
            WorkerRestarted(worker_id=1, incarnation=1, pid=2, waited_s=0.0),
            TaskReplayed(task=4, worker_id=1, attempt=2),
            TaskReplayed(task=5, worker_id=1, attempt=2),
            WorkerRecycled(worker_id=0, pid=1, used_bytes=9, limit_bytes=8),
            MemoryLow(wanted_bytes=2, free_bytes=1, action="warn", remedy=""),
            PoolShrunk(workers=1, reason="memory"),
        ]
        for event in events:
            recording.emit(event)
        now = recorder.statistics(now_ns=SECOND)
        assert (now.faults, now.retries, now.replaced, now.skipped, now.quarantined) == (3, 1, 1, 1, 1)
        assert (now.crashes, now.hangs, now.restarts, now.replayed_tasks, now.recycled) == (1, 1, 1, 2, 1)
        assert now.active_workers == 1
        recording.emit(PoolHealed(workers=2))
        assert recorder.statistics().active_workers == 2
        assert [type(e) for e in listener.heard] == [SampleFaulted] * 5 + [type(e) for e in events] + [PoolHealed]
        assert recorder.fault_log.total == 5
        assert recorder.summary().workers[0].restarts == 1

    def test_statistics_of_the_running_epoch(self) -> None:
        recorder = Recorder(TelemetryPolicy())
        assert recorder.statistics() == Statistics()
        recording = begin(recorder, epoch=3)
        recording.waited(SECOND, 0)
        recording.delivered(8, 80)
        recording.stepped(3 * SECOND)
        now = recorder.statistics(now_ns=4 * SECOND)
        assert (now.epoch, now.batches, now.samples, now.bytes, now.active_workers) == (3, 1, 8, 80, 2)
        assert (now.elapsed_s, now.wait_s, now.step_s) == pytest.approx((4, 1, 3))
        assert now.wait_fraction == pytest.approx(0.25)
        assert now.samples_per_s == pytest.approx(2)
        assert json.loads(json.dumps(now.to_dict())) == now.to_dict()
        recording.close(complete=True, workers_at_end=2, now_ns=5 * SECOND)
        assert recorder.statistics(now_ns=99 * SECOND).elapsed_s == pytest.approx(5)

    def test_overlapping_epochs_share_no_numbers(self) -> None:
        recorder = Recorder(TelemetryPolicy())
        outer, inner = begin(recorder, 0), begin(recorder, 1)
        outer.delivered(1, 1)
        inner.delivered(2, 2)
        inner.emit(crashed())
        inner.close(complete=True, workers_at_end=2, now_ns=SECOND)
        outer.close(complete=True, workers_at_end=2, now_ns=SECOND)
        assert [(s.epoch, s.samples, s.crashes) for s in recorder.summaries] == [(0, 1, 0), (1, 2, 1)]


class TestHistory:
    def test_history_is_bounded(self) -> None:
        recorder = Recorder(TelemetryPolicy(history=3))
        for epoch in range(10):
            run_epoch(recorder, epoch)
        assert [summary.epoch for summary in recorder.summaries] == [7, 8, 9]

    def test_lookup_by_number_and_from_the_end(self) -> None:
        recorder = Recorder(TelemetryPolicy(history=3))
        for epoch in range(5):
            run_epoch(recorder, epoch)
        assert recorder.summary().epoch == recorder.summary(4).epoch == 4
        assert recorder.summary(-2).epoch == 3
        for missing in (0, 5, -4):
            with pytest.raises(IndexError, match=rf"no summary of epoch {missing}, but of 2, 3, 4"):
                recorder.summary(missing)

    def test_a_running_epoch_has_a_summary_until_now(self) -> None:
        recorder = Recorder(TelemetryPolicy())
        run_epoch(recorder, 0)
        begin(recorder, 1).delivered(5, 5)
        running = recorder.summary(now_ns=SECOND)
        assert (running.epoch, running.complete, running.samples, running.duration_s) == (1, False, 5, 1.0)
        assert recorder.summary(1).samples == 5
        assert [summary.epoch for summary in recorder.summaries] == [0]

    def test_an_epoch_begun_twice_is_the_later_one(self) -> None:
        recorder = Recorder(TelemetryPolicy())
        run_epoch(recorder, 2, batches=3)
        run_epoch(recorder, 2, batches=5)
        assert recorder.summary(2).batches == 5

    def test_no_epoch_yet(self) -> None:
        with pytest.raises(IndexError, match="no epoch has begun"):
            Recorder(TelemetryPolicy()).summary()

    def test_closing_twice_changes_nothing(self) -> None:
        listener = Listener()
        recorder = Recorder(TelemetryPolicy(sinks=(listener,)))
        recording = begin(recorder)
        first = recording.close(complete=False, workers_at_end=1, now_ns=SECOND)
        assert recording.close(complete=True, workers_at_end=2, now_ns=2 * SECOND) is first
        assert recording.closed
        assert recording.summary(3 * SECOND) is first
        assert recorder.summaries == (first,)
        assert [type(event) for event in listener.heard] == [EpochFinished]


class TestOff:
    def test_off_counts_but_keeps_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        recorder = Recorder(None)
        with caplog.at_level(logging.INFO, "robustloader"):
            assert run_epoch(recorder) is None
            recording = begin(recorder, 1)
            recording.fault(FaultRecord(kind="exception", index=0))
            recording.delivered(3, 30)
        assert recorder.summaries == ()
        assert not caplog.records
        now = recorder.statistics()
        assert (now.epoch, now.batches, now.samples, now.bytes, now.faults) == (1, 1, 3, 30, 1)
        assert now.wait_s == now.step_s == 0
        assert recorder.fault_log.total == 1
        with pytest.raises(IndexError, match="telemetry is off"):
            recorder.summary()


class TestSinks:
    def test_a_sink_that_raises_is_dropped_with_one_warning(self) -> None:
        broken, listener = Broken(), Listener()
        recorder = Recorder(TelemetryPolicy(sinks=(broken, listener)))
        recording = begin(recorder)
        with pytest.warns(RobustLoaderWarning, match=r"Broken\(\) raised ConnectionError: no route") as caught:
            recording.emit(PoolHealed(workers=2))
        assert len(caught) == 1
        recording.emit(PoolHealed(workers=2))
        assert broken.calls == 1
        assert len(listener.heard) == 2

    def test_every_sink_hears_before_the_warning_may_raise(self) -> None:
        """The suite turns warnings into errors, as a user may."""
        broken, listener = Broken(), Listener()
        recorder = Recorder(TelemetryPolicy(sinks=(broken, listener)))
        recording = begin(recorder)
        with pytest.raises(RobustLoaderWarning):
            recording.emit(PoolHealed(workers=2))
        assert len(listener.heard) == 1
        recording.emit(PoolHealed(workers=2))

    def test_the_end_of_an_epoch_is_told(self) -> None:
        listener = Listener()
        summary = run_epoch(Recorder(TelemetryPolicy(sinks=(listener,))), epoch=4)
        (event,) = listener.heard
        assert isinstance(event, EpochFinished)
        assert event.summary is summary
        assert event.epoch == 4
        assert json.dumps(event.to_dict())

    def test_what_ends_in_a_collection_is_told_with_the_next_event(self) -> None:
        """Before that, by this process, and in no copy of it."""
        listener = Listener()
        recorder = Recorder(TelemetryPolicy(sinks=(listener,)))
        ending: list[Any] = [Ending(begin(recorder))]
        ending.append(ending)
        del ending
        gc.collect()
        assert not listener.heard and len(recorder.summaries) == 1
        child = os.fork()
        begin(recorder).emit(PoolHealed(workers=2))
        told = [type(event) for event in listener.heard]
        if not child:
            os._exit(told != [PoolHealed])
        assert os.waitpid(child, 0)[1] == 0
        assert told == [EpochFinished, PoolHealed]

    @pytest.mark.parametrize("wanted", [True, False])
    def test_one_line_in_the_log_per_epoch(self, wanted: bool, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "robustloader"):
            run_epoch(Recorder(TelemetryPolicy(log_epochs=wanted)), epoch=7)
        assert len(caplog.records) == wanted
        if wanted:
            (record,) = caplog.records
            assert record.levelno == logging.INFO
            assert record.getMessage().startswith("epoch 7: 20 batches, 160 samples in 400 ms (400 samples/s)")
            assert record.getMessage().endswith("input-bound")

    def test_the_log_line_names_failures(self, caplog: pytest.LogCaptureFixture) -> None:
        recording = begin(Recorder(TelemetryPolicy()))
        recording.emit(crashed())
        with caplog.at_level(logging.INFO, "robustloader"):
            recording.close(complete=False, workers_at_end=2, now_ns=SECOND)
        assert "(not complete)" in caplog.text
        assert "; crashes 1; warm-up" in caplog.text


class TestCopies:
    @pytest.fixture
    def original(self) -> Recorder:
        recorder = Recorder(TelemetryPolicy(sinks=(Listener(),), history=5))
        run_epoch(recorder, 0)
        begin(recorder, 1).fault(FaultRecord(kind="exception", index=1))
        return recorder

    def test_a_pickle_keeps_what_is_over_and_no_sinks(self, original: Recorder) -> None:
        copied = pickle.loads(pickle.dumps(original))
        assert copied.summaries == original.summaries
        assert copied.summary().epoch == 0
        assert list(copied.fault_log) == list(original.fault_log)
        assert copied.policy == TelemetryPolicy(history=5)
        run_epoch(copied, 1)
        assert len(copied.summaries) == 2
        assert len(original.summaries) == 1

    def test_a_deep_copy_shares_the_sinks_and_nothing_else(self, original: Recorder) -> None:
        copied = copy.deepcopy(original)
        assert copied.policy is original.policy
        assert original.policy is not None
        (listener,) = original.policy.sinks
        assert isinstance(listener, Listener)
        heard = len(listener.heard)
        run_epoch(copied, 1)
        assert len(listener.heard) == heard + 1
        assert len(original.summaries) == 1
        copied.fault_log.append(FaultRecord(kind="crash", index=2))
        assert original.fault_log.total == 1

    def test_off_is_copied_as_off(self) -> None:
        assert pickle.loads(pickle.dumps(Recorder(None))).policy is None
        assert copy.deepcopy(Recorder(None)).policy is None


class Uncopyable:
    """An index that defies everything but comparison."""

    def __deepcopy__(self, memo: object) -> None:
        raise TypeError("no")

    def __repr__(self) -> str:
        raise ValueError("no name")


class TestFaultLog:
    @staticmethod
    def filled(number: int, capacity: int = 10) -> FaultLog:
        log = FaultLog(capacity)
        for index in range(number):
            if index % 3 == 0:
                log.append(FaultRecord(kind="crash", index=index))
            else:
                log.append(FaultRecord(kind="exception", index=index, error_type="ValueError"))
        return log

    def test_it_is_a_sequence_of_the_newest(self) -> None:
        log = self.filled(25)
        assert (len(log), log.total, log.dropped) == (10, 25, 15)
        assert [record.index for record in log] == list(range(15, 25))
        assert (log[0].index, log[-1].index) == (15, 24)
        assert [record.index for record in log[-2:]] == [23, 24]
        assert [record.index for record in reversed(log)] == list(range(24, 14, -1))
        assert log[3] in log
        with pytest.raises(IndexError):
            log[10]

    def test_the_table_moves_no_cursor(self) -> None:
        log = FaultLog()
        log.append(FaultRecord(kind="exception", index="a\x1b[2Jb", error_type="E", message="c\x1b]0;x\x07d\x9be\r\nf"))
        assert str(log).isascii() and not re.search("[\x00-\x09\x0b-\x1f]", str(log))
        assert "a\\x1b[2Jb" in str(log) and "E: c ]0;x d e f" in str(log)

    def test_counts_are_over_all_ever_seen(self) -> None:
        log = self.filled(25)
        assert log.by_kind() == {"exception": 16, "crash": 9}
        assert log.by_error_type() == {"ValueError": 16, "": 9}

    def test_the_default_keeps_ten_thousand(self) -> None:
        log = FaultLog()
        record = FaultRecord(kind="exception", index=0)
        for _ in range(10_001):
            log.append(record)
        assert (len(log), log.dropped) == (10_000, 1)

    @pytest.mark.parametrize("capacity", [0, -1, 2.5])
    def test_capacity_is_checked(self, capacity: Any) -> None:
        with pytest.raises(OptionError, match="capacity"):
            FaultLog(capacity)

    def test_threads_lose_no_count(self) -> None:
        log = FaultLog(5)
        record = FaultRecord(kind="exception", index=0)

        def append_many() -> None:
            for _ in range(2_000):
                log.append(record)

        threads = [threading.Thread(target=append_many) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert len(list(log)) <= 5
            assert log.total <= 8_000
            str(log)
        for thread in threads:
            thread.join()
        assert log.total == sum(log.by_kind().values()) == 8_000

    def test_save_writes_json_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "faults.jsonl"
        path.write_text("what was there before")
        log = FaultLog()
        indices: list[Any] = [3, "a\nb", (1, 2), None, b"raw", {(1, 2): 3}, float("nan"), Uncopyable()]
        for index in indices:
            log.append(FaultRecord(kind="exception", index=index, replacement=index, message="\ud800", time=1.5))
        log.save(path)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert [row["index"] for row in rows[:-1]] == [3, "a\nb", [1, 2], None, "b'raw'", "{(1, 2): 3}", "nan"]
        assert "Uncopyable object at" in rows[-1]["replacement"]
        assert set(rows[0]) == {field.name for field in fields(FaultRecord)}
        assert list(tmp_path.iterdir()) == [path]

    def test_a_save_that_fails_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "faults.jsonl"
        path.write_text("before")

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            self.filled(3).save(str(path))
        assert path.read_text() == "before"
        assert list(tmp_path.iterdir()) == [path]

    def test_text_is_a_short_table(self) -> None:
        log = FaultLog(50)
        assert str(log) == "no faults"
        for index in range(60):
            log.append(
                FaultRecord(
                    kind="exception", index=index, error_type="lib.BadError", message="bad\n" * 99, action="skipped"
                )
            )
        log.append(FaultRecord(kind="crash", index=Uncopyable(), signal="SIGSEGV", action="replaced"))
        lines = str(log).splitlines()
        assert lines[0] == "fault records: 61 (exception 60, crash 1), the newest 20, 11 older ones dropped"
        assert len(lines) == 22
        assert max(map(len, lines)) <= 100
        assert "  BadError: bad bad" in lines[2]
        assert lines[-1].endswith("replaced")
        assert "SIGSEGV" in lines[-1]
        assert repr(log) == "<FaultLog: 61 records (exception 60, crash 1), 11 dropped>"

    def test_copies_are_apart(self) -> None:
        log = self.filled(25)
        for copied in (pickle.loads(pickle.dumps(log)), copy.deepcopy(log)):
            copied.append(FaultRecord(kind="hang", index=0))
            assert (copied.total, copied.dropped, len(copied)) == (26, 16, 10)
        assert log.total == 25
        log.append(FaultRecord(kind="exception", index=Uncopyable()))
        assert copy.deepcopy(log)[-1] is log[-1]


def test_the_public_face_is_sorted() -> None:
    assert telemetry.__all__ == sorted(telemetry.__all__)
    assert all(hasattr(telemetry, name) for name in telemetry.__all__)


def test_neither_torch_nor_multiprocessing_is_imported() -> None:
    """The floor is pure: it is imported alone, without the package's face."""
    code = (
        "import sys, types; face = types.ModuleType('robustloader'); face.__path__ = [sys.argv[1]]; "
        "sys.modules['robustloader'] = face; import robustloader.telemetry; "
        "sys.exit(bool({'torch', 'multiprocessing'} & set(sys.modules)))"
    )
    folder = Path(telemetry.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 0
