"""The demo keeps its promises when it is run as users run it, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import robustloader.cli as robustloader_cli
from robustloader.cli import main

for extra in ("PIL", "sklearn", "tqdm"):
    pytest.importorskip(extra)

ROOT = Path(__file__).parents[2]
LIMIT_S = 120


def environment(**more: str) -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


def run_robustloader(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "robustloader", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S
    )


class Finished(NamedTuple):
    process: subprocess.CompletedProcess[str]
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        return json.loads(self.process.stdout)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("demo") / "kept"
    arguments = ("demo", "--json", "--epochs", "2", "--dir", str(folder))
    return Finished(run_robustloader(*arguments, cwd=folder.parent), folder)


@pytest.mark.slow
def test_all_claims_hold(finished: Finished) -> None:
    """Exit status 0, and every claim holds."""
    assert finished.process.returncode == 0, finished.process.stdout + finished.process.stderr
    failed = [claim for claim in finished.result["claims"] if not claim["holds"]]
    assert not failed
    assert finished.result["ok"] is True
    assert finished.result["accuracy"] >= 0.95


@pytest.mark.slow
def test_torch_dies_in_each_situation(finished: Finished) -> None:
    """The comparison is real: torch's loader ends in the error that belongs to each situation."""
    errors = [entry["error"] for entry in finished.result["stock"]]
    assert len(errors) == 4
    assert "DataLoader worker process" in errors[0]
    assert errors[1].startswith("ConnectionError")
    assert all(re.match("RuntimeError: DataLoader worker|ConnectionResetError", error) for error in errors[2:])


@pytest.mark.slow
def test_the_fault_log_is_kept(finished: Finished) -> None:
    """With --dir the images stay, and the saved fault log names a file for every sample that raised."""
    records = [json.loads(line) for line in (finished.folder / "faults.jsonl").read_text().splitlines()]
    raised = [record for record in records if record["action"] in ("replaced", "retried")]
    named = [record["message"].split(": ")[0] for record in raised]
    assert named
    assert all(Path(name).is_file() and Path(name).parent == finished.folder / "train" for name in named)


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    """An interrupt in mid-epoch ends the demo with status 130, and its temporary folder and its workers are gone."""
    command = [sys.executable, "-u", "-m", "robustloader", "demo"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(TMPDIR=str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("  epoch 0: "):
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert list(tmp_path.glob("robustloader-demo-*")) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["demo", "--epochs", "0"], "--epochs: must be a whole number from 2 to 100, but got '0'"),
        (["demo", "--epochs", "many"], "but got 'many'"),
        (["demo", "--workers", "0"], "--workers: must be a whole number from 1 to 64, but got '0'"),
        (["demo", "--dir", str(ROOT)], "must be a new or an empty folder"),
        (["demo", "--speed", "9"], "unrecognized arguments: --speed 9"),
        (["dmeo"], "invalid choice: 'dmeo'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_bad_arguments(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A bad argument ends with status 2 and says what is allowed, before anything is done."""
    assert main(arguments) == 2
    output, errors = capsys.readouterr()
    assert told in errors
    assert output == ""


def test_status_of_the_process(tmp_path: Path) -> None:
    """``python -m robustloader`` exits with the status that ``main`` returns."""
    process = run_robustloader("demo", "--epochs", "0", cwd=tmp_path)
    assert process.returncode == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["PIL", "sklearn", "tqdm"])
def test_missing_extra(missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the demo's extra the user is told what to install."""
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "robustloader.cli.demo_data", raising=False)
    monkeypatch.delattr(robustloader_cli, "demo_data", raising=False)
    for name in [name for name in sys.modules if name.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["demo"]) == 2
    assert f"{missing} is missing: pip install 'robustloader[demo]'" in capsys.readouterr().err
