"""Who counts: one recorder per loader, one recording per epoch, both in the training process.

The engine calls an :class:`EpochRecording` as the epoch goes; users read through the loader, from any thread. Times
come in as arguments, in nanoseconds of ``time.monotonic_ns()``; only a reader who names no time has the clock asked.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import resource
import time
from dataclasses import dataclass, replace
from typing import Any

from robustloader.decisions.advice import Facts, WorkerPace, advise, find_stragglers, judge
from robustloader.errors import warn_user
from robustloader.events import (
    BatchDelivered,
    EpochFinished,
    EpochProgressed,
    Event,
    FaultRecord,
    PoolHealed,
    PoolResized,
    PoolShrunk,
    SampleFaulted,
    SampleReplaced,
    Sink,
    TaskLoaded,
    TaskReplayed,
    WorkerCrashed,
    WorkerHung,
    WorkerRecycled,
    WorkerRestarted,
)
from robustloader.policies import TelemetryPolicy
from robustloader.telemetry.deferral import tell
from robustloader.telemetry.faultlog import FaultLog
from robustloader.telemetry.histogram import LogHistogram
from robustloader.telemetry.summary import EpochSummary, Statistics, WorkerSummary

__all__ = ["EpochRecording", "Recorder"]

_logger = logging.getLogger("robustloader")

_NEVER_NS = 1 << 63
"""Later than any reading of the monotonic clock."""

_KEPT_RESIZES = 32
"""Of each epoch; there are seldom more than a handful."""

_loaders = itertools.count()


@dataclass(frozen=True, kw_only=True)
class _Finished:
    """What is kept of an epoch that is over."""

    epoch: int
    last: Statistics
    kept: EpochSummary | None

    def statistics(self, now_ns: int) -> Statistics:
        return self.last

    def summary(self, now_ns: int) -> EpochSummary | None:
        return self.kept


class _Tally:
    """What one worker has done so far."""

    __slots__ = ("loads", "peak_rss_bytes", "restarts", "samples")

    def __init__(self) -> None:
        self.loads = LogHistogram()
        self.peak_rss_bytes = 0
        self.restarts = 0
        self.samples = 0


class EpochRecording:
    """The running account of one epoch, made by :meth:`Recorder.begin_epoch`.

    Runs in: the training process. One thread at a time calls the methods that record (the one in ``next()``); any
    thread may read.

    Attributes:
        epoch: the loader's epoch, counted from 0.
        batches: batches delivered.
        samples: samples delivered.
        bytes: bytes delivered.
        faults: samples that failed for good: replaced, skipped or raised.
        retries: samples that failed and then loaded; not faults.
        replaced: samples whose place another one took.
        skipped: faults that were left out.
        quarantined: samples known to be bad, not fetched; not faults.
        crashes: workers that died, but for those killed because they hung.
        hangs: workers killed because they hung.
        restarts: processes started in a dead worker's place.
        replayed_tasks: tasks given out again.
        recycled: workers replaced because they held too much memory.
        active_workers: worker processes that load now, as PoolShrunk, PoolHealed and PoolResized told; the engine may
            set it.
        resizes: what ``num_workers="auto"`` did and why, one line each.
    """

    __slots__ = (
        "_begun_ns",
        "_due_ns",
        "_finished",
        "_first_wait_ns",
        "_key",
        "_persistent",
        "_progress_ns",
        "_ready",
        "_recorder",
        "_step_ns",
        "_tells_tasks",
        "_timed",
        "_told_ns",
        "_usable_cpus",
        "_waits",
        "_workers",
        "_workers_requested",
        "_workers_wanted",
        "active_workers",
        "batches",
        "bytes",
        "crashes",
        "epoch",
        "faults",
        "hangs",
        "quarantined",
        "recycled",
        "replaced",
        "replayed_tasks",
        "resizes",
        "restarts",
        "retries",
        "samples",
        "skipped",
    )

    def __init__(
        self, recorder: Recorder, key: int, *, epoch: int, workers: int, usable_cpus: int, persistent: bool, now_ns: int
    ) -> None:
        self._recorder = recorder
        self._key = key
        self._timed = recorder.policy is not None
        self._begun_ns = now_ns
        self._workers_requested = workers
        self._usable_cpus = usable_cpus
        self._persistent = persistent
        self._finished: _Finished | None = None
        # When the next batch has more to it than counting, so that the usual one costs a single comparison.
        self._tells_tasks = recorder._tells_tasks
        self._progress_ns = recorder._progress_ns
        self._due_ns = 0 if self._tells_tasks else now_ns + self._progress_ns
        self._told_ns = now_ns
        self._waits = LogHistogram()
        self._first_wait_ns = 0
        self._step_ns = 0
        self._ready = 0
        self._workers: dict[int | None, _Tally] = {}
        self.epoch = epoch
        self.active_workers = self._workers_wanted = workers
        self.resizes: tuple[str, ...] = ()
        self.batches = self.samples = self.bytes = 0
        self.faults = self.retries = self.replaced = self.skipped = self.quarantined = 0
        self.crashes = self.hangs = self.restarts = self.replayed_tasks = self.recycled = 0

    @property
    def closed(self) -> bool:
        """Whether the epoch is over; what is recorded after that is lost, but events still reach the sinks."""
        return self._finished is not None

    def waited(self, wait_ns: int, ready: int, now_ns: int = 0) -> None:
        """A batch is handed to the loop; it has been counted by :meth:`delivered`.

        Args:
            wait_ns: nanoseconds spent in ``next()``.
            ready: batches that lay ready when it was asked for.
            now_ns: the time; with 0, nobody is told of the progress.
        """
        if self._timed:
            if not self._waits.count:
                self._first_wait_ns = wait_ns
            self._waits.add(wait_ns)
            self._ready += ready
            if now_ns >= self._due_ns:
                self._tell(wait_ns, ready, now_ns)

    def stepped(self, step_ns: int) -> None:
        """The loop came back for more.

        Args:
            step_ns: nanoseconds it spent since it was handed the last batch.
        """
        if self._timed:
            self._step_ns += step_ns

    def delivered(self, samples: int, nbytes: int) -> None:
        """Count a delivered batch of ``samples`` samples and ``nbytes`` bytes."""
        self.batches += 1
        self.samples += samples
        self.bytes += nbytes

    def worker_task(
        self,
        worker_id: int | None,
        samples: int,
        load_ns: int,
        rss_bytes: int,
        task: int = 0,
        pid: int | None = None,
        begun_ns: int = 0,
    ) -> None:
        """A batch has arrived.

        Args:
            worker_id: the worker that loaded it, or None for the training process.
            samples: its number of samples.
            load_ns: nanoseconds spent loading it.
            rss_bytes: the loading process's resident memory in bytes; 0 if it was not measured.
            task: its number within the epoch.
            pid: the loading worker's process id, or None for the training process.
            begun_ns: when it began to load.
        """
        if self._timed:
            tally = self._workers.get(worker_id)
            if tally is None:
                tally = self._workers[worker_id] = _Tally()
            tally.samples += samples
            tally.loads.add(load_ns)
            if rss_bytes > tally.peak_rss_bytes:
                tally.peak_rss_bytes = rss_bytes
            if self._tells_tasks:
                self._recorder._send_tasks(
                    TaskLoaded(
                        epoch=self.epoch,
                        task=task,
                        worker_id=worker_id,
                        pid=pid,
                        begin_ns=begun_ns,
                        end_ns=begun_ns + load_ns,
                        samples=samples,
                    )
                )

    def _tell(self, wait_ns: int, ready: int, now_ns: int) -> None:
        """Tell of this batch those who want to hear of each, and of the progress, when it is time, all."""
        recorder = self._recorder
        if self._tells_tasks:
            recorder._send_tasks(
                BatchDelivered(
                    epoch=self.epoch, batch=self.batches - 1, begin_ns=now_ns - wait_ns, end_ns=now_ns, ready=ready
                )
            )
            if now_ns - self._told_ns < self._progress_ns:
                return
        self._told_ns = now_ns
        if not self._tells_tasks:
            self._due_ns = now_ns + self._progress_ns
        recorder._send(
            EpochProgressed(
                epoch=self.epoch,
                loader=recorder.loader,
                statistics=self._snapshot(now_ns).to_dict(),
                ready=ready,
                workers=[_as_progress(worker) for worker in self._summarise_workers(0.0, ())],
            )
        )

    def fault(self, record: FaultRecord) -> None:
        """Log a sample that failed, count it by its ``action``, and tell the sinks."""
        self._recorder.fault_log.append(record)
        self.emit(SampleFaulted(epoch=self.epoch, time=record.time, fault=record))

    def emit(self, event: Event) -> None:
        """Count an event and hand it to every sink.

        ``replaced`` counts :class:`~robustloader.SampleReplaced`: of the fault records, those of spares that failed as
        well say "replaced" too. A :class:`~robustloader.WorkerCrashed` whose cause is "hang" is the end of a hang,
        which :class:`~robustloader.WorkerHung` counts.
        """
        self._count(event)
        self._recorder._send(event)

    def close(self, *, complete: bool, workers_at_end: int, now_ns: int) -> EpochSummary | None:
        """End the epoch: keep its summary, tell the sinks and the log. Closing again changes nothing.

        Args:
            complete: whether the epoch ran to its end.
            workers_at_end: worker processes that still loaded when it ended; 0 for the training process.
            now_ns: when it ended.

        Returns:
            The summary, or None where telemetry is off.
        """
        if self._finished is None:
            self.active_workers = workers_at_end
            summary = self._summarise(complete, now_ns) if self._timed else None
            self._finished = _Finished(epoch=self.epoch, last=self._snapshot(now_ns), kept=summary)
            self._recorder._finish(self._key, self._finished)
        return self._finished.kept

    def statistics(self, now_ns: int) -> Statistics:
        """Where the epoch stands, or stood when it was closed."""
        return self._finished.last if self._finished else self._snapshot(now_ns)

    def summary(self, now_ns: int) -> EpochSummary | None:
        """What the epoch came to until now or until it was closed; None where telemetry is off."""
        if self._finished:
            return self._finished.kept
        return self._summarise(False, now_ns) if self._timed else None

    def _count(self, event: Event) -> None:
        match event:
            case SampleFaulted(fault=record):
                self._count_fault(record)
            case SampleReplaced():
                self.replaced += 1
            case WorkerCrashed(cause=cause):
                self.crashes += cause != "hang"
            case WorkerHung():
                self.hangs += 1
            case WorkerRestarted(worker_id=worker_id):
                self.restarts += 1
                self._workers.setdefault(worker_id, _Tally()).restarts += 1
            case TaskReplayed():
                self.replayed_tasks += 1
            case WorkerRecycled():
                self.recycled += 1
            case PoolShrunk(workers=workers) | PoolHealed(workers=workers):
                self.active_workers = workers
            case PoolResized(before=before, workers=workers, reason=reason):
                self.active_workers = workers
                self._workers_wanted += workers - before
                self.resizes = (
                    *self.resizes[-_KEPT_RESIZES + 1 :],
                    f"batch {self.batches}: {before} → {workers}, as {reason}",
                )
            case _:
                pass

    def _count_fault(self, record: FaultRecord) -> None:
        if record.action == "retried":
            self.retries += 1
        elif record.action == "quarantined":
            self.quarantined += 1
        else:
            self.faults += 1
            self.skipped += record.action == "skipped"

    def _snapshot(self, now_ns: int) -> Statistics:
        elapsed_s = _s(max(0, now_ns - self._begun_ns))
        wait_s, step_s = _s(self._waits.total_ns), _s(self._step_ns)
        samples = self.samples
        return Statistics(
            epoch=self.epoch,
            batches=self.batches,
            samples=samples,
            bytes=self.bytes,
            elapsed_s=elapsed_s,
            wait_s=wait_s,
            step_s=step_s,
            wait_fraction=_ratio(wait_s, wait_s + step_s),
            samples_per_s=_ratio(samples, elapsed_s),
            faults=self.faults,
            retries=self.retries,
            replaced=self.replaced,
            skipped=self.skipped,
            quarantined=self.quarantined,
            crashes=self.crashes,
            hangs=self.hangs,
            restarts=self.restarts,
            replayed_tasks=self.replayed_tasks,
            recycled=self.recycled,
            active_workers=self.active_workers,
        )

    def _summarise(self, complete: bool, now_ns: int) -> EpochSummary:
        now = self._snapshot(now_ns)
        pace = self._pace()
        workers = self._summarise_workers(now.elapsed_s, find_stragglers(pace))
        loads = LogHistogram()
        for tally in list(self._workers.values()):
            loads.merge(tally.loads)
        facts = self._facts(now, pace)
        return EpochSummary(
            epoch=self.epoch,
            complete=complete,
            batches=now.batches,
            samples=now.samples,
            bytes=now.bytes,
            duration_s=now.elapsed_s,
            wait_s=now.wait_s,
            step_s=now.step_s,
            wait_fraction=now.wait_fraction,
            samples_per_s=now.samples_per_s,
            batches_per_s=_ratio(now.batches, now.elapsed_s),
            bytes_per_s=_ratio(now.bytes, now.elapsed_s),
            wait_p50_s=self._waits.percentile(0.50),
            wait_p95_s=self._waits.percentile(0.95),
            wait_p99_s=self._waits.percentile(0.99),
            load_p50_s=loads.percentile(0.50),
            load_p95_s=loads.percentile(0.95),
            load_p99_s=loads.percentile(0.99),
            ready_depth_mean=_ratio(self._ready, self._waits.count),
            faults=now.faults,
            retries=now.retries,
            replaced=now.replaced,
            skipped=now.skipped,
            quarantined=now.quarantined,
            crashes=now.crashes,
            hangs=now.hangs,
            restarts=now.restarts,
            replayed_tasks=now.replayed_tasks,
            recycled=now.recycled,
            workers_requested=self._workers_requested,
            workers_at_end=now.active_workers,
            peak_worker_bytes=max((w.peak_rss_bytes for w in workers if w.worker_id is not None), default=0),
            workers=workers,
            verdict=judge(facts),
            advice=advise(facts),
            first_wait_s=facts.first_wait_s,
            peak_trainer_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            resizes=self.resizes,
        )

    def _tallies(self) -> list[tuple[int | None, _Tally]]:
        """The workers in the order of their ids, the training process last."""
        # sorted() and list() take all items in one atomic step; the recording thread may add a worker meanwhile.
        return sorted(self._workers.items(), key=lambda item: (item[0] is None, item[0] or 0))

    def _pace(self) -> list[WorkerPace]:
        return [
            WorkerPace(worker_id=worker_id, tasks=tally.loads.count, busy_s=_s(tally.loads.total_ns))
            for worker_id, tally in self._tallies()
            if worker_id is not None and tally.loads.count
        ]

    def _summarise_workers(self, elapsed_s: float, stragglers: tuple[int, ...]) -> tuple[WorkerSummary, ...]:
        return tuple(
            WorkerSummary(
                worker_id=worker_id,
                tasks=tally.loads.count,
                samples=tally.samples,
                busy_s=_s(tally.loads.total_ns),
                load_p95_s=tally.loads.percentile(0.95),
                peak_rss_bytes=tally.peak_rss_bytes,
                restarts=tally.restarts,
                busy_fraction=min(1.0, _ratio(_s(tally.loads.total_ns), elapsed_s)),
                straggler=worker_id in stragglers,
            )
            for worker_id, tally in self._tallies()
        )

    def _facts(self, now: Statistics, pace: list[WorkerPace]) -> Facts:
        return Facts(
            batches=now.batches,
            samples=now.samples,
            faults=now.faults,
            wait_s=now.wait_s,
            first_wait_s=_s(self._first_wait_ns),
            step_s=now.step_s,
            deaths=now.crashes + now.hangs,
            workers_requested=self._workers_wanted,
            workers_at_end=now.active_workers,
            usable_cpus=self._usable_cpus,
            persistent=self._persistent,
            pace=pace,
        )


class Recorder:
    """Keeps what a loader's epochs came to, and passes their events on.

    Epochs may overlap, when several iterators of one loader are open: they share only the summaries, the fault log and
    the sinks. A copy or a pickle holds the closed epochs and the fault log; epochs that still run belong to the
    original. A deep copy shares the sinks; a pickle leaves them out, since they hold files and connections.

    Runs in: the training process.

    Args:
        policy: what to tell and whom; None is off: no summary, no sink and no line in the log. Batches, failures and
            the fault log are counted all the same.

    Attributes:
        policy: as given.
        fault_log: every sample that failed, the newest in full.
        loader: counts the recorders of this process from 0, so that a sink can tell loaders apart.
    """

    def __init__(self, policy: TelemetryPolicy | None) -> None:
        self.policy = policy
        self.loader = next(_loaders)
        self.fault_log = FaultLog()
        self._sinks: tuple[Sink, ...] = policy.sinks if policy else ()
        # In the order in which they began. Keyed, so that each change is one atomic step and readers need no lock.
        self._epochs: dict[int, EpochRecording | _Finished] = {}
        self._keys = itertools.count()

    @property
    def summaries(self) -> tuple[EpochSummary, ...]:
        """The kept summaries of epochs that are over, in the order in which they began."""
        entries = list(self._epochs.values())
        return tuple(entry.kept for entry in entries if isinstance(entry, _Finished) and entry.kept is not None)

    def begin_epoch(
        self, *, epoch: int, workers: int, usable_cpus: int, now_ns: int, persistent: bool = False
    ) -> EpochRecording:
        """Open the account of an epoch. Whoever opens it closes it, also when the epoch is abandoned.

        Args:
            epoch: the loader's epoch, counted from 0.
            workers: worker processes that load; 0 for the training process.
            usable_cpus: CPUs that this process may use.
            now_ns: when it begins.
            persistent: whether the workers outlive the epoch.
        """
        key = next(self._keys)
        recording = EpochRecording(
            self, key, epoch=epoch, workers=workers, usable_cpus=usable_cpus, persistent=persistent, now_ns=now_ns
        )
        self._epochs[key] = recording
        return recording

    def summary(self, epoch: int = -1, *, now_ns: int | None = None) -> EpochSummary:
        """What an epoch came to; for one that still runs, until now and with ``complete=False``.

        Args:
            epoch: an epoch's number (the later one where a resumed epoch was begun again); or -1 for the one begun
                last, -2 for the one begun before, and so on.
            now_ns: the time to take as now; None looks at the clock.

        Raises:
            IndexError: there is no such epoch, or it is no longer kept, or telemetry is off.
        """
        if self.policy is None:
            raise IndexError("there are no epoch summaries: telemetry is off (telemetry=None)")
        entries = list(self._epochs.values())
        if not entries:
            raise IndexError("there is no epoch summary yet: no epoch has begun")
        found = entries[epoch:][:1] if -len(entries) <= epoch < 0 else [e for e in entries if e.epoch == epoch][-1:]
        summary = found[0].summary(_now(now_ns)) if found else None
        if summary is None:
            known = ("... " if len(entries) > 8 else "") + ", ".join(str(entry.epoch) for entry in entries[-8:])
            raise IndexError(
                f"there is no summary of epoch {epoch}, but of {known} "
                f"(TelemetryPolicy.history={self.policy.history} are kept)"
            )
        return summary

    def statistics(self, *, now_ns: int | None = None) -> Statistics:
        """Where the epoch begun last stands; all zeros and ``epoch=None`` before the first.

        Runs in: any thread of the training process, at any time, without a lock.

        Args:
            now_ns: the time to take as now; None looks at the clock.
        """
        entries = list(self._epochs.values())
        return entries[-1].statistics(_now(now_ns)) if entries else Statistics()

    def _finish(self, key: int, finished: _Finished) -> None:
        self._epochs[key] = finished
        over = [key for key, entry in list(self._epochs.items()) if isinstance(entry, _Finished)]
        for old in over[: -self.policy.history if self.policy else -1]:
            self._epochs.pop(old, None)
        if self.policy is None or finished.kept is None:
            return
        self._send(EpochFinished(epoch=finished.epoch, loader=self.loader, summary=finished.kept))
        if self.policy.log_epochs:
            tell(functools.partial(_logger.info, "%s", finished.kept.headline()))

    @property
    def _tells_tasks(self) -> bool:
        return any(map(_wants_tasks, self._sinks))

    @property
    def _progress_ns(self) -> int:
        """How often the sinks are told of the progress; never, where there are none."""
        seconds = self.policy.progress_s if self.policy and self._sinks else None
        return _NEVER_NS if seconds is None else int(seconds * 1e9)

    def _send(self, event: Event) -> None:
        """Hand an event to every sink."""
        tell(functools.partial(self._send_to, self._sinks, event))

    def _send_tasks(self, event: Event) -> None:
        """Hand an event to the sinks that want to hear of every task."""
        tell(functools.partial(self._send_to, tuple(filter(_wants_tasks, self._sinks)), event))

    def _send_to(self, sinks: tuple[Sink, ...], event: Event) -> None:
        """Hand an event to sinks; what a sink raises must not stop training, so that one is dropped."""
        failed: list[tuple[Sink, Exception]] = []
        for sink in sinks:
            try:
                sink.receive(event)
            except Exception as error:
                failed.append((sink, error))
        # The warning may itself be raised, where the user made warnings errors: by then every sink has the event.
        for broken, _ in failed:
            self._sinks = tuple(sink for sink in self._sinks if sink is not broken)
        for broken, reason in failed:
            warn_user(
                f"telemetry sink {_name(broken)} raised {type(reason).__name__}: {reason} on {type(event).__name__}; "
                "it gets no more events, training goes on"
            )

    def __getstate__(self) -> dict[str, Any]:
        policy = replace(self.policy, sinks=()) if self.policy else None
        return {"policy": policy, "fault_log": self.fault_log, "epochs": self._over()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.policy = state["policy"]
        self.loader = next(_loaders)
        self.fault_log = state["fault_log"]
        self._sinks = ()
        self._take_over(state["epochs"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        copied = Recorder(self.policy)
        memo[id(self)] = copied
        copied._sinks = self._sinks
        copied.fault_log = copy.deepcopy(self.fault_log, memo)
        copied._take_over(self._over())
        return copied

    def _over(self) -> list[_Finished]:
        return [entry for entry in list(self._epochs.values()) if isinstance(entry, _Finished)]

    def _take_over(self, epochs: list[_Finished]) -> None:
        self._epochs = dict(enumerate(epochs))
        self._keys = itertools.count(len(epochs))


def _now(now_ns: int | None) -> int:
    return time.monotonic_ns() if now_ns is None else now_ns


def _name(sink: Sink) -> str:
    try:
        return repr(sink)
    except Exception:
        return type(sink).__name__


def _wants_tasks(sink: Sink) -> bool:
    return bool(getattr(sink, "wants_tasks", False))


def _as_progress(worker: WorkerSummary) -> dict[str, Any]:
    """A worker's counts so far; its share and whether it straggles are told at the end."""
    return {
        "worker_id": worker.worker_id,
        "tasks": worker.tasks,
        "samples": worker.samples,
        "busy_s": worker.busy_s,
        "load_p95_s": worker.load_p95_s,
        "peak_rss_bytes": worker.peak_rss_bytes,
        "restarts": worker.restarts,
    }


def _s(ns: int) -> float:
    return ns * 1e-9


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
