"""What was written is read back, and damage costs only the lines that it hit."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustloader import EpochProgressed, Event, JsonlSink, PoolHealed, RobustLoaderWarning
from robustloader.events import FaultRecord
from robustloader.policies import TelemetryPolicy
from robustloader.report import Interval, RunReader, Tail, read_run
from robustloader.report.reader import SCHEMA
from robustloader.report.run import merge_intervals, thin_intervals
from robustloader.telemetry import Recorder, jsonl
from tests.support.runs import BEGIN, envelope, fault, made_run, started, write_run
from tests.support.telemetry import BATCHES, run_epoch


def read_lines(*lines: Any, path: str = "run.jsonl") -> Any:
    reader = RunReader()
    reader.open(path)
    for line in lines:
        reader.add(path, line if isinstance(line, bytes) else json.dumps(line).encode())
    return reader.run()


def test_a_run_is_read_back() -> None:
    """Epochs, progress, faults by kind and incidents are those that were written."""
    lines = list(made_run(rank="3", epochs=4, faults=30, deaths=3))
    run = read_lines(*lines)
    (rank,) = run.ranks
    counts = Counter(line["event"] for line in lines)
    summaries = [line["summary"] for line in lines if line["event"] == "EpochFinished"]
    assert (rank.rank, rank.host, rank.cpus, rank.pids) == ("3", "node-a", 16, (4_242,))
    assert [epoch.summary.batches for epoch in rank.epochs] == [summary["batches"] for summary in summaries]
    assert sum(rank.faults_by_kind.values()) == sum(group.count for group in rank.faults) == counts["SampleFaulted"]
    assert Counter(mark.what for mark in rank.incidents)["WorkerCrashed"] == counts["WorkerCrashed"] > 0
    assert len(rank.intervals) == counts["EpochProgressed"] + counts["EpochFinished"]
    assert run.sound and run.notes == () and not rank.running


# --- what the real sink writes ----------------------------------------------------------------------------------------


def test_a_real_run_is_read_in_full(tmp_path: Path) -> None:
    """Its summary, a fault, a death and every batch; the process that writes is the trainer, not the dead worker."""
    path = tmp_path / "run.jsonl"
    with JsonlSink(path) as sink:
        summary = run_epoch(sink)
    run = read_run([path])
    assert run.sound and run.notes == ()
    (rank,) = run.ranks
    assert rank.pids == (os.getpid(),)
    (epoch,) = rank.epochs
    assert epoch.summary == summary and not epoch.running
    assert sum(interval.batches for interval in rank.intervals) == summary.batches == BATCHES
    assert {mark.what for mark in rank.incidents} == {"WorkerCrashed", "WorkerRestarted"}
    crash = next(json.loads(line) for line in path.read_text().splitlines() if '"WorkerCrashed"' in line)
    assert f"(pid {crash['worker_pid']}) died" in rank.incidents[0].text
    assert [(group.sample, group.kind, group.action) for group in rank.faults] == [("50", "exception", "replaced")]


def made_event(kind: type[Event]) -> Event:
    """An event with something in every field."""
    recording = Recorder(TelemetryPolicy()).begin_epoch(epoch=0, workers=0, usable_cpus=1, now_ns=0)
    given: dict[str, Any] = {
        "fault": FaultRecord(kind="exception", index=3),
        "summary": recording.summary(now_ns=1),
        "statistics": {"batches": 4, "elapsed_s": 2.0},
        "workers": [] if kind is EpochProgressed else 2,
    }
    values = {entry.name: given.get(entry.name, 1) for entry in fields(kind) if entry.name not in ("time", "epoch")}
    return kind(epoch=0, **values)


@pytest.mark.parametrize("kind", Event.__subclasses__(), ids=lambda kind: kind.__name__)
def test_every_event_is_known(tmp_path: Path, kind: type[Event]) -> None:
    """Whatever the sink may write: none is passed over as one of an unknown version."""
    with JsonlSink(tmp_path / "run.jsonl") as sink:
        sink.receive(made_event(kind))
    run = read_run([tmp_path / "run.jsonl"])
    assert run.sources[0].unknown == {} and run.sources[0].damaged == 0
    assert run.sources[0].lines == 2
    texts = [mark.text for rank in run.ranks for mark in rank.incidents]
    assert not [text for text in texts if "None" in text]


def test_events_that_the_sink_lost_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many, once they can be written again."""
    monkeypatch.setattr(jsonl, "_RETRY_S", 0.0)
    path = tmp_path / "run.jsonl"
    with JsonlSink(path) as sink:
        path.mkdir()
        with pytest.warns(RobustLoaderWarning, match="cannot be written"):
            for _ in range(3):
                sink.receive(PoolHealed(workers=2))
        path.rmdir()
        sink.receive(PoolHealed(workers=2))
    run = read_run([path])
    assert [rank.lost_events for rank in run.ranks] == [3]
    assert "3 events could not be written" in run.notes[0]


