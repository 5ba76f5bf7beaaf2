"""The page about scale against the result that it tells of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guide" / "scale.md").read_text()
RESULT: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text())
LINK = "(../../benchmarks/results/scale.json)"


def table(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    lines = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def survival(ranks: int, hours: float) -> dict[str, Any]:
    return next(row for row in RESULT["survival"] if (row["ranks"], row["death_every_h"]) == (ranks, hours))


def knee(workers: int, prefetch: int) -> dict[str, Any]:
    return next(row for row in RESULT["knee"] if (row["workers"], row["prefetch_factor"]) == (workers, prefetch))


def test_the_table_of_workers_is_the_result() -> None:
    rows = table("One rank, many workers")
    wanted = []
    for workers in sorted({row["workers"] for row in RESULT["knee"]}):
        rates = [f"{knee(workers, ahead)['batches_per_s']:.1f}" for ahead in (1, 2, 8)]
        wanted.append([str(workers), *rates, f"{knee(workers, 2)['first_batch_s']:.2f} s"])
    assert rows == wanted


def test_the_table_of_lost_jobs_is_the_result() -> None:
    rows = table("Many ranks, some deaths")
    assert [row[0] for row in rows] == [f"{ranks:,}" for ranks in sorted({row["ranks"] for row in RESULT["survival"]})]
    for row in rows:
        ranks = int(row[0].replace(",", ""))
        for hours, cell in zip((1e3, 1e4, 1e5, 1e6), row[1:], strict=True):
            found = survival(ranks, hours)
            share = 100 * found["lost"] / found["jobs"]
            assert cell == (f"{share:.0f} %" if share >= 10 else f"{share:.1f} %"), (ranks, hours)


@pytest.mark.parametrize(
    "figure",
    [
        f"{knee(32, 8)['batches_per_s']:.1f} batches a second",
        f"{knee(128, 2)['batches_per_s']:.1f}",
        f"{100 * survival(512, 1e5)['lost'] / survival(512, 1e5)['jobs']:.0f} %",
        f"{100 * RESULT['stall']['wait_fraction_without_deaths']:.0f} %",
        f"{RESULT['stall']['stall_s']:.2f} s",
        f"{survival(4096, 1e4)['deaths_per_job']:.0f} deaths",
        f"{survival(4096, 1e4)['stalled_s_per_job']:.0f} s",
    ],
)
def test_each_figure_of_a_sentence_is_the_result_and_links_to_it(figure: str) -> None:
    assert f"[{figure}]{LINK}" in re.sub(r"\s+", " ", PAGE)


def test_every_link_to_the_result_is_looked_at() -> None:
    """The one of the introduction, and those above: a figure that is put in later belongs there as well."""
    assert PAGE.count(LINK) == 1 + 7
