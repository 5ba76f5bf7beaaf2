"""What is told about faults: complete records, events to the sinks, one warning a kind, and no flood."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from robustloader import (
    FaultPolicy,
    RobustDataLoader,
    RobustLoaderWarning,
    SampleFaulted,
    SampleReplaced,
    TelemetryPolicy,
)
from tests.support.datasets import Damaged, Numbers, Raising, Shaped, damaged
from tests.support.listener import BrokenSink, Listener, flat
from tests.support.peek import await_idle

WORKERS = pytest.mark.parametrize("workers", [0, 2])
quiet = pytest.mark.filterwarnings("ignore::robustloader.RobustLoaderWarning")


@quiet
@WORKERS
def test_a_record_is_complete(workers: int) -> None:
    """Everything one asks when reading it a day later."""
    began = time.time()
    loader = RobustDataLoader(Raising(24, {13: damaged}), batch_size=8, num_workers=workers)
    list(loader)
    iterator = iter(loader)
    pids = [process.pid for process in iterator._workers] or [os.getpid()]
    samples = flat(iterator)
    _, record = loader.fault_log
    assert (record.kind, record.index, record.action) == ("exception", 13, "replaced")
    assert record.error_type == "Damaged"
    assert record.message == "cannot decode 13"
    assert record.traceback.startswith("Traceback")
    assert "in load" in record.traceback
    assert "raise self.errors[index](index)" in record.traceback
    assert record.worker_id == (1 if workers else None)
    assert record.pid in pids
    assert (record.epoch, record.task, record.attempts, record.signal) == (1, 1, 1, None)
    assert record.replacement == samples[13]
    assert began <= record.time <= time.time()


@quiet
@WORKERS
def test_sinks_hear_of_faults_and_replacements(workers: int) -> None:
    """One event each, before the batch is returned."""
    listener = Listener()
    loader = RobustDataLoader(
        Raising(24, {3: damaged, 13: damaged}), batch_size=8, num_workers=workers, telemetry=listener.policy
    )
    samples = flat(loader)
    assert {event.fault.index for event in listener.of(SampleFaulted)} == {3, 13}
    faulted = sorted(listener.of(SampleFaulted), key=lambda event: event.fault.task)
    assert [event.fault for event in faulted] == sorted(loader.fault_log, key=lambda record: record.task)
    replaced = sorted(listener.of(SampleReplaced), key=lambda event: event.task)
    assert [(event.task, event.position, event.wanted, event.used) for event in replaced] == [
        (0, 3, 3, samples[3]),
        (1, 5, 13, samples[13]),
    ]
    assert all(event.epoch == 0 for event in [*faulted, *replaced])


@quiet
@WORKERS
def test_the_summary_counts(workers: int) -> None:
    """Faults, replaced, skipped."""
    for action, counts in (("replace", (2, 2, 0)), ("skip", (2, 0, 2))):
        loader = RobustDataLoader(
            Raising(24, {20: damaged, 23: damaged}),
            batch_size=8,
            num_workers=workers,
            faults=action,  # type: ignore[arg-type]
        )
        list(loader)
        summary = loader.summary()
        assert (summary.faults, summary.replaced, summary.skipped) == counts
        assert summary.complete
        assert loader.fault_log.by_kind() == {"exception": 2}


@WORKERS
def test_one_warning_of_a_kind(workers: int) -> None:
    """The first fault of each kind warns, with the facts; the others are only recorded."""

    class Both(Shaped):
        def load(self, index: int) -> Any:
            if index in (3, 6, 40, 50):
                raise Damaged("bad")
            return super().load(index)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = RobustDataLoader(Both(64, (20, 30, 60)), batch_size=8, num_workers=workers)
        for _ in range(2):
            list(loader)
    texts = [str(warning.message) for warning in caught if warning.category is RobustLoaderWarning]
    assert len(texts) == 2
    assert sum("Damaged: bad" in text for text in texts) == 1
    assert sum("RuntimeError" in text for text in texts) == 1
    assert all("fault_log" in text for text in texts)
    assert all(len(text) < 1_000 for text in texts)


@WORKERS
def test_a_storm_does_not_flood(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    """A thousand faults: one warning, a handful of log lines, all of them in the fault log."""
    dataset = Raising(2_000, dict.fromkeys(range(0, 2_000, 2), damaged))
    policy = FaultPolicy(action="skip", burst=5_000)
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        loader = RobustDataLoader(dataset, batch_size=50, num_workers=workers, faults=policy)
        assert flat(loader) == list(range(1, 2_000, 2))
    assert sum(warning.category is RobustLoaderWarning for warning in caught) == 1
    assert len(caplog.records) < 10
    assert loader.fault_log.total == 1_000


@WORKERS
def test_a_warning_made_an_error_loses_nothing(workers: int) -> None:
    """With warnings as errors, ``next()`` raises it once; the batches that had come in together with it still come."""
    iterator = iter(RobustDataLoader(Raising(32, {3: damaged, 30: damaged}), batch_size=4, num_workers=workers))
    for worker in range(workers):
        await_idle(iterator, worker, done=2)
    delivered: list[int] = []
    raised = 0
    while True:
        try:
            delivered += next(iterator).tolist()
        except StopIteration:
            break
        except RobustLoaderWarning:
            raised += 1
            assert raised < 10
    assert raised == 1
    # In process the batch that met the fault is lost with it, as a batch whose error is raised is.
    expected = set(range(32)) - {3, 30} - (set() if workers else set(range(4)))
    assert expected <= set(delivered)


@quiet
@WORKERS
def test_the_log_can_be_saved(workers: int, tmp_path: Path) -> None:
    """As JSON lines."""
    loader = RobustDataLoader(Raising(24, {3: damaged}), batch_size=8, num_workers=workers)
    list(loader)
    loader.fault_log.save(tmp_path / "faults.jsonl")
    (line,) = (tmp_path / "faults.jsonl").read_text().splitlines()
    assert json.loads(line)["index"] == 3


@WORKERS
def test_a_sink_that_raises_is_dropped(workers: int) -> None:
    """With one warning; training and the other sinks go on."""
    broken, listener = BrokenSink(), Listener()
    loader = RobustDataLoader(
        Raising(24, {3: damaged, 13: damaged}),
        batch_size=8,
        num_workers=workers,
        telemetry=TelemetryPolicy(sinks=(broken, listener)),
    )
    with pytest.warns(RobustLoaderWarning) as caught:
        assert len(flat(loader)) == 24
    assert broken.calls == 1
    assert sum("sink" in str(warning.message) for warning in caught) == 1
    assert {event.fault.index for event in listener.of(SampleFaulted)} == {3, 13}


@quiet
@WORKERS
def test_without_telemetry(workers: int) -> None:
    """Faults are handled, and logged, all the same."""
    loader = RobustDataLoader(Raising(24, {3: damaged}), batch_size=8, num_workers=workers, telemetry=None)
    iterator = iter(loader)
    assert len(flat(iterator)) == 24
    assert [record.index for record in loader.fault_log] == [3]


@WORKERS
def test_nothing_is_told_of_a_clean_epoch(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    """No fault record and no warning."""
    listener = Listener()
    loader = RobustDataLoader(Numbers(24), batch_size=8, num_workers=workers, telemetry=listener.policy)
    list(loader)
    assert not loader.fault_log
    assert [type(event).__name__ for event in listener.events] == ["EpochFinished"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
