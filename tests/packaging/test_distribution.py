"""What is in the two files of a release, and that the wheel works where it is installed."""

from __future__ import annotations

import json
import tarfile
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path
from typing import Any

import pytest

import robustloader
from tests.packaging.conftest import ROOT, Installed

SMOKE = """
import json
import multiprocessing
import sys
from importlib import metadata

from torch.utils.data import Dataset

import robustloader
from robustloader import RobustDataLoader


class Numbers(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 13:
            raise ValueError("unlucky")
        return index


if __name__ == "__main__":
    loader = RobustDataLoader(Numbers(), batch_size=8, num_workers=2, multiprocessing_context=sys.argv[1])
    sums = [int(batch.sum()) for batch in loader]
    print(json.dumps({
        "file": robustloader.__file__,
        "version": metadata.version("robustloader"),
        "sums": sums,
        "faults": [record.index for record in loader.fault_log],
        "batches": loader.summary().batches,
        "left": [child.pid for child in multiprocessing.active_children()],
    }))
"""


def names_in(installed: Installed) -> tuple[set[str], set[str]]:
    """The files of the sdist, below its folder, and of the wheel."""
    with tarfile.open(installed.sdist) as archive:
        sdist = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(installed.wheel) as archive:
        wheel = set(archive.namelist())
    return sdist, wheel


def test_the_wheel_holds_the_package_and_nothing_else(installed: Installed) -> None:
    """Every file of the package, with its types' marker and its page; no test, no benchmark, no document."""
    _, wheel = names_in(installed)
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "robustloader").rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".pyo")
    }
    assert "robustloader/py.typed" in package
    assert {name for name in wheel if ".dist-info/" not in name} == package
    assert {name.split("/")[0] for name in wheel} == {
        "robustloader",
        f"robustloader-{robustloader.__version__}.dist-info",
    }


def test_the_sdist_can_be_built_and_tested(installed: Installed) -> None:
    """It has the package, the tests and what they need, and nothing of the machine it was made on."""
    sdist, wheel = names_in(installed)
    assert {name for name in wheel if ".dist-info/" not in name} <= sdist
    assert {"pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "README.md", "CHANGELOG.md"} <= sdist
    assert {"tests/conftest.py", "benchmarks/__init__.py", "docs/benchmarks.md"} <= sdist
    strange = [
        name for name in sdist if "__pycache__" in name or name.split("/")[0] in (".venv", "build", "dist", ".ci")
    ]
    assert strange == []


def test_what_it_says_of_itself(installed: Installed) -> None:
    """Version, licences with their texts, the command, and no dependency on what only developers need."""
    with zipfile.ZipFile(installed.wheel) as archive:
        info = f"robustloader-{robustloader.__version__}.dist-info"
        said = message_from_string(archive.read(f"{info}/METADATA").decode())
        licences = {name: archive.read(f"{info}/licenses/{name}").decode() for name in said.get_all("License-File", [])}
        commands = archive.read(f"{info}/entry_points.txt").decode()
    assert said["Version"] == robustloader.__version__
    assert said["License-Expression"] == "BSD-3-Clause AND MIT"
    assert "Redistribution and use in source and binary forms" in licences["LICENSE"]
    assert "MIT" in licences["robustloader/report/vendor/uPlot.LICENSE"]
    assert "robustloader = robustloader.cli:main" in commands
    required = {line.split(";")[0] for line in said.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert required == set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_epoch(installed: Installed, tmp_path: Path, method: str) -> None:
    """With workers, from a folder of the user's own: the sample that raises is replaced, the rest arrives."""
    (tmp_path / "smoke.py").write_text(SMOKE)
    done = installed.run(installed.python, "smoke.py", method, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert Path(told["file"]).is_relative_to(installed.folder)
    assert told["version"] == robustloader.__version__
    assert told["batches"] == 5
    assert [total for number, total in enumerate(told["sums"]) if number != 1] == [28, 156, 220, 284]
    assert told["faults"] == [13]
    assert told["left"] == []


def test_the_command(installed: Installed, tmp_path: Path) -> None:
    """``robustloader`` is on the path of the environment, and looks at the machine."""
    done = installed.run(
        installed.folder / "bin" / "robustloader", "doctor", "--num-workers", "1", "--json", cwd=tmp_path
    )
    told = json.loads(done.stdout)
    assert done.returncode == (0 if told["ok"] else 1), done.stderr
    assert {check["name"] for check in told["checks"]} >= {"processors", "memory", "open files"}
    asked = installed.run(installed.python, "-m", "robustloader", "--version", cwd=tmp_path)
    assert asked.stdout.strip() == f"robustloader {robustloader.__version__}"
