"""The timeline: it follows the format's rules, and what it shows is what happened."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from robustloader import ChromeTraceSink, OptionError, PoolHealed, RobustDataLoader, TaskLoaded, TelemetryPolicy
from tests.support.datasets import Numbers
from tests.support.running import ROOT
from tests.support.telemetry import BATCH_SIZE, BATCHES, run_epoch
from tests.support.traceformat import check, check_event, check_nesting, check_pairs, load, thread_names, tracks


def marks(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event["ph"] == "i" and event["name"] == name]


def test_a_run_as_a_timeline(tmp_path: Path) -> None:
    """Every task on its worker's track, every wait on the loop's, the death on the track of the worker that died."""
    with ChromeTraceSink(tmp_path / "trace.json", labels={"loader": "train"}) as sink:
        run_epoch(sink)
    events = load(tmp_path / "trace.json")
    check(events)
    names, slices = thread_names(events), tracks(events)
    here = os.getpid()
    assert {event["pid"] for event in events} == {here}
    assert names.pop(here) == "loop"
    assert set(names.values()) <= {"worker 0", "worker 1", "worker 1, restarted"}
    tasks = [piece for tid, pieces in slices.items() if tid != here for piece in pieces]
    assert {piece["args"]["task"] for piece in tasks} == set(range(BATCHES))
    assert sum(piece["args"]["samples"] for piece in tasks) == BATCHES * BATCH_SIZE
    assert [piece["args"]["batch"] for piece in slices[here]] == list(range(BATCHES))
    assert {piece["name"] for piece in slices[here]} == {"wait"}
    # Nobody gets a batch before it was loaded: the loop's n-th wait ends after the n-th task does.
    ends = {piece["args"]["task"]: piece["ts"] + piece["dur"] for piece in tasks}
    assert all(wait["ts"] + wait["dur"] >= ends[wait["args"]["batch"]] for wait in slices[here])
    (death,) = marks(events, "WorkerCrashed")
    assert names[death["tid"]] == "worker 1" and death["args"]["signal"] == "SIGKILL"
    assert all(piece["ts"] + piece["dur"] <= death["ts"] for piece in slices.get(death["tid"], []))
    (restart,) = marks(events, "WorkerRestarted")
    assert names[restart["tid"]] == "worker 1, restarted" and restart["ts"] >= death["ts"]
    assert [mark["args"]["index"] for mark in marks(events, "SampleFaulted")] == [50]
    (end,) = [event for event in events if event["ph"] == "e"]
    assert end["name"] == "epoch 0" and end["args"]["samples"] == BATCHES * BATCH_SIZE
    assert sum(event["ph"] == "C" for event in events) == BATCHES
    assert {"ph": "M", "name": "process_labels", "pid": here, "tid": here, "args": {"labels": "loader=train"}} in events


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_that_take_turns_do_not_overlap(workers: int, tmp_path: Path) -> None:
    """Training and validation share one trace; in the training process loading lies within the wait for it."""
    with ChromeTraceSink(tmp_path / "trace.json") as sink:
        policy = TelemetryPolicy(sinks=(sink,))
        train, val = (RobustDataLoader(Numbers(40), 4, num_workers=workers, telemetry=policy) for _ in range(2))
        assert sum(1 for _ in zip(train, val, strict=True)) == 10
    events = load(tmp_path / "trace.json")
    check(events)
    assert sum(piece["name"].startswith("task") for pieces in tracks(events).values() for piece in pieces) == 20
    assert len(thread_names(events)) == 1 + 2 * workers


def test_a_killed_run_leaves_a_readable_trace(tmp_path: Path) -> None:
    """The end of the list is optional."""
    path = tmp_path / "trace.json"
    code = (
        "import os, signal, sys\nfrom robustloader import ChromeTraceSink, PoolHealed\n"
        "sink = ChromeTraceSink(sys.argv[1])\nsink.receive(PoolHealed(workers=1))\nsink.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=False).returncode == -9
    assert not path.read_text().rstrip().endswith("]")
    events = load(path)
    check(events)
    assert len(marks(events, "PoolHealed")) == 1


def test_the_end_of_the_program_ends_the_trace(tmp_path: Path) -> None:
    """Without ``close``, and a fork that ends first writes nothing."""
    path = tmp_path / "trace.json"
    code = (
        "import os, sys\nfrom robustloader import ChromeTraceSink, PoolHealed\n"
        "sink = ChromeTraceSink(sys.argv[1])\nsink.receive(PoolHealed(workers=1))\n"
        "child = os.fork()\nsink.receive(PoolHealed(workers=2))\n"
        "if child: os.waitpid(child, 0)\n"
    )
    subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=True)
    assert path.read_text().endswith("}\n]\n")
    assert [mark["args"]["workers"] for mark in marks(load(path), "PoolHealed")] == [1, 2]


def test_an_epoch_that_the_program_cuts_short(tmp_path: Path) -> None:
    """Its end comes after the trace's: there is nothing to warn of."""
    code = (
        "import sys\nfrom robustloader import ChromeTraceSink, RobustDataLoader, TelemetryPolicy\n"
        "policy = TelemetryPolicy(sinks=(ChromeTraceSink(sys.argv[1]),))\n"
        "batches = iter(RobustDataLoader(range(20), 4, num_workers=1, telemetry=policy))\nnext(batches)\n"
    )
    path = tmp_path / "trace.json"
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert path.read_text().endswith("}\n]\n")


