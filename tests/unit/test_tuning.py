"""The search for a number of workers, with a measurer that knows the answer: no processes."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robustloader.decisions.limits import Descriptors, Memory, Processes
from robustloader.decisions.tuning import (
    Block,
    Explorer,
    Model,
    advise,
    choose,
    duration,
    plan_ceiling,
    plan_grid,
    tell_trouble,
)
from robustloader.system import limits
from robustloader.tuning import search as searching
from robustloader.tuning.copying import copy_sharing_data
from robustloader.tuning.measure import Probe, Walk, Workbench
from robustloader.tuning.search import search

GIB = 1 << 30


class Fake:
    """Knows how fast each number of workers is, and keeps a clock of its own."""

    def __init__(self, rates: Callable[[int], float], *, load_s: float = 0.1, cpu_s: float = 0.1, **facts: Any) -> None:
        self.rates = rates
        self.load_s, self.cpu_s = load_s, cpu_s
        self.facts = {"in_process": True, "worker_bytes": 0, "batch_bytes": 1000, **facts}
        self.why_no_copy = "TypeError: it cannot be copied"
        self.notes: list[str] = []
        self.turns: list[int] = []
        self.now = 0.0
        self.stop_after = 10**9

    def probe(self, seconds: float) -> Probe:
        return Probe(
            load_s=self.load_s,
            cpu_s=self.cpu_s,
            batch_bytes=self.facts["batch_bytes"],
            cross_s=0.0001,
            in_process=self.facts["in_process"],
        )

    def measure(self, workers: int, seconds: float, goes_on: Callable[[], bool] = lambda: True) -> Block | None:
        if len(self.turns) >= self.stop_after:
            raise KeyboardInterrupt
        self.turns.append(workers)
        self.now += seconds
        rate = self.rates(workers)
        return Block(
            batches=max(1, round(rate * seconds)),
            elapsed_s=max(1, round(rate * seconds)) / rate,
            first_batch_s=0.01 * (1 + workers),
            worker_bytes=self.facts["worker_bytes"],
        )

    def search(self, **options: Any) -> Any:
        arguments = {"batch_size": 8, "candidates": None, "seconds": 1000.0, "step_s": 0.0, "prefetch_factor": 2}
        return search(self, **(arguments | options), clock=lambda: self.now)


@pytest.fixture(scope="module", autouse=True)
def fonts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """matplotlib keeps the files of its fonts open for good once it has drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure()
    figure.subplots().set_title("0")
    for suffix in ("png", "svg"):
        figure.savefig(tmp_path_factory.mktemp("fonts") / f"0.{suffix}")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen processors, 100 GiB, no other limit."""
    monkeypatch.setattr(limits, "usable_cpus", lambda: 16)
    monkeypatch.setattr(limits, "local_world_size", lambda: 1)
    monkeypatch.setattr(limits, "read_memory", lambda: Memory(limit_bytes=100 * GIB, free_bytes=100 * GIB))
    monkeypatch.setattr(limits, "open_descriptors", lambda: Descriptors(used=10, soft=1 << 20, hard=1 << 20))
    monkeypatch.setattr(limits, "read_processes", lambda: Processes(free=None))


# --- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knee", [0, 1, 2, 3, 4, 6, 8, 12, 16])
def test_the_knee_is_found_though_the_model_is_wrong(knee: int) -> None:
    """The model expects a straight line up to sixteen; what is measured decides, and not everything is measured."""
    fake = Fake(lambda n: 10.0 * min(max(n, 0.5), knee) if knee else 10.0 - min(n, 1))
    report = fake.search()
    assert report.best == knee
    assert report.complete
    assert len(fake.turns) <= 6 * 8


def test_measurements_are_spent_where_they_matter() -> None:
    """Far from the knee a candidate has one turn, near it several; not every candidate has one."""
    fake = Fake(lambda n: 10.0 * min(max(n, 1), 16))
    report = fake.search()
    counted = {row.num_workers: row.rounds for row in report.rows}
    assert counted[0] == counted[1] == 1
    assert counted[16] >= 3
    assert not set(plan_grid(16)) <= set(counted)


def test_rounds_are_interleaved() -> None:
    """With given candidates each has its turn in each round, and the order turns round."""
    fake = Fake(lambda n: 100.0 + n)
    fake.search(candidates=(0, 1, 2))
    assert fake.turns[:6] == [0, 1, 2, 2, 1, 0]


def test_a_gain_below_the_knees_is_not_worth_a_worker() -> None:
    """4 % more is left, 6 % more is taken."""
    assert choose({1: 100.0, 2: 104.0}) == 1
    assert choose({1: 100.0, 2: 106.0}) == 2
    assert choose({0: 100.0, 1: 60.0, 2: 99.0}) == 0


def test_it_keeps_to_its_time() -> None:
    """What does not fit is left out, and said."""
    fake = Fake(lambda n: 10.0 * max(n, 1))
    report = fake.search(seconds=0.25)
    assert not report.complete
    assert len(fake.turns) <= 3
    assert "cut short" in str(report)


def test_ctrl_c_gives_the_result_so_far() -> None:
    """After two turns there is a report, before the first there is none."""
    fake = Fake(lambda n: 10.0 * max(n, 1))
    fake.stop_after = 2
    report = fake.search()
    assert len(report.rows) == 2
    assert not report.complete
    fake.stop_after = 0
    fake.turns.clear()
    with pytest.raises(KeyboardInterrupt):
        fake.search()


def test_a_search_cut_short_does_not_pretend() -> None:
    """What the model expects of a number that had no turn is said; where it promises nothing, the answer stands."""
    fake = Fake(lambda n: 0.25 * max(n, 1), load_s=4.0, cpu_s=4.0)
    report = fake.search(seconds=0.5)
    assert fake.turns == [0]
    assert (report.best, report.verdict, report.complete) == (0, "unfinished", False)
    assert "num_workers=16 had none, and of that the model expects 16 × the throughput" in report.reason
    assert "largest number" not in str(report)
    # A step of a minute hides it all: nothing else is worth a turn.
    report = Fake(lambda n: 1 / 61, load_s=4.0, cpu_s=4.0).search(seconds=0.5, step_s=60)
    assert report.verdict != "unfinished"
    # Given candidates, of which the best has had its turn.
    fake = Fake(lambda n: 0.25 * max(n, 1), load_s=4.0, cpu_s=4.0)
    fake.stop_after = 1
    report = fake.search(candidates=(1, 2))
    assert (report.best, report.verdict) == (1, "unfinished")
    assert "num_workers=2 had none" in report.reason


def test_progress_begins_with_the_probe() -> None:
    """Loading in one process may take the longest of all; Ctrl-C in it leaves nothing to report."""
    told: list[str] = []

    @contextlib.contextmanager
    def show() -> Any:
        told.append("opened")
        yield told.append
        told.append("closed")

    class Interrupted(Fake):
        def probe(self, seconds: float) -> Probe:
            assert told == ["opened", "one process"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Interrupted(lambda n: 1.0).search(show=show)
    told.clear()
    Fake(lambda n: 1.0).search(show=show, candidates=(1,))
    assert told[:3] == ["opened", "one process", "num_workers=1"]
    assert told[-1] == "closed"


def test_a_measured_worker_that_is_large_lowers_the_ceiling() -> None:
    """Workers of 20 GiB each: four fit into 90 % of 100 GiB."""
    fake = Fake(lambda n: 10.0 * max(n, 1), worker_bytes=20 * GIB)
    report = fake.search()
    assert report.best == 4
    assert "memory" in report.ceiling_reason
    assert max(fake.turns[2:], default=0) <= 16


class Swelling(Fake):
    """From so many workers on, each of them is seen to hold 29 GiB."""

    swells_at = 8

    def measure(self, workers: int, seconds: float, goes_on: Callable[[], bool] = lambda: True) -> Block | None:
        self.facts["worker_bytes"] = 29 * GIB if workers >= self.swells_at else 0
        return super().measure(workers, seconds, goes_on)


@pytest.mark.parametrize("candidates", [None, (2, 3, 8, 16), (2, 4, 8, 16)])
def test_what_was_measured_and_does_not_fit_is_not_recommended(candidates: tuple[int, ...] | None) -> None:
    """Sixteen are the fastest by far and were measured, before it was seen that only three workers fit."""
    fake = Swelling(lambda n: 10.0 * max(n, 1))
    report = fake.search(candidates=candidates)
    assert max(fake.turns) >= 8
    assert report.ceiling == 3
    assert report.best == max(row.num_workers for row in report.rows if row.num_workers <= 3)
    assert "memory" in report.reason
    assert str(report)


def test_nothing_that_was_measured_fits() -> None:
    """Then the most that fits is recommended, unmeasured, and it is said."""
    fake = Swelling(lambda n: 10.0 * n)
    report = fake.search(candidates=(8, 16))
    assert (report.best, report.ceiling) == (3, 3)
    assert "Nothing that was measured fits" in str(report)


@pytest.mark.parametrize(
    ("limits_of_a_rank", "why"),
    [
        ({"worker_bytes": 29 * GIB // 10}, "memory"),
        ({"descriptors": Descriptors(used=0, soft=46, hard=46)}, "open files"),
        ({"processes": Processes(free=3, limit="pids.max")}, "pids.max"),
    ],
)
def test_advice_stays_below_the_ceiling(limits_of_a_rank: dict[str, Any], why: str) -> None:
    """Whichever limit makes it: three workers, though eight were measured and are faster."""
    top = ceiling(**limits_of_a_rank)
    blocks = {n: [Block(batches=10 * n, elapsed_s=1.0, first_batch_s=0.1)] for n in (1, 2, 3, 4, 8)}
    found = advise(blocks, model=None, step_s=0, ceiling=top)
    assert top.workers == found.best == 3
    assert [row.num_workers for row in found.rows] == [1, 2, 3, 4, 8]
    assert why in found.reason


def test_candidates_above_the_ceiling_are_left_out() -> None:
    """And it is said why."""
    report = Fake(lambda n: 10.0 * max(n, 1)).search(candidates=(0, 2, 99))
    assert [row.num_workers for row in report.rows] == [0, 2]
    assert "more than 16 workers were left out: 16 processors" in report.notes[0]


@pytest.mark.parametrize("in_process", [True, False])
def test_nothing_within_the_limits(monkeypatch: pytest.MonkeyPatch, in_process: bool) -> None:
    """The error says why nothing was measured."""
    fake = Fake(lambda n: 10.0, in_process=in_process)
    with pytest.raises(ValueError, match=r"nothing was measured: .*more than 16 workers were left out: 16 processors"):
        fake.search(candidates=(17, 99))
    monkeypatch.setattr(limits, "read_processes", lambda: Processes(free=0, limit="pids.max"))
    if not in_process:
        with pytest.raises(ValueError, match=r"cannot be copied.*more than 0 workers were left out: .*pids\.max"):
            fake.search()
    assert not fake.turns


def test_one_is_not_a_plural(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with one processor."""
    monkeypatch.setattr(limits, "usable_cpus", lambda: 1)
    report = Fake(lambda n: 1000 + n).search(candidates=(0, 1, 4))
    assert report.notes == ("more than 1 worker was left out: 1 processor for this rank",)
    assert "num_workers=1 was 0.1% faster" in report.reason
    assert "1e+03" not in str(Fake(lambda n: 999.7).search(candidates=(0,)))


