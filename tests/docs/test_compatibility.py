"""The page of versions says what the result says."""

from __future__ import annotations

from pathlib import Path

from tests.versions import BEGIN, END, read_environments, render

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_result() -> None:
    """As ``make versions`` puts it there."""
    environments = read_environments(ROOT / "benchmarks" / "results" / "versions.json")
    _, _, rest = (ROOT / "docs" / "compatibility.md").read_text().partition(BEGIN)
    shown, end, _ = rest.partition(END)
    assert environments and end
    assert shown.strip() == render(environments).strip()


def test_failures_are_named() -> None:
    """A table that says so, and each test by name."""
    failed = {
        "python": "3.12.1",
        "torch": "2.6.0",
        "counts": {"passed": 3_899, "failed": 1},
        "commits": ["0123456789abcdef"],
        "files": {"tests/unit/test_a.py": {"failures": [{"test": "tests.unit.test_a::test_b", "said": "no"}]}},
    }
    assert render([failed]).splitlines()[2:] == [
        "| 3.12.1 | 2.6.0 | 3,899 | 1 | 0 | `0123456789` |",
        "",
        "What failed:",
        "",
        "* Python 3.12.1, torch 2.6.0: `tests.unit.test_a::test_b`",
    ]
