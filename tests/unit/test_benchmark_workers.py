"""The study of num_workers, its pure parts: verdicts, what the simulator is told, and the page that is made of it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.num_workers import (
    FULL,
    QUICK,
    Calibration,
    Look,
    Turn,
    batch_sizes,
    least_idle,
    main,
    simulated,
    to_device,
)
from benchmarks.thresholds import judge_study
from benchmarks.workers_page import RESULT, fill, markers, render
from benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guide" / "num-workers.md"


def made(**more: Any) -> dict[str, Any]:
    """What the study says of a kind that shows everything that it should."""
    ratio = {"median": 1.0, "low": 1.0, "high": 1.0}
    facts = {
        "best": 2,
        "tuned": {"workers": 2, "of_the_best": ratio, "took_s": 2.0, "sweep_s": 10.0},
        "auto": {
            "of_the_best": {"median": 0.9, "low": 0.8, "high": 1.0},
            "most_workers": 2,
            "ceiling": 2,
            "allowed": 8,
            "least_idle": None,
            "least_free": 0.5,
            "headroom": 0.1,
        },
        "simulator_error": {"0": 0.01, "1": 0.15, "2": 0.02},
    }
    for name, value in more.items():
        place, _, key = name.partition("__")
        if key:
            facts[place][key] = value
        else:
            facts[place] = value
    return facts


# --- verdicts


def test_what_shows_everything_passes_every_line() -> None:
    verdicts = list(judge_study({"skewed": made()}))
    assert [(verdict.measurement, verdict.passed) for verdict in verdicts] == [("skewed", True)] * 6


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({"tuned__of_the_best": {"median": 0.949, "low": 0.9, "high": 1.0}}, "tune()"),
        ({"tuned__took_s": 2.01}, "tune() time"),
        ({"auto__of_the_best": {"median": 0.899, "low": 0.8, "high": 1.0}}, "auto"),
        ({"auto__most_workers": 9}, "auto limits"),
        ({"auto__least_idle": 0.09}, "auto and processors"),
        ({"auto__least_free": 0.09}, "auto limits"),
        ({"simulator_error": {"0": 0.0, "1": 0.0, "2": 0.151}}, "simulator"),
    ],
)
def test_each_line_can_fall_short(facts: dict[str, Any], line: str) -> None:
    verdicts = judge_study({"skewed": made(**facts)})
    assert [verdict.against for verdict in verdicts if not verdict.passed] == [line]


# --- what "auto" did


@pytest.mark.parametrize(
    ("workers", "busy", "wanted"),
    [
        ([2, 2, 2], [0.0, 2.0, 4.0], None),  # never more than there are processors
        ([1, 1, 2, 2], [0.0, 2.0, 4.0, 6.0], None),
        ([2, 2, 2, 3, 3], [0.0, 1.0, 2.0, 4.0, 6.0], 0.5),
        ([2, 2, 3, 3, 4], [0.0, 0.5, 2.0, 3.8, 6.0], 0.1),  # of both times the one with less
        ([2, 2, 3, 3, 2, 2, 3], [0.0, 1.0, 2.0, 4.0, 6.0, 7.0, 8.0], 0.5),  # back, and tried again
    ],
)
def test_processors_idle_before_more_workers(workers: list[int], busy: list[float], wanted: float | None) -> None:
    """Two processors, a look each second."""
    looks = [Look(at, number, 0.5, 2.0 * at, busy[at]) for at, number in enumerate(workers)]
    assert least_idle(looks, 2) == pytest.approx(wanted)


# --- what the simulator is told


def observed(
    times_s: list[float], worker_ms: float, trainer_ms: float = 0.5, shallow_s: float = 0.02, two_ms: float = 0.0
) -> dict[str, float]:
    """Facts of one worker that loads in ``times_s`` and uses its processor for ``worker_ms`` a batch; with two of them
    it is ``two_ms``. Without lookahead a batch takes ``shallow_s``."""
    calibration = Calibration(workload=WORKLOADS["tiny"], folder=ROOT, seconds=1.0, times_s=times_s)
    one = {"first_batch_ms": 1.0}
    calibration.alone = [Turn(batches_per_s=500.0, trainer_ms=2.0, workers_ms=0.0, **one)]
    calibration.one = [Turn(batches_per_s=100.0, trainer_ms=trainer_ms, workers_ms=worker_ms, **one)]
    calibration.two = [Turn(batches_per_s=200.0, trainer_ms=trainer_ms, workers_ms=two_ms, **one)]
    calibration.shallow = [
        Turn(batches_per_s=1 / shallow_s, trainer_ms=trainer_ms, workers_ms=worker_ms, **one) for _ in range(3)
    ]
    return calibration.facts()


def test_processor_time_beyond_loading_is_sending() -> None:
    """Loading takes 10 ms, the worker's processor 12: it never waits, and sends for 2."""
    facts = observed([0.008, 0.012], worker_ms=12.0)
    assert facts["wait_s"] == 0
    assert facts["send_s"] == pytest.approx(0.002)
    assert facts["cross_s"] == pytest.approx(0.0005)
    assert facts["alone_s"] == pytest.approx(0.002)


