"""The examples run as they are, from the root of the repository, and stay short enough to be read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
LIMIT_S = 85
SLOW = {"ray_train.py": 280}
"""Ray starts a dozen processes, each of which imports torch: minutes on a busy machine."""
LINES = 60


def limited(path: Path) -> Any:
    """The example as a parameter, with the deadline that a slow one has."""
    marks = [pytest.mark.deadline(SLOW[path.name] + 20)] if path.name in SLOW else []
    return pytest.param(path, id=path.name, marks=marks)


@pytest.mark.parametrize("example", [limited(example) for example in EXAMPLES])
def test_examples_run(example: Path) -> None:
    """Exit status 0 without arguments, and without a network: what would reach for one is sent nowhere."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, str(example.relative_to(ROOT))],
        cwd=ROOT,
        env={**os.environ, **nowhere, "no_proxy": "localhost,127.0.0.1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SLOW.get(example.name, LIMIT_S),
    )
    assert done.returncode == 0, f"{done.stdout[-2_000:]}\n{done.stderr[-6_000:]}"


@pytest.mark.parametrize("example", EXAMPLES, ids=[path.name for path in EXAMPLES])
def test_examples_are_short(example: Path) -> None:
    """Fewer than 60 lines, and a docstring that says what is shown."""
    text = example.read_text(encoding="utf-8")
    assert len(text.splitlines()) < LINES
    assert text.startswith('"""')


def test_there_are_examples() -> None:
    """The plain loop and the stream, at least."""
    assert {"train.py", "stream.py"} <= {path.name for path in EXAMPLES}