def test_without_a_copy_the_original_is_left_alone() -> None:
    """Nothing is loaded in this process then."""
    fake = Fake(lambda n: 10.0 * max(n, 1), in_process=False)
    report = fake.search()
    assert 0 not in fake.turns
    assert "cannot be copied" in report.notes[0]


# --- what is said -----------------------------------------------------------------------------------------------------


def test_data_is_not_the_bottleneck() -> None:
    """A step of 50 ms, and workers that load 100 batches a second."""
    report = Fake(lambda n: min(20.0, 100.0 * max(n, 1)) if n else 17.0).search(step_s=0.05)
    assert report.verdict == "data is not your bottleneck"
    assert report.best == 1
    assert "Data is not your bottleneck: with num_workers=1" in report.reason


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.00217, "2.17 ms"), (0.9994, "999 ms"), (0.9996, "1 s"), (4.0, "4 s"), (999.6, "1,000 s"), (1234.5, "1,234 s")],
)
def test_durations_are_written_for_people(seconds: float, told: str) -> None:
    """Without exponents, wherever they stand."""
    assert duration(seconds) == told
    rate = 1 / seconds
    found = advise({1: [Block(batches=1, elapsed_s=seconds, first_batch_s=0.1)]}, model=None, step_s=0, ceiling=None)
    assert f"longer than {duration(1 / rate)} a batch" in found.reason
    fast = {1: [Block(batches=1, elapsed_s=seconds, first_batch_s=0.1)]}
    found = advise(fast, model=None, step_s=seconds, ceiling=None)
    assert f"with steps of {told} waits" in found.reason


