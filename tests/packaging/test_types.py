"""A user's annotated program against the installed package, as mypy and pyright read it; and it runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import robustloader
import robustloader.testing
from tests.packaging.conftest import ROOT, Installed

SAMPLE = ROOT / "tests" / "packaging" / "sample.py"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The sample, where the checkout is out of reach."""
    return Path(shutil.copy(SAMPLE, tmp_path / "sample.py"))


def test_it_runs(installed: Installed, program: Path) -> None:
    """What is shown to the type checkers is no fiction."""
    done = installed.run(installed.python, "-W", "ignore", program, program.parent, cwd=program.parent)
    assert done.returncode == 0, done.stderr
    assert "burst: -1 2" in done.stdout


def mypy(installed: Installed, program: Path) -> subprocess.CompletedProcess[str]:
    """mypy in strict mode, with the types that the installed package brings."""
    return installed.run(
        *(sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={installed.folder / 'mypy'}"),
        *(f"--python-executable={installed.python}", program),
        cwd=program.parent,
    )


def pyright(installed: Installed, program: Path) -> list[dict[str, Any]]:
    """What pyright's strict mode finds, as basedpyright brings it, with a Node of its own."""
    (program.parent / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict"}))
    done = installed.run(
        *(sys.executable, "-m", "basedpyright", "--outputjson", f"--pythonpath={installed.python}", program),
        cwd=program.parent,
    )
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == 1
    return list(found["generalDiagnostics"])


def test_mypy(installed: Installed, program: Path) -> None:
    """Nothing to complain of in strict mode."""
    done = mypy(installed, program)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright(installed: Installed, program: Path) -> None:
    """Nothing in pyright's strict mode either."""
    assert [f"{entry['range']['start']['line'] + 1}: {entry['message']}" for entry in pyright(installed, program)] == []


WRONG = """
from torch.utils.data import Dataset

from robustloader import FaultPolicy, RecoveryPolicy, RobustDataLoader

def use(dataset: Dataset[int]) -> None:
    RobustDataLoader(dataset, faults="ignore")
    RobustDataLoader(dataset, num_workers="many")
    RobustDataLoader(dataset, recovery=FaultPolicy())
    RecoveryPolicy(max_restart=3)
    RobustDataLoader(dataset).summary().wait_p95
"""
"""One mistake in each of the last five lines."""


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_mistakes_are_seen(installed: Installed, tmp_path: Path, checker: str) -> None:
    """The types say something: each of these lines is refused."""
    program = tmp_path / "wrong.py"
    program.write_text(WRONG)
    if checker == "mypy":
        lines = [int(line.split(":")[1]) for line in mypy(installed, program).stdout.splitlines() if ": error:" in line]
    else:
        lines = [entry["range"]["start"]["line"] + 1 for entry in pyright(installed, program)]
    assert sorted(set(lines)) == [7, 8, 9, 10, 11]


def test_public_types_are_complete(installed: Installed, tmp_path: Path) -> None:
    """Every public name, and every attribute of it, has a type that no type checker has to guess.

    The one exception: torch's loader has one type parameter or two, by its version, so ours cannot name them.
    """
    path = f"{installed.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"  # it asks the first python there
    words = ("-m", "basedpyright", "--outputjson", "--ignoreexternal", "--verifytypes", "robustloader")
    done = installed.run(sys.executable, *words, cwd=tmp_path, PATH=path)
    report = json.loads(done.stdout)["typeCompleteness"]
    assert Path(report["pyTypedPath"]).is_relative_to(installed.folder)
    public = tuple(
        f"{thing.__module__}.{thing.__qualname__}"
        for module in (robustloader, robustloader.testing)
        for thing in (getattr(module, name) for name in module.__all__)
    )
    ours = [
        symbol
        for symbol in report["symbols"]
        if symbol["name"] in public or symbol["name"].startswith(tuple(f"{name}." for name in public))
    ]
    assert {symbol["name"] for symbol in ours} >= set(public)
    guessed = {symbol["name"] for symbol in ours if not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]}
    assert guessed == {"robustloader.loader.RobustDataLoader"}
