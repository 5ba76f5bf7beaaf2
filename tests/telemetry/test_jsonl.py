"""JSON lines: every event is one line that anybody can parse, whatever happens to the file."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from robustloader import JsonlSink, OptionError, PoolHealed, RobustLoaderWarning
from robustloader.telemetry.jsonl import heal
from robustloader.telemetry.plain import as_json
from tests.support.running import ROOT
from tests.support.telemetry import BATCHES, hostile_events, hostile_values, run_epoch


def lines(path: Any) -> list[dict[str, Any]]:
    """A file's lines, each of which is a JSON object and ends properly."""
    content = Path(path).read_bytes()
    assert content.endswith(b"\n")
    parsed = [json.loads(line, parse_constant=pytest.fail) for line in content.split(b"\n")[:-1]]
    assert all(isinstance(line, dict) and line["schema"] == 1 for line in parsed)
    return parsed


def names(path: Any) -> list[str]:
    return [line["event"] for line in lines(path)]


# --- a real run -------------------------------------------------------------------------------------------------------


def test_a_run_is_told_line_by_line(tmp_path: Path) -> None:
    """The start, a death and what followed, the fault, the progress and the end, each with who, where and when."""
    with JsonlSink(tmp_path / "run.jsonl", labels={"loader": "train"}) as sink:
        summary = run_epoch(sink)
    told = lines(tmp_path / "run.jsonl")
    first, last = told[0], told[-1]
    assert first["event"] == "RunStarted"
    assert first["cpus"] >= 1 and first["versions"].keys() >= {"python", "torch"}
    assert {"WorkerCrashed", "WorkerRestarted", "TaskReplayed", "SampleFaulted", "EpochProgressed"} <= {
        line["event"] for line in told
    }
    for line in told:
        assert line["labels"] == {"loader": "train"}
        assert (line["pid"], line["host"]) == (os.getpid(), os.uname().nodename)
        assert isinstance(line["time"], float)
        assert line.get("epoch", 0) == 0
    assert last["event"] == "EpochFinished"
    assert last["summary"] == json.loads(json.dumps(summary.to_dict()))
    crash = next(line for line in told if line["event"] == "WorkerCrashed")
    assert crash["signal"] == "SIGKILL" and crash["worker_pid"] not in (None, os.getpid())
    fault = next(line for line in told if line["event"] == "SampleFaulted")["fault"]
    assert (fault["index"], fault["kind"], fault["message"]) == (50, "exception", "cannot decode 50")
    progress = [line for line in told if line["event"] == "EpochProgressed"]
    assert [line["statistics"]["batches"] for line in progress] == list(range(1, BATCHES + 1))
    assert sum(worker["tasks"] for worker in progress[-1]["workers"]) == BATCHES
    assert progress[-1]["workers"][0].keys() == {
        "worker_id",
        "tasks",
        "samples",
        "busy_s",
        "load_p95_s",
        "peak_rss_bytes",
        "restarts",
    }


# --- values -----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(hostile_events())
def test_any_event_is_one_line(event: Any) -> None:
    """Whatever an index is and a message says: one line, parseable, nothing raised, nothing dropped."""
    with tempfile.TemporaryDirectory() as folder:
        with JsonlSink(f"{folder}/run.jsonl") as sink:
            sink.receive(event)
        assert names(f"{folder}/run.jsonl") == ["RunStarted", type(event).__name__]


@settings(max_examples=200, deadline=None)
@given(hostile_values())
def test_any_value_has_a_json_form(value: Any) -> None:
    """And that form is stable: it stays as it is when it is read back and converted again."""
    once = json.loads(json.dumps(as_json(value), allow_nan=False))
    assert json.loads(json.dumps(as_json(once))) == once


def test_indices_keep_their_meaning() -> None:
    """Tuples, tensors and arrays become lists, and numbers stay numbers."""
    import numpy as np
    import torch

    assert as_json((1, "a", (2.5, None))) == [1, "a", [2.5, None]]
    assert as_json(torch.tensor([[1, 2]])) == [[1, 2]]
    assert as_json(torch.tensor(3)) == 3 == as_json(np.int64(3))
    assert as_json({"video": 1, ("a", 2): Path("/x")}) == {"video": 1, "('a', 2)": "PosixPath('/x')"}
    assert as_json(float("nan")) == "nan"
    assert as_json(torch.zeros(10_000)).startswith("tensor(")


