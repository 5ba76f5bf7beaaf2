"""What happened: one frozen record per kind of event, and the protocol of those who want to hear of it.

Events are made in the training process, in the thread that calls ``next()`` on the iterator, and handed to each sink
there and then. Times are seconds since the epoch (``time.time()``), durations are in seconds, sizes in bytes; what ends
in ``_ns`` is a reading of ``time.monotonic_ns()``, one clock for all processes of a machine.
"""

from __future__ import annotations

import time as _time
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from robustloader.telemetry.summary import EpochSummary

__all__ = [
    "BatchDelivered",
    "BatchInfo",
    "EpochFinished",
    "EpochProgressed",
    "Event",
    "FaultAction",
    "FaultKind",
    "FaultRecord",
    "MemoryLow",
    "PoolHealed",
    "PoolResized",
    "PoolShrunk",
    "SampleFaulted",
    "SampleReplaced",
    "ShardEnded",
    "Sink",
    "TaskLoaded",
    "TaskReplayed",
    "TransportDegraded",
    "WorkerCrashed",
    "WorkerHung",
    "WorkerRecycled",
    "WorkerRestarted",
]

FaultKind = Literal["exception", "crash", "hang", "poison", "collate", "unpicklable", "undecodable"]
FaultAction = Literal["retried", "replaced", "skipped", "raised", "quarantined"]


@dataclass(frozen=True, kw_only=True)
class FaultRecord:
    """One sample that failed, and what was done about it.

    Attributes:
        kind: what failed: the sample raised ("exception"), its worker died ("crash", and "poison" once it is proved
            that this sample kills workers) or stayed silent ("hang"), ``collate_fn`` raised ("collate"), the result
            could not be pickled ("unpicklable") or unpickled ("undecodable").
        index: the sample's index, as the sampler yielded it; None for an iterable dataset.
        error_type: qualified name of the exception type; empty for a crash.
        message: ``str()`` of the exception, cut to 4,096 characters.
        traceback: the traceback where it was raised, or of a hang the worker's Python stacks, cut to 16,384 characters.
        worker_id: the worker, or None for the training process.
        pid: process id of the one who saw it.
        epoch: counted from 0 for each loader.
        task: number of the batch within the epoch, counted from 0.
        attempts: how often the sample was tried.
        signal: name of the signal that killed the worker, or None.
        action: what was done: "retried" (and then it loaded), "replaced", "skipped", "raised", "quarantined" (known
            bad from before, not fetched at all).
        replacement: the index used instead, or None.
        time: when it was recorded, seconds since the epoch.
    """

    kind: FaultKind
    index: Any
    error_type: str = ""
    message: str = ""
    traceback: str = ""
    worker_id: int | None = None
    pid: int | None = None
    epoch: int = 0
    task: int = 0
    attempts: int = 1
    signal: str | None = None
    action: FaultAction = "raised"
    replacement: Any = None
    time: float = field(default_factory=_time.time)


