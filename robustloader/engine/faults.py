"""Faults as the training process meets them: recorded, counted against the budget, warned of, raised if need be."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections import Counter
from collections.abc import Iterable
from typing import Any

from robustloader.decisions.budgets import FaultBudget
from robustloader.decisions.keys import Key, index_key
from robustloader.engine.quarantine import KILLERS, Quarantine
from robustloader.errors import FaultBudgetError, SampleError, WorkerCrashError, WorkerError, WorkerHangError, warn_user
from robustloader.events import FaultKind, FaultRecord, SampleReplaced, ShardEnded
from robustloader.policies import FaultPolicy
from robustloader.system import torch_private
from robustloader.telemetry import EpochRecording
from robustloader.transport.messages import Fault, Raised, Report

__all__ = ["FaultDesk", "add_note", "rebuild"]

_RECORDS_IN_ERROR = 32


class FaultDesk:
    """One per loader: what has failed so far, over all its epochs and iterators.

    Runs in the training process, in the thread that calls ``next()``.
    """

    def __init__(self, policy: FaultPolicy) -> None:
        self.policy = policy
        self.quarantine = Quarantine(policy.quarantine)
        self.budget = FaultBudget(burst=policy.burst, max_fraction=policy.max_fraction)
        self._first: list[FaultRecord] = []
        self._warned: set[str] = set()
        self._commonest: Counter[str] = Counter()
        self._hints: Counter[str] = Counter()

    @property
    def known_bad(self) -> dict[Key, FaultKind]:
        """Samples that are not to be fetched, and why."""
        return self.quarantine.kinds

    @property
    def repairs(self) -> bool:
        """Whether samples may be replaced, so that tasks need spares."""
        return self.policy.action != "raise" or bool(self.known_bad)

    def refusal(self, samples: Iterable[Any]) -> WorkerError | None:
        """With ``faults="raise"``: what a batch raises that needs a sample which has killed workers in this run. (One
        that only the quarantine file lists is replaced.)"""
        killers = self.quarantine.added
        if self.policy.action != "raise" or not killers:
            return None
        for index in samples:
            kind = killers.get(index_key(index))
            if kind is not None:
                text = f"sample {index!r} is not loaded again: it has killed workers in this run (kind {kind!r})"
                return WorkerHangError(text, index=index) if kind == "hang" else WorkerCrashError(text, index=index)
        return None

    def take(
        self,
        report: Report | None,
        recording: EpochRecording,
        *,
        task: int,
        worker_id: int | None,
        pid: int | None,
        shard: int = 0,
        batches: int = 0,
    ) -> None:
        """Enter what a worker reported about one task; of an iterable dataset, one of ``shard``, which has given
        ``batches``.

        Raises:
            FaultBudgetError: too many samples have failed.
        """
        if report is None:
            return
        error: FaultBudgetError | None = None
        for fault in report.faults:
            self.enter(fault, recording, task=task, worker_id=worker_id, pid=pid)
            error = error or self.budget_error()  # of the fault that was one too many; the rest is recorded as well
        for position, (wanted, used) in report.replaced.items():
            recording.emit(
                SampleReplaced(epoch=recording.epoch, task=task, position=position, wanted=wanted, used=used)
            )
        if report.ended:
            self.end_shard(recording, shard, batches, report.ended)
        if error is not None:
            raise error

    def end_shard(self, recording: EpochRecording, worker_id: int, batches: int, reason: str) -> None:
        """A worker's share of an iterable dataset ended before its time."""
        recording.emit(ShardEnded(epoch=recording.epoch, worker_id=worker_id, batches=batches, reason=reason))
        self._warn(
            "shard",
            f"the share of worker {worker_id} of the iterable dataset ended early, after {batches} batches: {reason}. "
            "What it would have yielded is missing from this epoch",
        )

    def enter(
        self, fault: Fault, recording: EpochRecording, *, task: int, worker_id: int | None, pid: int | None
    ) -> None:
        """Record one fault."""
        record = FaultRecord(
            kind=fault.kind,
            index=fault.index,
            error_type=fault.error_type,
            message=f"{fault.message}; {fault.hint}" if fault.hint else fault.message,
            traceback=fault.traceback,
            worker_id=worker_id,
            pid=os.getpid() if pid is None else pid,
            epoch=recording.epoch,
            task=task,
            attempts=fault.attempts,
            action=fault.action,
            replacement=fault.replacement,
        )
        if fault.hint and fault.action not in ("retried", "raised"):
            self._hints[fault.hint] += 1
        self.enter_record(record, recording, transient=fault.transient)

    def enter_record(self, record: FaultRecord, recording: EpochRecording, *, transient: bool = False) -> None:
        """Record one fault that is already described."""
        recording.fault(record)
        if record.action not in ("retried", "raised"):
            self.budget.faulted()
            self._commonest[f"{record.error_type or record.kind}"] += 1
            if len(self._first) < _RECORDS_IN_ERROR:
                self._first.append(record)
            if record.kind in KILLERS and record.index is not None:
                self.quarantine.add(record.index, record.kind)
            # What failed in passing may load tomorrow: only samples that are bad by themselves are left out for good.
            if record.index is not None and not transient:
                self.quarantine.record(record)
            self._warn(
                record.kind,
                f"sample {_text(record.index)} was {record.action}: {record.error_type or record.kind}: "
                f"{_text(record.message, plain=True)} (worker {record.worker_id}, epoch {record.epoch}, task "
                f"{record.task}). Further faults of kind {record.kind!r} are only recorded: see loader.fault_log",
            )

    def left_out(self, indices: Iterable[Any], recording: EpochRecording, *, task: int) -> None:
        """These samples are known to be bad and were not fetched."""
        for index in indices:
            recording.fault(
                FaultRecord(
                    kind=self.known_bad.get(index_key(index), "exception"),
                    index=index,
                    epoch=recording.epoch,
                    task=task,
                    action="quarantined",
                )
            )

    def budget_error(self) -> FaultBudgetError | None:
        """What to raise when too many samples have failed; None while they have not."""
        budget = self.budget
        if self.policy.action == "raise" or not budget.exceeded:
            return None
        common = ", ".join(f"{name} ({count})" for name, count in self._commonest.most_common(3))
        remedy = "Mend the data, or raise burst or max_fraction."
        hint, count = (self._hints.most_common(1) or [("", 0)])[0]
        if 2 * count >= budget.faults:
            remedy = f"In {count} of them the data is not at fault: {hint}."
        traces = "\n".join(record.traceback for record in self._first[:2] if record.traceback)
        return FaultBudgetError(
            f"{budget.faults} of {budget.samples} samples failed, but FaultPolicy(burst={self.policy.burst}, "
            f"max_fraction={self.policy.max_fraction}) allows {budget.allowed}. Commonest: {common}. "
            f"{remedy} First tracebacks:\n{traces}",
            faults=budget.faults,
            samples=budget.samples,
            records=self._first,
        )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warn_user(text)


