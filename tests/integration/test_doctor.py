"""``robustloader doctor``: on this machine, under limits, and with the user's dataset."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

import robustloader
from robustloader import OptionError, doctor
from robustloader.cli import main
from robustloader.cli.datasets import DatasetNameError, load_dataset
from tests.support.datasets import Raising
from tests.support.limited import MIB, Exhausting, Large, LeakyStream

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run it as users do."""
    return subprocess.run(
        [sys.executable, "-m", "robustloader", "doctor", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=80,
        **settings,
    )


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Every line is there, and the exit status follows from the verdicts."""
    status = main(["doctor", "--num-workers", "1"])
    text = capsys.readouterr().out
    for name in ("processors", "memory", "/dev/shm", "open files", "processes", "start method"):
        assert re.search(rf"^{name} +(ok|warning|problem) ", text, re.MULTILINE), name
    assert status == int(" problem" in text.splitlines()[-1])


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    """One document with the same verdicts and the numbers."""
    status = main(["doctor", "--num-workers", "1", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] == (status == 0)
    checks = {check["name"]: check for check in told["checks"]}
    assert checks["processors"]["facts"]["usable"] >= 1
    assert all(check["verdict"] in ("ok", "warning", "problem") for check in checks.values())
    assert [check.name for check in doctor(num_workers=1).checks] == list(checks)


def test_few_files() -> None:
    """``ulimit -n 64`` is a problem for 8 workers and none for one."""
    many = command("--num-workers", "8", "--json", preexec_fn=few_files)
    assert many.returncode == 1, many.stderr
    check = next(check for check in json.loads(many.stdout)["checks"] if check["name"] == "open files")
    assert check["verdict"] == "problem"
    assert "hard limit 64" in check["finding"]
    one = command("--num-workers", "1", preexec_fn=few_files)
    assert one.returncode == 0, one.stdout


def test_a_dataset() -> None:
    """One batch is measured, and what it means for this loader and for torch's is said."""
    done = command(
        *("--dataset", "tests.support.limited:make_large", "--batch-size", "2"),
        *("--num-workers", "1", "--prefetch-factor", "3", "--json"),
    )
    assert done.returncode == 0, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["batch"]["facts"]["bytes"] == 2 * 38 * MIB
    assert checks["batch"]["facts"]["tensors"] == 1
    assert checks["lookahead"]["facts"]["batches"] == 1 * (3 + 1) + 1
    assert checks["torch's loader"]["facts"]["wanted_bytes"] == 4 * 2 * 38 * MIB


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch-size", "0"],
        ["--num-workers", "-1"],
        ["--num-workers", "²"],
        ["--prefetch-factor", "two"],
        ["--dataset", "nowhere:make"],
        ["--dataset", "tests.support.limited"],
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    """Status 2, and one line that says what is wrong."""
    assert main(["doctor", *arguments]) == 2
    assert "robustloader doctor: " in capsys.readouterr().err


def test_a_reader_that_leaves() -> None:
    """``robustloader doctor | true``: no traceback, and the status of a program that SIGPIPE ends."""
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "robustloader", "doctor"],
            cwd=ROOT,
            stdout=theirs,
            stderr=subprocess.PIPE,
            timeout=80,
        )
    finally:
        os.close(theirs)
    assert (done.returncode, done.stderr) == (141, b"")


def test_what_a_dataset_raises_moves_no_cursor(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Escape sequences in its message come to the terminal as text."""
    monkeypatch.setattr("tests.support.limited.make_large", lambda: Raising(8, {0: lambda index: OSError("a\x1b[2Jb")}))
    assert main(["doctor", "--dataset", "tests.support.limited:make_large"]) == 1
    assert "a [2Jb" in capsys.readouterr().err


def test_a_dataset_that_raises(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 1, and what it raised."""
    monkeypatch.setattr("tests.support.limited.make_large", lambda: Exhausting(8, {0}))
    assert main(["doctor", "--dataset", "tests.support.limited:make_large"]) == 1
    assert "loading one batch raised OSError" in capsys.readouterr().err


# --- the function -----------------------------------------------------------------------------------------------------


def test_it_is_public() -> None:
    """And says what it is."""
    assert robustloader.doctor is doctor
    assert "Raises:" in (doctor.__doc__ or "")


class Counted(Dataset):
    """Notes in a file which samples were loaded."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "loaded"

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        with self.path.open("a") as file:
            file.write(f"{index} {os.getpid()}\n")
        return index


def test_one_batch_and_no_more_is_loaded(tmp_path: Path) -> None:
    """In another process."""
    doctor(Counted(tmp_path), batch_size=4, num_workers=2)
    loaded = [line.split() for line in (tmp_path / "loaded").read_text().splitlines()]
    assert [index for index, _ in loaded] == ["0", "1", "2", "3"]
    assert {pid for _, pid in loaded}.isdisjoint({str(os.getpid())})


def test_streams_and_small_datasets() -> None:
    """A stream is read from its beginning; a batch may be all there is."""
    for dataset, size in ((LeakyStream(8, 0), 2 * 8), (Large(1, 64), 64)):
        checks = {check.name: check for check in doctor(dataset, batch_size=2, num_workers=1).checks}
        assert checks["batch"].facts["bytes"] == size


def test_an_empty_dataset() -> None:
    """There is nothing to measure."""
    with pytest.raises(ValueError, match="empty"):
        doctor(Large(0, 64))


@pytest.mark.parametrize(("name", "value"), [("num_workers", -1), ("prefetch_factor", 0), ("batch_size", 0)])
def test_wrong_options(name: str, value: int) -> None:
    """Refused by name."""
    with pytest.raises(OptionError, match=name):
        doctor(**{name: value})


# --- names of datasets ------------------------------------------------------------------------------------------------


def test_names_of_datasets() -> None:
    """A function, a class, an object that is there."""
    assert isinstance(load_dataset("tests.support.limited:make_large"), Large)
    assert isinstance(load_dataset("tests.support.limited:Large"), Large)
    assert len(load_dataset("tests.support.limited:LARGE")) == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tests.support.limited", "not of the form package.module:callable"),
        (":make", "not of the form package.module:callable"),
        ("tests.support.nowhere:make", "importing 'tests.support.nowhere' raised ModuleNotFoundError"),
        ("tests.support.limited:nothing", "has no 'nothing'"),
        ("tests.support.limited:Large.nothing", "has no 'Large.nothing'"),
        ("tests.support.limited:NUMBER", "is a int: neither a dataset nor something to call"),
        ("tests.support.limited:make_nothing", "gives a NoneType, which is no dataset"),
        ("tests.support.limited:make_trouble", "raised FileNotFoundError: no such folder"),
    ],
)
def test_names_that_lead_nowhere(name: str, text: str) -> None:
    """Each says why."""
    with pytest.raises(DatasetNameError, match=re.escape(text)):
        load_dataset(name)