# --- what lines add up to ---------------------------------------------------------------------------------------------


def test_intervals_add_up_to_the_summaries() -> None:
    """Progress is told as running totals: what lies between two readings is counted once."""
    rank = read_lines(*made_run(epochs=3)).ranks[0]
    for name in ("batches", "samples", "wait_s", "step_s"):
        assert sum(getattr(interval, name) for interval in rank.intervals) == pytest.approx(rank.total(name))
    worker = sum(interval.busy_s[2] for interval in rank.intervals)
    assert worker == pytest.approx(rank.workers[2].busy_s)


def test_an_epoch_that_never_ended_is_running() -> None:
    """What was last told of it is what it came to so far, its workers included."""
    rank = read_lines(*made_run(epochs=2, finish=False)).ranks[0]
    assert rank.running
    assert [epoch.running for epoch in rank.epochs] == [False, True] or rank.epochs[-1].running
    assert rank.epochs[-1].summary.batches > 0 and len(rank.epochs[-1].summary.workers) == 8


def test_another_process_ends_what_the_last_one_left() -> None:
    """A job that was started again does not go on with the counters of the one that was killed."""
    first = list(made_run(epochs=1, finish=False))
    second = [{**line, "pid": 9, "time": line["time"] + 1_000} for line in made_run(epochs=1)]
    rank = read_lines(*first, *second).ranks[0]
    assert rank.pids == (4_242, 9)
    assert not rank.running and len(rank.epochs) == 2
    assert sum(interval.samples for interval in rank.intervals) == rank.total("samples")


