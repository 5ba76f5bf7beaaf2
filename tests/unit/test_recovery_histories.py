"""Single histories over simulated workers: what is convicted stays out of the training process, suspects are not
forgotten, and nothing goes on for ever."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from torch.utils.data import Dataset

import robustloader.engine.iterator as engine
from robustloader import RecoveryPolicy, RobustDataLoader, WorkerCrashed, WorkerCrashError
from robustloader.decisions.adaptation import Step
from robustloader.decisions.workers import AutoWorkers
from robustloader.system import host
from robustloader.transport.messages import Fetch, Trial
from robustloader.worker.beacon import Reading
from tests.support.listener import Listener, flat
from tests.support.simulation import IDLE, SimPool, SimWorker

BAD = 7
KILLED, CRASHED = -signal.SIGKILL, -signal.SIGSEGV

pytestmark = pytest.mark.filterwarnings("ignore::robustloader.RobustLoaderWarning")


class Here(Dataset):
    """Notes what is loaded; only the training process loads anything here."""

    def __init__(self) -> None:
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        self.loaded.append(index)
        return index


class History:
    """A loader over simulated workers, of which each dies that takes the bad sample in hand."""

    def __init__(
        self,
        batches: list[list[int]],
        *,
        workers: Any = 2,
        faults: Any = "replace",
        options: dict[str, Any] | None = None,
        **recovery: Any,
    ) -> None:
        self.dataset = Here()
        self.listener = Listener()
        self.policy = RecoveryPolicy(backoff_s=0, stall_report_s=None, start_timeout_s=None, **recovery)
        self.loader = RobustDataLoader(
            self.dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=list,
            faults=faults,
            recovery=self.policy,
            memory=None,
            telemetry=self.listener.policy,
            **(options or {}),
        )
        self.iterator: Any = iter(self.loader)

    @property
    def pool(self) -> SimPool:
        pool: SimPool = self.iterator._pool
        return pool

    @property
    def over(self) -> bool:
        """Whether there is nothing left for workers to do."""
        return bool(self.iterator._recovery.local or self.iterator.closed or self.iterator._books.error)

    def settle(self) -> None:
        if not self.over:
            self.iterator._turn(0.0)

    def come_up(self) -> None:
        """Who is on its way is there, and says so."""
        for worker in list(self.pool.starting):
            self.pool.come_up(worker)
        self.settle()
        for worker in self.pool.workers:
            if not worker.ready:
                self.pool.work(worker)
        self.settle()

    def meets(self, worker: SimWorker) -> Reading | None:
        """Where a worker is when it takes the bad sample in hand; None where it has something else to do."""
        order = worker.order
        if isinstance(order, Trial) and order.index == BAD:
            return Reading("item", order.run, order.task, order.position, 1, 0, 0)
        if isinstance(order, Fetch):
            for place, index in enumerate(order.indices):
                if index == BAD and place not in order.avoid:
                    return Reading("item", order.run, order.task, place, 1, 0, 0)
        return None

    def die(self, worker: SimWorker, exitcode: int = KILLED, reading: Reading | None = None) -> None:
        self.pool.die(worker, exitcode, reading or self.meets(worker) or IDLE)
        self.settle()

    def until_over(self, exitcode: int = KILLED) -> None:
        """Nobody does anything but die of the bad sample."""
        for _ in range(100):
            self.settle()
            self.come_up()
            fated = next((worker for worker in self.pool.workers if self.meets(worker)), None)
            if self.over or fated is None:
                return
            self.die(fated, exitcode)
        raise AssertionError("this goes on for ever")

    def until_closing(self) -> None:
        """The only worker dies of the bad sample, until the last one is to look into it."""
        self.come_up()
        while not self.iterator._books.closing:
            self.die(self.pool.workers[0])
            self.settle()
            assert len(self.listener.of(WorkerCrashed)) <= self.policy.max_restarts + 1
            if not self.iterator._books.closing:
                self.come_up()

    def rest(self) -> list[list[int]]:
        """The rest of the epoch, if nothing more happens."""
        self.pool.drains = True
        return list(self.iterator)


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated workers, and a trainer that always listens to them."""
    monkeypatch.setattr(engine, "Pool", SimPool)
    monkeypatch.setattr(engine, "_LOOK_EVERY_NS", -1)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_convicted_last_is_not_loaded_in_the_training_process(workers: int) -> None:
    """The last worker convicts it, while batches that need it wait for the training process."""
    history = History([[7, 1], [2, 7], [7, 3], [1, 7], [4, 5]], workers=workers, max_restarts=0)
    history.until_over()
    assert history.iterator._recovery.local
    assert {(record.kind, record.index) for record in history.loader.fault_log} == {("poison", BAD)}
    batches = history.rest()
    assert BAD not in history.dataset.loaded
    assert [len(batch) for batch in batches] == [2] * 5
    assert BAD not in flat(batches)


