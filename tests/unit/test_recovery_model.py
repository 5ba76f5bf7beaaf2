"""The real iterator over simulated workers: whatever happens to them, in whatever order, each batch comes exactly once.

A plain model beside it keeps only what was promised: which batch is next, how many deaths there were and with which
sample in hand. hypothesis looks for a history that breaks a promise, and shortens it.
"""

from __future__ import annotations

import logging
import signal
from collections import Counter
from collections.abc import Container, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.utils.data import Dataset

import robustloader.engine.iterator as engine
from robustloader import RecoveryPolicy, RestartBudgetError, RobustDataLoader, WorkerCrashed
from robustloader.decisions.adaptation import Step
from robustloader.decisions.workers import AutoWorkers
from robustloader.system import host
from robustloader.transport.messages import Trial
from robustloader.worker.beacon import Reading
from tests.support.listener import Listener
from tests.support.simulation import IDLE, SimPool, SimWorker

BATCHES, BATCH_SIZE = 10, 2
SAMPLES = BATCHES * BATCH_SIZE

DEATHS = {"killed": -signal.SIGKILL, "crash": -signal.SIGSEGV, "exit": 3, "memory": -signal.SIGKILL, "hang": -9}
MOST_WORKERS = 5
LETHAL_HERE = {"crash", "exit", "memory", "hang"}
"""What would take the training process along, so that it may not load in the workers' place."""


class Here(Dataset):
    """Loaded by the training process alone; ``forbidden`` are samples that it should not have."""

    def __init__(self) -> None:
        self.bad: Container[int] = ()
        self.forbidden: list[int] = []

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> int:
        if index in self.bad:
            self.forbidden.append(index)
        return index


