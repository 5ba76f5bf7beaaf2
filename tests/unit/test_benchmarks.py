"""The pure parts of the benchmarks: statistics, order of turns, thresholds, tables."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import harness
from benchmarks.__main__ import FULL, NAMES
from benchmarks.contenders import policy_pair
from benchmarks.harness import LIMIT, Form, affordable, block_size, compare_anew, equal, measurement, turn_order
from benchmarks.stats import paired_ratio, spread
from benchmarks.tables import BEGIN, END, insert, render
from benchmarks.thresholds import THRESHOLDS, judge
from benchmarks.workloads import WORKLOADS


def made(ours: list[float], torch: list[float], **more: Any) -> dict[str, Any]:
    return measurement("what", "ms a batch", {"robustloader": ours, "torch": torch, **more}, "robustloader")


# --- statistics


def test_spread_is_median_and_quartiles() -> None:
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 2.0, 4.0)
    assert spread([7.0]) == (7.0, 7.0, 7.0)


def test_a_ratio_is_paired_by_round() -> None:
    """A machine that is ten times slower in some rounds moves both figures, and the ratio not at all."""
    ours = [1.0, 10.0, 1.0, 10.0, 1.0]
    assert paired_ratio([3 * value for value in ours], ours) == (3.0, 3.0, 3.0)


def test_the_interval_holds_the_median_and_narrows_with_rounds() -> None:
    chance = np.random.default_rng(1)

    def interval(rounds: int) -> Any:
        return paired_ratio(list(2 + chance.normal(0, 0.2, rounds)), [1.0] * rounds)

    few, many = interval(8), interval(200)
    for found in (few, many):
        assert found.low <= found.median <= found.high
    assert many.low < 2.0 < many.high
    assert many.high - many.low < few.high - few.low


@pytest.mark.parametrize(("above", "below"), [([], []), ([1.0], [1.0, 2.0])])
def test_what_is_not_paired_has_no_ratio(above: list[float], below: list[float]) -> None:
    with pytest.raises(ValueError, match="paired rounds"):
        paired_ratio(above, below)


def test_everyone_comes_first_equally_often() -> None:
    for size in (2, 5):
        orders = [turn_order(range(size), number) for number in range(2 * size)]
        assert all(sorted(order) == list(range(size)) for order in orders)
        assert set(Counter(order[0] for order in orders).values()) == {2}


def test_slow_workloads_get_fewer_rounds_but_some() -> None:
    form = Form(rounds=24, block_s=0.25, budget_s=50, fine_starts=3, fine_rounds=3)
    assert affordable(24, round_s=1.0, form=form) == 24
    assert affordable(24, round_s=5.0, form=form) == 10
    assert affordable(24, round_s=500.0, form=form) == 3
    assert affordable(2, round_s=500.0, form=form) == 2


@pytest.mark.parametrize(
    ("batch_s", "granule", "batches"), [(0.01, 1, 25), (0.01, 20, 40), (9.0, 1, 8), (1e-9, 1, 4000)]
)
def test_a_block_is_as_long_as_wanted(batch_s: float, granule: int, batches: int) -> None:
    form = Form(rounds=3, block_s=0.25, budget_s=50, fine_starts=3, fine_rounds=3)
    assert block_size(batch_s, form, granule) == batches


def test_a_start_counts_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each start's median, from a comparison of its own, and each setting comes first in half of them."""
    on, off = policy_pair("auto")
    orders = []

    def compare(workload: Any, contenders: Any, form: Form, folder: Path, **options: Any) -> dict[str, list[float]]:
        orders.append([contender.name for contender in contenders])
        return {contender.name: [float(len(orders)), 9.0, 0.0] for contender in contenders}

    monkeypatch.setattr(harness, "compare", compare)
    form = replace(FULL, fine_starts=4)
    found = compare_anew(WORKLOADS["tiny"], (on, off), form, tmp_path)
    assert found == {name: [1.0, 2.0, 3.0, 4.0] for name in (on.name, off.name)}
    assert Counter(order[0] for order in orders) == {on.name: 2, off.name: 2}


def test_who_cannot_do_the_work_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on, off = policy_pair("auto")
    monkeypatch.setattr(harness, "compare", lambda *args, **options: {on.name: "it is ill", off.name: [1.0]})
    found = compare_anew(WORKLOADS["tiny"], (on, off), replace(FULL, fine_starts=2), tmp_path)
    assert found == {on.name: "it is ill", off.name: [1.0, 1.0]}


# --- fairness


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({"x": torch.arange(3), "y": ["a", np.ones(2)]}, True),
        ({"x": torch.arange(3.0), "y": ["a", np.ones(2)]}, False),
        ({"x": torch.arange(3), "y": ["b", np.ones(2)]}, False),
        ({"x": torch.arange(3), "y": ["a", np.ones(2, dtype=np.float32)]}, False),
        ({"x": torch.arange(3), "y": ("a", np.ones(2))}, False),
        ({"x": torch.arange(3)}, False),
    ],
)
def test_batches_are_compared_in_structure_type_and_value(other: Any, same: bool) -> None:
    assert equal({"x": torch.arange(3), "y": ["a", np.ones(2)]}, other) is same