# --- many ranks -------------------------------------------------------------------------------------------------------


def test_ranks_have_files_and_labels_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RANK, as torchrun sets it, is a label by itself; the pattern makes a file for each rank."""
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        with JsonlSink(tmp_path / "run-{rank}-{job}.jsonl", labels={"job": "a/b"}) as sink:
            sink.receive(PoolHealed(workers=2))
        assert lines(tmp_path / f"run-{rank}-a_b.jsonl")[1]["labels"] == {"rank": rank, "job": "a/b"}
    monkeypatch.delenv("RANK")
    assert JsonlSink(tmp_path / "run-{rank}.jsonl").path == str(tmp_path / "run-0.jsonl")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"path": "nowhere/run.jsonl"}, "folder that exists"),
        ({"path": "run-{rnak}.jsonl"}, "fields.*rank"),
        ({"path": ""}, "a path"),
        ({"path": "."}, "not a folder"),
        ({"path": "model.pt"}, "this one is neither"),
        ({"path": "run.jsonl", "labels": {"a-b": "c"}}, "letters"),
        ({"path": "run.jsonl", "labels": {"rank": 0}}, "strings"),
        ({"path": "run.jsonl", "max_bytes": 0}, "at least 1"),
        ({"path": "run.jsonl", "backups": -1}, "at least 0"),
    ],
)
def test_a_mistake_is_seen_at_once(
    options: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before three weeks of training, not after; and nobody's file is touched."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04 weights")
    with pytest.raises(OptionError, match=said):
        JsonlSink(**options)
    assert (tmp_path / "model.pt").read_bytes() == b"PK\x03\x04 weights"
    assert os.listdir(tmp_path) == ["model.pt"]


# --- rotation and healing ---------------------------------------------------------------------------------------------


def test_a_full_file_gives_way_to_a_new_one(tmp_path: Path) -> None:
    """The newest are kept, each begins with RunStarted, none is larger than asked, and no line is lost in between."""
    path = tmp_path / "run.jsonl"
    with JsonlSink(path, max_bytes=1_500, backups=2) as sink:
        for number in range(40):
            sink.receive(PoolHealed(workers=number))
    files = [tmp_path / "run.jsonl.2", tmp_path / "run.jsonl.1", path]
    assert sorted(os.listdir(tmp_path)) == ["run.jsonl", "run.jsonl.1", "run.jsonl.2"]
    assert all(names(file)[0] == "RunStarted" for file in files)
    assert all(file.stat().st_size <= 1_500 for file in files)
    kept = [line["workers"] for file in files for line in lines(file) if line["event"] == "PoolHealed"]
    assert kept == list(range(40 - len(kept), 40))


def test_without_backups_a_full_file_begins_anew(tmp_path: Path) -> None:
    with JsonlSink(tmp_path / "run.jsonl", max_bytes=1_000, backups=0) as sink:
        for _ in range(20):
            sink.receive(PoolHealed(workers=1))
    assert os.listdir(tmp_path) == ["run.jsonl"]
    assert names(tmp_path / "run.jsonl")[0] == "RunStarted"


@pytest.mark.parametrize("cut", [1, 5, 11, 40, 100])
def test_a_half_line_is_taken_away(tmp_path: Path, cut: int) -> None:
    """What a kill in the middle of a write left; the run that goes on says that it began."""
    path = tmp_path / "run.jsonl"
    with JsonlSink(path) as sink:
        sink.receive(PoolHealed(workers=1))
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[1][:cut])
    with JsonlSink(path) as sink:
        sink.receive(PoolHealed(workers=2))
    assert path.read_bytes().startswith(whole)
    assert names(path) == ["RunStarted", "PoolHealed"] * 2


def test_what_is_not_ours_is_never_taken_away(tmp_path: Path) -> None:
    """Somebody else's half line only gets its line end."""
    path = tmp_path / "notes"
    path.write_bytes(b"one\ntwo")
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        assert heal(fd) == 8
    finally:
        os.close(fd)
    assert path.read_bytes() == b"one\ntwo\n"