def test_a_trace_ends_at_its_size(tmp_path: Path) -> None:
    """Below the size that was asked for, whole, and saying so; the events that follow are not drawn."""
    path, size = tmp_path / "trace.json", 20_000
    with ChromeTraceSink(path, max_bytes=size) as sink:
        for task in range(1_000):
            sink.receive(
                TaskLoaded(task=task, worker_id=0, pid=7, begin_ns=task * 1000, end_ns=task * 1000 + 900, samples=1)
            )
    events = load(path)
    check(events)
    assert size - 2_000 < path.stat().st_size <= size
    assert len(marks(events, "trace is full")) == 1


def test_a_mistake_is_seen_at_once(tmp_path: Path) -> None:
    for options in ({"path": tmp_path / "no" / "trace.json"}, {"path": tmp_path / "t", "max_bytes": 10}):
        with pytest.raises(OptionError):
            ChromeTraceSink(**options)  # type: ignore[arg-type]
    sink = ChromeTraceSink(tmp_path / "trace.json")
    twin = pickle.loads(pickle.dumps(sink))
    twin.receive(PoolHealed(workers=1))
    twin.close()
    assert len(marks(load(tmp_path / "trace.json"), "PoolHealed")) == 1


# --- the checker can fail ---------------------------------------------------------------------------------------------

SLICE = {"ph": "X", "name": "a", "pid": 1, "tid": 1, "ts": 0.0, "dur": 10.0}


@pytest.mark.parametrize(
    "event",
    [
        {**SLICE, "ph": "Z"},
        {**SLICE, "dur": -1},
        {**SLICE, "name": ""},
        {**SLICE, "ph": "i"},
        {**SLICE, "ph": "C", "args": {"ready": "3"}},
        {**SLICE, "ph": "b", "cat": ""},
    ],
)
def test_a_wrong_event_is_seen(event: dict[str, Any]) -> None:
    with pytest.raises((AssertionError, KeyError)):
        check_event(event)


def test_overlapping_slices_are_seen() -> None:
    """Partly, on one thread; apart, within, or on different threads is fine."""
    with pytest.raises(AssertionError, match="overlap"):
        check_nesting([SLICE, {**SLICE, "ts": 5.0}])
    check_nesting([SLICE, {**SLICE, "ts": 5.0, "dur": 5.0}, {**SLICE, "ts": 10.0}, {**SLICE, "ts": 5.0, "tid": 2}])
    with pytest.raises(AssertionError):
        check_pairs([{"ph": "b", "cat": "c", "id": "1", "name": "n", "ts": 1}])