def test_a_suspect_that_cannot_be_tried_is_not_loaded_in_the_training_process() -> None:
    """In no batch: neither in the one it was in when its workers died, nor in those that wait."""
    history = History([[7, 1], [2, 7], [7, 3], [1, 7], [4, 5]], workers=1, max_restarts=1)
    history.until_closing()
    history.pool.come_up(history.pool.starting[0], fails=True)
    history.settle()
    assert history.iterator._recovery.local
    batches = history.rest()
    assert BAD not in history.dataset.loaded
    assert [len(batch) for batch in batches] == [2] * 5


def test_successors_that_never_come_up_end_the_search_for_suspects() -> None:
    """Killed each time before they are ready: after some, the training process goes on without the suspect."""
    history = History([[7, 1], [2, 3], [4, 5]], workers=1, max_restarts=2)
    history.until_closing()
    deaths = 0
    while not history.over:
        history.pool.come_up(history.pool.starting[0])
        history.settle()
        history.die(history.pool.workers[0], reading=IDLE._replace(phase="init"))
        deaths += 1
        assert deaths <= 10, "this goes on for ever"
        history.settle()
    assert history.iterator._recovery.local
    assert [batch[1:] for batch in history.rest()] == [[1], [3], [5]]
    assert BAD not in history.dataset.loaded
    assert len(history.listener.of(WorkerCrashed)) >= deaths


def test_the_trials_of_a_slot_that_never_came_to_be_are_held_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool was growing: a worker on its way inherited a suspect, and cannot be started."""
    kernel_kills = [0]
    monkeypatch.setattr(host, "memory_kills", lambda: kernel_kills[0])
    monkeypatch.setattr(host, "usable_cpus", lambda: 2)
    batches = [[7, 1], [2, 7], [4, 5], [6, 8], [9, 10], [11, 12]]
    history = History(batches, workers=AutoWorkers(2), poison_after=1)
    history.come_up()
    history.iterator._resize(Step(workers=4, reason="a test"))
    history.settle()
    assert len(history.pool.starting) == 2
    for _ in range(2):
        kernel_kills[0] += 1
        history.die(next(worker for worker in history.pool.workers if history.meets(worker)))
    history.pool.come_up(history.pool.starting[0], fails=True)
    history.settle()
    assert sorted(flat(history.rest())) == sorted(flat(batches))


def test_a_condemned_batch_explains_its_own_deaths_only() -> None:
    """Another sample crashed between them: the training process would not survive that, and does not take over."""
    history = History([[1, 2], [7, 3], [4, 5], [6, 8]], workers=2, max_restarts=100)
    history.come_up()
    condemned = False
    for death in range(10):
        worker = next(worker for worker in history.pool.workers if _works_on(worker, 0))
        order = worker.order
        assert isinstance(order, Fetch)
        history.die(worker, CRASHED if death else KILLED, Reading("collate", order.run, 0, None, 2, 0, 0))
        if death == 0:
            history.die(next(worker for worker in history.pool.workers if history.meets(worker)), CRASHED)
        condemned = bool(history.loader.fault_log)
        if condemned:
            break
        while not any(_works_on(worker, 0) for worker in history.pool.workers):
            history.settle()
            history.come_up()
    assert condemned
    assert not history.iterator._crew.safe_in_process


def _works_on(worker: SimWorker, task: int) -> bool:
    order = worker.order
    return isinstance(order, Fetch) and order.task == task


def test_the_last_batches_are_given_out_when_the_pool_has_shrunk() -> None:
    """In any order: workers that wait for their batches to be taken have no room for what the sampler yields last, and
    say nothing once they have."""
    batches = [[0], [1], [2], [3]]
    history = History(batches, workers=3, options={"in_order": False, "prefetch_factor": 1}, max_restarts=0)
    history.come_up()
    for worker in list(history.pool.workers):
        history.pool.work(worker)
        history.settle()
        if worker.worker_id == 0:
            history.die(worker)
    assert len(history.pool.workers) == 2
    assert sorted(history.rest()) == batches


def test_with_raise_a_convicted_sample_is_raised_in_each_epoch() -> None:
    """Its batches fail, each with an error of its own; the others come."""
    history = History([[7, 1], [2, 3], [4, 7], [5, 6]], workers=1, faults="raise", max_restarts=100)
    for epoch in range(3):
        if epoch:
            history.iterator = iter(history.loader)
        history.until_over(CRASHED)
        history.pool.drains = True
        came: list[Any] = []
        for _ in range(4):
            try:
                came.append(next(history.iterator))
            except WorkerCrashError as error:
                came.append(error)
        with pytest.raises(StopIteration):
            next(history.iterator)
        first, second, third, fourth = came
        assert (second, fourth) == ([2, 3], [5, 6])
        assert isinstance(first, WorkerCrashError)
        assert isinstance(third, WorkerCrashError)
        assert first is not third
        assert (first.index, third.index) == (BAD, BAD)
    assert len({record.epoch for record in history.loader.fault_log}) == 1