def test_files_without_a_rank_are_ranks_by_name(tmp_path: Path) -> None:
    """Where no label tells ranks apart, the files do."""
    for name in ("a", "b"):
        write_run(tmp_path / f"{name}.jsonl", rank=None, epochs=1)
    run = read_run([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert [rank.rank for rank in run.ranks] == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


def test_ranks_are_in_the_order_of_their_numbers() -> None:
    """Rank 10 comes after rank 9."""
    run = read_lines(*(line for rank in ("10", "9", "x", "0") for line in made_run(rank=rank, epochs=1)))
    assert [rank.rank for rank in run.ranks] == ["0", "9", "10", "x"]


@pytest.mark.parametrize(
    ("waits", "steps", "slowest", "why"),
    [
        ((0.01, 0.05, 0.01), (0.1, 0.1, 0.1), "1", "samples/s"),
        ((0.01, 0.03, 0.01), (0.1, 0.08, 0.1), "1", "waits for data"),
        ((0.01, 0.01, 0.01), (0.1, 0.1, 0.1), None, "even"),
    ],
)
def test_the_slowest_rank(waits: tuple[float, ...], steps: tuple[float, ...], slowest: str | None, why: str) -> None:
    """The one below the others' rate; among ranks in step, the one that itself waits for data."""
    lines = [
        line
        for rank, (wait_s, step_s) in enumerate(zip(waits, steps, strict=True))
        for line in made_run(rank=str(rank), wait_s=wait_s, step_s=step_s, deaths=0)
    ]
    comparison = read_lines(*lines).comparison
    assert comparison.slowest == slowest
    assert why in comparison.reason


def test_thinning_keeps_the_sums() -> None:
    """However few intervals are left, they add up to the same."""
    many = [
        Interval(begin=float(i), end=i + 1.0, epoch=0, batches=i, samples=3 * i, wait_s=0.25, busy_s={i % 3: 0.5})
        for i in range(777)
    ]
    few = thin_intervals(many, 20)
    assert 10 <= len(few) <= 20
    assert (few[0].begin, few[-1].end) == (0.0, 777.0)
    assert sum(i.samples for i in few) == sum(i.samples for i in many)
    assert sum(sum(i.busy_s.values()) for i in few) == pytest.approx(777 * 0.5)
    assert merge_intervals(many[0], many[1]).wait_s == 0.5


def test_a_long_run_stays_small() -> None:
    """Intervals, faults and incidents are bounded, and what is no longer kept one by one is still counted."""
    reader = RunReader()
    samples = 0
    for number in range(9_000):
        at = BEGIN + 5.0 * number
        samples += 10
        statistics = {"batches": number + 1, "samples": samples, "elapsed_s": 5.0 * (number + 1), "active_workers": 2}
        reader.add("r", json.dumps(envelope("EpochProgressed", at, "0", statistics=statistics, workers=[])).encode())
        reader.add("r", json.dumps(fault(at, "0", 0, number)).encode())
    (rank,) = reader.run().ranks
    assert len(rank.intervals) <= 4_000
    assert sum(interval.samples for interval in rank.intervals) == samples
    assert len(rank.faults) + rank.faults_dropped == rank.faults_by_kind["exception"] == 9_000


@pytest.mark.parametrize(
    ("line", "counted"),
    [
        (b"\x00\x00\x00", "damaged"),
        (b"not json", "damaged"),
        (b"[1, 2]", "damaged"),
        (b"{}", "damaged"),
        (b'{"schema": 1}', "damaged"),
        (b"[" * 100_000, "damaged"),
        (b"\xff\xfe{}", "damaged"),
        (b'{"schema": 1, "event": "EpochFinished", "time": 1e999}', "damaged"),
        (b'{"schema": 1, "event": ["x"], "time": 1700000000}', "damaged"),
        (b'{"schema": 1, "event": "EpochFinished", "time": 1700000000}', "damaged"),
        (b'{"schema": 2, "event": "?"}', "newer"),
        (b'{"schema": 1, "event": "Teleported", "time": 1700000000, "labels": {}}', "unknown"),
    ],
)
def test_what_is_no_event_is_counted_and_told(line: bytes, counted: str) -> None:
    """One such line is left out and said; the lines around it count."""
    lines = list(made_run(epochs=1))
    run = read_lines(lines[0], line, *lines[1:])
    (source,) = run.sources
    assert source.lines == len(lines)
    assert {"damaged": source.damaged, "newer": source.newer, "unknown": sum(source.unknown.values())} == {
        "damaged": 0, "newer": 0, "unknown": 0, counted: 1,
    }  # fmt: skip
    assert len(run.notes) == 1 and "run.jsonl" in run.notes[0]
    assert run.sound == (counted == "unknown")
    assert len(run.ranks[0].epochs) == 1


def test_a_newer_schema_says_what_to_do() -> None:
    """The reader names the remedy."""
    run = read_lines({**started(BEGIN, "0"), "schema": SCHEMA + 1})
    assert "upgrade" in run.notes[0]


def _intact(lines: list[bytes], hit: set[int]) -> list[bytes]:
    return [line for number, line in enumerate(lines) if number not in hit]


LINES = [json.dumps(line).encode() for line in made_run(epochs=2, epoch_s=20, faults=6, deaths=1)]


@settings(max_examples=60, deadline=None)
@given(
    damage=st.dictionaries(
        st.integers(0, len(LINES) - 1),
        st.one_of(
            st.binary(max_size=60).map(lambda piece: b"\x00" + piece.replace(b"\n", b"")),
            st.integers(0, 40).map(lambda cut: LINES[0][: cut + 1]),
        ),
        max_size=8,
    )
)
def test_damage_costs_only_the_lines_it_hit(damage: dict[int, bytes]) -> None:
    """Whatever bytes stand in a line's place, the others are read as if it were not there."""
    reader = RunReader()
    for number, line in enumerate(LINES):
        reader.add("run.jsonl", damage.get(number, line))
    run, other = reader.run(), read_lines(*_intact(LINES, set(damage)))
    assert run.ranks == other.ranks
    assert run.sources[0].damaged == len(damage)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_value_breaks_the_reader_or_the_page(data: st.DataObject) -> None:
    """A field may hold anything that JSON has: the line counts, or is told as damaged, and a page can be made."""
    from robustloader.report.page import make_page

    line = json.loads(data.draw(st.sampled_from(LINES)))
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        for key in list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            places.append((part, key))
            walk(part[key])

    walk(line)
    for part, key in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=4)):
        part[key] = data.draw(json_values)
    run = read_lines(LINES[0], json.dumps(line).encode())
    source = run.sources[0]
    assert source.lines + source.damaged + source.newer + sum(source.unknown.values()) == 2
    page = make_page(run, made_at=BEGIN)
    page.encode("utf-8")
    json.dumps(run.to_dict(), allow_nan=False)