class Histories(RuleBasedStateMachine):
    """Tasks are dispatched, arrive and are delivered, while workers die, hang, come back late or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel_kills = 0
        self.patches = [
            mock.patch.object(engine, "Pool", SimPool),
            mock.patch.object(host, "memory_kills", self.memory_kills),
        ]
        for patch in self.patches:
            patch.start()
        self.listener = Listener()
        self.over = False
        self.delivered: list[int] = []
        self.deaths: Counter[str] = Counter()
        self.in_hand: Counter[int] = Counter()
        self.task_deaths = 0

    @initialize(
        workers=st.integers(1, 3),
        prefetch=st.integers(1, 3),
        in_order=st.booleans(),
        seeding=st.sampled_from(["worker", "batch"]),
        max_restarts=st.sampled_from([0, 1, 3, 100, 100]),
        haunted=st.integers(0, 5),
        min_workers=st.integers(1, 2),
        in_process=st.booleans(),
        looks=st.booleans(),
        auto=st.booleans(),
        shared=st.booleans(),
    )
    def begin(
        self,
        workers: int,
        prefetch: int,
        in_order: bool,
        seeding: Any,
        haunted: int,
        looks: bool,
        auto: bool = False,
        shared: bool = False,
        **recovery: Any,
    ) -> None:
        # Whether a trainer that finds a batch ready listens to its workers first is a matter of the clock.
        # "auto" begins with as many workers as there are processors, however many this machine has.
        for patch in (
            mock.patch.object(engine, "_LOOK_EVERY_NS", -1 if looks else 1 << 62),
            mock.patch.object(host, "usable_cpus", return_value=workers),
        ):
            self.patches.append(patch)
            patch.start()
        self.auto = auto
        self.workers, self.prefetch, self.in_order, self.haunted = workers, prefetch, in_order, haunted
        self.policy = RecoveryPolicy(backoff_s=0, stall_report_s=None, start_timeout_s=None, **recovery)
        self.batches = [[BATCH_SIZE * batch + place for place in range(BATCH_SIZE)] for batch in range(BATCHES)]
        if shared:  # as when sampling with replacement
            for batch in range(0, BATCHES, 2):
                self.batches[batch][1] = haunted
        self.dataset = Here()
        self.loader = RobustDataLoader(
            self.dataset,
            batch_sampler=self.batches,
            num_workers=AutoWorkers(workers) if auto else workers,
            prefetch_factor=prefetch,
            in_order=in_order,
            seeding=seeding,
            persistent_workers=True,
            collate_fn=list,
            recovery=self.policy,
            memory=None,
            telemetry=self.listener.policy,
            generator=torch.Generator().manual_seed(0),  # spares follow from it, and a history must repeat
        )
        self.dataset.bad = self.loader._desk.known_bad
        if auto:
            assert self.loader._adaptation is not None
            self.workers = self.loader._adaptation.workers
        self.iterator: Any = iter(self.loader)

    def memory_kills(self) -> int:
        return self.kernel_kills

    @property
    def pool(self) -> SimPool:
        pool: SimPool = self.iterator._pool
        return pool

    def settle(self) -> None:
        if not self.iterator._recovery.local and not self.iterator.closed:
            self.iterator._turn(0.0)

    # --- what happens

    @precondition(lambda self: not self.over and self.pool.workers)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        """A worker says that it is ready, sends a batch, or survives a trial."""
        self.pool.work(data.draw(st.sampled_from(self.pool.workers)))
        self.settle()

    @precondition(lambda self: not self.over and self.pool.workers)
    @rule(
        data=st.data(),
        how=st.sampled_from([*DEATHS]),
        phase=st.sampled_from(["idle", "item", "item", "items", "collate"]),
        place=st.integers(0, BATCH_SIZE - 1),
    )
    def die(self, data: st.DataObject, how: str, phase: Any, place: int) -> None:
        """A worker dies, idle or with something in hand."""
        worker: SimWorker = data.draw(st.sampled_from(self.pool.workers))
        if worker.dismissed:
            self.pool.die(worker, 0, IDLE)
            self.settle()
            return
        self.end(worker, how, self.at_work(worker, phase, place))

    @precondition(lambda self: not self.over and any(map(self.meets_the_haunted, self.pool.workers)))
    @rule(how=st.sampled_from(["killed", "crash", "hang"]))
    def haunt(self, how: str) -> None:
        """Whoever loads one certain sample dies of it."""
        worker = next(filter(self.meets_the_haunted, self.pool.workers))
        order = worker.order
        place = 0 if isinstance(order, Trial) else order.indices.index(self.haunted)
        self.end(worker, how, self.at_work(worker, "item", place))

    def meets_the_haunted(self, worker: SimWorker) -> bool:
        order = worker.order
        if isinstance(order, Trial):
            return bool(order.index == self.haunted)
        return order is not None and self.haunted in order.indices and not worker.dismissed

    def end(self, worker: SimWorker, how: str, reading: Reading) -> None:
        self.kernel_kills += how == "memory"
        worker.killed_for = "hang" if how == "hang" else ""
        self.deaths[how] += 1
        self.pool.die(worker, DEATHS[how], reading)
        self.settle()

    def at_work(self, worker: SimWorker, phase: Any, place: int) -> Reading:
        order = worker.order
        if order is None or phase == "idle":
            if isinstance(order, Trial) and self.iterator._books.closing:
                self.in_hand[order.index] += 1
            return IDLE
        if isinstance(order, Trial):
            self.in_hand[order.index] += 1
            return Reading("item", order.run, order.task, order.position, 1, 0, 0)
        if phase != "item" or place in order.avoid:
            self.task_deaths += 1
            return Reading("collate" if phase == "item" else phase, order.run, order.task, None, 2, 0, 0)
        self.in_hand[order.indices[place]] += 1
        return Reading("item", order.run, order.task, place, 1, 0, 0)

    @precondition(lambda self: not self.over and self.pool.starting)
    @rule(data=st.data())
    def come_up(self, data: st.DataObject) -> None:
        """A dead worker's successor is there, and says so."""
        worker = data.draw(st.sampled_from(self.pool.starting))
        self.pool.come_up(worker)
        self.settle()
        if worker in self.pool.workers:
            self.pool.work(worker)
            self.settle()

    @precondition(lambda self: not self.over and self.pool.starting)
    @rule()
    def stay_down(self) -> None:
        """It cannot be started."""
        self.deaths["start"] += 1
        self.pool.come_up(self.pool.starting[0], fails=True)
        self.settle()

    @precondition(lambda self: not self.over and self.auto and self.may_resize)
    @rule(data=st.data())
    def resize(self, data: st.DataObject) -> None:
        """The pool follows the run: more workers, or fewer."""
        crew = self.iterator._crew
        size = crew.size
        numbers = [n for n in range(max(1, self.policy.min_workers), MOST_WORKERS + 1) if n != size]
        credit = crew.budget.credit
        self.iterator._resize(Step(workers=data.draw(st.sampled_from(numbers)), reason="a test"))
        assert crew.budget.credit == credit, "a choice cost restart credit"
        self.settle()

    @property
    def may_resize(self) -> bool:
        """As the adapter asks: nobody is dead, on its way or leaving, and nothing is closing in."""
        it = self.iterator
        quiet = not it._recovery.local and not it.closed and not it._books.closing and it._books.error is None
        return bool(quiet and it._crew.whole)

    @precondition(lambda self: not self.over and self.pool.frames)
    @rule(data=st.data())
    def hear_again(self, data: st.DataObject) -> None:
        """A frame comes for the second time, or after its sender's death, or of an epoch that was abandoned."""
        worker, frame = data.draw(st.sampled_from(self.pool.frames[:-4:-1]))
        before = self.iterator._books.ledger.ready
        self.pool.repeat(worker, frame)
        self.settle()
        assert self.iterator._books.ledger.ready == before, "a late or doubled frame was taken for a result"

    @precondition(lambda self: not self.over)
    @rule()
    def take(self) -> None:
        """The trainer takes a batch, where it would not have to wait."""
        if self.iterator._recovery.local or self.iterator._books.ledger.deliverable() or self.iterator._books.error:
            self.next()

    @precondition(lambda self: not self.over)
    @rule(rounds=st.integers(1, 6))
    def go_on(self, rounds: int) -> None:
        """For a while nothing happens but work."""
        for _ in range(rounds):
            for worker in list(self.pool.starting):
                self.pool.come_up(worker)
                self.settle()
            for worker in list(self.pool.workers):
                if not worker.dismissed and not self.meets_the_haunted(worker):
                    self.pool.work(worker)
                    self.settle()

    @precondition(lambda self: not self.over and len(self.delivered) % 3 == 2)
    @rule()
    def start_over(self) -> None:
        """The trainer leaves its loop and begins another epoch with the same workers, or with others where none are
        left."""
        gone = self.iterator.closed or self.iterator._recovery.local
        try:
            again = iter(self.loader)
        except RestartBudgetError as error:
            self.ends(error)
            return
        assert (again is not self.iterator) == gone
        if gone:
            self.deaths.clear()
            self.listener.events.clear()
            self.iterator = again
            if self.auto:
                self.workers = self.loader._adaptation.workers  # type: ignore[union-attr]
            assert again._crew.size == again._crew.processes == self.workers, "not all workers are back"
        self.delivered.clear()

    @precondition(lambda self: self.over)
    @rule()
    def ask_again(self) -> None:
        """Who asks on after the end gets the same answer."""
        with pytest.raises(RestartBudgetError):
            next(self.iterator)

    def next(self) -> bool:
        try:
            batch = next(self.iterator)
        except StopIteration:
            assert sorted(self.delivered) == list(range(BATCHES)), "the epoch ended before its last batch"
            return False
        except RestartBudgetError as error:
            self.ends(error)
            return False
        info = self.iterator.batch_info
        assert info.index not in self.delivered, f"batch {info.index} came twice"
        assert not self.in_order or info.index == len(self.delivered), "out of order"
        self.delivered.append(info.index)
        wanted = self.batches[info.index]
        assert len(batch) == BATCH_SIZE
        for place, (sample, want) in enumerate(zip(batch, wanted, strict=True)):
            assert sample == want or info.replaced[place] == (want, sample), "a sample was changed without a word"
        return True

    def ends(self, error: RestartBudgetError) -> None:
        """Giving up is allowed where nobody is left and the training process may not load, and not before."""
        self.over = True
        lethal = any(self.deaths[how] for how in LETHAL_HERE)
        assert not self.policy.in_process or lethal, "it gave up, although the training process could have loaded"
        assert sum(self.deaths.values()) > min(self.policy.max_restarts, 1)
        assert error.history

    # --- what always holds

    @invariant()
    def no_more_is_outstanding_than_allowed(self) -> None:
        if not self.over and not self.iterator.closed:
            ahead, lanes = self.iterator._put_ahead, self.workers
            if self.auto:
                lanes = sum(slot.counts for slot in self.iterator._crew.slots)
            assert len(self.iterator._books.ledger) <= self.prefetch * lanes + ahead

    @invariant()
    def each_task_is_in_one_place(self) -> None:
        """With a worker that lives or waits to be heard, in one queue, before a trial, or arrived."""
        if self.over or self.iterator.closed or self.iterator._books.error is not None:
            return
        books, crew = self.iterator._books, self.iterator._crew
        held = Counter(task.id for queue in (books.queue, books.parked) for task in queue)
        for slot in crew.slots:
            cases = [*slot.trials, *([slot.trial] if slot.trial else [])]
            held.update(task.id for case in cases for task in case.waiting)
            if slot.worker is not None:
                incarnation = slot.worker.incarnation
                held.update(
                    task.id
                    for task in books.ledger
                    if (task.worker_id, task.incarnation) == (slot.worker_id, incarnation) and not task.arrived
                )
        held.update(task.id for task in books.ledger if task.arrived)
        assert held == Counter(task.id for task in books.ledger)

    @invariant()
    def budgets_and_pool_keep_their_bounds(self) -> None:
        if self.over:
            return
        crew = self.iterator._crew
        assert 0 <= crew.budget.credit <= self.policy.max_restarts
        most = MOST_WORKERS if self.auto else self.workers
        assert 0 <= crew.size <= most
        assert crew.size == 0 or crew.size >= min(self.policy.min_workers, self.workers)
        leaving = sum(slot.leaving == "reserve" for slot in crew.slots)
        assert self.iterator._recovery.local or crew.processes <= crew.size + leaving
        there = [worker for worker in self.pool.workers if not (self.auto and worker.dismissed)]
        assert len(there) + len(self.pool.starting) <= 2 * most + 1
        assert len(crew.slots) <= 2 * most

    @invariant()
    def only_the_proved_are_convicted(self) -> None:
        """A conviction needs ``poison_after`` deaths with the sample in hand and one more, alone. A batch is left out
        after that many deaths where no process can be had to try it again."""
        for record in self.loader.fault_log if hasattr(self, "loader") else ():
            if record.index is None:
                assert self.task_deaths >= self.policy.poison_after + (record.kind == "poison")
            elif record.kind in ("poison", "hang"):
                assert self.in_hand[record.index] > self.policy.poison_after

    @invariant()
    def the_training_process_loads_nothing_that_was_convicted(self) -> None:
        assert not hasattr(self, "dataset") or not self.dataset.forbidden

    @invariant()
    def every_death_is_told_once(self) -> None:
        told = len(self.listener.of(WorkerCrashed))
        assert told <= sum(self.deaths.values()) or self.over or not hasattr(self, "loader")

    def teardown(self) -> None:
        """However it went: if nothing more happens, the epoch is delivered to its end."""
        try:
            if hasattr(self, "loader") and not self.over:
                self.pool.drains = True
                while self.next():
                    pass
        finally:
            if hasattr(self, "loader"):
                self.iterator.close()
            for patch in self.patches:
                patch.stop()


