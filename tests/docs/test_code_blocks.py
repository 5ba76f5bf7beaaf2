"""What the documentation shows works: its Python runs, its commands end well, what else it names is there."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from docs.check import ROOT
from tests.support.pages import PAGES, PYTHON, SHELL, Block, blocks, commands
from tests.support.runs import write_run

LIMIT_S = 85
REASONS_SHOWN = 12
"""How many blocks may be left out, over all pages: each has its reason beside it."""

MODULE = '''"""What the pages call my_project.data."""

import torch
from torch.utils.data import TensorDataset


def train_set():
    return TensorDataset(torch.arange(640), torch.arange(640) % 10)
'''

SHOWING = [page for page in PAGES if any(True for _ in blocks(page))]
IDENTITIES = [str(path.relative_to(ROOT)) for path in SHOWING]


def is_run(block: Block) -> bool:
    return block.reason is None


@pytest.mark.parametrize("page", SHOWING, ids=IDENTITIES)
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    """Python blocks end without an exception, each on its own; our commands end with status 0."""
    files = []
    for block in filter(is_run, blocks(page)):
        name = tmp_path / f"{page.stem}-{block.line}"
        if block.language in PYTHON:
            path = name.with_suffix(".py")
            # The blank lines make a traceback name the page's own line.
            path.write_text("\n" * (block.line - 1) + block.code, encoding="utf-8")
        elif block.language in SHELL:
            ours = [words for words in commands(block.code) if words[0] == "robustloader" and words[1] != "demo"]
            if not ours:
                continue
            path = name.with_suffix(".commands")
            path.write_text("\n".join(map(shlex.join, ours)), encoding="utf-8")
        else:
            continue
        files.append(path)
    if not files:
        return
    (tmp_path / "my_project").mkdir()
    (tmp_path / "my_project" / "data.py").write_text(MODULE, encoding="utf-8")
    for name in ("run.jsonl", "run-0.jsonl", "run-1.jsonl"):
        write_run(tmp_path / name, epochs=2, faults=3, deaths=1)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]), "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.pages", *map(str, files)],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, f"{done.stdout[-2_000:]}\n{done.stderr[-6_000:]}"


@pytest.mark.parametrize("page", SHOWING, ids=IDENTITIES)
def test_what_is_not_run_is_there(page: Path) -> None:
    """Commands that are too long for a test: verbs of the Makefile, extras, modules and files exist. No other ones."""
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for block in filter(is_run, blocks(page)):
        if block.language not in SHELL:
            continue
        for words in commands(block.code):
            match words:
                case ["robustloader", *_]:
                    pass
                case ["make", *rest]:
                    assert {word for word in rest if "=" not in word} <= verbs, words
                case ["pip", "install", *rest]:
                    named = {
                        each for word in rest for found in re.findall(r"\[(.*)\]", word) for each in found.split(",")
                    }
                    assert named <= extras, words
                case ["python", "-m", module, *_]:
                    assert find_spec(module), words
                case ["python", file, *_]:
                    assert (ROOT / file).is_file(), words
                case ["torchrun", *rest]:
                    files = [word for word in rest if word.endswith(".py")]
                    assert files, words
                    assert all((ROOT / file).is_file() for file in files), words
                case ["export", _]:
                    pass
                case _:
                    pytest.fail(
                        f"{page.name}:{block.line}: nobody runs {shlex.join(words)}: mark it <!-- not run: … -->"
                    )


def test_little_is_left_out() -> None:
    """Few blocks carry a reason for not being run, and every Python one of them compiles all the same."""
    left_out = [(page, block) for page in PAGES for block in blocks(page) if not is_run(block)]
    assert len(left_out) <= REASONS_SHOWN, [(page.name, block.line) for page, block in left_out]
    for page, block in left_out:
        if block.language in PYTHON:
            ast.parse(block.code, f"{page.name}:{block.line}")


@pytest.mark.parametrize("page", SHOWING, ids=IDENTITIES)
def test_data_is_well_formed(page: Path) -> None:
    """JSON parses, and every block says what it is, so that none is overlooked."""
    for block in blocks(page):
        assert block.language, f"{page.name}:{block.line}: a block without a language"
        if block.language == "json":
            json.loads(block.code)