def test_rotated_files_are_read_oldest_first(tmp_path: Path) -> None:
    """run.jsonl.2, run.jsonl.1, run.jsonl are one run, each read once, also where the shell named them all."""
    lines = [json.dumps(line) + "\n" for line in made_run(epochs=3)]
    third = len(lines) // 3
    for name, part in (
        ("run.jsonl.2", lines[:third]),
        ("run.jsonl.1", lines[third:-third]),
        ("run.jsonl", lines[-third:]),
    ):
        (tmp_path / name).write_text("".join(part))
    (tmp_path / "run.jsonl.bak").write_text("nothing of ours")
    whole = read_lines(*(line.encode() for line in lines), path=str(tmp_path / "run.jsonl"))
    assert read_run([tmp_path / "run.jsonl"]) == whole
    assert read_run([tmp_path / "run.jsonl.1", tmp_path / "run.jsonl", tmp_path / "run.jsonl.2"]).ranks == whole.ranks


@pytest.mark.parametrize("cut", [1, 20])
def test_a_last_line_without_its_end_is_told(tmp_path: Path, cut: int) -> None:
    """A killed writer leaves half a line; one that lacks only the newline is whole."""
    path = write_run(tmp_path / "run.jsonl", epochs=1)
    lines = len(path.read_bytes().splitlines())
    path.write_bytes(path.read_bytes()[:-cut])
    (source,) = read_run([path]).sources
    assert (source.lines, source.truncated, source.damaged) == ((lines, False, 0) if cut == 1 else (lines - 1, True, 0))


def test_an_empty_file_is_a_run_without_ranks(tmp_path: Path) -> None:
    """Nothing is not an error, but it is said."""
    (tmp_path / "run.jsonl").touch()
    run = read_run([tmp_path / "run.jsonl"])
    assert run.ranks == () and not run.sound and "no events yet" in run.notes[0]


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    """Rotated neighbours do not stand in for it."""
    (tmp_path / "run.jsonl.1").touch()
    with pytest.raises(FileNotFoundError, match=r"run\.jsonl"):
        read_run([tmp_path / "run.jsonl"])


def test_a_tail_follows_growth_rotation_and_cutting(tmp_path: Path) -> None:
    """Every whole line comes once, in order, whatever happens to the file meanwhile."""
    path = tmp_path / "run.jsonl"
    tail = Tail(path)
    assert list(tail.poll()) == []
    with path.open("ab", buffering=0) as file:
        file.write(b"one\ntw")
        assert list(tail.poll()) == [b"one"]
        file.write(b"o\n")
        assert list(tail.poll()) == [b"two"]
        file.write(b"three\n")
        os.replace(path, tmp_path / "run.jsonl.1")
        file.write(b"four\n")
    assert list(tail.poll()) == [b"three", b"four"]
    path.write_bytes(b"five\n")
    assert list(tail.poll()) == [b"five"]
    with path.open("r+b") as file:
        file.truncate(0)
        assert list(tail.poll()) == []
        file.write(b"6\n")
    assert list(tail.poll()) == [b"6"]
    path.unlink()
    assert list(tail.poll()) == []
    path.write_bytes(b"seven\n")
    assert list(tail.poll()) == [b"seven"]
    tail.close()