def test_data_is_the_bottleneck() -> None:
    """Sixteen workers bring half of what the trainer could take."""
    report = Fake(lambda n: 10.0 * max(n, 1)).search(step_s=1 / 320)
    assert report.verdict == "data is the bottleneck"
    assert "still waits 50%" in report.reason
    assert "16 processors for this rank" in report.reason


def test_the_report_is_json_and_a_table(tmp_path: Path) -> None:
    """Both hold the same numbers; the plot is a picture."""
    pytest.importorskip("matplotlib")
    report = Fake(lambda n: 10.0 * min(max(n, 1), 4)).search()
    told = json.loads(json.dumps(report.to_dict()))
    assert told["best"] == 4
    assert [row["num_workers"] for row in told["rows"]] == [row.num_workers for row in report.rows]
    assert "<-" in next(line for line in str(report).splitlines() if line.split()[:1] == ["4"])
    assert max(map(len, str(report).splitlines())) <= 100
    report.plot(tmp_path / "tune.png")
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")


def test_what_went_wrong_is_told() -> None:
    """Counts of all turns, the numbers of workers that had deaths, and causes where they are known."""
    quiet = Block(batches=5, elapsed_s=1.0, first_batch_s=0.1, samples=40)
    faulty = Block(
        batches=5, elapsed_s=1.0, first_batch_s=0.1, samples=39, faults=1, fault_causes=frozenset({"OSError"})
    )
    died = Block(batches=5, elapsed_s=1.0, first_batch_s=0.1, samples=40, deaths=1)
    killed = Block(
        batches=5, elapsed_s=1.0, first_batch_s=0.1, samples=40, deaths=2, death_causes=frozenset({"SIGBUS"})
    )
    assert tell_trouble({0: [quiet], 2: [quiet, quiet]}) == []
    assert tell_trouble({0: [quiet], 2: [quiet, faulty]})[0].startswith("1 of 120 samples failed for good (OSError): ")
    assert tell_trouble({2: [died, quiet]})[0].startswith("workers died or hung once with num_workers=2: ")
    both = tell_trouble({1: [quiet], 2: [quiet, died], 4: [killed]})
    assert both[0].startswith("workers died or hung 3 times (SIGBUS) with num_workers=2, 4: ")
    found = advise({2: [faulty, killed]}, model=None, step_s=0, ceiling=None)
    assert (found.rows[0].faults, found.rows[0].deaths) == (1, 2)


