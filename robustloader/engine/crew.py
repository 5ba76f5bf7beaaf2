"""The workers of one iterator as a crew: who is there, who comes back when, how many there may be.

Decides with the pure rules of ``decisions`` and acts through the pool. Knows nothing about batches.
"""

from __future__ import annotations

import logging
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from robustloader.decisions.blame import Cause, ShardBlame
from robustloader.decisions.budgets import BATCHES_PER_CREDIT, RestartBudget
from robustloader.decisions.keys import Key
from robustloader.decisions.ledger import Task
from robustloader.engine.pool import Died, Pool, Worker
from robustloader.errors import RestartBudgetError, WorkerCrashError
from robustloader.events import (
    Event,
    PoolHealed,
    PoolResized,
    PoolShrunk,
    WorkerCrashed,
    WorkerHung,
    WorkerRecycled,
    WorkerRestarted,
)
from robustloader.policies import RecoveryPolicy
from robustloader.system import host
from robustloader.telemetry import EpochRecording
from robustloader.worker.beacon import Reading

__all__ = ["Crew", "Label", "Slot", "TrialCase"]

logger = logging.getLogger("robustloader")

_TAKES_TRAINER_ALONG: frozenset[Cause] = frozenset(("memory", "shared memory", "crash", "exit", "hang"))
_HISTORY = 64

Label = Key | tuple[str, int] | tuple[str, int, int]
"""What a death is put down to: a sample, a batch, or a place of a shard."""

Details = Callable[["Slot"], dict[str, Any]]
"""What a slot's next process must be told beyond its ids. Passed per call: kept here, it would tie crew and iterator
into a cycle, and an abandoned iterator would not go at once."""


@dataclass(slots=True, eq=False)
class TrialCase:
    """A suspected sample that waits for its trial, and the tasks that wait for the verdict."""

    key: Key
    index: Any
    position: int
    task: Task
    waiting: list[Task]


@dataclass(slots=True, eq=False)
class Slot:
    """The place of one worker id.

    Attributes:
        state: "live" (there is a process), "waiting" (for its restart), "starting" (off the calling thread),
            "ended" (its shard has ended and its process has left), "retired" (the pool has shrunk), "reserve" (the pool
            was made smaller by choice). The pool may grow into a slot in reserve or retired again.
        streak: deaths in a row without a finished task between them.
        leaving: why this slot's process goes once its tasks are done: "recycle" (another takes its place), "retire"
            (the pool goes on without it), "reserve" (likewise, by choice), or "" for none of it; ``held_bytes`` and
            ``leaving_reason`` tell more.
        recycled: the next process follows one that was replaced, or none, not one that died.
        new: the pool has grown by this slot, and no process of it has been ready: it gets no tasks that others would
            have to wait for.
        trials: samples to be tried alone in this slot's next fresh process; ``trial`` is the one under way.
        ended, batches, calls, blame, rng, snapshot, orders: iterable only. Whether this shard has ended, how many of
            its batches have arrived, how often its stream was read for them, what its processes have died of since, the
            random states it began the epoch with (None: those of its seed), where its stream stands if it can tell (for
            a successor), and tasks to be sent once there is a process.
    """

    worker_id: int
    worker: Worker | None = None
    incarnation: int = 0
    state: str = "waiting"
    due_ns: int = 0
    waited_s: float = 0.0
    streak: int = 0
    leaving: str = ""
    leaving_reason: str = ""
    held_bytes: int = 0
    recycled: bool = False
    new: bool = False
    trials: deque[TrialCase] = field(default_factory=deque)
    trial: TrialCase | None = None
    ended: bool = False
    batches: int = 0
    calls: int = 0
    blame: ShardBlame = field(default_factory=ShardBlame)
    rng: Any = None
    snapshot: bytes | None = None
    orders: deque[Task] = field(default_factory=deque)

    @property
    def takes_tasks(self) -> bool:
        """Whether new tasks may go to this slot's process now."""
        return self.state == "live" and self.trial is None and not self.trials and not self.leaving and not self.new

    @property
    def counts(self) -> bool:
        """Whether the lookahead holds batches for this slot."""
        return self.state != "reserve" and self.leaving != "reserve"


