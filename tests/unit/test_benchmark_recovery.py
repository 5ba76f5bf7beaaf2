"""The pure parts of the benchmark of failures: which samples are bad, percentiles, fates, verdicts, the table."""

from __future__ import annotations

import math
import traceback
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

from benchmarks.recovery import (
    BAD,
    BEGIN,
    CLEAN,
    END,
    KILLS,
    is_bad,
    judge,
    percentile,
    printed_exceptions,
    render,
    tell_fate,
)
from benchmarks.tables import insert
from benchmarks.thresholds import RECOVERY


def result(**more: Any) -> dict[str, Any]:
    gap = {"method": "fork", "added_mb": 0, "kills": 9, "p50_ms": 20.0, "p95_ms": 105.0, "plain_p50_ms": 5.0}
    ratios = {name: {"median": 0.9, "low": 0.88, "high": 0.92} for name in ("1 % bad", KILLS)}
    made = {"what": "realistic", "ratios": ratios, "median": {CLEAN: 3000.0, "1 % bad": 2700.0, KILLS: 2700.0}}
    return {
        "machine": {"cpu": "a processor", "usable_cores": 2, "kernel": "6.1"},
        "versions": {"torch": "2.13.0"},
        "commit": {"hash": "0123456789abcdef", "dirty": False},
        "started": "2026-01-02T03:04:05+00:00",
        "short": False,
        "gaps": [{**gap, "load_ms": 10.0, "trainer_rss_mb": 400.0, **more}],
        "throughput": {"realistic": made},
        "peers": {"torch": {"fate": "stops: a | b", "delivered": 320, "missing": 2880, "doubled": 0}},
    }


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.05, 1.0])
def test_as_many_samples_are_bad_as_asked_for(share: float) -> None:
    bad = sum(is_bad(index, share) for index in range(100_000))
    assert abs(bad - share * 100_000) <= 5 * math.sqrt(100_000 * share * (1 - share))


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert percentile(values, 0.50) == 50.0
    assert percentile(values, 0.95) == 95.0
    assert percentile([3.0], 0.95) == 3.0
    assert math.isnan(percentile([], 0.5))


@pytest.mark.parametrize(
    ("indices", "told", "fate", "missing", "doubled"),
    [
        ([0, 1, 2, 3], {"status": 0}, "goes on; every sample arrives once", 0, 0),
        ([0, 1, 3, 3], {"status": 0}, "the loop ends without an exception, samples are lost and doubled", 1, 1),
        ([0, 1, 2, 3, 3], {"status": 0}, "the loop ends without an exception, samples are doubled", 0, 1),
        (
            [0, 1],
            {"status": 0, "printed": ["BrokenProcessPool"]},
            "the loop ends without an exception, samples are lost (BrokenProcessPool on stderr)",
            2,
            0,
        ),
        ([0, 1], {"status": None}, "hangs: not at its end after 9 s", 2, 0),
        ([0, 1], {"status": 0, "error": "RuntimeError: gone"}, "stops: RuntimeError: gone", 2, 0),
        ([0], {"status": -9}, "its process ends with status -9", 3, 0),
        ([0, 1, 2, 3], {"status": 0, "struck": False}, "no worker was killed: status 0", 0, 0),
    ],
)
def test_the_fate_of_an_epoch(indices: list[int], told: dict[str, Any], fate: str, missing: int, doubled: int) -> None:
    facts = {"error": None, "struck": True, "deadline_s": 9.0, **told}
    assert tell_fate(indices, 4, **facts) == {
        "fate": fate,
        "delivered": len(indices),
        "missing": missing,
        "doubled": doubled,
    }


def test_exceptions_that_were_only_printed_are_named() -> None:
    """Each once, by the last part of its name, wherever its traceback stands."""
    try:
        try:
            raise KeyError("one")
        except KeyError as error:
            raise BrokenProcessPool("a child died") from error
    except BrokenProcessPool:
        text = f"said before\n{traceback.format_exc()}said after: no exception\n{traceback.format_exc()}"
    assert printed_exceptions(text) == ["KeyError", "BrokenProcessPool"]
    assert printed_exceptions("ValueError: told without a traceback\n") == []


def test_a_tasks_load_time_is_part_of_the_limit() -> None:
    passed = {verdict.measurement: verdict.passed for verdict in judge(result())}
    assert passed == {"kill to next batch, fork": True, "1 % bad": False, KILLS: True}
    assert next(judge(result(load_ms=5.0))).passed
    assert not next(judge(result(load_ms=4.9))).passed
    assert not next(judge(result(p95_ms=math.nan))).passed


def test_every_threshold_of_recovery_is_measured() -> None:
    """The names are those that a run gives: kills under fork, with and without memory added, and two conditions."""
    whole = result()
    whole["gaps"].append({**whole["gaps"][0], "added_mb": 1000})
    assert [verdict.measurement for verdict in judge(whole)] == [threshold.measurement for threshold in RECOVERY]
    assert {threshold.measurement for threshold in RECOVERY if threshold.against == CLEAN} <= {*BAD, KILLS}


def test_only_fork_is_held_to_the_limit() -> None:
    assert not [verdict for verdict in judge(result(method="spawn")) if "kill to next" in verdict.measurement]


def test_the_tables_go_between_their_own_markers() -> None:
    text = render(result())
    assert "| fork | 9 | 20.0 | 105.0 | 5.0 | 10.0 | 400 |" in text
    assert "stops: a \\| b" in text
    assert "| 1 % bad | at least 0.95 × as fast | 0.90 (0.880 to 0.920) | **no** |" in text
    page = insert(f"before\n{BEGIN}\nold\n{END}\nafter\n", text, BEGIN, END)
    assert page.startswith("before\n") and page.endswith("after\n") and text in page and "old" not in page