@dataclass(frozen=True, kw_only=True)
class BatchInfo:
    """What the iterator's ``batch_info`` tells of the batch it returned last.

    Attributes:
        index: number of the batch within the epoch, from 0, in the order of the sampler.
        indices: the indices that were really loaded, in the order of the batch; empty for an iterable dataset.
        replaced: position in the sampler's batch → (index wanted, index used).
        skipped: positions in the sampler's batch that were left out.
        worker_id: the worker that loaded it; None for the training process.
        attempts: how often it was given to a worker; more than 1 after a crash.
        load_s: seconds the worker spent on it (samples and collate).
    """

    index: int
    indices: tuple[Any, ...] = ()
    replaced: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    skipped: tuple[int, ...] = ()
    worker_id: int | None = None
    attempts: int = 1
    load_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events.

    Attributes:
        epoch: the loader's epoch, counted from 0.
        time: seconds since the epoch (Unix time).
    """

    epoch: int = 0
    time: float = field(default_factory=_time.time)

    def to_dict(self) -> dict[str, Any]:
        """The event as a plain dict; ``event`` holds the class name, and a fault record is a dict as well.

        Values are the event's own, not copies: an index may be any object, and need not be copyable.
        """
        return {"event": type(self).__name__, **_shallow(self)}


@dataclass(frozen=True, kw_only=True)
class SampleFaulted(Event):
    """A sample failed; one that was retried and then loaded is told of as well.

    Attributes:
        fault: the full record.
    """

    fault: FaultRecord


@dataclass(frozen=True, kw_only=True)
class SampleReplaced(Event):
    """Another sample took the place of one that could not be loaded.

    Attributes:
        task: number of the batch within the epoch, from 0.
        position: place in the batch, from 0.
        wanted: the index that the sampler asked for.
        used: the index that was loaded instead.
    """

    task: int
    position: int
    wanted: Any
    used: Any


@dataclass(frozen=True, kw_only=True)
class WorkerCrashed(Event):
    """A worker process died.

    Attributes:
        worker_id: 0 to ``num_workers - 1``; it outlives the process.
        incarnation: which process of that worker it was, from 0.
        pid: its process id.
        exitcode: its exit status, minus the signal's number for a signal; None where it could not be had.
        signal: name of the signal that killed it, or None.
        cause: "memory" (the kernel's out-of-memory killer), "shared memory" (SIGBUS), "crash" (a signal such as
            SIGSEGV or SIGABRT), "exit" (it called exit), "killed" (SIGKILL or SIGTERM from outside), "start" (never
            became ready in time), "hang" (killed because it stayed silent) or "unknown".
        phase: what it was doing, as its beacon said: "idle", "init", "item", "items", "collate" or "encode".
        index: the sample it was loading, where one is known.
        tasks: how many unfinished tasks it held, all of which are replayed.
    """

    worker_id: int
    incarnation: int
    pid: int | None
    exitcode: int | None
    signal: str | None
    cause: str
    phase: str
    index: Any
    tasks: int


@dataclass(frozen=True, kw_only=True)
class WorkerHung(Event):
    """A worker stayed silent past its deadline and was killed.

    Attributes:
        worker_id: 0 to ``num_workers - 1``.
        incarnation: which process of that worker it was, from 0.
        pid: its process id.
        phase: what it was doing, as in :class:`WorkerCrashed`.
        index: the sample it was loading, where one is known.
        silent_s: how long it had been silent, in seconds.
        stack: its Python stacks as text; empty where they could not be taken.
    """

    worker_id: int
    incarnation: int
    pid: int | None
    phase: str
    index: Any
    silent_s: float
    stack: str


@dataclass(frozen=True, kw_only=True)
class WorkerRestarted(Event):
    """A new process took a dead worker's place.

    Attributes:
        worker_id: 0 to ``num_workers - 1``.
        incarnation: which process of that worker it is, from 0.
        pid: its process id.
        waited_s: seconds of backoff before it was started.
    """

    worker_id: int
    incarnation: int
    pid: int | None
    waited_s: float


@dataclass(frozen=True, kw_only=True)
class TaskReplayed(Event):
    """A task that a dead worker had not finished was given out again.

    Attributes:
        task: number of the batch within the epoch, from 0.
        worker_id: the worker that got it now.
        attempt: how often it has been given out, counted from 2.
    """

    task: int
    worker_id: int
    attempt: int


@dataclass(frozen=True, kw_only=True)
class PoolShrunk(Event):
    """Fewer workers load from now on.

    Attributes:
        workers: how many are left; 0 means that the training process loads the rest itself.
        reason: why, in words.
    """

    workers: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class PoolHealed(Event):
    """The pool grew back by one.

    Attributes:
        workers: how many processes it has now.
    """

    workers: int


@dataclass(frozen=True, kw_only=True)
class PoolResized(Event):
    """``num_workers="auto"`` goes on with ``workers`` processes instead of ``before``, for ``reason``."""

    before: int
    workers: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class WorkerRecycled(Event):
    """A worker was replaced between two tasks because it held too much memory of its own.

    Attributes:
        worker_id: 0 to ``num_workers - 1``.
        pid: process id of the one that left.
        used_bytes: what it held.
        limit_bytes: ``MemoryPolicy.max_worker_bytes``.
    """

    worker_id: int
    pid: int | None
    used_bytes: int
    limit_bytes: int


@dataclass(frozen=True, kw_only=True)
class ShardEnded(Event):
    """One worker's share of an iterable dataset ended before its natural end.

    Attributes:
        worker_id: whose share.
        batches: batches of it that were delivered.
        reason: why, in words.
    """

    worker_id: int
    batches: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class MemoryLow(Event):
    """Less memory is free than the memory policy asks for.

    Attributes:
        wanted_bytes: how much should be free.
        free_bytes: how much is.
        action: ``MemoryPolicy.on_low``.
        remedy: what to change, in words.
    """

    wanted_bytes: int
    free_bytes: int
    action: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class TransportDegraded(Event):
    """A batch went through a worker's socket instead of its arena. Told once per worker and epoch.

    Attributes:
        worker_id: the worker, or None where there is no arena for any.
        reason: why, in words.
    """

    worker_id: int | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class EpochProgressed(Event):
    """Where a running epoch stands, told every ``TelemetryPolicy.progress_s`` seconds while batches are delivered.

    Attributes:
        loader: which loader of this process, counted from 0: loaders may share a sink.
        statistics: ``Statistics.to_dict()`` of the epoch.
        ready: batches that lay ready when the last one was asked for.
        workers: one dict per worker so far: ``worker_id``, ``tasks``, ``samples``, ``busy_s``, ``load_p95_s``,
            ``peak_rss_bytes``, ``restarts``, with the meaning they have in a ``WorkerSummary``.
    """

    loader: int = 0
    statistics: dict[str, Any]
    ready: int
    workers: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class EpochFinished(Event):
    """An epoch ended, or its iterator was closed early (``summary.complete`` is False then).

    Attributes:
        loader: which loader of this process, counted from 0.
        summary: what the epoch came to.
    """

    loader: int = 0
    summary: EpochSummary

    def to_dict(self) -> dict[str, Any]:
        """The event as a plain dict, with the summary as ``EpochSummary.to_dict`` gives it."""
        return {**super().to_dict(), "summary": self.summary.to_dict()}


@dataclass(frozen=True, kw_only=True)
class TaskLoaded(Event):
    """A batch has arrived. Told only to sinks that have ``wants_tasks = True``.

    Attributes:
        task: number of the batch within the epoch, from 0.
        worker_id: the worker that loaded it; None for the training process.
        pid: that worker's process id; None for the training process.
        begin_ns: when it began to load, on the monotonic clock.
        end_ns: when it was loaded and collated.
        samples: samples in it.
    """

    task: int
    worker_id: int | None
    pid: int | None
    begin_ns: int
    end_ns: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class BatchDelivered(Event):
    """A batch was handed to the loop. Told only to sinks that have ``wants_tasks = True``.

    Attributes:
        batch: how many batches of the epoch were delivered before it.
        begin_ns: when the loop asked for it, on the monotonic clock.
        end_ns: when it got it.
        ready: batches that lay ready when it asked.
    """

    batch: int
    begin_ns: int
    end_ns: int
    ready: int


@runtime_checkable
class Sink(Protocol):
    """Someone who wants to hear of events.

    ``receive`` runs in the training process, in the thread that iterates, between two batches: it should return fast.
    A sink that raises is dropped with one warning; training goes on. One that has an attribute ``wants_tasks`` that is
    true hears of every task and batch too (:class:`TaskLoaded`, :class:`BatchDelivered`).
    """

    def receive(self, event: Event) -> None:
        """Take one event."""
        ...


def _shallow(record: Any) -> dict[str, Any]:
    """A record's fields by name, with records among its values turned into dicts too."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: _shallow(value) if isinstance(value, FaultRecord) else value for name, value in values.items()}
