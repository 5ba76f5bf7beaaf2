"""What becomes of the tasks, the suspects and the pool when a worker dies.

Deaths are classified by the crew and judged by the pure rules of ``decisions.blame``; this module carries the judgement
out. It never raises: what the trainer must hear of is left in the books.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

from robustloader.decisions.blame import OUTSIDE_TRIALS, Cause, Judgement, Point
from robustloader.decisions.keys import Key, index_key
from robustloader.decisions.ledger import Task
from robustloader.engine.books import Books
from robustloader.engine.crew import Crew, Label, Slot, TrialCase
from robustloader.engine.pool import Died, NotStarted, Worker
from robustloader.errors import ResourceError, WorkerCrashError, WorkerError, WorkerHangError, WorkerStartError
from robustloader.events import FaultAction, FaultKind, FaultRecord, WorkerCrashed
from robustloader.policies import RECORDED_AS, RecoveryPolicy
from robustloader.transport.messages import TRACEBACK_CHARS
from robustloader.worker.beacon import Reading

__all__ = ["Recovery"]


class Recovery:
    """Recovery for one iterator.

    Attributes:
        orphans: shards of an iterable dataset without a process.
        local: the training process loads the rest of the epoch, because no workers can be kept.

    Args:
        on_fall_back: called when ``local`` becomes true.
    """

    def __init__(
        self,
        books: Books,
        crew: Crew,
        policy: RecoveryPolicy | None,
        *,
        on_fall_back: Callable[[], None] | None = None,
    ) -> None:
        self.books = books
        self.crew = crew
        self.policy = policy
        self.orphans: deque[Slot] = deque()
        self.local = False
        self._local_reason = ""
        self._vain_deaths = 0  # while closing in, in a row, with nothing in hand
        self._on_fall_back = on_fall_back

    # --- a death

    def on_died(self, died: Died) -> None:
        """A worker process ended that nobody had asked to."""
        books, crew = self.books, self.crew
        worker = died.worker
        slot = crew.slot_of(worker)
        cause = crew.account(died)
        case, slot.trial = slot.trial, None
        lost = books.ledger.release(worker.worker_id, worker.incarnation)
        task, position, index = books.in_hand(died, case)
        event = crew.report_death(died, cause, index, len(lost))
        crew.vacate(slot)
        if self.policy is None:
            books.raise_once(crew.crash_error(event))
            return
        if cause == "start" and not worker.killed_for and crew.nobody_starts():
            error = WorkerStartError(
                f"no worker became ready: {crew.failed_starts} processes ended in Python's own start-up (exit code 1). "
                "Their tracebacks are on stderr. With spawn and forkserver, a script must keep its main part under "
                'if __name__ == "__main__":',
                worker_id=worker.worker_id,
                pid=worker.pid,
            )
            books.raise_once(error)
            return
        if books.iterable:
            self._on_shard_died(slot, lost, event, cause, died)
            return
        key = None if task is None or position is None else index_key(index)
        if case is not None and died.reading.phase in ("idle", "init") and not books.closing:
            # Killed before the trial began, or after the sample had survived it: that proves nothing. While closing,
            # restarts are outside the budget, and only the count of trials bounds them.
            slot.trials.appendleft(case)
            self._requeue(lost)
            self._restart_or_shrink(slot, cause, None)
            return
        if task is None:
            self._requeue(lost)
            self._vain_deaths += 1
            self._restart_or_shrink(slot, cause, None)
            return
        self._vain_deaths = 0
        judgement = self._judge(task, position, key, cause, on_trial=case is not None)
        waiting = case.waiting if case is not None else []
        if judgement.action == "trial" and key is not None and position is not None:
            suspected = [other for other in lost if key in map(index_key, other.samples)]
            if case is None and task not in suspected:
                suspected.append(task)
            slot.trials.append(TrialCase(key, index, position, task, waiting + suspected))
            self._requeue([other for other in lost if other not in suspected])
            self._restart_or_shrink(slot, cause, key)
            return
        label: Label | None = key if key is not None else ("task", task.id)
        if judgement.action == "convict" and key is not None:
            self._convict(key, index, task, judgement, event, worker)
        elif judgement.action == "exclude" and position is not None:
            self._exclude(task, position, judgement, event)
        elif judgement.action == "condemn":
            self._condemn(task, judgement, event)
        elif judgement.action == "careful":
            task.careful = True
        self._requeue(waiting + lost)
        if judgement.action in ("convict", "exclude", "condemn"):
            crew.spend(cause, label)
            crew.forgive(label, judgement.refund)
            crew.schedule(slot)
            self.check_suspects()
        else:
            self._restart_or_shrink(slot, cause, label)

    def _on_shard_died(self, slot: Slot, lost: list[Task], event: WorkerCrashed, cause: Cause, died: Died) -> None:
        """A shard goes on from where its results end; one that dies there again and again ends."""
        assert self.policy is not None
        for order in reversed(lost):
            order.worker_id = slot.worker_id  # only this shard can do it
            slot.orders.appendleft(order)
        point = _point_of(died.reading, self.books.run)
        deaths = slot.blame.died(point, cause, poison_after=self.policy.poison_after) if point is not None else 0
        label = ("shard", slot.worker_id, slot.batches) if point is not None else None
        if not deaths:
            self._restart_or_shrink(slot, cause, label)
            return
        reason = f"{deaths} of its processes died at the same point of the stream ({cause})"
        task = lost[0] if lost else Task(-1, None, [])
        self._record("poison", None, reason, task, deaths, event, "skipped", died.worker.stack)
        self.books.desk.end_shard(self.books.recording, slot.worker_id, slot.batches, reason)
        self.crew.spend(cause, label)
        self.crew.forgive(label, deaths)
        slot.ended, slot.state = True, "ended"
        self.books.withdraw_stream(slot.worker_id)
        slot.orders.clear()

    def _judge(self, task: Task, position: int | None, key: Key | None, cause: Cause, *, on_trial: bool) -> Judgement:
        blame = self.books.blame
        if key is None:
            return blame.task_died(task.id, cause, careful=task.careful)
        if key in self.books.desk.known_bad:
            return Judgement("convict", refund=1, deaths=1)
        place = task.id if position is not None and position >= 0 else -1  # a spare has no place to be left out of
        return blame.sample_died(key, cause, on_trial=on_trial, task=place)

    def _requeue(self, tasks: list[Task]) -> None:
        for task in tasks:
            if not task.arrived:
                self.books.requeue(task)

    def _convict(
        self, key: Key, index: Any, task: Task, judgement: Judgement, event: WorkerCrashed, worker: Worker
    ) -> None:
        """It is proved that this sample kills workers: it is never loaded again, nowhere."""
        books, desk = self.books, self.books.desk
        if key in desk.known_bad:
            return
        how = {"hang": "it stayed silent", "exit": f"exit code {event.exitcode}"}.get(event.cause, event.signal)
        message = f"it killed its worker {judgement.deaths} times, the last time alone in it ({how})"
        raises = desk.policy.action == "raise"
        desk.quarantine.add(index, "poison")
        kind: FaultKind = "hang" if event.cause == "hang" else "poison"
        action: FaultAction = "raised" if raises else "quarantined"
        self._record(kind, index, message, task, judgement.deaths, event, action, worker.stack)
        if not raises:
            books.learn()
            return
        error: WorkerError = self.crew.crash_error(event)
        if event.cause == "hang":
            error = WorkerHangError(
                message,
                worker_id=event.worker_id,
                pid=event.pid,
                index=index,
                silent_s=worker.silent_s,
                stack=worker.stack,
            )
        self._fail_all_with(key, error)

    def _fail_all_with(self, key: Key, error: WorkerError) -> None:
        """With ``faults="raise"``: every batch under way that needs this sample raises."""
        for task in self.books.ledger:
            if not task.arrived and key in map(index_key, task.samples):
                self.books.fail(task, copy.copy(error))  # each is raised once

    def _exclude(self, task: Task, position: int, judgement: Judgement, event: WorkerCrashed) -> None:
        """A sample kills in the company of others of its task, though not alone: this task does without it."""
        if self.books.desk.policy.action == "raise":
            self.books.fail(task, self.crew.crash_error(event))
            return
        task.avoid = tuple(sorted({*task.avoid, position}))
        index = task.samples[position]
        message = f"it killed its worker {judgement.deaths} times in batch {task.id}, where others had survived alone"
        action = RECORDED_AS[self.books.desk.policy.action]
        self._record("crash", index, message, task, judgement.deaths, event, action)

    def _condemn(self, task: Task, judgement: Judgement, event: WorkerCrashed) -> None:
        """No sample of the task kills alone, but the task does: all its samples are replaced."""
        action = self.books.desk.policy.action
        if action == "raise":
            self.books.fail(task, self.crew.crash_error(event))
            return
        task.avoid = tuple(range(len(task.samples)))
        message = f"batch {task.id} killed its worker {judgement.deaths} times, though no sample of it does alone"
        self._record("poison", None, message, task, judgement.deaths, event, "replaced")

    def _record(
        self,
        kind: FaultKind,
        index: Any,
        message: str,
        task: Task,
        deaths: int,
        event: WorkerCrashed,
        action: FaultAction,
        stack: str = "",
    ) -> None:
        record = FaultRecord(
            kind=kind,
            index=index,
            message=message,
            traceback=stack[:TRACEBACK_CHARS],
            worker_id=event.worker_id,
            pid=event.pid,
            epoch=self.books.epoch,
            task=task.id,
            attempts=deaths,
            signal=event.signal,
            action=action,
        )
        self._enter(record)

    def _enter(self, record: FaultRecord) -> None:
        self.books.desk.enter_record(record, self.books.recording)
        error = self.books.desk.budget_error()
        if error is not None:
            self.books.raise_once(error)

    # --- trials

    def on_trial_passed(self, slot: Slot) -> None:
        """A suspect did not kill its worker when it was alone in it."""
        case, slot.trial = slot.trial, None
        if case is not None:
            self.books.blame.trial_passed(case.key, case.task.id)
            self._requeue(case.waiting)
        self.check_suspects()

    def check_suspects(self) -> None:
        """Let the training process load, if that only waited for suspects to be cleared or convicted."""
        if self.books.closing and not self._suspects_left():
            self._go_local()

    def _suspects_left(self) -> bool:
        books = self.books
        return any(slot.trials or slot.trial for slot in self.crew.slots) or any(
            not task.arrived and books.suspected(task) for task in books.ledger
        )

    def _give_up_suspects(self) -> None:
        """Suspects that cannot be tried are left out rather than loaded in the training process."""
        for slot in self.crew.slots:
            cases = [*slot.trials, *([slot.trial] if slot.trial else [])]
            slot.trials.clear()
            slot.trial = None
            for case in cases:
                deaths = self.books.blame.deaths_of(case.key)
                message = f"it was in hand when {deaths} workers died, and no process could be had to try it alone"
                self._enter(self._left_out(case.index, message, case.task, deaths))
                self._do_without(case.index, message)
                self._requeue(case.waiting)
        for task in self.books.ledger:
            if not task.arrived and self.books.suspected(task):
                self._leave_out(task)
        self._go_local()

    def _leave_out(self, task: Task) -> None:
        """Do without what is suspected in a task: the samples with deaths to their names, or all of it.

        As everywhere, one death is chance; from ``poison_after`` on it is suspicion.
        """
        assert self.policy is not None
        blame, enough = self.books.blame, self.policy.poison_after
        suspects = {place for place, index in enumerate(task.samples) if blame.deaths_of(index_key(index)) >= enough}
        if not suspects and blame.deaths_on(task.id) < enough:
            blame.arrived(task.id, map(index_key, task.samples))
            return
        message = "workers died while it was in hand, and no process could be had to try it again"
        for index in [task.samples[place] for place in sorted(suspects)] or [None]:
            self._enter(self._left_out(index, message, task, task.attempt))
            if index is not None:
                self._do_without(index, message)
        if not suspects and self.books.desk.policy.action == "raise":
            self.books.fail(task, WorkerCrashError(f"batch {task.id}: {message}"))
        elif not suspects:
            task.avoid = tuple(range(len(task.samples)))
            self.books.avoid_known(task)
        blame.arrived(task.id, map(index_key, task.samples))

    def _do_without(self, index: Any, message: str) -> None:
        """A suspect is never loaded again, though nothing is proved."""
        self.books.desk.quarantine.add(index, "crash")
        if self.books.desk.policy.action == "raise":
            self._fail_all_with(index_key(index), WorkerCrashError(f"sample {index!r}: {message}", index=index))
        else:
            self.books.learn()

    def _left_out(self, index: Any, message: str, task: Task, deaths: int) -> FaultRecord:
        """What is recorded of a sample (or, without index, of a task) that is done without, unproved."""
        return FaultRecord(
            kind="crash",
            index=index,
            message=message,
            epoch=self.books.epoch,
            task=task.id,
            attempts=deaths,
            action=RECORDED_AS[self.books.desk.policy.action],
        )

    # --- restarts, and fewer workers

    def on_not_started(self, happening: NotStarted) -> None:
        """A process could not be started in a dead one's place."""
        slot = self.crew.slots[happening.worker_id]
        slot.incarnation += 1
        if not isinstance(happening.error, Exception):  # a signal handler's: the start is not to blame
            self.crew.schedule(slot)
            return
        slot.streak += 1
        if self.policy is None:  # a recycled worker's successor
            self.books.raise_once(WorkerStartError(f"a worker process could not be started: {happening.error}"))
            return
        self._restart_or_shrink(slot, "start", None, f"a worker process could not be started: {happening.error}")

    def without(self, slots: list[Slot], error: BaseException) -> None:
        """These first processes could not be started, or for want of something were not tried (``ResourceError``)."""
        assert self.policy is not None
        reason = str(error) if isinstance(error, ResourceError) else f"a worker process could not be started: {error}"
        if len(self.crew.slots) - len(slots) < self.policy.min_workers:
            self._fall_back(reason, None, error)
            return
        for slot in slots:
            self.crew.retire(slot, reason)
            self._hand_on(slot)

    def _restart_or_shrink(self, slot: Slot, cause: Cause, label: Label | None, reason: str = "") -> None:
        assert self.policy is not None
        credit = self.crew.spend(cause, label)
        if self.books.closing:
            if cause == "start" or self._vain_deaths > max(OUTSIDE_TRIALS, self.policy.max_restarts):
                self._give_up_suspects()
            elif self._suspects_left():
                self.crew.schedule(slot)  # outside the budget; blame bounds it, or the count of deaths in vain
            else:
                self._go_local()
            return
        # Where memory runs out, a worker less helps, and the same number again does not.
        if credit and not (cause == "memory" and self.crew.size > self.policy.min_workers):
            self.crew.schedule(slot)
        else:
            self._shrink(slot, reason or cause)

    def _shrink(self, slot: Slot, reason: str) -> None:
        assert self.policy is not None
        crew = self.crew
        if crew.size - 1 >= self.policy.min_workers:
            crew.retire(slot, f"worker {slot.worker_id} is not restarted ({reason})")
            crew.budget.refill()
            self._hand_on(slot)
        else:
            least = f"the pool may not become smaller than min_workers={self.policy.min_workers}"
            self._fall_back(f"{least} and the restart budget is spent ({reason})", slot)

    def _hand_on(self, slot: Slot) -> None:
        """A retired slot's suspects go to another slot; its shard waits for a place."""
        if self.books.iterable:
            self.books.withdraw_stream(slot.worker_id)
            slot.orders.clear()
            if not slot.ended:
                self.orphans.append(slot)
            return
        self.hand_on_trials(slot)

    def hand_on_trials(self, slot: Slot) -> None:
        """The suspects of a slot that is not there any more go to another one, if possible one that has a process."""
        heirs = [other for other in self.crew.slots if other.state not in ("retired", "ended", "reserve")]
        if heirs:
            min(heirs, key=lambda other: other.new).trials.extend(slot.trials)
            slot.trials.clear()

    def _fall_back(self, reason: str, slot: Slot | None, cause: BaseException | None = None) -> None:
        """No workers can be kept: the training process loads the rest, where that is allowed and safe."""
        crew = self.crew
        assert self.policy is not None
        if not self.policy.in_process or not crew.safe_in_process:
            why = "in_process=False" if not self.policy.in_process else "what killed them would kill it too"
            error = crew.budget_error(f"{reason}, and the training process does not load in their place: {why}.")
            error.__cause__ = cause
            self.books.raise_once(error)
            return
        self._local_reason = reason
        if slot is not None and not self.books.iterable and self._suspects_left():
            # Suspects are never loaded in the training process: one more process looks into them, outside the budget.
            self._vain_deaths = 0
            self.books.close_in()
            crew.schedule(slot)
            return
        self._go_local()

    def _go_local(self) -> None:
        books = self.books
        if not self.crew.safe_in_process:
            books.raise_once(
                self.crew.budget_error(f"{self._local_reason}, and then suspects crashed their last worker.")
            )
            return
        self.local = True
        if self._on_fall_back is not None:
            self._on_fall_back()
        books.open_up()
        for slot in self.crew.slots:
            if books.iterable:
                books.withdraw_stream(slot.worker_id)
                slot.orders.clear()
                if not slot.ended and slot not in self.orphans:
                    self.orphans.append(slot)
            elif slot.worker is not None:
                self._requeue(books.ledger.release(slot.worker_id, slot.worker.incarnation))
        self.crew.retire_all(self._local_reason)

    # --- shards of an iterable dataset

    def on_left(self, worker: Worker) -> None:
        """A process that was asked to leave has left."""
        slot = self.crew.slot_of(worker)
        if slot.worker is worker:
            slot.worker = None
            if slot.state == "live":
                slot.state = "ended"

    def next_orphan(self) -> Slot | None:
        """A shard that lost its process, once there is a place for it again."""
        if self.orphans and self.crew.processes >= self.crew.size:
            for slot in self.crew.slots:  # persistent workers stay when their shard has ended: one gives way
                if slot.ended and slot.worker is not None and slot.state == "live":
                    if not slot.worker.dismissed:
                        self.crew.pool.dismiss(slot.worker)
                    break
        if self.orphans and self.crew.processes < self.crew.size:
            slot = self.orphans.popleft()
            slot.streak = 0
            self.crew.schedule(slot)
            return slot
        return None


def _point_of(reading: Reading, run: int) -> Point | None:
    """Which moment of loading a batch of this run a process died at; None where it was at none."""
    if reading.phase in ("idle", "init") or reading.run != run or reading.task < 0:  # reading it again is no task
        return None
    return reading.task, reading.phase, reading.position