def test_nothing_measured_is_no_advice() -> None:
    """There is nothing to say."""
    with pytest.raises(ValueError, match="nothing was measured"):
        advise({}, model=None, step_s=0, ceiling=None)


# --- model and limits -------------------------------------------------------------------------------------------------


def test_the_model() -> None:
    """The slowest of workers, processors and trainer."""
    model = Model(load_s=0.1, cpu_s=0.1, cross_s=0.0, cpus=4)
    assert model.batch_s(0) == model.batch_s(1) == pytest.approx(0.1)
    assert model.batch_s(4) == model.batch_s(8) == pytest.approx(0.025)
    waiting = Model(load_s=0.1, cpu_s=0.001, cross_s=0.0, cpus=1, step_s=0.02)
    assert waiting.batch_s(0) == pytest.approx(0.12)
    assert waiting.batch_s(8) == pytest.approx(0.02)
    assert waiting.knee(range(9)) == 5


def ceiling(**facts: Any) -> Any:
    given = {
        "cpus": 8,
        "ranks": 1,
        "load_s": 0.1,
        "cpu_s": 0.1,
        "memory": Memory(limit_bytes=10 * GIB, free_bytes=10 * GIB),
        "headroom_fraction": 0.1,
        "batch_bytes": 1,
        "worker_bytes": 0,
        "prefetch_factor": 2,
        "descriptors": Descriptors(used=0, soft=1 << 20, hard=1 << 20),
        "processes": Processes(free=None),
    }
    return plan_ceiling(**(given | facts))