def test_each_event_is_in_the_file_at_once(tmp_path: Path) -> None:
    """SIGKILL right after an event loses nothing: there is no buffer."""
    path = tmp_path / "run.jsonl"
    code = (
        "import os, signal, sys\nfrom robustloader import JsonlSink, PoolHealed\n"
        "sink = JsonlSink(sys.argv[1])\nsink.receive(PoolHealed(workers=1))\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=False).returncode == -9
    assert names(path) == ["RunStarted", "PoolHealed"]


def test_threads_and_forks_share_a_sink(tmp_path: Path) -> None:
    """No line is torn or lost, and each says whose it is."""
    path = tmp_path / "run.jsonl"
    sink = JsonlSink(path)

    def tell() -> None:
        for number in range(50):
            sink.receive(PoolHealed(workers=number))

    tell()
    threads = [threading.Thread(target=tell) for _ in range(3)]
    child = multiprocessing.get_context("fork").Process(target=tell)
    child.start()
    for thread in threads:
        thread.start()
    for each in (*threads, child):
        each.join()
    sink.close()
    told = lines(path)
    assert sum(line["event"] == "PoolHealed" for line in told) == 250
    assert sum(line["pid"] == child.pid for line in told) == 51, "its own RunStarted, and 50 events"
    child.close()


A_FORK_LEAVES = """
import os, sys
from robustloader import JsonlSink, RobustDataLoader, TelemetryPolicy
from torch.utils.data import IterableDataset

class Walk:
    def __init__(self): self.at = 0
    def __iter__(self): return self
    def __next__(self):
        self.at += 1
        if self.at > 20: raise StopIteration
        return self.at
    def state_dict(self):
        print("asked", flush=True)
        return {"at": self.at}
    def load_state_dict(self, state): self.at = state["at"]

class Stream(IterableDataset):
    def __iter__(self): return Walk()

def main():
    telemetry = TelemetryPolicy(sinks=(JsonlSink(sys.argv[1]),))
    batches = iter(RobustDataLoader(Stream(), 4, num_workers=int(sys.argv[2]), telemetry=telemetry))
    next(batches)
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        for _ in batches: pass

main()
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fork_that_leaves_ends_nobodys_epoch(workers: int, tmp_path: Path) -> None:
    """What it goes through on its way out is the trainer's: the epoch is told once, when it is over."""
    path = tmp_path / "run.jsonl"
    command = [sys.executable, "-c", A_FORK_LEAVES, path, str(workers)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert names(path) == ["RunStarted", "EpochFinished"]
    assert lines(path)[1]["summary"]["complete"]
    if not workers:
        assert not done.stdout, "the fork asked for the state of the stream"


def test_sinks_travel_with_loaders(tmp_path: Path) -> None:
    """A pickle opens a file of its own when it is needed; a copy in this process is the sink itself."""
    sink = JsonlSink(tmp_path / "run.jsonl", labels={"a": "b"}, backups=3)
    assert copy.deepcopy(sink) is sink is copy.copy(sink)
    sink.receive(PoolHealed(workers=1))
    twin = pickle.loads(pickle.dumps(sink))
    twin.receive(PoolHealed(workers=2))
    assert repr(twin) == repr(sink) and "backups=3" in repr(sink)
    sink.close()
    twin.close()
    sink.receive(PoolHealed(workers=3))
    assert names(tmp_path / "run.jsonl") == ["RunStarted", "PoolHealed"] * 2


# --- a disk that fails ------------------------------------------------------------------------------------------------


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process grows beyond ``size`` bytes: writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_was_full_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning; then silence, until there is room: the half line goes, and a line says how many were lost."""
    monkeypatch.setattr("robustloader.telemetry.jsonl._RETRY_S", 0.0)
    path = tmp_path / "run.jsonl"
    with JsonlSink(path) as sink:
        sink.receive(PoolHealed(workers=0))
        with file_size_limit(path.stat().st_size + 20):
            with pytest.warns(RobustLoaderWarning, match="cannot be written to.*training goes on") as caught:
                for number in range(1, 4):
                    sink.receive(PoolHealed(workers=number))
            assert len(caught) == 1
        sink.receive(PoolHealed(workers=4))
    assert names(path) == ["RunStarted", "PoolHealed", "RunStarted", "EventsLost", "PoolHealed"]
    assert lines(path)[3]["lost"] == 3
    assert lines(path)[-1]["workers"] == 4


def test_between_attempts_nothing_is_tried(tmp_path: Path) -> None:
    """A failing disk is not asked again with every event."""
    path = tmp_path / "run.jsonl"
    with JsonlSink(path) as sink:
        with file_size_limit(0), pytest.warns(RobustLoaderWarning):
            sink.receive(PoolHealed(workers=0))
        sink.receive(PoolHealed(workers=1))
        assert path.stat().st_size == 0


@pytest.mark.parametrize("moved", [True, False])
def test_a_file_that_is_moved_or_removed_is_begun_anew(
    moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a warning, once the event that noticed it is in the new file."""
    monkeypatch.setattr("robustloader.telemetry.jsonl._LOOK_S", 0.0)
    path = tmp_path / "run.jsonl"
    with JsonlSink(path) as sink:
        sink.receive(PoolHealed(workers=0))
        path.rename(tmp_path / "old") if moved else path.unlink()
        with pytest.warns(RobustLoaderWarning, match=r"moved or removed .*run\.jsonl.*begun anew"):
            sink.receive(PoolHealed(workers=1))
        sink.receive(PoolHealed(workers=2))
    assert names(path) == ["RunStarted", "PoolHealed", "PoolHealed"]
    assert lines(path)[1]["workers"] == 1
    if moved:
        assert names(tmp_path / "old") == ["RunStarted", "PoolHealed"]


def test_a_file_that_another_takes_the_place_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As logrotate does, or another process that writes there and finds it full: nothing is lost, nothing to tell."""
    monkeypatch.setattr("robustloader.telemetry.jsonl._LOOK_S", 0.0)
    path = tmp_path / "run.jsonl"
    with JsonlSink(path) as sink:
        sink.receive(PoolHealed(workers=0))
        path.rename(tmp_path / "run.jsonl.1")
        path.touch()
        sink.receive(PoolHealed(workers=1))
    assert names(path) == ["RunStarted", "PoolHealed"]


def test_a_folder_that_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that fails: one warning, and when the folder is back, how many events were lost."""
    monkeypatch.setattr("robustloader.telemetry.jsonl._LOOK_S", 0.0)
    monkeypatch.setattr("robustloader.telemetry.jsonl._RETRY_S", 0.0)
    path = tmp_path / "run" / "run.jsonl"
    path.parent.mkdir()
    with JsonlSink(path) as sink:
        sink.receive(PoolHealed(workers=0))
        path.unlink()
        path.parent.rmdir()
        with pytest.warns(RobustLoaderWarning, match=r"cannot be written to.*training goes on") as caught:
            sink.receive(PoolHealed(workers=1))
            sink.receive(PoolHealed(workers=2))
        assert len(caught) == 1
        path.parent.mkdir()
        sink.receive(PoolHealed(workers=3))
    assert names(path) == ["RunStarted", "EventsLost", "PoolHealed"]
    assert lines(path)[1]["lost"] == 2


MOUNTS = {
    "full": "mount -t tmpfs -o size=16k tmpfs {folder} && head -c 1M /dev/zero > {folder}/filler; true",
    "read-only": "mount -t tmpfs -o ro tmpfs {folder}",
    "filling": "mount -t tmpfs -o size=16k tmpfs {folder}",
}


@pytest.mark.parametrize("mount", MOUNTS)
def test_training_goes_on_without_a_disk(mount: str, tmp_path: Path) -> None:
    """On a real file system that is full, read-only, or becomes full: all batches, one warning, exit status 0."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("may not mount here: unshare -m is refused")
    script = MOUNTS[mount].format(folder=tmp_path) + f"\nexec {sys.executable} -m tests.support.sinking {tmp_path}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1000", "warnings", "1"]