# --- thresholds


def test_every_measurement_has_a_threshold_against_every_peer() -> None:
    """Nothing is measured without being judged, and nothing is judged that is not measured."""
    assert {threshold.measurement for threshold in THRESHOLDS} == {*NAMES, "short-epoch"}
    against = {(threshold.measurement, threshold.against) for threshold in THRESHOLDS}
    assert len(against) == len(THRESHOLDS)
    for name in {*WORKLOADS, "first-batch", "short-epoch"} - {"paced"}:
        assert {(name, peer) for peer in ("torch", "torchdata", "spdl")} <= against


@pytest.mark.parametrize(
    ("name", "ours", "torch", "limit", "passed"),
    [
        ("tiny", 1.0, 6.1, 0.5, True),
        ("tiny", 1.0, 5.9, 0.5, False),
        ("io", 1.0, 0.98, 1.0, True),
        ("io", 1.0, 0.96, 1.0, False),
        ("cpu", 1.0, 1.0, 0.91, True),
        ("cpu", 1.0, 1.0, 0.89, False),
        ("cpu", 1.0, 1.16, 0.5, True),
        ("memory", 1.04, 1.0, None, True),
        ("memory", 1.06, 1.0, None, False),
    ],
)
def test_a_threshold_is_judged(name: str, ours: float, torch: float, limit: float | None, passed: bool) -> None:
    more = {} if limit is None else {LIMIT: [limit] * 5}
    verdict = next(judge({name: made([ours] * 5, [torch] * 5, **more)}))
    assert (verdict.against, verdict.passed) == ("torch", passed)


@pytest.mark.parametrize(("off", "passed"), [(1.0, True), (1.02, True), (0.96, False), (1.04, False)])
def test_a_setting_must_cost_next_to_nothing(off: float, passed: bool) -> None:
    results: dict[str, Any] = {"all on": [1.0] * 5, "all off": [off] * 5}
    assert [verdict.passed for verdict in judge({"policies": measurement("", "ms", results, "all on")})] == [passed]


def test_the_interval_is_judged_and_not_its_middle() -> None:
    """Rounds that differ too much to tell show nothing."""
    torn = [0.9, 0.9, 1.0, 1.1, 1.1]
    assert paired_ratio(torn, [1.0] * 5).median == 1.0
    assert next(judge({"io": made([1.0] * 5, torn)})).passed is False
    for setting in (torn, [1.0, 1.0, 1.0, 1.1, 1.1], [0.9, 0.9, 1.0, 1.0, 1.0]):
        results: dict[str, Any] = {"all on": [1.0] * 5, "all off": setting}
        assert next(judge({"policies": measurement("", "ms", results, "all on")})).passed is False


def test_who_cannot_do_the_work_is_not_compared_unless_it_is_this_loader() -> None:
    verdicts = {v.against: v for v in judge({"tiny": made([1.0], [9.0], spdl="ValueError: no")})}
    assert verdicts["torch"].passed is True
    assert (verdicts["spdl"].passed, verdicts["spdl"].shown) == (None, "ValueError: no")
    results: dict[str, Any] = {"robustloader": "OSError: broken", "torch": [1.0]}
    own = next(judge({"tiny": measurement("", "ms", results, "robustloader")}))
    assert (own.passed, own.shown) == (False, "OSError: broken")


# --- tables


def result(**measurements: Any) -> dict[str, Any]:
    return {
        "form": "full",
        "started": "2026-01-02T03:04:05+00:00",
        "took_s": 90.0,
        "workers": 2,
        "transport": "auto",
        "machine": {"cpu": "Abacus", "usable_cores": 2, "memory_gib": 8.0, "kernel": "6.1"},
        "versions": {"python": "3.11", "spdl-core": None},
        "commit": {"hash": "0123456789abcdef", "dirty": True},
        "measurements": measurements,
        "verdicts": [verdict.to_dict() for verdict in judge(measurements)],
    }


def test_the_tables_tell_everything() -> None:
    text = render(result(tiny=made([1.0, 1.0], [6.5, 6.5], limit=[0.5, 0.5], spdl="ValueError: a | b")))
    assert "Abacus, 2 cores" in text
    assert "commit `0123456789` with changes, 2026-01-02" in text
    assert "| `tiny` | what | 1 | 6.5 |  | cannot | 0.5 | 0.50 |" in text
    assert "| `tiny` | 6.50 (6.50 to 6.50) |  |  |" in text
    assert "| `tiny` | torch | at least 6 × as fast | 6.50 (6.500 to 6.500) | yes |" in text
    assert "* `tiny`, spdl: ValueError: a \\| b" in text


def test_a_table_replaces_the_one_before() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = insert(page, "new\n")
    assert once == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert insert(once, "new\n") == once


@pytest.mark.parametrize("page", ["nothing", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{END}"])
def test_a_page_without_its_markers_is_left_alone(page: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        insert(page, "new")


def test_forms_are_frozen() -> None:
    assert replace(FULL, rounds=1).rounds == 1
    with pytest.raises(AttributeError):
        FULL.rounds = 1  # type: ignore[misc]