def rebuild(raised: Raised, *, index: Any, worker_id: int | None, pid: int | None) -> Exception:
    """The user's exception again, with torch's wording and a note on where it came from.

    Its own type where that can be imported and built from one text; :class:`SampleError` otherwise, and for what would
    end the loop or the program (``StopIteration``, ``SystemExit``, ``KeyboardInterrupt``).

    *Source*: ``ExceptionWrapper.reraise`` in ``torch/_utils.py``, torch 2.13, for the wording.
    """
    name = raised.error_type.rpartition(".")[2]
    text = f"Caught {name} {raised.where}.\nOriginal {raised.traceback}"
    error = _build(raised.type_pickle, text)
    if error is None:
        error = SampleError(text, index=index, worker_id=worker_id, error_type=raised.error_type)
    if index is not None or worker_id is not None:
        place = "the training process" if worker_id is None else f"worker {worker_id} (pid {pid})"
        sample = "" if index is None else f"sample index {_text(index)}, "
        add_note(error, f"{sample}in {place}")
    try:
        shown = str(error)
    except BaseException:
        shown = ""
    if raised.message not in shown:
        add_note(error, text)
    return error


def add_note(error: BaseException, text: str) -> None:
    """Note something on an exception, unless its type will not have it."""
    with contextlib.suppress(Exception):  # a user's __getattribute__ or __setattr__
        error.add_note(f"[robustloader] {text}")


def _build(type_pickle: bytes | None, text: str) -> Exception | None:
    if type_pickle is None:
        return None
    try:
        kind = pickle.loads(type_pickle)
    except Exception:  # importing the user's module may do anything
        return None
    if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(
        kind, (StopIteration, StopAsyncIteration)
    ):
        return None
    message = torch_private.key_error_message(text) if kind is KeyError else text
    try:
        make: Any = kind
        error: Exception = make(message=message) if getattr(kind, "message", None) else make(message)
    except BaseException:
        try:
            error = kind(message)
        except BaseException:
            return None
    return error if type(error) is kind else None


def _text(value: Any, *, plain: bool = False) -> str:
    try:
        text = str(value) if plain else repr(value)
    except Exception:  # a user's __repr__
        text = f"<{type(value).__qualname__}>"
    return text if len(text) <= 200 else text[:197] + "..."
