"""The ledger: whatever happens to workers, every task is delivered exactly once, in order where order is asked for."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from robustloader.decisions.ledger import Ledger

WORKERS = 3


class Recovery(RuleBasedStateMachine):
    """Workers that get tasks, die, come back, send results, send them twice, and send them after their death."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(in_order=True)
        self.incarnations = [0] * WORKERS
        self.sent: list[tuple[int, int, int]] = []  # what some incarnation was given, dead ones included
        self.delivered: list[int] = []
        self.withdrawn: list[int] = []
        self.arrivals: list[int] = []

    @initialize(in_order=st.booleans())
    def begin(self, in_order: bool) -> None:
        self.ledger = Ledger(in_order=in_order)

    @rule()
    def open(self) -> None:
        before = self.ledger.next_id
        task = self.ledger.open([before], [before])
        assert task.id == before
        assert self.ledger.next_id == before + 1

    @rule(data=st.data(), worker=st.integers(0, WORKERS - 1))
    def dispatch(self, data: st.DataObject, worker: int) -> None:
        free = [task for task in self.ledger if task.worker_id < 0]
        if free:
            task = data.draw(st.sampled_from(free))
            attempt = task.attempt
            self.ledger.assign(task, worker, self.incarnations[worker])
            assert task.attempt == attempt + 1
            self.sent.append((task.id, worker, self.incarnations[worker]))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def result(self, data: st.DataObject) -> None:
        """Any result that was ever under way comes in: fresh, for the second time, or of a dead worker."""
        task_id, worker, incarnation = data.draw(st.sampled_from(self.sent))
        task = self.ledger.accept(task_id, worker, incarnation)
        closed = task_id in self.delivered or task_id in self.withdrawn
        late = incarnation != self.incarnations[worker]
        assert (task is None) == (closed or late or task_id in self.arrivals)
        if task is not None:
            self.ledger.arrive(task, f"batch {task_id}")
            self.arrivals.append(task_id)

    @rule(worker=st.integers(0, WORKERS - 1))
    def die(self, worker: int) -> None:
        held = [task.id for task in self.ledger if task.worker_id == worker and not task.arrived]
        lost = self.ledger.release(worker, self.incarnations[worker])
        assert [task.id for task in lost] == sorted(held)
        assert all(task.worker_id == -1 for task in lost)
        assert self.ledger.waiting_for(worker) == 0
        self.incarnations[worker] += 1

    @rule()
    def deliver(self) -> None:
        task = self.ledger.deliverable()
        if task is not None:
            assert task.result == f"batch {task.id}"
            self.ledger.deliver(task)
            self.delivered.append(task.id)

    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        """The end of a shard closes tasks that will have no batch."""
        if len(self.ledger) > 3:
            task = data.draw(st.sampled_from(list(self.ledger)))
            self.ledger.withdraw(task)
            self.withdrawn.append(task.id)

    @invariant()
    def books_balance(self) -> None:
        """Each task is open, delivered or withdrawn: exactly one of the three."""
        everywhere = [task.id for task in self.ledger] + self.delivered + self.withdrawn
        assert sorted(everywhere) == list(range(self.ledger.next_id))

    @invariant()
    def ready_is_what_arrived(self) -> None:
        assert self.ledger.ready == sum(task.arrived for task in self.ledger)
        assert len(self.ledger) == sum(1 for _ in self.ledger)

    @invariant()
    def order_holds(self) -> None:
        if self.ledger.in_order:
            assert self.delivered == sorted(self.delivered)
        else:
            assert self.delivered == [task for task in self.arrivals if task in self.delivered]

    def teardown(self) -> None:
        """However it went, a worker that lives long enough gets everything delivered."""
        for worker in range(WORKERS):
            self.ledger.release(worker, self.incarnations[worker])
            self.incarnations[worker] += 1
        for task in self.ledger:
            if not task.arrived:
                self.ledger.assign(task, 0, self.incarnations[0])
                assert self.ledger.accept(task.id, 0, self.incarnations[0]) is task
                self.ledger.arrive(task, f"batch {task.id}")
        while (task := self.ledger.deliverable()) is not None:
            self.ledger.deliver(task)
            self.delivered.append(task.id)
        assert not len(self.ledger)
        assert sorted(self.delivered + self.withdrawn) == list(range(self.ledger.next_id))


Recovery.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestRecovery = Recovery.TestCase


def ledger_with(count: int, *, in_order: bool = True) -> Ledger:
    ledger = Ledger(in_order=in_order)
    for number in range(count):
        ledger.assign(ledger.open([number], [number]), number % 2, 0)
    return ledger


def test_a_later_task_waits_for_the_one_before_it() -> None:
    """In order, the head of the line decides."""
    ledger = ledger_with(2)
    second = ledger.accept(1, 1, 0)
    assert second is not None
    ledger.arrive(second, "b")
    assert ledger.deliverable() is None
    first = ledger.accept(0, 0, 0)
    assert first is not None
    ledger.arrive(first, "a")
    assert ledger.deliverable() is first


def test_without_order_the_first_to_arrive_is_delivered_first() -> None:
    """With ``in_order=False`` a slow task holds nobody up."""
    ledger = ledger_with(2, in_order=False)
    second = ledger.accept(1, 1, 0)
    assert second is not None
    ledger.arrive(second, "b")
    assert ledger.deliverable() is second


@pytest.mark.parametrize(("worker", "incarnation"), [(0, 1), (1, 0), (-1, -1), (0, -1)])
def test_a_result_of_somebody_else_is_refused(worker: int, incarnation: int) -> None:
    """Only the incarnation that has the task may answer."""
    ledger = ledger_with(1)
    assert ledger.accept(0, worker, incarnation) is None
    assert ledger.accept(0, 0, 0) is ledger.get(0)


def test_what_arrived_before_a_death_is_not_replayed() -> None:
    """Only received and decoded is done, and done stays done."""
    ledger = ledger_with(4)
    task = ledger.get(0)
    assert task is not None
    ledger.arrive(task, "a")
    assert [lost.id for lost in ledger.release(0, 0)] == [2]
    assert ledger.deliverable() is task


def test_counts_per_worker() -> None:
    """``held_by`` counts as torch's ``_workers_num_tasks`` does: until delivery. ``waiting_for`` until arrival."""
    ledger = ledger_with(4)
    task = ledger.get(0)
    assert task is not None
    assert (ledger.held_by(0), ledger.waiting_for(0)) == (2, 2)
    ledger.arrive(task, "a")
    assert (ledger.held_by(0), ledger.waiting_for(0)) == (2, 1)
    ledger.deliver(task)
    assert (ledger.held_by(0), ledger.waiting_for(0)) == (1, 1)