def test_loading_beyond_processor_time_is_waiting() -> None:
    """Loading takes 10 ms, the worker's processor 1: it waits for 9."""
    facts = observed([0.010], worker_ms=1.0)
    assert facts["wait_s"] == pytest.approx(0.009)
    assert facts["send_s"] == 0


def test_what_is_left_of_a_period_is_two_wake_ups() -> None:
    """16 ms: 9 of waiting, 1 of work, 2 of receiving, so 2 for each wake-up."""
    facts = observed([0.010], worker_ms=1.0, trainer_ms=2.0, shallow_s=0.016)
    assert facts["wake_s"] == pytest.approx(0.002)
    assert observed([0.010], worker_ms=1.0, trainer_ms=2.0, shallow_s=0.010)["wake_s"] == 0


def test_more_processor_time_with_two_workers_is_contention() -> None:
    assert observed([0.010], worker_ms=10.0, two_ms=12.5)["contention"] == pytest.approx(0.25)
    assert observed([0.010], worker_ms=10.0, two_ms=9.5)["contention"] == 0


def test_the_simulator_starts_from_what_was_seen() -> None:
    """Alone: as seen. One worker that loads for 10 ms and sends for 2: one batch in 12 ms."""
    facts = observed([0.010], worker_ms=12.0, trainer_ms=0.0, shallow_s=0.012)
    rates = simulated(facts, [0.010], (0, 1), cores=2, batches=500)
    assert rates == {0: pytest.approx(500), 1: pytest.approx(1 / 0.012, rel=0.01)}


# --- turns


def test_a_batch_is_copied_to_the_device_whatever_its_structure() -> None:
    moved = to_device({"x": torch.arange(3), "y": [torch.ones(2), "text", (1, torch.zeros(1))]}, torch.device("meta"))
    assert moved["x"].is_meta
    assert moved["y"][0].is_meta
    assert moved["y"][1] == "text"
    assert moved["y"][2][1].is_meta


def test_the_usual_batch_size_is_swept_once() -> None:
    assert batch_sizes(WORKLOADS["tiny"], FULL) == [8, 32, 128]
    assert batch_sizes(WORKLOADS["paced"], FULL) == [1, 4]


def test_the_simulator_still_draws_the_curves_that_were_committed() -> None:
    """From the load times and costs in the result it computes what the result says that it computed."""
    _, result = committed()
    facts = {
        "cores": result["machine"]["usable_cores"],
        "batches": {"full": FULL, "quick": QUICK}[result["form"]].simulated,
    }
    for kind, made in result["kinds"].items():
        rates = simulated(made["calibration"], made["load_times_s"], (0, 1, 2), **facts)
        for workers, rate in rates.items():
            assert rate == pytest.approx(made["simulated"][str(workers)], rel=0.001), (kind, workers)


def test_curves_are_simulated_anew_from_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After a change of the simulator; what was measured stays as it is."""
    _, result = committed()
    kind = "latency-bound"
    result["kinds"] = {kind: result["kinds"][kind]}
    spoilt = copy.deepcopy(result)
    spoilt["kinds"][kind]["simulated"]["2"] = spoilt["kinds"][kind]["simulator_error"]["2"] = 0.5
    path = tmp_path / "result.json"
    path.write_text(json.dumps(spoilt))
    main(["--simulate", "--out", str(path)])
    assert json.loads(path.read_text())["kinds"] == result["kinds"]
    with pytest.raises(SystemExit):
        main(["--simulate", "--out", str(tmp_path / "absent.json")])
    assert "absent.json does not exist" in capsys.readouterr().err


# --- the page


def prose(text: str) -> list[str]:
    """Sentences outside tables."""
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    return re.split(r"(?<=[.:])\s+(?=[A-Z*])", "\n".join(lines))


def committed() -> tuple[str, dict[str, Any]]:
    return PAGE.read_text(), json.loads((PAGE.parent / RESULT).read_text())


def test_the_figures_of_the_page_are_those_of_the_result() -> None:
    """Filling it anew changes nothing; another result would."""
    page, result = committed()
    assert fill(page, result) == page
    other = copy.deepcopy(result)
    for kind in other["kinds"].values():
        for row in kind["workers"]:
            row["robustloader"]["batches_per_s"] *= 1 + row["workers"]
    assert fill(page, other) != page


def test_no_figure_stands_outside_of_what_is_put_in() -> None:
    """Whoever writes prose writes no measured figure: those come from the result."""
    page, result = committed()
    for name in render(result):
        begin, end = markers(name)
        before, _, rest = page.partition(begin)
        page = before + rest.partition(end)[2]
    assert not re.findall(r"\d[\d.,]*\s?(?:%|×|ms|s|MB|MiB|GiB|batches/s)(?!\w)", page)


def test_every_sentence_with_a_figure_links_to_the_result() -> None:
    _, result = committed()
    for name, text in render(result).items():
        for sentence in prose(text):
            if re.search(r"\d", re.sub(r"\[[^\]]*\]\([^)]*\)", "", sentence)):
                assert RESULT in sentence, f"{name}: {sentence}"
