"""Each rule of the verdict and of the advice, one case per row."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustloader.decisions.advice import Facts, WorkerPace, advise, find_stragglers, judge


def pace(*busy_s: float, tasks: int = 25) -> tuple[WorkerPace, ...]:
    return tuple(WorkerPace(worker_id=number, tasks=tasks, busy_s=busy) for number, busy in enumerate(busy_s))


BALANCED = Facts(
    batches=100,
    samples=6_400,
    faults=0,
    wait_s=1.5,
    first_wait_s=0.5,
    step_s=9.0,
    deaths=0,
    workers_requested=4,
    workers_at_end=4,
    usable_cpus=4,
    pace=pace(8, 8, 8, 8),
)
INPUT = replace(BALANCED, wait_s=5.5, step_s=5.0)
COMPUTE = replace(BALANCED, wait_s=0.51, step_s=10.0)


@pytest.mark.parametrize(
    ("wait_s", "verdict"),
    [(0.0, "compute-bound"), (2.0, "compute-bound"), (2.1, "balanced"), (19.9, "balanced"), (20.0, "input-bound")],
)
def test_verdict_follows_the_wait_after_the_first_batch(wait_s: float, verdict: str) -> None:
    """Of 100 s after the first batch; the 30 s until it came count for nothing."""
    assert judge(replace(BALANCED, first_wait_s=30.0, wait_s=30.0 + wait_s, step_s=100.0 - wait_s)) == verdict


@pytest.mark.parametrize("batches", [0, 9])
def test_few_batches_are_no_evidence(batches: int) -> None:
    facts = replace(INPUT, batches=batches)
    assert judge(facts) == "warm-up"
    assert "too few" in advise(facts)


def test_an_epoch_without_any_time_is_judged() -> None:
    facts = replace(BALANCED, wait_s=0.0, first_wait_s=0.0, step_s=0.0)
    assert judge(facts) == "compute-bound"
    assert "not your bottleneck" in advise(facts)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        pytest.param(INPUT, "4 workers on 4 usable CPUs cannot keep up: make samples cheaper", id="cpus-busy"),
        pytest.param(replace(INPUT, usable_cpus=16), "try num_workers=8", id="twice-as-fast"),
        pytest.param(replace(INPUT, usable_cpus=6), "try num_workers=6", id="no-more-than-cpus"),
        pytest.param(
            replace(INPUT, wait_s=3.1, step_s=10.0, usable_cpus=5), "try num_workers=5", id="at-least-one-more"
        ),
        pytest.param(
            replace(INPUT, workers_requested=1, workers_at_end=1, usable_cpus=1, pace=pace(9)),
            "1 worker on 1 usable CPU cannot",
            id="one-of-each",
        ),
        pytest.param(
            replace(INPUT, workers_requested=0, workers_at_end=0, pace=()),
            "training process: num_workers=2",
            id="in-process",
        ),
        pytest.param(
            replace(INPUT, workers_requested=0, workers_at_end=0, pace=(), usable_cpus=1), "num_workers=1", id="one-cpu"
        ),
        pytest.param(
            replace(INPUT, workers_requested=0, workers_at_end=0, pace=(), wait_s=99.0, step_s=0.0, usable_cpus=64),
            "num_workers=64",
            id="nothing-but-waiting",
        ),
        pytest.param(replace(INPUT, pace=pace(3, 3, 3, 3)), "busy only 30 % of the time", id="bursts"),
        pytest.param(
            replace(INPUT, batches=10**5, pace=pace(0.01, 0.01, 0.01, 0.01)),
            "loads in 400 µs, faster than a worker hands it over: try num_workers=0, or larger",
            id="tiny-batches",
        ),
        pytest.param(
            replace(INPUT, batches=50_000, workers_requested=0, workers_at_end=0, pace=()),
            "loads in 100 µs, faster than a worker hands it over: larger batches",
            id="tiny-batches-in-process",
        ),
        pytest.param(replace(INPUT, pace=pace(3, 9, 3, 3)), "Worker 1 takes 3x as long", id="straggler"),
        pytest.param(replace(BALANCED, pace=pace(9, 2, 2)), "Worker 0 takes 4.5x", id="balanced-straggler"),
        pytest.param(replace(INPUT, pace=pace(8, 9, 8, 8, tasks=3)), "cannot keep up", id="too-few-tasks-to-blame"),
        pytest.param(COMPUTE, "only a faster training step", id="compute"),
        pytest.param(replace(COMPUTE, pace=pace(1, 1, 1, 1)), "num_workers=1 would do", id="fewer-would-do"),
        pytest.param(replace(COMPUTE, pace=pace(1, 9, 1, 1)), "num_workers=2 would do", id="compute-hides-straggler"),
        pytest.param(
            replace(COMPUTE, workers_requested=0, workers_at_end=0, pace=()), "faster training", id="compute-0"
        ),
        pytest.param(BALANCED, "waits 10 % of its time for data: nothing needs to change", id="balanced"),
        pytest.param(replace(BALANCED, usable_cpus=8), "num_workers=5 may win", id="balanced-one-more"),
        pytest.param(
            replace(BALANCED, first_wait_s=8.0, wait_s=8.0), "The first batch took 8 s of 17 s: persistent", id="start"
        ),
        pytest.param(
            replace(COMPUTE, first_wait_s=8.0, wait_s=8.0, persistent=True), "faster training step", id="already-so"
        ),
        pytest.param(
            replace(INPUT, faults=700), "9.9 % of the samples failed (700): see loader.fault_log", id="faults"
        ),
        pytest.param(replace(INPUT, batches=1, samples=4, faults=5), "see loader.fault_log", id="faults-at-once"),
        pytest.param(replace(INPUT, samples=20, faults=4), "cannot keep up", id="a-few-faults-are-no-news"),
        pytest.param(replace(INPUT, faults=64), "cannot keep up", id="rare-faults-are-no-news"),
        pytest.param(replace(BALANCED, deaths=9, workers_at_end=1), "from 4 to 1 workers", id="shrunk"),
        pytest.param(replace(BALANCED, deaths=1), "nothing needs to change", id="a-death-that-was-mended"),
        pytest.param(replace(BALANCED, workers_at_end=1), "nothing needs to change", id="shards-that-ended"),
    ],
)
def test_advice(facts: Facts, said: str) -> None:
    assert said in advise(facts)


seconds = st.floats(0, 1e7)
counts = st.integers(0, 10**9)
few = st.integers(0, 256)


@given(
    st.builds(
        Facts,
        batches=counts,
        samples=counts,
        faults=counts,
        wait_s=seconds,
        first_wait_s=seconds,
        step_s=seconds,
        deaths=few,
        workers_requested=few,
        workers_at_end=few,
        usable_cpus=st.integers(1, 256),
        persistent=st.booleans(),
        pace=st.lists(st.builds(WorkerPace, worker_id=few, tasks=st.integers(1, 10**6), busy_s=seconds), max_size=5),
    )
)
def test_any_numbers_give_one_line(facts: Facts) -> None:
    """One sentence that fits the table's width, and a share that is one."""
    advice = advise(facts)
    assert advice.endswith(".")
    assert len(advice) <= 110
    assert "\n" not in advice
    assert 0.0 <= facts.wait_fraction <= 1.0
    assert 0.0 <= facts.busy_fraction <= 1.0


@pytest.mark.parametrize(
    ("busy_s", "tasks", "stragglers"),
    [
        ((), 25, ()),
        ((9,), 25, ()),
        ((8, 8, 8, 8), 25, ()),
        ((8, 15.9, 8, 8), 25, ()),
        ((8, 16, 8, 8), 25, (1,)),
        ((20, 8, 8, 20, 8), 25, (0, 3)),
        ((1, 2), 25, (1,)),
        ((0, 0, 0), 25, ()),
        ((8, 80, 8, 8), 9, ()),
    ],
)
def test_stragglers_take_twice_as_long_as_the_others_median(
    busy_s: tuple[float, ...], tasks: int, stragglers: tuple[int, ...]
) -> None:
    assert find_stragglers(pace(*busy_s, tasks=tasks)) == stragglers


def test_a_workers_share_of_the_tasks_makes_no_straggler() -> None:
    """It is the time per batch that counts."""
    assert find_stragglers([WorkerPace(worker_id=0, tasks=100, busy_s=40), *pace(0, 8, 8)[1:]]) == ()
