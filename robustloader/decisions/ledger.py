"""The ledger: every task that was given out and not yet delivered.

*dispatched → arrived → delivered*. A task leaves the ledger exactly once, by :meth:`Ledger.deliver` or
:meth:`Ledger.withdraw`. Only a result that was received and decoded counts as arrived; what a dead worker held
otherwise is replayed under the same id, and a late result of an earlier incarnation is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Ledger", "Task"]


@dataclass(slots=True, eq=False)
class Task:
    """A request for one batch.

    Attributes:
        id: number within the epoch, from 0, in the order the sampler yielded them.
        indices: what the sampler yielded, untouched.
        samples: the same as a list with one index per sample (one entry without automatic batching).
        spares: indices the worker may use in place of samples it cannot load.
        avoid: positions that must be replaced without loading them.
        careful: load sample by sample and prove each alone, because a worker died on this task.
        verify: prove that each sample survives encoding and decoding, because the batch did not.
        rounds: how often spares were drawn.
        worker_id, incarnation: who has it; ``worker_id`` is -1 while nobody has.
        attempt: 1, and one more for each replay.
        arrived: whether ``result`` holds the decoded result.
    """

    id: int
    indices: Any
    samples: list[Any]
    spares: tuple[Any, ...] = ()
    avoid: tuple[int, ...] = ()
    careful: bool = False
    verify: bool = False
    rounds: int = 1
    worker_id: int = -1
    incarnation: int = -1
    attempt: int = 0
    arrived: bool = False
    result: Any = None


@dataclass(slots=True)
class Ledger:
    """The open tasks of one epoch. ``in_order`` delivers by id, otherwise by arrival."""

    in_order: bool
    _tasks: dict[int, Task] = field(default_factory=dict)
    _arrivals: deque[Task] = field(default_factory=deque)
    _next_id: int = 0

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(list(self._tasks.values()))

    @property
    def next_id(self) -> int:
        """The id the next task gets."""
        return self._next_id

    @property
    def ready(self) -> int:
        """How many tasks have arrived and wait to be delivered."""
        return len(self._arrivals)

    def open(self, indices: Any, samples: list[Any]) -> Task:
        """Enter a new task."""
        task = Task(self._next_id, indices, samples)
        self._tasks[task.id] = task
        self._next_id += 1
        return task

    def skip(self) -> int:
        """Leave out a number that was delivered before the epoch was resumed; returns it."""
        self._next_id += 1
        return self._next_id - 1

    def get(self, task_id: int) -> Task | None:
        """The open task with this id, if there is one."""
        return self._tasks.get(task_id)

    def assign(self, task: Task, worker_id: int, incarnation: int) -> None:
        """Note that a worker was sent the task."""
        task.worker_id = worker_id
        task.incarnation = incarnation
        task.attempt += 1

    def accept(self, task_id: int, worker_id: int, incarnation: int) -> Task | None:
        """The task a message speaks of; None where the message is late: the task has been given to someone else since,
        has arrived already, or is closed."""
        task = self._tasks.get(task_id)
        if task is None or task.arrived or task.worker_id != worker_id or task.incarnation != incarnation:
            return None
        return task

    def arrive(self, task: Task, result: Any) -> None:
        """Keep the decoded result of a task until it is delivered."""
        task.arrived = True
        task.result = result
        self._arrivals.append(task)

    def deliverable(self) -> Task | None:
        """The task whose turn it is, if it has arrived."""
        if self.in_order:
            head = next(iter(self._tasks.values()), None)
            return head if head is not None and head.arrived else None
        return self._arrivals[0] if self._arrivals else None

    def deliver(self, task: Task) -> None:
        """Close a task: its batch goes to the trainer."""
        del self._tasks[task.id]
        self._arrivals.remove(task)

    def withdraw(self, task: Task) -> None:
        """Close a task that will never be delivered (the end of an iterable dataset)."""
        del self._tasks[task.id]
        if task.arrived:
            self._arrivals.remove(task)

    def release(self, worker_id: int, incarnation: int) -> list[Task]:
        """Take back, in task order, what a worker had not finished; the tasks belong to nobody then."""
        lost = [
            task
            for task in self._tasks.values()
            if task.worker_id == worker_id and task.incarnation == incarnation and not task.arrived
        ]
        for task in lost:
            task.worker_id = task.incarnation = -1
        return sorted(lost, key=lambda task: task.id)

    def held_by(self, worker_id: int) -> int:
        """Tasks given to this worker and not yet delivered, arrived or not (torch's ``_workers_num_tasks``)."""
        return sum(task.worker_id == worker_id for task in self._tasks.values())

    def waiting_for(self, worker_id: int) -> int:
        """Tasks given to this worker that have not arrived."""
        return sum(task.worker_id == worker_id and not task.arrived for task in self._tasks.values())
