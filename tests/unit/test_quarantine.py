"""The dead-letter file: appended to, never rewritten, refused when it is not ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustloader import FaultRecord, OptionError, RobustLoaderWarning
from robustloader.engine.quarantine import Quarantine


def fault(index: Any, kind: Any = "exception") -> FaultRecord:
    return FaultRecord(kind=kind, index=index, error_type="ValueError", message="bad ✗", epoch=2, time=5.0)


GOOD = '{"schema": 1, "key": 7}\n'
NOT_OURS = {
    "not JSON": b"hello\n",
    "half a line": GOOD.encode() + b'{"schema": 1, "ke',
    "other JSON": b'{"a": 1}\n',
    "a list": b"[1, 2]\n",
    "a number": b"17\n",
    "another schema": b'{"schema": 2, "key": 7}\n',
    "a key of another type": b'{"schema": 1, "key": [7]}\n',
    "a boolean key": b'{"schema": 1, "key": true}\n',
    "not UTF-8": b"\xff\xfe\x00\n",
    "binary": bytes(range(256)),
}


def test_without_a_path_nothing_is_kept() -> None:
    """Poison is left out in this run all the same."""
    quarantine = Quarantine(None)
    quarantine.record(fault(3))
    quarantine.add(4)
    assert quarantine.keys == {4}


def test_a_relative_path_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program may go elsewhere, as it does where each run has a folder of its own."""
    monkeypatch.chdir(tmp_path)
    quarantine = Quarantine("bad.jsonl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    quarantine.record(fault(3))
    assert Quarantine("../bad.jsonl").keys == {3}
    assert not os.listdir()


def test_what_is_recorded_is_read_again(tmp_path: Path) -> None:
    """By key, whatever type the index had."""
    path = tmp_path / "bad.jsonl"
    quarantine = Quarantine(path)
    assert not path.exists(), "making a loader writes nothing"
    for index in (3, np.int64(5), "a/b.jpg", ("shard", 9), "✗"):
        quarantine.record(fault(index))
    assert Quarantine(path).keys == quarantine.keys
    assert quarantine.keys == {3, 5, "s:a/b.jpg", "t:[s:shard,9]", "s:✗"}


def test_a_line_tells_what_happened(tmp_path: Path) -> None:
    """For people and for other programs."""
    path = tmp_path / "bad.jsonl"
    Quarantine(path).record(fault(3))
    (line,) = path.read_text().splitlines()
    entry = json.loads(line)
    assert entry == {
        "schema": 1,
        "key": 3,
        "kind": "exception",
        "error_type": "ValueError",
        "message": "bad ✗",
        "epoch": 2,
        "time": 5.0,
    }


def test_each_sample_is_written_once(tmp_path: Path) -> None:
    """Also when another run has written it before."""
    path = tmp_path / "bad.jsonl"
    for _ in range(2):
        quarantine = Quarantine(path)
        quarantine.record(fault(3))
        quarantine.record(fault(3))
    assert len(path.read_text().splitlines()) == 1


def test_two_ranks_share_a_file(tmp_path: Path) -> None:
    """Each appends whole lines and overwrites nothing."""
    path = tmp_path / "bad.jsonl"
    one, other = Quarantine(path), Quarantine(path)
    for index in range(50):
        (one if index % 2 else other).record(fault(index))
    assert Quarantine(path).keys == set(range(50))


def test_empty_lines_and_unknown_fields_are_fine(tmp_path: Path) -> None:
    """A later version may write more, and people use editors."""
    path = tmp_path / "bad.jsonl"
    path.write_text('\n{"schema": 1, "key": 7, "colour": "red"}\n\n')
    assert Quarantine(path).keys == {7}


@pytest.mark.parametrize("content", NOT_OURS.values(), ids=NOT_OURS.keys())
def test_a_file_that_is_not_ours_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    """The error names the field and the value; not one byte is changed."""
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(OptionError, match="quarantine") as caught:
        Quarantine(path)
    assert caught.value.field == "quarantine"
    assert caught.value.value == str(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content


def test_a_folder_is_refused(tmp_path: Path) -> None:
    """The path of a directory."""
    with pytest.raises(OptionError) as caught:
        Quarantine(tmp_path)
    assert caught.value.field == "quarantine"


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    """Now, not after a day of training; and nothing is created."""
    with pytest.raises(OptionError) as caught:
        Quarantine(tmp_path / "nowhere" / "bad.jsonl")
    assert caught.value.field == "quarantine"
    assert not (tmp_path / "nowhere").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    """``file/bad.jsonl`` cannot be."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError):
        Quarantine(tmp_path / "file" / "bad.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    """Permissions."""
    path = tmp_path / "bad.jsonl"
    path.write_text(GOOD)
    path.chmod(0)
    with pytest.raises(OptionError):
        Quarantine(path)


def test_a_target_that_cannot_be_written_warns_once(tmp_path: Path) -> None:
    """Training goes on, the samples stay known in this run."""
    path = tmp_path / "bad.jsonl"
    quarantine = Quarantine(path)
    path.mkdir()  # somebody else was here
    with pytest.warns(RobustLoaderWarning, match="quarantine") as caught:
        for index in range(5):
            quarantine.record(fault(index))
    assert len(caught) == 1
    assert quarantine.keys == set(range(5))


FULL_DISK = """
import resource, sys, warnings
from robustloader import FaultRecord
from robustloader.engine.quarantine import Quarantine
quarantine = Quarantine(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for index in range(20):
        quarantine.record(FaultRecord(kind="exception", index=index, message="m" * 30))
print(len(caught), sorted(quarantine.keys) == list(range(20)))
"""


@pytest.mark.parametrize("room", [0, 100, 1_000])
def test_a_full_disk_warns_once_and_leaves_a_file_that_can_be_read(tmp_path: Path, room: int) -> None:
    """No half line is left that would stop the next run from starting.

    A bound on the file's size behaves as a full disk does: the last write that fits is cut short.
    """
    path = tmp_path / "bad.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path), str(room)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "True"], done.stderr
    keys = Quarantine(path).keys
    assert keys == set(range(len(keys)))
