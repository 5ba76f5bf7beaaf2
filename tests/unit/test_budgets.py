"""How many faults and restarts are allowed, and how long a restart waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustloader.decisions.budgets import BATCHES_PER_CREDIT, FaultBudget, RestartBudget


def restart_budget(max_restarts: int = 3, backoff_s: float = 0.5, max_backoff_s: float = 4.0) -> RestartBudget:
    return RestartBudget(max_restarts=max_restarts, backoff_s=backoff_s, max_backoff_s=max_backoff_s)


@pytest.mark.parametrize(
    ("burst", "max_fraction", "samples", "allowed"),
    [(16, 0.05, 0, 16), (16, 0.05, 100, 21), (0, 0.0, 10_000, 0), (2, 1.0, 8, 10), (0, 0.05, 19, 0), (0, 0.05, 20, 1)],
)
def test_faults_allowed(burst: int, max_fraction: float, samples: int, allowed: int) -> None:
    """``burst + max_fraction * samples``, rounded down; one more is too many."""
    budget = FaultBudget(burst=burst, max_fraction=max_fraction)
    budget.fetched(samples)
    budget.faulted(allowed)
    assert budget.allowed == allowed
    assert not budget.exceeded
    budget.faulted()
    assert budget.exceeded


@given(st.integers(0, 50), st.floats(0, 1), st.lists(st.tuples(st.integers(0, 64), st.integers(0, 64))))
def test_fault_budget_only_depends_on_the_sums(burst: int, fraction: float, steps: list[tuple[int, int]]) -> None:
    """However samples and faults come in, their totals decide."""
    budget = FaultBudget(burst=burst, max_fraction=fraction)
    for samples, faults in steps:
        budget.fetched(samples)
        budget.faulted(faults)
    samples, faults = sum(s for s, _ in steps), sum(f for _, f in steps)
    assert (budget.samples, budget.faults) == (samples, faults)
    assert budget.exceeded == (faults > int(burst + fraction * samples))


def test_credit_is_spent_one_a_death() -> None:
    """``max_restarts`` deaths in a row are restarted, the next is not."""
    budget = restart_budget(max_restarts=3)
    assert [budget.spend() for _ in range(5)] == [True, True, True, False, False]


def test_no_credit_from_the_beginning() -> None:
    """``max_restarts=0`` restarts nobody."""
    assert not restart_budget(max_restarts=0).spend()


def test_progress_earns_credit() -> None:
    """One credit back per 50 delivered batches, never more than there was to begin with."""
    budget = restart_budget(max_restarts=3)
    budget.spend()
    budget.spend()
    for _ in range(BATCHES_PER_CREDIT - 1):
        budget.delivered()
    assert budget.credit == 1
    budget.delivered()
    assert budget.credit == 2
    for _ in range(20 * BATCHES_PER_CREDIT):
        budget.delivered()
    assert budget.credit == 3
    assert budget.full


def test_refund_and_refill() -> None:
    """A conviction gives its deaths back; a shrunk pool starts afresh."""
    budget = restart_budget(max_restarts=3)
    for _ in range(3):
        budget.spend()
    budget.refund(2)
    assert budget.credit == 2
    budget.refund(7)
    assert budget.credit == 3
    budget.spend()
    budget.refill()
    assert budget.full


@pytest.mark.parametrize(
    ("streak", "delay_s"), [(0, 0.0), (1, 0.0), (2, 0.5), (3, 1.0), (4, 2.0), (5, 4.0), (6, 4.0), (10_000, 4.0)]
)
def test_backoff(streak: int, delay_s: float) -> None:
    """The first restart is immediate, the next doubles each time, up to the bound, without overflow."""
    assert restart_budget().delay_s(streak) == delay_s


@given(st.lists(st.sampled_from(["spend", "delivered", "refund", "refill"]), max_size=300), st.integers(0, 9))
def test_credit_stays_in_bounds(steps: list[str], max_restarts: int) -> None:
    """Never negative, never above ``max_restarts``."""
    budget = restart_budget(max_restarts=max_restarts)
    for step in steps:
        had = budget.credit
        if step == "spend":
            assert budget.spend() == (had > 0)
        elif step == "refund":
            budget.refund(2)
        else:
            getattr(budget, step)()
        assert 0 <= budget.credit <= max_restarts
