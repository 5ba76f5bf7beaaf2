"""The simulator against closed forms and cases worked out by hand, and what holds in every run."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robustloader.decisions.processors import Scheduler
from robustloader.decisions.simulator import LoadTime, Setup, simulate, survive


def rate(batches: int = 4000, seed: int = 0, **facts: Any) -> float:
    """Batches per second over a long epoch."""
    return simulate(Setup(**facts), batches, seed=seed).batches_per_s


def constant(mean_s: float = 0.1, **facts: Any) -> LoadTime:
    return LoadTime(mean_s=mean_s, **facts)


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8, 64])
@pytest.mark.parametrize("step_s", [0.0, 0.01, 0.05, 0.5])
def test_the_slower_of_workers_and_trainer(workers: int, step_s: float) -> None:
    """Enough processors, constant times: the period is max(step, load / workers)."""
    assert 1 / rate(workers=workers, load=constant(), step_s=step_s) == pytest.approx(
        max(step_s, 0.1 / workers), rel=0.01
    )


def test_in_the_training_process_nothing_overlaps() -> None:
    """load + step, exactly."""
    found = simulate(Setup(workers=0, load=constant(), step_s=0.05), 10)
    assert found.duration_s == pytest.approx(1.5)
    assert found.wait_s == pytest.approx(1.0)
    assert found.first_batch_s == pytest.approx(0.1)


@pytest.mark.parametrize("cores", [1, 2, 3.5, 8])
@pytest.mark.parametrize("workers", [1, 2, 4, 16])
def test_processors_are_the_limit(cores: float, workers: int) -> None:
    """All work: the rate is min(workers, cores) / load, however many more workers there are."""
    assert rate(workers=workers, load=constant(), cores=cores) == pytest.approx(10 * min(workers, cores), rel=0.01)


@pytest.mark.parametrize("workers", [1, 2, 4, 8, 32])
def test_waiting_overlaps_and_work_does_not(workers: int) -> None:
    """A quarter of the time is work, one processor. With constant times workers stay in step: all wait at once, then
    all share the processor, so a round of n takes wait + n × work, however much more could overlap."""
    found = rate(workers=workers, load=constant(work_fraction=0.25), cores=1, prefetch_factor=8)
    assert found == pytest.approx(workers / (0.075 + 0.025 * workers), rel=0.01)


@pytest.mark.parametrize("workers", [1, 2, 4, 8, 32])
def test_random_times_bring_workers_out_of_step(workers: int) -> None:
    """Then it is the closed queueing network of one shared processor and a delay, which mean value analysis solves
    (Reiser and Lavenberg, 1980); that takes wait and work as independent, which they are not here."""
    load = LoadTime(mean_s=0.1, kind="exponential", work_fraction=0.25)
    waiting = throughput = 0.0
    for number in range(1, workers + 1):
        response = 0.025 * (1 + waiting)
        throughput = number / (response + 0.075)
        waiting = throughput * response
    found = rate(20_000, workers=workers, load=load, cores=1, prefetch_factor=200)
    assert found == pytest.approx(throughput, rel=0.08)


def test_crossing_is_serial() -> None:
    """The training process takes one batch at a time: step + cross bounds whatever the workers do."""
    assert 1 / rate(workers=64, load=constant(), step_s=0.01, cross_s=0.005) == pytest.approx(0.015, rel=0.01)


def test_one_exponential_worker_and_a_constant_step() -> None:
    """A queue M/D/1 with a full lookahead: with a deep one the rate is the slower side's; with equal rates and a
    shallow one it is less than either."""
    load = LoadTime(mean_s=0.1, kind="exponential")
    assert rate(20_000, workers=1, load=load, step_s=0.05, prefetch_factor=100) == pytest.approx(10, rel=0.03)
    assert rate(20_000, workers=1, load=load, step_s=0.2, prefetch_factor=100) == pytest.approx(5, rel=0.03)
    assert rate(20_000, workers=1, load=load, step_s=0.1, prefetch_factor=1) < 8


def test_no_lookahead_to_speak_of() -> None:
    """One worker, one batch ahead, exponential load and a constant step D: it loads one while the trainer has the one
    before, so the period is E[max(X, D)] = D + m exp(-D / m)."""
    load = LoadTime(mean_s=0.1, kind="exponential")
    wanted = 0.1 + 0.1 * math.exp(-1)
    assert 1 / rate(50_000, workers=1, load=load, step_s=0.1, prefetch_factor=1) == pytest.approx(wanted, rel=0.02)


def test_the_mean_is_the_mean() -> None:
    """Skewed and exponential times keep it, so one worker without a trainer is as fast as with constant ones."""
    for kind in ("skewed", "exponential"):
        assert rate(50_000, workers=1, load=constant(kind=kind)) == pytest.approx(10, rel=0.05)


def test_stragglers_cost_less_with_more_lookahead() -> None:
    """Batches are delivered in order: a slow one holds the others up, the less the further one looks ahead."""
    facts = {"workers": 4, "load": constant(kind="skewed")}
    assert rate(**facts, prefetch_factor=1) < 0.8 * rate(**facts, prefetch_factor=16) <= 0.8 * 42


# --- processors, shared by workers and trainer ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "cores", "period_s"),
    [
        (1, math.inf, 0.12),  # the worker loads and sends; the trainer receives meanwhile
        (1, 2, 0.12),
        (1, 1, 0.15),  # all of it on one processor: 100 + 20 + 30 ms
        (8, 1, 0.15),
        (2, 2, 0.075),  # two processors share it
        (8, 2, 0.075),
        (3, 4, 0.04),  # a processor for each of the workers, and one for the trainer
        (8, math.inf, 0.03),  # the trainer receives one after the other
    ],
)
def test_crossing_costs_both_sides(workers: int, cores: float, period_s: float) -> None:
    """Load 100 ms, send 20 ms, receive 30 ms, all of it work."""
    found = rate(workers=workers, load=constant(), cores=cores, send_s=0.02, cross_s=0.03, prefetch_factor=4)
    assert 1 / found == pytest.approx(period_s, rel=0.01)


def test_who_waits_for_storage_needs_no_processor() -> None:
    """A hundred workers sleep 100 ms a batch; one processor only has to receive."""
    load = constant(work_fraction=0.0)
    assert rate(workers=100, load=load, cores=1, cross_s=0.0005) == pytest.approx(1000, rel=0.02)
    assert rate(workers=100, load=load, cores=1, cross_s=0.002) == pytest.approx(500, rel=0.02)
    assert rate(workers=100, load=load, cores=1, send_s=0.001, cross_s=0.001) == pytest.approx(500, rel=0.02)


@pytest.mark.parametrize(
    ("share", "period_s"),
    [
        (0.0, 0.1),  # the device computes, the worker has the processor
        (0.5, 0.15),  # for 50 ms of work the trainer takes half of it, for 100 ms; then the worker has all for 50 ms
        (1.0, 0.2),
    ],
)
def test_a_step_on_the_processor_takes_it_from_the_workers(share: float, period_s: float) -> None:
    """One processor, load and step 100 ms each."""
    facts = {"load": constant(), "cores": 1, "step_s": 0.1, "step_work_fraction": share, "prefetch_factor": 4}
    assert 1 / rate(workers=1, **facts) == pytest.approx(period_s, rel=0.01)
    assert 1 / rate(workers=1, **{**facts, "cores": 2}) == pytest.approx(0.1, rel=0.01)
    assert 1 / rate(workers=0, **facts) == pytest.approx(0.2)


@pytest.mark.parametrize(("workers", "batches_per_s"), [(1, 10), (2, 20), (3, 23), (4, 26), (8, 26)])
def test_a_second_thread_of_a_core_adds_little(workers: int, batches_per_s: float) -> None:
    """Two cores with two threads each; a second thread adds 30 %."""
    found = rate(workers=workers, load=constant(), cores=2, siblings=2, sibling_gain=0.3)
    assert found == pytest.approx(batches_per_s, rel=0.01)


@pytest.mark.parametrize(("workers", "batches_per_s"), [(1, 10), (2, 20 / 1.5), (4, 20 / 1.5)])
def test_processes_that_share_a_memory_slow_each_other_down(workers: int, batches_per_s: float) -> None:
    """Two at once take half as long again; more than two never run at once."""
    assert rate(workers=workers, load=constant(), cores=2, contention=0.5) == pytest.approx(batches_per_s, rel=0.01)


@pytest.mark.parametrize(("load_s", "least", "most"), [(0.0002, 0.75, 0.92), (0.02, 0.98, 1.0)])
def test_small_batches_leave_processors_idle(load_s: float, least: float, most: float) -> None:
    """Two workers and the trainer on two processors, where each side's crossing takes a third of the load time: with
    loads of 0.2 ms somebody often waits in line beside an idle processor, with 20 ms hardly ever."""
    facts = {"workers": 2, "load": constant(load_s), "cores": 2, "send_s": load_s / 3, "cross_s": load_s / 3}
    shared, queued = rate(**facts), rate(**facts, scheduler=Scheduler.linux(2))
    assert shared == pytest.approx(2 / (load_s * 5 / 3), rel=0.01)
    assert least <= queued / shared <= most


@pytest.mark.parametrize("cores", [1.5, math.inf])
def test_a_scheduler_has_whole_processors(cores: float) -> None:
    with pytest.raises(ValueError, match="whole"):
        Setup(workers=1, load=constant(), cores=cores, scheduler=Scheduler.linux(2))


def test_who_slept_goes_on_a_little_later() -> None:
    """Without lookahead worker and trainer sleep in turn: 100 ms of loading, 20 of receiving, and two wake-ups."""
    facts = {"workers": 1, "load": constant(), "cross_s": 0.02, "wake_s": 0.01}
    assert 1 / rate(**facts, prefetch_factor=1) == pytest.approx(0.14, rel=0.01)
    assert 1 / rate(**facts, prefetch_factor=2) == pytest.approx(0.10, rel=0.01)


def test_half_a_processor_is_half_as_fast() -> None:
    """A quota below one processor slows work in the training process too, and waiting not at all."""
    assert rate(workers=0, load=constant(), cores=0.5) == pytest.approx(5)
    assert rate(workers=0, load=constant(work_fraction=0.0), cores=0.5) == pytest.approx(10)
    assert rate(workers=4, load=constant(), cores=0.5) == pytest.approx(5, rel=0.01)


def test_observed_times_come_in_their_order() -> None:
    """And again from the beginning: 4 batches of 100, 300, 100 and 300 ms are two rounds of two workers."""
    load = LoadTime.observed((0.1, 0.3))
    assert load.mean_s == pytest.approx(0.2)
    assert list(itertools.islice(load.draw(random.Random(0)), 4)) == [0.1, 0.3, 0.1, 0.3]
    assert simulate(Setup(workers=0, load=load), 3).duration_s == pytest.approx(0.5)
    assert simulate(Setup(workers=2, load=load, prefetch_factor=4), 4).duration_s == pytest.approx(0.6)
    with pytest.raises(ValueError, match="no load time"):
        LoadTime.observed(())


# --- what holds in every run

_STEADY = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
_SECONDS = st.floats(0.001, 1.0)

_LOADS = st.one_of(
    st.builds(
        LoadTime,
        mean_s=_SECONDS,
        kind=st.sampled_from(("constant", "exponential", "skewed")),
        work_fraction=st.floats(0, 1),
    ),
    st.builds(LoadTime.observed, st.lists(_SECONDS, min_size=1, max_size=5).map(tuple), work_fraction=st.floats(0, 1)),
)


def setup(*, cores: float, scheduler: Scheduler | None, **facts: Any) -> Setup:
    """A scheduler only where there are whole processors."""
    return Setup(cores=cores, scheduler=scheduler if math.isfinite(cores) and cores.is_integer() else None, **facts)


_SCHEDULERS = st.one_of(
    st.none(),
    st.builds(Scheduler, migration_cost_s=st.floats(0, 1), slice_s=st.floats(0.001, 1)),
)

_SETUPS = st.builds(
    setup,
    workers=st.integers(0, 6),
    load=_LOADS,
    cores=st.sampled_from((0.5, 1.0, 2.0, 3.5, math.inf)),
    siblings=st.sampled_from((0.0, 1.0, 4.0)),
    scheduler=_SCHEDULERS,
    contention=st.sampled_from((0.0, 0.4)),
    wake_s=st.floats(0, 0.1),
    send_s=st.floats(0, 0.1),
    cross_s=st.floats(0, 0.1),
    step_s=st.floats(0, 0.5),
    step_work_fraction=st.floats(0, 1),
    prefetch_factor=st.integers(1, 4),
    start_s=st.floats(0, 1),
)


@_STEADY
@given(setup=_SETUPS, batches=st.integers(1, 60), seed=st.integers(0, 9))
def test_no_run_beats_its_bounds(setup: Setup, batches: int, seed: int) -> None:
    """All work is done, once; it takes at least as long as the processors, each worker and the trainer need for their
    shares, and no longer than everything one after the other."""
    found = simulate(setup, batches, seed=seed)
    loads = list(itertools.islice(setup.load.draw(random.Random(seed)), batches))
    crossing = (setup.send_s + setup.cross_s) if setup.workers else 0.0
    share, step_work_s = setup.load.work_fraction, setup.step_s * setup.step_work_fraction
    work_s = sum(loads) * share + batches * (crossing + step_work_s)
    waits_s = sum(loads) * (1 - share) + batches * (setup.step_s - step_work_s)
    start_s = setup.start_s if setup.workers else 0.0
    slack = 1e-6
    assert found.batches == batches
    assert found.work_s == pytest.approx(work_s, abs=slack)
    capacity = max(n * setup.speed(n) for n in range(1, setup.workers + 2))
    assert found.duration_s >= work_s / capacity - slack
    assert found.duration_s >= sum(loads) / max(1, setup.workers) - slack
    assert found.duration_s >= batches * (setup.step_s + (setup.cross_s if setup.workers else 0)) - slack
    slowest = min(n * setup.speed(n) for n in range(1, setup.workers + 2))
    wakes_s = (batches * 2 + setup.workers) * setup.wake_s
    assert found.duration_s <= start_s + waits_s + wakes_s + work_s / min(1.0, slowest) + slack
    # What is not waiting is the steps: as long as they are where the trainer has a processor for itself, longer else.
    assert batches * setup.step_s - slack <= found.duration_s - found.wait_s
    if setup.workers + 1 <= setup.cores and not setup.contention:
        assert found.duration_s - found.wait_s == pytest.approx(batches * setup.step_s, abs=slack)
    assert found.first_batch_s >= start_s + loads[0] - slack


@_STEADY
@given(setup=_SETUPS, batches=st.integers(1, 40), factor=st.sampled_from((0.01, 3.0, 1000.0)))
def test_a_slower_clock_changes_nothing_else(setup: Setup, batches: int, factor: float) -> None:
    """All times stretched: everything takes so much longer."""
    stretched = dataclasses.replace(
        setup,
        load=dataclasses.replace(
            setup.load,
            mean_s=setup.load.mean_s * factor,
            observed_s=tuple(factor * time_s for time_s in setup.load.observed_s),
        ),
        scheduler=setup.scheduler
        and Scheduler(
            migration_cost_s=setup.scheduler.migration_cost_s * factor, slice_s=setup.scheduler.slice_s * factor
        ),
        **{name: getattr(setup, name) * factor for name in ("wake_s", "send_s", "cross_s", "step_s", "start_s")},
    )
    one, other = simulate(setup, batches), simulate(stretched, batches)
    for name in ("duration_s", "wait_s", "work_s", "first_batch_s"):
        assert getattr(other, name) == pytest.approx(factor * getattr(one, name), rel=1e-6)


# --- deaths -----------------------------------------------------------------------------------------------------------


def test_deaths_cost_a_restart_and_half_a_batch() -> None:
    """One worker: between two deaths it is up for M on average, then away for R, and begins its batch anew: in a life
    it loads M / (exp-lengthened batch) of them. Rate = exp(-L/M) / (1 - exp(-L/M)) / (M + R)."""
    load_s, every_s, away_s = 0.1, 5.0, 1.0
    found = simulate(Setup(workers=1, load=constant(), death_every_s=every_s, restart_s=away_s), 60_000)
    per_life = math.exp(-load_s / every_s) / (1 - math.exp(-load_s / every_s))
    assert found.batches == 60_000
    assert not found.lost
    assert found.batches_per_s == pytest.approx(per_life / (every_s + away_s), rel=0.03)
    assert found.deaths / found.duration_s == pytest.approx(1 / (every_s + away_s), rel=0.1)


def test_without_recovery_the_first_death_ends_the_job() -> None:
    """After the time that the exponential law says, on average."""
    setup = Setup(workers=4, load=constant(), death_every_s=100.0)
    ends = [simulate(setup, 10**6, seed=seed) for seed in range(300)]
    assert all(end.lost and end.deaths == 1 for end in ends)
    assert sum(end.duration_s for end in ends) / 300 == pytest.approx(25, rel=0.2)


def test_the_same_seed_is_the_same_run() -> None:
    """And another seed is another one."""
    setup = Setup(workers=3, load=LoadTime(mean_s=0.1, kind="exponential"), death_every_s=3.0, restart_s=0.5, cores=2)
    assert simulate(setup, 500, seed=7) == simulate(setup, 500, seed=7)
    assert simulate(setup, 500, seed=7) != simulate(setup, 500, seed=8)


@pytest.mark.parametrize("batches", [0, 1, 5])
@pytest.mark.parametrize("workers", [0, 1, 8])
def test_short_epochs(batches: int, workers: int) -> None:
    """Every batch is delivered, and no more."""
    found = simulate(Setup(workers=workers, load=constant(), step_s=0.01, start_s=1.0 if workers else 0.0), batches)
    assert found.batches == batches
    if batches:
        assert found.first_batch_s == pytest.approx(1.1 if workers else 0.1)


def test_many_ranks() -> None:
    """Drawn and computed shares of lost jobs agree, and a small hazard times many workers is a large one."""
    facts = {"workers": 8, "death_every_s": 1e8, "duration_s": 86_400.0, "stall_s": 2.0}
    few, many = survive(ranks=8, **facts), survive(ranks=4096, **facts)
    assert few.lost / few.jobs == pytest.approx(few.lost_expected, abs=0.03)
    assert many.lost_expected > 0.99
    assert many.lost == many.jobs
    assert many.stalled_s_per_job == pytest.approx(2 * many.deaths_per_job)
