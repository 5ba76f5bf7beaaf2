"""What the documentation shows: its code blocks, and a process that runs those of one page, one after another.

``python -m tests.support.pages FILE…`` runs each file as a script (``.py``) or as one command line of ours per line
(``.commands``), and ends with the first that fails.
"""

from __future__ import annotations

import glob
import re
import runpy
import shlex
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from docs.check import ROOT, Page

PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>\S.*) -->")
SHELL = ("sh", "bash", "shell", "console")
PYTHON = ("python", "py")

LONG = {"tune": ["--seconds", "1", "--candidates", "0,1"], "compare": ["--batches", "6"]}
"""Added to commands that would measure for a while."""

MAY_FIND_TROUBLE = ("doctor",)
"""Exit status 1 is an answer, too: it is about the machine."""


@dataclass(frozen=True)
class Block:
    """One code block.

    Attributes:
        line: its first line in the page.
        reason: why it is not run; None where it is.
    """

    line: int
    language: str
    code: str
    reason: str | None


def blocks(path: Path) -> Iterator[Block]:
    """The code blocks of a page, each with the mark in the last line of text before it, if that is one."""
    page = Page(path)
    for start, language, code in page.blocks:
        before = [text for number, text in page.prose if number < start - 1 and text.strip()]
        mark = NOT_RUN.fullmatch(before[-1].strip()) if before else None
        yield Block(start, language, code, mark["reason"] if mark else None)


def commands(code: str) -> Iterator[list[str]]:
    """The command lines of a shell block, split into words; a prompt ``$`` is taken off, output is left out."""
    lines = code.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    for line in lines:
        if words := shlex.split(line, comments=True):
            yield words


def run_command(words: list[str]) -> None:
    """Run one command of ours in this process; raises where it fails."""
    from robustloader.cli import main

    arguments = [name for word in words[1:] for name in (sorted(glob.glob(word)) if "*" in word else [word])]
    status = main(arguments + LONG.get(words[1], []))
    if status != 0 and not (status == 1 and words[1] in MAY_FIND_TROUBLE):
        raise SystemExit(f"{shlex.join(words)}: exit status {status}")


def run_files(names: list[str]) -> None:
    """Run what was written to these files, in order."""
    for name in names:
        print(f"--- {name}", file=sys.stderr, flush=True)
        if name.endswith(".py"):
            runpy.run_path(name, run_name="__main__")
        else:
            for line in Path(name).read_text(encoding="utf-8").splitlines():
                run_command(shlex.split(line))


if __name__ == "__main__":
    try:
        run_files(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        sys.exit(1)
