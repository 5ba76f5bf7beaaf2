"""The guide names the releases that are tested, and each extra that an error names exists."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from robustloader.integrations.accelerate import robustify
from robustloader.integrations.lightning import resume_callback
from robustloader.integrations.transformers import RobustTrainerMixin

ROOT = Path(__file__).resolve().parents[2]
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
NAMED = re.findall(r"`([\w-]+)==([\w.]+)`", (ROOT / "docs" / "guide" / "frameworks.md").read_text())


def test_every_framework_is_named() -> None:
    """In the table at the top."""
    assert {name for name, _ in NAMED} == {"accelerate", "lightning", "pytorch-ignite", "ray", "transformers"}


@pytest.mark.parametrize(("name", "release"), sorted(set(NAMED)))
def test_the_releases_named_are_those_tested(name: str, release: str) -> None:
    """Pinned for development and CI, and installed."""
    assert PINNED[name] == release
    assert importlib.metadata.version(name) == release


@pytest.mark.parametrize(
    ("user", "module"),
    [
        (lambda: robustify(None), "accelerate"),
        (RobustTrainerMixin, "transformers"),
        (resume_callback, "lightning"),
    ],
)
def test_what_is_missing_is_named(user: Any, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the extra to install, which exists."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=module) as caught:
        user()
    (extra,) = re.findall(r"robustloader\[(\w+)\]", str(caught.value))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"]
