"""Who has a processor when: cases worked out by hand, and what holds in every run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustloader.decisions.processors import Lines, Processors, Scheduler, Shared

HOT_S = 0.5
SLICE_S = 3.0


def alone(processes: int) -> float:
    """Processes that do not slow each other down."""
    return 1.0


def two(processes: int) -> float:
    """Two processors, shared."""
    return min(1.0, 2 / processes)


def lines(count: int = 2, *, slice_s: float = SLICE_S, migration_cost_s: float = HOT_S) -> Lines:
    return Lines(count, alone, Scheduler(migration_cost_s=migration_cost_s, slice_s=slice_s))


def run(processors: Processors, until: float = math.inf) -> dict[int, float]:
    """When each process's work ends, until that time, or until nothing happens any more."""
    now, ends = 0.0, {}
    while (next_s := processors.next_s()) < math.inf and now + next_s <= until:
        processors.advance(next_s)
        now += next_s
        process = processors.happen()
        if process is not None:
            ends[process] = now
    if until < math.inf:
        processors.advance(until - now)
    return ends


def test_shared_evenly() -> None:
    """Three processes on two processors: each has two thirds of one, then each its own."""
    processors = Shared(two)
    for process, work_s in enumerate((2.0, 2.0, 3.0)):
        processors.begin(process, work_s)
    assert run(processors) == pytest.approx({0: 3.0, 1: 3.0, 2: 4.0})
    assert processors.work_s == pytest.approx(7.0)


def test_what_is_stopped_gives_its_share_back() -> None:
    processors = Shared(two)
    for process in range(3):
        processors.begin(process, 2.0)
    assert run(processors, 1.5) == {}
    processors.stop(0)
    assert run(processors) == pytest.approx({1: 1.0, 2: 1.0})
    assert processors.next_s() == math.inf


def test_each_to_an_idle_processor_or_into_line() -> None:
    """0 and 1 have one each, 2 waits for that of 0, and has it when 0 is done."""
    processors = lines()
    for process, work_s in enumerate((1.0, 2.0, 4.0)):
        processors.begin(process, work_s)
    assert run(processors) == pytest.approx({0: 1.0, 1: 2.0, 2: 5.0})


def test_a_turn_ends_where_others_wait() -> None:
    """4 and 3 s on one processor, in turns of 3: three of the one, all of the other, the rest of the one."""
    processors = lines(1)
    processors.begin(0, 4.0)
    processors.begin(1, 3.0)
    assert run(processors) == pytest.approx({1: 6.0, 0: 7.0})


def test_nobody_is_interrupted_by_who_goes_on() -> None:
    """0 works on at once, with what is left of its turn, before 1 that has waited."""
    processors = lines(1)
    processors.begin(0, 1.0)
    processors.begin(1, 1.0)
    assert run(processors, 1.0) == pytest.approx({0: 1.0})
    processors.begin(0, 5.0, goes_on=True)
    assert run(processors) == pytest.approx({1: 3.0, 0: 6.0})


def test_who_never_ran_is_taken_over_at_once() -> None:
    """2 waits for 0, 1 is done first: 2 goes there."""
    processors = lines()
    for process, work_s in enumerate((2.0, 1.0, 1.0)):
        processors.begin(process, work_s)
    assert run(processors) == pytest.approx({1: 1.0, 0: 2.0, 2: 2.0})


@pytest.mark.parametrize(("migration_cost_s", "end_s"), [(0.0, 1.2), (0.5, 1.5), (9.0, 3.0)])
def test_who_ran_a_moment_ago_waits_beside_an_idle_processor(migration_cost_s: float, end_s: float) -> None:
    """2 has run, has work again at once, and finds both processors taken, for 2 s and for 0.2. The second one takes it
    over when it has not run for so long; if that is later, the first one is done before."""
    processors = lines(migration_cost_s=migration_cost_s)
    processors.begin(2, 1.0)
    assert run(processors) == pytest.approx({2: 1.0})
    for process, work_s in enumerate((2.0, 0.2, 1.0)):
        processors.begin(process, work_s)
    assert run(processors) == pytest.approx({0: 2.0, 1: 0.2, 2: end_s})


def test_a_stopped_process_leaves_its_line() -> None:
    processors = lines(1)
    processors.begin(0, 5.0)
    processors.begin(1, 1.0)
    processors.stop(0)
    assert run(processors) == pytest.approx({1: 1.0})


@pytest.mark.parametrize(("processors", "slice_ms"), [(1, 0.7), (2, 1.4), (4, 2.1), (8, 2.8), (128, 2.8)])
def test_the_kernels_own_figures(processors: int, slice_ms: float) -> None:
    """As ``/sys/kernel/debug/sched`` shows them."""
    scheduler = Scheduler.linux(processors)
    assert scheduler.slice_s == pytest.approx(1e-3 * slice_ms)
    assert scheduler.migration_cost_s == 0.0005


def test_a_turn_takes_time() -> None:
    with pytest.raises(ValueError, match="slice_s=0"):
        Scheduler(migration_cost_s=0.0, slice_s=0)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    work=st.lists(st.floats(0.001, 3.0), min_size=1, max_size=8),
    count=st.integers(1, 4),
    migration_cost_s=st.floats(0, 2),
    slice_s=st.floats(0.01, 4),
)
def test_all_work_is_done_once(work: list[float], count: int, migration_cost_s: float, slice_s: float) -> None:
    """No earlier than each alone could, no later than one after the other."""
    processors = lines(count, slice_s=slice_s, migration_cost_s=migration_cost_s)
    for process, work_s in enumerate(work):
        processors.begin(process, work_s)
    ends = run(processors)
    assert processors.work_s == pytest.approx(sum(work))
    assert all(ends[process] >= work_s - 1e-9 for process, work_s in enumerate(work))
    assert sum(work) / count - 1e-9 <= max(ends.values()) <= sum(work) + 1e-9


@settings(max_examples=50, deadline=None, derandomize=True)
@given(work=st.lists(st.floats(0.1, 3.0), min_size=1, max_size=6))
def test_short_turns_share_a_processor_evenly(work: list[float]) -> None:
    """On one processor lines with turns of nearly no time are the shared processor."""
    queued, shared = lines(1, slice_s=1e-3), Shared(lambda processes: 1 / processes)
    for processors in (queued, shared):
        for process, work_s in enumerate(work):
            processors.begin(process, work_s)
    assert run(queued) == pytest.approx(run(shared), abs=1e-3 * len(work) + 1e-6)