Histories.TestCase.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.filterwarnings("ignore::robustloader.RobustLoaderWarning")
class TestHistories(Histories.TestCase):  # type: ignore[misc,name-defined]
    """Hundreds of histories."""

    @pytest.fixture(autouse=True)
    def quiet(self) -> Iterator[None]:
        """The log would hold every shrunk pool of every history."""
        logging.getLogger("robustloader").addFilter(_nothing)
        yield
        logging.getLogger("robustloader").removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


@pytest.mark.parametrize("how", ["crash", "killed"])
def test_a_death_before_the_trial_begins_proves_nothing(how: str) -> None:
    """The suspect has been sent to be tried, and the worker dies before it has looked at it."""
    history = Histories()
    history.begin(
        workers=1,
        prefetch=1,
        in_order=True,
        seeding="worker",
        max_restarts=100,
        min_workers=1,
        haunted=0,
        looks=True,
        in_process=True,
    )

    def come_up() -> None:
        history.settle()
        if history.pool.starting:
            history.pool.come_up(history.pool.starting[0])
            history.settle()
        history.pool.work(history.pool.workers[0])
        history.settle()

    try:
        for _ in range(2):
            come_up()
            history.haunt(how="killed")
        for _ in range(6):
            come_up()
            assert isinstance(history.pool.workers[0].order, Trial)
            history.end(history.pool.workers[0], how, IDLE)
        assert not history.loader.fault_log
    finally:
        history.teardown()
    assert not history.loader.fault_log
    assert history.delivered == list(range(BATCHES))
