"""The rules of ``num_workers="auto"``, without processes: tables, curves of the simulator, and hypothesis."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustloader.decisions.adaptation import PATIENCE, WINDOWS, Adaptation, Step, Window, pooled
from robustloader.decisions.limits import Descriptors, Memory, Processes, Room, plan_room
from robustloader.decisions.simulator import LoadTime, Setup, simulate
from robustloader.decisions.tuning import OVERSUBSCRIPTION

GIB = 1 << 30

plenty: Callable[[int], Room] = lambda extra: Room(workers=extra)  # noqa: E731


def window(workers: int, **facts: Any) -> Window:
    """A quarter of a second of a loop that does nothing but wait for workers that mostly wait for storage."""
    usual = {
        "batches": 10 * workers,
        "elapsed_s": 0.25,
        "wait_s": 0.25,
        "busy_s": 0.25 * workers,
        "worker_cpu_s": 0.01 * workers,
        "queued_s": 0.0,
        "trainer_cpu_s": 0.01,
        "loop_busy_s": 0.01,
    }
    return Window(workers=workers, **(usual | facts))


def run(rules: Adaptation, shown: Callable[[int], Window], windows: int, room: Any = plenty) -> list[Step]:
    """Tell the rules of so many windows, each with the workers that they have come to; the steps."""
    steps = []
    for _ in range(windows):
        step = rules.observe(shown(rules.workers), room)
        if step is not None:
            assert rules.workers == step.workers
            steps.append(step)
    return steps


# --- single decisions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "workers", "facts", "wanted"),
    [
        (2, 2, {}, 4),  # it waits for storage: twice as many
        (2, 4, {}, 8),
        (2, 8, {}, None),  # four times the processors are the most
        (2, 2, {"wait_s": 0.02}, None),  # 8 %: nothing to win
        (2, 2, {"wait_s": 0.05}, 4),  # 20 %
        (8, 8, {"wait_s": 0.05}, 13),  # as many as make up for 20 %, and a quarter more
        (2, 2, {"worker_cpu_s": 0.45}, None),  # the processors are in use
        (2, 2, {"trainer_cpu_s": 0.45}, None),  # by the trainer itself
        (2, 2, {"worker_cpu_s": 0.15, "queued_s": 0.35}, None),  # by others: all the work waits for a processor
        (2, 2, {"loop_busy_s": 0.24, "trainer_cpu_s": 0.24}, None),  # what it waits for is its own unpacking
        (2, 2, {"busy_s": 0.2}, None),  # the workers are not what it waits for, as far as one window tells
    ],
)
def test_when_it_grows(cores: int, workers: int, facts: dict[str, float], wanted: int | None) -> None:
    """After one window: workers are added where the loop waits, the pool is busy, and processors are free."""
    step = Adaptation(workers=workers, cores=cores).observe(window(workers, **facts), plenty)
    assert (step.workers if step else None) == wanted
    assert step is None or "the loop waited" in step.reason


def test_one_slow_batch_holds_up_the_others() -> None:
    """The loop waits, and so do the workers: after several windows that agree, more of them look further ahead."""
    steps = run(Adaptation(workers=2, cores=2), lambda n: window(n, busy_s=0.2), WINDOWS)
    assert [step.workers for step in steps] == [4]


@pytest.mark.parametrize(
    ("workers", "facts", "wanted"),
    [
        (8, {"wait_s": 0.0, "busy_s": 0.5}, 4),  # it never waits, and two workers' work is done by eight: half of them
        (8, {"wait_s": 0.0, "busy_s": 1.25}, 7),  # five workers' work, and a quarter to spare
        (8, {"wait_s": 0.0, "busy_s": 1.9}, None),
        (8, {"wait_s": 0.02, "busy_s": 1.25}, None),  # it waits a little: every one of them may be of use
        (2, {"wait_s": 0.2, "busy_s": 0.05, "loop_busy_s": 0.24}, 1),  # it waits, but not for loading
        (1, {"wait_s": 0.0, "busy_s": 0.01}, None),  # never none
    ],
)
def test_when_it_shrinks(workers: int, facts: dict[str, float], wanted: int | None) -> None:
    """After several windows that agree, and only where the work would fit into fewer workers."""
    rules = Adaptation(workers=workers, cores=workers)
    for _ in range(WINDOWS - 1):
        assert rules.observe(window(workers, **facts), plenty) is None
    step = rules.observe(window(workers, **facts), plenty)
    assert (step.workers if step else None) == wanted


def test_never_fewer_than_least() -> None:
    """``min_workers`` of the recovery policy holds here as well."""
    rules = Adaptation(workers=8, cores=8, least=6)
    steps = run(rules, lambda n: window(n, batches=80, wait_s=0.0, busy_s=0.1), 100)
    assert [step.workers for step in steps] == [6]


def test_what_brings_nothing_goes_again() -> None:
    """Twice the workers, the same throughput: back, and never there again; half way is tried."""
    rules = Adaptation(workers=4, cores=4)
    steps = run(rules, lambda n: window(n, batches=40), 400)
    assert [step.workers for step in steps] == [8, 4, 6, 4, 5, 4]
    assert "not worth more workers" in steps[1].reason


def test_what_is_worse_goes_at_once() -> None:
    """A clear loss is not watched for longer than a window."""
    rules = Adaptation(workers=4, cores=4)
    assert rules.observe(window(4, batches=40), plenty) == Step(workers=8, reason=_any_reason(rules))
    step = rules.observe(window(8, batches=20), plenty)
    assert step is not None
    assert step.workers == 4


def _any_reason(rules: Adaptation) -> Any:
    class Anything:
        def __eq__(self, other: object) -> bool:
            return isinstance(other, str)

        __hash__ = None  # type: ignore[assignment]

    return Anything()


def test_fewer_that_are_too_few_come_back() -> None:
    """It had hardly waited with eight, and waits with four: eight again, and no further trial of four."""
    shown = {8: window(8, batches=80, wait_s=0.0, busy_s=0.6)}
    rules = Adaptation(workers=8, cores=8)
    steps = run(rules, lambda n: shown.get(n, window(n, batches=78, wait_s=0.05, busy_s=0.6)), 300)
    assert [step.workers for step in steps][:2] == [4, 8]
    assert "too few" in steps[1].reason
    assert min(step.workers for step in steps[2:] or steps[:1]) >= 4
    assert rules.workers == 8


def test_another_situation_opens_the_bounds() -> None:
    """Storage that becomes ten times as slow in the middle of a run: what was no use before is tried again."""
    rules = Adaptation(workers=4, cores=4)
    run(rules, lambda n: window(n, batches=40), 100)
    assert (rules.workers, rules.roof) == (4, 5)
    steps = run(rules, lambda n: window(n, batches=n), 3 * PATIENCE)
    assert steps[-1].workers == 16


def test_somebody_else_changes_the_pool() -> None:
    """A worker is lost while a step is on trial: the trial is void, and nobody wants the lost one back at once."""
    rules = Adaptation(workers=2, cores=2)
    assert run(rules, window, 1)[0].workers == 4
    assert rules.observe(window(3, wait_s=0.0, busy_s=0.7), plenty) is None
    assert (rules.workers, rules.floor, rules.roof) == (3, 0, None)


def test_what_could_not_be_had_is_not_asked_for_again() -> None:
    """A worker that did not start, a pool that memory has shrunk."""
    rules = Adaptation(workers=2, cores=2)
    assert run(rules, window, 1)[0].workers == 4
    rules.cannot_exceed(2)
    assert run(rules, window, 500) == []
    assert rules.workers == 2


def test_little_room() -> None:
    """As many as there is room for, with the reason; none, where there is none, and then nobody looks all the time."""
    step = Adaptation(workers=4, cores=4).observe(window(4), lambda extra: Room(workers=1, reason="memory"))
    assert step is not None
    assert step.workers == 5
    assert step.reason.endswith("no more than that: memory")
    asked = []

    def none(extra: int) -> Room:
        asked.append(extra)
        return Room(workers=0, reason="memory")

    assert run(Adaptation(workers=4, cores=4), window, 160, none) == []
    assert len(asked) == 160 / PATIENCE


def test_it_can_be_copied_and_pickled() -> None:
    """A loader holds it, and loaders are."""
    rules = Adaptation(workers=4, cores=4)
    run(rules, window, 3)
    for twin in (copy.deepcopy(rules), pickle.loads(pickle.dumps(rules))):
        assert twin == rules
        twin.observe(window(twin.workers), plenty)
        assert twin != rules


# --- room -------------------------------------------------------------------------------------------------------------


def room(extra: int, **limits: Any) -> Room:
    usual: dict[str, Any] = {
        "descriptors": Descriptors(used=10, soft=1024, hard=1 << 20),
        "processes": Processes(free=None),
        "memory": Memory(limit_bytes=10 * GIB, free_bytes=5 * GIB),
        "fraction": 0.1,
        "batch_bytes": GIB // 4,
        "worker_bytes": GIB // 4,
        "prefetch_factor": 2,
    }
    return plan_room(extra, **(usual | limits))


@pytest.mark.parametrize(
    ("limits", "workers", "why"),
    [
        ({}, 4, ""),
        ({"memory": Memory(limit_bytes=10 * GIB, free_bytes=4 * GIB)}, 3, "a worker takes about 1 GiB"),
        ({"memory": Memory(limit_bytes=10 * GIB, free_bytes=GIB // 2)}, 0, "memory"),
        ({"ranks": 2}, 2, "memory"),
        ({"descriptors": Descriptors(used=10, soft=50, hard=50)}, 2, "hard limit is 50"),
        ({"processes": Processes(free=3, limit="pids.max")}, 3, "pids.max"),
        ({"batch_bytes": 0, "worker_bytes": 0, "memory": Memory(limit_bytes=GIB, free_bytes=0)}, 4, ""),
    ],
)
def test_room_for_four_more(limits: dict[str, Any], workers: int, why: str) -> None:
    """Each further worker brings its own memory, its lookahead and one batch more."""
    found = room(4, **limits)
    assert found.workers == workers
    assert why in found.reason
    assert bool(found.reason) == (workers < 4)


def test_room_says_which_soft_limit_to_set() -> None:
    """Where the hard limit allows it."""
    assert room(4, descriptors=Descriptors(used=40, soft=50, hard=1 << 20)).soft == 40 + 16 + 40


# --- whole runs -------------------------------------------------------------------------------------------------------

KINDS = {
    "cheap": LoadTime(mean_s=0.002),
    "heavy": LoadTime(mean_s=0.05),
    "storage": LoadTime(mean_s=0.017, work_fraction=0.03),
    "half and half": LoadTime(mean_s=0.02, work_fraction=0.4),
    "skewed": LoadTime(mean_s=0.005, kind="skewed", slow_fraction=0.05, slow_factor=20),
    "any": LoadTime(mean_s=0.01, kind="exponential", work_fraction=0.5),
}


@cache
def simulated(kind: str, cores: int, step_s: float, workers: int, cross_s: float) -> Window:
    """What the simulator's loader shows in a long window."""
    load, batches = KINDS[kind], 600
    setup = Setup(workers=workers, load=load, cores=cores, cross_s=cross_s, step_s=step_s)
    outcome = simulate(setup, batches)
    work_s = batches * load.mean_s * load.work_fraction
    # Sharing the processors makes the work take longer, and never more than there is time.
    stretch = max(1.0, min(workers, batches * load.mean_s / outcome.duration_s * 2) * load.work_fraction / cores)
    busy_s = batches * load.mean_s * (1 - load.work_fraction) + work_s * stretch
    busy_s = min(workers * outcome.duration_s, busy_s)
    return Window(
        workers=workers,
        batches=batches,
        elapsed_s=outcome.duration_s,
        wait_s=outcome.wait_s,
        busy_s=busy_s,
        worker_cpu_s=work_s,
        queued_s=max(0.0, busy_s - batches * load.mean_s),
        trainer_cpu_s=batches * cross_s,
        loop_busy_s=batches * cross_s,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cores", [1, 2, 8])
@pytest.mark.parametrize("step_s", [0.0, 0.004, 0.1])
def test_it_comes_to_nine_tenths_of_the_best(kind: str, cores: int, step_s: float) -> None:
    """On each curve of the simulator, within a few dozen windows, and stays there."""
    rules = Adaptation(workers=cores, cores=cores)
    shown = lambda workers: simulated(kind, cores, step_s, workers, 0.0002)  # noqa: E731
    steps = run(rules, shown, 40)
    best = max(shown(workers).rate for workers in range(1, OVERSUBSCRIPTION * cores + 1))
    assert shown(rules.workers).rate >= 0.9 * best, [step.workers for step in steps]
    assert run(rules, shown, 200) == []


def most_steps(cores: int) -> int:
    """Each trial halves what is left between the bounds, or doubles the pool, and takes two steps at most."""
    return 4 * (math.ceil(math.log2(OVERSUBSCRIPTION * cores)) + 1)


@given(st.integers(1, 64), st.integers(1, 16), st.data())
def test_what_does_not_change_is_left_alone(workers: int, cores: int, data: st.DataObject) -> None:
    """Whatever the throughput of each number of workers: few steps, then none."""
    share = st.floats(0.0, 1.0)
    shown: dict[int, Window] = {}

    def show(number: int) -> Window:
        if number not in shown:
            busy = data.draw(share)
            shown[number] = Window(
                workers=number,
                batches=data.draw(st.integers(10, 1000)),
                elapsed_s=0.25,
                wait_s=0.25 * data.draw(share),
                busy_s=0.25 * number * busy,
                worker_cpu_s=0.25 * min(cores, number * busy) * data.draw(share),
                queued_s=0.25 * number * busy * data.draw(share),
                trainer_cpu_s=0.0,
                loop_busy_s=0.25 * data.draw(share),
            )
        return shown[number]

    rules = Adaptation(workers=workers, cores=cores)
    steps = run(rules, show, 120)
    assert len(steps) <= most_steps(max(cores, workers))
    assert run(rules, show, 120) == []


windows = st.builds(
    Window,
    workers=st.integers(1, 70),
    batches=st.integers(1, 10_000),
    elapsed_s=st.floats(0.01, 100.0),
    wait_s=st.floats(0.0, 120.0),
    busy_s=st.floats(0.0, 1000.0),
    worker_cpu_s=st.floats(0.0, 1000.0),
    queued_s=st.floats(0.0, 1000.0),
    trainer_cpu_s=st.floats(0.0, 100.0),
    loop_busy_s=st.floats(0.0, 100.0),
)


@given(
    st.integers(1, 16),
    st.integers(1, 4),
    st.lists(st.tuples(windows, st.booleans(), st.integers(0, 8)), max_size=60),
)
def test_no_limit_is_ever_exceeded(cores: int, least: int, story: list[tuple[Window, bool, int]]) -> None:
    """Whatever is seen and whoever else changes the pool: no step beyond processors, room, or what could not be had."""
    rules = Adaptation(workers=cores, cores=cores, least=least)
    for seen, elsewhere, fits in story:
        here = seen if elsewhere else Window(**{**vars(seen), "workers": rules.workers})
        before = here.workers
        step = rules.observe(here, lambda extra, fits=fits: Room(workers=min(extra, fits)))  # type: ignore[misc]
        if step is None:
            continue
        assert step.workers >= 1
        assert step.workers != before
        if step.workers > before and "too few" not in step.reason:
            assert step.workers <= OVERSUBSCRIPTION * cores
            assert step.workers <= before + fits
        if step.workers < before and "not worth" not in step.reason:
            assert step.workers >= least


@given(st.lists(windows, min_size=1, max_size=200), st.integers(1, 8))
def test_even_on_noise_the_steps_get_rarer(noise: list[Window], cores: int) -> None:
    """What is seen jumps about all the time: the bounds are forgotten ever more seldom, and between that they close."""
    rules = Adaptation(workers=cores, cores=cores)
    steps = 0
    for seen in noise:
        steps += rules.observe(Window(**{**vars(seen), "workers": rules.workers}), plenty) is not None
    openings = 1 + max(0, math.floor(math.log2(len(noise) / PATIENCE + 1)))
    assert steps <= openings * 2 * OVERSUBSCRIPTION * cores


@given(st.lists(windows.map(lambda seen: Window(**{**vars(seen), "workers": 3})), min_size=1, max_size=8))
def test_pooled_windows_add_up(several: list[Window]) -> None:
    """Time and batches are sums; a rate lies between the rates."""
    together = pooled(several)
    assert together.batches == sum(seen.batches for seen in several)
    rates = [seen.rate for seen in several]
    assert min(rates) * (1 - 1e-9) <= together.rate <= max(rates) * (1 + 1e-9)
