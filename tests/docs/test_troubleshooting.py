"""What the page on errors quotes is what the package says, and every error has its place there."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
import torch.utils.data.dataloader as torch_dataloader

import robustloader
from docs.check import ROOT
from robustloader import errors

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
TORCHS, OURS = PAGE.split("## This package's words")
GENERAL = {"RobustLoaderError", "WorkerError"}
"""Bases: nobody raises them."""


def headings(text: str) -> list[str]:
    return re.findall(r"^### (.+)$", text, re.MULTILINE)


@cache
def texts() -> tuple[str, ...]:
    """Every string of the package's source, with … for what is filled in."""
    found = []
    for path in sorted((ROOT / "robustloader").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%\.?\d*[a-z]", "…", node.value))
    return tuple(found)


@pytest.mark.parametrize("heading", headings(OURS))
def test_our_words_are_what_the_package_says(heading: str) -> None:
    """Somewhere in the source there is a text in which the heading's words stand in this order."""
    heading = re.sub(r"(?<=sample … was )\w+", "…", heading)  # the action is filled in
    words = [re.escape(piece.strip()) for piece in heading.split("…") if piece.strip()]
    pattern = re.compile(".*".join(words), re.DOTALL)
    assert any(pattern.search(text) for text in texts()), heading


TYPES = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)}


@pytest.mark.parametrize("name", sorted(TYPES - GENERAL))
def test_every_error_has_its_place(name: str) -> None:
    """The page says what to do about each type of error, and about the warning."""
    assert f"`{name}`" in OURS or f"`{name}`" in TORCHS


def test_torchs_words_are_torchs() -> None:
    """Those that torch's loader says in Python are said by the torch that is installed."""
    with open(torch_dataloader.__file__, encoding="utf-8") as file:
        joined = re.sub(r'"\s*\n\s*f?"', "", file.read())
    for words in (
        "exited unexpectedly",
        "Too many open files. Communication with the workers is no longer possible",
        "DataLoader timed out after",
        "Pin memory thread exited unexpectedly",
        "prefetch_factor option could only be specified in multiprocessing",
        "persistent_workers option needs num_workers > 0",
    ):
        assert words in joined, words
        assert words in TORCHS, words


def test_the_page_is_there() -> None:
    """So many errors are told of that a broken heading would be seen above."""
    assert len(headings(OURS)) > 30
    assert robustloader.__version__