@pytest.mark.parametrize(
    ("facts", "workers", "reason"),
    [
        ({}, 8, "8 processors"),
        ({"ranks": 4}, 2, "2 processors"),
        ({"ranks": 99}, 1, "1 processor for"),
        ({"cpu_s": 0.05}, 16, "waits at least 50%"),
        ({"cpu_s": 0.0}, 32, "waits at least 75%"),
        ({"batch_bytes": GIB}, 2, "memory"),
        ({"worker_bytes": 2 * GIB}, 4, "memory"),
        ({"descriptors": Descriptors(used=0, soft=46, hard=46)}, 3, "open files"),
        ({"processes": Processes(free=5, limit="pids.max")}, 5, "pids.max"),
    ],
)
def test_the_ceiling(facts: dict[str, Any], workers: int, reason: str) -> None:
    """Each limit binds, and is named."""
    found = ceiling(**facts)
    assert found.workers == workers
    assert reason in found.reason


@pytest.mark.parametrize("top", range(40))
def test_the_grid(top: int) -> None:
    """Ascending, from 0 to the ceiling, every number up to four, and no gap of more than a half above."""
    grid = plan_grid(top)
    assert grid[0] == 0
    assert grid[-1] == top
    assert set(range(min(top, 4) + 1)) <= set(grid)
    assert all(0 < b - a <= max(1, a / 2) for a, b in itertools.pairwise(grid))


def test_a_candidate_that_cannot_be_measured_is_dropped() -> None:
    """And the search ends."""
    explorer = Explorer((0, 1), None)
    while (workers := explorer.next()) is not None:
        explorer.drop(workers)
    assert explorer.blocks == {}


# --- what is left alone -----------------------------------------------------------------------------------------------


class Held:
    """Has a position, a tensor and an array."""

    def __init__(self) -> None:
        self.seen = [1]
        self.tensor = torch.zeros(4)
        self.array = np.zeros(4)


def test_a_copy_shares_only_data() -> None:
    """Tensors and arrays are the original's, the rest is not."""
    held = Held()
    twin = copy_sharing_data(held)
    assert twin is not held
    assert twin.tensor is held.tensor
    assert twin.array is held.array
    twin.seen.append(2)
    assert held.seen == [1]


def test_the_walk_goes_on() -> None:
    """Each reader goes on where the last one stopped, around and around, in order or not."""
    walk = Walk(3, shuffle=False)
    first, second = iter(walk), iter(walk)
    assert [next(first), next(first)] == [0, 1]
    assert [next(second), next(second)] == [2, 0]
    walk = Walk(10**12, shuffle=True)
    drawn = [next(iter(walk)) for _ in range(100)]
    assert len(set(drawn)) == 100
    assert drawn != sorted(drawn)
    assert list(Walk(0, shuffle=False)) == list(Walk(0, shuffle=True)) == []


def test_progress_without_tqdm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line per turn on stderr."""
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    with searching._progress(5)() as tell:
        tell("num_workers=3")
    assert "num_workers=3" in capsys.readouterr().err


class Unsized:
    """A sampler without a length."""

    def __iter__(self) -> Any:
        return iter((0, 1))


@pytest.mark.parametrize(("sampler", "samples"), [(None, 3), (range(2), 2), (range(9), 8), (Unsized(), 3)])
def test_an_epoch_is_as_long_as_its_sampler(sampler: Any, samples: int) -> None:
    """One with replacement gives more than the dataset has, one of many ranks fewer."""
    bench = Workbench([1, 2, 3], batch_size=8, step_s=0, loader_kwargs={"sampler": sampler})
    assert bench.batch_size == samples
    assert bool(bench.notes) == (samples < 8)