class Crew:
    """Slots, restart budget and pool size of one iterator.

    Attributes:
        pool: the processes.
        policy, budget: what to do about deaths, and the credit for restarts; without a policy there is no budget.
        size: workers that there should be, dead ones that will be restarted included.
        slots: one for each worker id that there has been.
        history: the last events, for the text of an error.
        recording: of the epoch that runs; set by the iterator before anything happens.
        failed_starts: processes that ended before they could say anything.
        anyone_ready: a process has become ready, whichever; set by the iterator.
        memory_low: the pool must not grow back now; set by the iterator.
        memory_killed: the kernel's memory killer has taken a worker.
        tick_s: how often, in seconds, deadlines should be looked at.

    Args:
        policy: None recovers nothing.
        timeout_s: the loader's ``timeout``, a deadline per task, in seconds; 0 for none.
        heals: whether the pool may grow back within an epoch.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        num_workers: int,
        policy: RecoveryPolicy | None,
        timeout_s: float,
        heals: bool,
    ) -> None:
        self.pool = pool
        self.policy = policy
        self.size = num_workers
        self.slots = [Slot(worker_id) for worker_id in range(num_workers)]
        self.history: deque[Event] = deque(maxlen=_HISTORY)
        self.recording: EpochRecording
        self._heals = heals
        self._deaths: list[tuple[Cause, Label | None]] = []
        self._oom_kills = host.memory_kills()
        self._wait_begun_ns = 0
        self._waited_ns = 0
        self._since_shrink = 0
        self.failed_starts = 0
        self.memory_low = False
        self.memory_killed = False
        self.anyone_ready = False
        if policy is not None:
            self.budget = RestartBudget(
                max_restarts=policy.max_restarts, backoff_s=policy.backoff_s, max_backoff_s=policy.max_backoff_s
            )
        self._sample_limit_s = policy.hang_after_s if policy is not None else None
        self._task_limit_s = timeout_s or None
        self._start_limit_s = policy.start_timeout_s if policy is not None else None
        bounds = (self._sample_limit_s, self._task_limit_s, self._start_limit_s)
        limits = [limit for limit in bounds if limit is not None]
        self.tick_s = min([1.0, *(max(0.02, limit / 8) for limit in limits)])

    # --- who is there

    @property
    def live(self) -> list[Slot]:
        """Slots whose process takes tasks."""
        return [slot for slot in self.slots if slot.takes_tasks]

    @property
    def processes(self) -> int:
        """Worker processes there are, or will be when their restart is due."""
        return sum(slot.state in ("live", "waiting", "starting") for slot in self.slots)

    def start_all(self, details: Details, workers: int) -> Exception | None:
        """Start the first processes of the first ``workers`` slots that have something to load. What one raises comes
        back; those started before stay."""
        for slot in self.slots:
            if slot.ended:  # before the epoch was resumed
                slot.state = "ended"
        for slot in [slot for slot in self.slots if not slot.ended][:workers]:
            try:
                slot.worker = self.pool.start(slot.worker_id, slot.incarnation, **details(slot))
            except Exception as error:
                return error
            slot.state = "live"
        return None

    def slot_of(self, worker: Worker) -> Slot:
        """The slot a worker belongs to."""
        return self.slots[worker.worker_id]

    def emit(self, event: Event) -> None:
        """Tell the sinks, and remember it for an error's history."""
        self.history.append(event)
        self.recording.emit(event)

    # --- a death

    def account(self, died: Died) -> Cause:
        """Why a worker died."""
        reason = died.worker.killed_for
        code = died.exitcode
        before, kills = self._oom_kills, host.memory_kills()
        if kills is not None:
            self._oom_kills = kills
        if reason == "hang":
            return "hang"
        if reason == "start":
            return "start"
        if code is None:
            return "unknown"
        if code == 1 and not died.worker.ready:
            return "start"  # Python's exit status after an exception in multiprocessing's own start-up
        if code == -signal.SIGKILL:
            memory = before is not None and kills is not None and kills > before
            self.memory_killed = self.memory_killed or memory
            return "memory" if memory else "killed"
        if code == -signal.SIGBUS:
            return "shared memory"
        if code in (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP):
            return "killed"
        return "crash" if code < 0 else "exit"

    def nobody_starts(self) -> bool:
        """Note a process that ended before it could say anything; whether that is all that ever happens."""
        self.failed_starts += 1
        return not self.anyone_ready and self.failed_starts > len(self.slots)

    def report_death(self, died: Died, cause: Cause, index: Any, tasks: int) -> WorkerCrashed:
        """Emit what is known about a death."""
        worker, reading = died.worker, died.reading
        event = WorkerCrashed(
            epoch=self.recording.epoch,
            worker_id=worker.worker_id,
            incarnation=worker.incarnation,
            pid=worker.pid,
            exitcode=died.exitcode,
            signal=host.signal_name(died.exitcode),
            cause=cause,
            phase=reading.phase,
            index=index,
            tasks=tasks,
        )
        self.emit(event)
        return event

    def vacate(self, slot: Slot) -> None:
        """The slot's process is gone."""
        worker = slot.worker
        if worker is not None and worker.finished:
            slot.streak = 0
        if slot.leaving == "reserve":  # a death comes before the choice: recovery decides what becomes of the slot
            self.size += 1
            self.recording.active_workers = self.size
        slot.worker = None
        slot.leaving = ""
        slot.streak += 1
        slot.incarnation += 1

    def spend(self, cause: Cause, label: Label | None) -> bool:
        """Book a death; whether there is credit for a restart."""
        self._deaths.append((cause, label))
        return self.budget.spend()

    def forgive(self, label: Label | None, deaths: int) -> None:
        """What these deaths were put down to is done without from now on: they will not come again."""
        self.budget.refund(deaths)
        self._deaths = [death for death in self._deaths if death[1] != label]

    def schedule(self, slot: Slot) -> None:
        """Restart the slot's worker when its backoff is over."""
        slot.state, slot.recycled = "waiting", False
        slot.waited_s = self.budget.delay_s(slot.streak) if self.policy is not None else 0.0
        slot.due_ns = time.monotonic_ns() + int(slot.waited_s * 1e9)

    def let_go(self, slot: Slot, limit_bytes: int | None) -> None:
        """Dismiss the process of a slot that is to leave and has nothing to do: replaced at once, or for good."""
        worker, leaving = slot.worker, slot.leaving
        assert worker is not None
        self.pool.dismiss(worker)
        slot.worker, slot.leaving = None, ""
        slot.incarnation += 1
        if leaving == "retire":
            self.retire(slot, slot.leaving_reason)
            return
        if leaving == "reserve":
            slot.state = "reserve"
            return
        slot.state, slot.recycled, slot.streak = "waiting", True, 0
        slot.due_ns, slot.waited_s = 0, 0.0
        self.emit(
            WorkerRecycled(
                epoch=self.recording.epoch,
                worker_id=worker.worker_id,
                pid=worker.pid,
                used_bytes=slot.held_bytes,
                limit_bytes=limit_bytes or 0,
            )
        )

    # --- a pool that follows the run

    @property
    def resizing(self) -> bool:
        """Whether a process that the pool grew by is still on its way."""
        return any(slot.new and slot.state in ("live", "waiting", "starting") for slot in self.slots)

    @property
    def whole(self) -> bool:
        """Whether every worker that there should be is there: none is dead, on its way or leaving."""
        return sum(slot.takes_tasks for slot in self.slots) == self.size and not any(s.leaving for s in self.slots)

    def grow(self, workers: int, reason: str) -> None:
        """Start further processes, as many as make the pool ``workers`` large."""
        before, added = self.size, workers - self.size
        there = [slot for state in ("reserve", "retired") for slot in self.slots if slot.state == state]
        for slot in [*there, *(Slot(len(self.slots) + number, state="reserve") for number in range(added))]:
            if self.size == workers:
                break
            if slot.worker_id == len(self.slots):
                self.slots.append(slot)
            self.size += 1
            slot.streak, slot.new = 0, True
            self.schedule(slot)
            slot.recycled = True
        self._tell_resized(before, reason)

    def lay_off(self, workers: int, reason: str) -> list[Slot]:
        """Let the last workers go once they have nothing to do, as many as leave ``workers``; returns their slots."""
        before = self.size
        there = [slot for slot in self.slots if slot.takes_tasks]
        slots = there[len(there) - max(0, before - workers) :]
        for slot in slots:
            slot.leaving, slot.leaving_reason = "reserve", reason
        self.size -= len(slots)
        self._tell_resized(before, reason)
        return slots

    def can_do_without(self, slot: Slot) -> bool:
        """Whether a slot is one that the pool was to grow by, and there are enough workers without it."""
        return slot.new and self.size > (self.policy.min_workers if self.policy is not None else 1)

    def withdraw(self, slot: Slot, reason: str) -> None:
        """A process that the pool was to grow by cannot be had: without it, as before. Costs no restart credit."""
        before = self.size
        slot.worker, slot.state, slot.new = None, "reserve", False
        slot.incarnation += 1
        self.size -= 1
        self._tell_resized(before, reason)

    def _tell_resized(self, before: int, reason: str) -> None:
        self.recording.active_workers = self.size
        self.emit(PoolResized(epoch=self.recording.epoch, before=before, workers=self.size, reason=reason))
        logger.info("the pool goes on with %d instead of %d workers: %s", self.size, before, reason)

    # --- fewer workers

    def retire(self, slot: Slot, reason: str) -> None:
        """The pool goes on without this slot."""
        slot.state = "retired"
        self.size -= 1
        self._since_shrink = 0
        self.recording.active_workers = self.size
        self.emit(PoolShrunk(epoch=self.recording.epoch, workers=self.size, reason=reason))
        logger.warning("the pool shrank to %d workers: %s", self.size, reason)

    def retire_all(self, reason: str) -> None:
        """No workers any more: the training process loads from now on."""
        for slot in self.slots:
            slot.state = "retired"
            if slot.worker is not None:
                self.pool.dismiss(slot.worker)
                slot.worker = None
        self.size = self.recording.active_workers = 0
        self.emit(PoolShrunk(epoch=self.recording.epoch, workers=0, reason=reason))
        logger.warning("the training process loads the rest of the epoch itself: %s", reason)

    @property
    def safe_in_process(self) -> bool:
        """Whether what killed the workers would leave the training process alone."""
        return not any(cause in _TAKES_TRAINER_ALONG for cause, _ in self._deaths)

    def delivered(self) -> None:
        """A batch was delivered: credit comes back, and one day the pool grows again."""
        if self.policy is None:
            return
        self.budget.delivered()
        self._since_shrink += 1
        if self._since_shrink >= BATCHES_PER_CREDIT * max(1, self.policy.max_restarts) and self.budget.full:
            self._since_shrink = 0
            self._deaths.clear()
            self._heal()

    def _heal(self) -> None:
        slot = next((slot for slot in self.slots if slot.state == "retired"), None)
        if self._heals and not self.memory_low and slot is not None and self.size > 0:
            self.heal(slot)

    def refill(self, slot: Slot, *, heals: bool) -> None:
        """A new epoch begins, and this slot's process is leaving or has left: another one takes its place, if there is
        one, or where the pool ``heals``."""
        if slot.state != "retired":
            slot.worker, slot.state = None, "retired"
            slot.incarnation += 1
        if self.processes < self.size:
            self.schedule(slot)
        elif heals:
            self.heal(slot)

    def heal(self, slot: Slot) -> None:
        """The pool grows back by this slot, which has no process."""
        self.size += 1
        self.recording.active_workers = self.size
        slot.streak = 0
        self.schedule(slot)
        self.emit(PoolHealed(epoch=self.recording.epoch, workers=self.size))

    # --- time passes

    def next_due_s(self) -> float:
        """Seconds until something here wants to be looked at."""
        wait = self.tick_s
        now = time.monotonic_ns()
        for slot in self.slots:
            if slot.state == "waiting":
                wait = min(wait, max(0.0, (slot.due_ns - now) / 1e9))
        return wait

    def start_due(self, details: Details) -> None:
        """Start the processes whose time has come."""
        now = time.monotonic_ns()
        for slot in self.slots:
            if slot.state == "waiting" and slot.due_ns <= now:
                slot.state = "starting"
                self.pool.start_aside(slot.worker_id, slot.incarnation, **details(slot))

    def arrived(self, worker: Worker) -> Slot:
        """A process that was started aside is there."""
        slot = self.slot_of(worker)
        slot.worker = worker
        slot.state = "live"
        if slot.recycled:
            slot.recycled = False
            return slot
        self.emit(
            WorkerRestarted(
                epoch=self.recording.epoch,
                worker_id=worker.worker_id,
                incarnation=worker.incarnation,
                pid=worker.pid,
                waited_s=slot.waited_s,
            )
        )
        return slot

    def begin_wait(self) -> None:
        """The trainer begins to wait: silence counts from here on, not while it computed."""
        self._wait_begun_ns = time.monotonic_ns()

    def watch(self, name_sample: Callable[[Worker], Any], has_work: Callable[[Worker], bool]) -> None:
        """Look at deadlines: kill what hangs, report what stalls.

        ``name_sample`` tells what a worker has in hand, ``has_work`` whether it should have something: one that is
        idle with work waiting, while the trainer listens, does not run.
        """
        policy = self.policy
        if policy is None:
            return
        now = time.monotonic_ns()
        self._waited_ns += now - self._wait_begun_ns
        self._wait_begun_ns = now
        passed_s = self._waited_ns / 1e9
        if passed_s < self.tick_s / 2:
            return
        self._waited_ns = 0
        passed_s = min(passed_s, 2 * self.tick_s)  # a longer gap means that this process itself was stopped
        for worker in self.pool.workers:
            if worker.dismissed or worker.killed_for:
                continue
            if not worker.ready:
                self._watch_start(worker, passed_s)
                continue
            reading = worker.beacon.read()
            idle = reading.phase == "idle" and not has_work(worker)
            task = (reading.run, reading.task, reading.done)
            if idle or task != worker.task:
                worker.task, worker.task_s = task, 0.0
            else:
                worker.task_s += passed_s
            moment = (reading.started_ns, reading.position)
            if idle or moment != worker.silent_since:
                worker.silent_since, worker.silent_s, worker.reported = moment, 0.0, False
            else:
                worker.silent_s += passed_s
            if self._is_hung(worker, reading):
                self._kill_hung(worker, name_sample(worker))
            elif policy.stall_report_s is not None and worker.silent_s > policy.stall_report_s and not worker.reported:
                worker.reported = True
                logger.warning(
                    "worker %d (pid %s) has been in phase %r for %.0f s, sample index %r; it is left alone",
                    worker.worker_id,
                    worker.pid,
                    reading.phase,
                    worker.silent_s,
                    name_sample(worker),
                )

    def _is_hung(self, worker: Worker, reading: Reading) -> bool:
        sample, task = self._sample_limit_s, self._task_limit_s
        return (sample is not None and worker.silent_s > sample * max(1, reading.in_flight)) or (
            task is not None and reading.task >= 0 and worker.task_s > task  # reading a stream again is no task
        )

    def _watch_start(self, worker: Worker, passed_s: float) -> None:
        limit = self._start_limit_s
        worker.silent_s += passed_s  # begins anew with its first phase
        if limit is not None and worker.silent_s > limit:
            logger.warning("worker %d (pid %s) was not ready after %g s", worker.worker_id, worker.pid, limit)
            worker.kill("start")

    def _kill_hung(self, worker: Worker, index: Any) -> None:
        worker.stack = worker.take_stacks()
        worker.silent_s = max(worker.silent_s, worker.task_s)
        reading = worker.beacon.read()
        worker.kill("hang")
        self.emit(
            WorkerHung(
                epoch=self.recording.epoch,
                worker_id=worker.worker_id,
                incarnation=worker.incarnation,
                pid=worker.pid,
                phase=reading.phase,
                index=index,
                silent_s=worker.silent_s,
                stack=worker.stack,
            )
        )

    # --- errors

    def crash_error(self, event: WorkerCrashed) -> WorkerCrashError:
        """What a death is without recovery, in words that users of torch search for."""
        hint = {
            "memory": "The kernel's memory killer took it: use fewer workers or a smaller prefetch_factor.",
            "shared memory": "It is possible that dataloader's workers are out of shared memory. "
            "Please try to raise your shared memory limit.",
            "crash": "Native code crashed while loading: try the sample alone, outside the loader.",
            "exit": "Code in the dataset ended the process.",
        }.get(event.cause, "Something outside the program may have killed it.")
        code = event.exitcode
        if code is not None and code < 0:
            how = f"is killed by signal: {signal.strsignal(-code)}."
        else:
            how = f"exited unexpectedly with exit code {code}."
        advice = " RecoveryPolicy() restarts workers and replays what they held." if self.policy is None else ""
        where = f" It had sample index {event.index!r} in hand." if event.index is not None else ""
        return WorkerCrashError(
            f"DataLoader worker (pid {event.pid}) {how} DataLoader worker (pid(s) {event.pid}) exited unexpectedly."
            f"{where} {hint}{advice}",
            worker_id=event.worker_id,
            pid=event.pid,
            exitcode=code,
            signal=event.signal,
            index=event.index,
            hint=hint,
        )

    def budget_error(self, reason: str) -> RestartBudgetError:
        """Workers kept dying, and there is no way on."""
        steps = "\n".join(f"  {_line(event)}" for event in self.history)
        return RestartBudgetError(f"{reason} What happened:\n{steps}", history=tuple(self.history))


def _line(event: Event) -> str:
    facts = {
        name: value
        for name, value in vars(event).items()
        if name not in ("time", "epoch", "stack") and value is not None
    }
    return f"{type(event).__name__}({', '.join(f'{name}={value!r}' for name, value in facts.items())})"
