"""From lines to a run: tolerant of what a killed writer, a full disk or a newer version leaves in a file.

:class:`RunReader` takes one line at a time and keeps a bounded account, however long the run: :mod:`.files` feeds it
from files, once or while they grow.
"""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, TypeVar

from robustloader.report.run import Epoch, FaultGroup, Incident, Interval, RankRun, Run, Source, thin_intervals
from robustloader.telemetry import EpochSummary, Statistics, WorkerSummary

__all__ = ["SCHEMA", "RunReader"]

SCHEMA = 1
"""The newest version of lines that is understood."""

# Kept per rank; what is more is merged or counted, so that a year of progress lines takes some megabytes.
_INTERVALS = 2_000
_FAULT_GROUPS = 2_000
_INCIDENTS = 2_000
_TEXT = 4_096
_NOT_TOLD = frozenset(("SampleReplaced", "TaskReplayed", "TaskLoaded", "BatchDelivered"))
_LATEST = 4e9  # the year 2096: a time beyond it is damage

R = TypeVar("R", EpochSummary, WorkerSummary, Statistics)


@dataclass
class _Mark:
    """How far an epoch had come at the last reading."""

    statistics: Statistics
    at: float
    busy_s: Mapping[int, float] = field(default_factory=dict)
    workers: tuple[WorkerSummary, ...] = ()


@dataclass
class _Account:
    """What is known of one rank so far."""

    labels: dict[str, str] = field(default_factory=dict)
    host: str = ""
    pids: list[int] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    cpus: int = 0
    epochs: list[Epoch] = field(default_factory=list)
    intervals: list[Interval] = field(default_factory=list)
    running: dict[tuple[int, int], _Mark] = field(default_factory=dict)
    faults: dict[tuple[str, str, str], FaultGroup] = field(default_factory=dict)
    by_kind: Counter[str] = field(default_factory=Counter)
    by_action: Counter[str] = field(default_factory=Counter)
    faults_dropped: int = 0
    incidents: deque[Incident] = field(default_factory=lambda: deque(maxlen=_INCIDENTS))
    incidents_seen: int = 0
    lost_events: int = 0


class RunReader:
    """Builds a :class:`~robustloader.report.Run` from lines, in the order in which they were written per file."""

    def __init__(self) -> None:
        self._sources: dict[str, Source] = {}
        self._unknown: dict[str, Counter[str]] = {}
        self._accounts: dict[str, _Account] = {}

    def open(self, path: str) -> None:
        """Name a file, so that it is told of even where it holds nothing."""
        self._sources.setdefault(path, Source(path=path))

    def leave(self, path: str, *, truncated: bool) -> None:
        """Say whether the last line of a file was cut off."""
        self.open(path)
        self._sources[path] = replace(self._sources[path], truncated=truncated)

    def add(self, path: str, line: bytes) -> None:
        """Take one line of a file; blank ones are passed over.

        Args:
            path: the file's name; also the rank's, where its lines carry no ``rank`` label.
            line: the bytes, with or without the newline.
        """
        self.open(path)
        if not line.strip():
            return
        source = self._sources[path]
        try:
            entry = json.loads(line)
            schema = _whole(entry["schema"]) if isinstance(entry, dict) else 0
            if schema > SCHEMA:
                self._sources[path] = replace(source, newer=source.newer + 1)
                return
            if schema < 1:
                raise ValueError("not a line of ours")
            name, at = entry["event"], float(entry["time"])
            if not isinstance(name, str) or not 0 < at < _LATEST:
                raise ValueError("not an event")
            known = self._take(path, name, at, entry)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            self._sources[path] = replace(source, damaged=source.damaged + 1)
            return
        if known:
            self._sources[path] = replace(source, lines=source.lines + 1)
        else:
            unknown = self._unknown.setdefault(path, Counter())
            unknown[_text(name, 80) if len(unknown) < 20 else "others"] += 1

    def run(self) -> Run:
        """What has been read so far; reading may go on afterwards."""
        return Run(
            ranks=tuple(_freeze(rank, self._accounts[rank]) for rank in sorted(self._accounts, key=_rank_order)),
            sources=tuple(
                replace(source, unknown=dict(self._unknown.get(path, {}))) for path, source in self._sources.items()
            ),
        )

    def _take(self, path: str, name: str, at: float, entry: dict[str, Any]) -> bool:
        act = _ACTS.get(name)
        if act is None and name not in _NOT_TOLD:
            return False
        labels = {_text(key, 80): _text(value, 200) for key, value in _mapping(entry.get("labels")).items()}
        account = self._accounts.setdefault(labels.get("rank") or path, _Account())
        account.labels = labels or account.labels
        account.host = _text(entry.get("host", account.host), 200)
        pid = _whole(entry.get("pid"))
        if pid and pid not in account.pids[-1:]:
            account.pids.append(pid)
            # What another process had begun, it will not end.
            for key in list(account.running):
                account.epochs.append(_as_epoch(key, account.running.pop(key), running=False))
        if act is not None:
            act(account, at, entry)
        return True


def _started(account: _Account, at: float, entry: dict[str, Any]) -> None:
    account.versions = {_text(key, 80): _text(value, 80) for key, value in _mapping(entry.get("versions")).items()}
    account.cpus = _whole(entry.get("cpus"))


def _progressed(account: _Account, at: float, entry: dict[str, Any]) -> None:
    statistics = _record(Statistics, {"epoch": entry.get("epoch"), **_mapping(entry.get("statistics"))})
    workers = _workers(entry.get("workers"))
    key = (_whole(entry.get("loader")), _whole(entry.get("epoch")))
    _advance(account, key, at, statistics, workers, ready=_whole(entry.get("ready")))
    account.running[key] = _Mark(statistics, at, _busy(workers), workers)


def _finished(account: _Account, at: float, entry: dict[str, Any]) -> None:
    told = _mapping(entry["summary"])
    summary = replace(
        _record(EpochSummary, {"epoch": entry.get("epoch"), **told}), workers=_workers(told.get("workers"))
    )
    key = (_whole(entry.get("loader")), _whole(entry.get("epoch")))
    last = Statistics(
        epoch=summary.epoch,
        batches=summary.batches,
        samples=summary.samples,
        bytes=summary.bytes,
        elapsed_s=summary.duration_s,
        wait_s=summary.wait_s,
        step_s=summary.step_s,
        active_workers=summary.workers_at_end,
    )
    _advance(account, key, at, last, summary.workers, ready=None)
    account.running.pop(key, None)
    account.epochs.append(Epoch(loader=key[0], begin=at - summary.duration_s, end=at, running=False, summary=summary))


def _advance(
    account: _Account,
    key: tuple[int, int],
    at: float,
    now: Statistics,
    workers: tuple[WorkerSummary, ...],
    ready: int | None,
) -> None:
    """Note what an epoch did since its last reading."""
    before = account.running.get(key)
    if before is None or before.statistics.batches > now.batches or before.statistics.elapsed_s > now.elapsed_s:
        before = _Mark(Statistics(), at - now.elapsed_s)
    old, busy = before.statistics, _busy(workers)
    elapsed_s = now.elapsed_s - old.elapsed_s
    if elapsed_s <= 0:
        return
    account.intervals.append(
        Interval(
            begin=at - elapsed_s,
            end=at,
            epoch=key[1],
            loader=key[0],
            batches=now.batches - old.batches,
            samples=max(0, now.samples - old.samples),
            bytes=max(0, now.bytes - old.bytes),
            wait_s=max(0.0, now.wait_s - old.wait_s),
            step_s=max(0.0, now.step_s - old.step_s),
            ready=ready,
            active_workers=now.active_workers,
            busy_s={worker: max(0.0, busy[worker] - before.busy_s.get(worker, 0.0)) for worker in busy},
            rss_bytes={_worker_key(worker.worker_id): worker.peak_rss_bytes for worker in workers},
        )
    )
    if len(account.intervals) > 2 * _INTERVALS:
        account.intervals = thin_intervals(account.intervals, _INTERVALS)


def _faulted(account: _Account, at: float, entry: dict[str, Any]) -> None:
    fault = _mapping(entry["fault"])
    kind, action = _text(fault.get("kind", "unknown"), 40), _text(fault.get("action", ""), 40)
    account.by_kind[kind] += 1
    account.by_action[action] += 1
    key = (kind, _text(fault.get("index"), 300), _text(fault.get("error_type", ""), 200))
    old = account.faults.get(key)
    if old is None and len(account.faults) >= _FAULT_GROUPS:
        account.faults_dropped += 1
        return
    account.faults[key] = FaultGroup(
        kind=key[0],
        sample=key[1],
        error_type=key[2],
        message=_text(fault.get("message", ""), 1_000),
        action=action,
        count=old.count + 1 if old else 1,
        first=old.first if old else at,
        last=at,
        epoch=_whole(entry.get("epoch")),
        traceback=_text(fault.get("traceback", ""), _TEXT),
    )


def _lost(account: _Account, at: float, entry: dict[str, Any]) -> None:
    account.lost_events += _whole(entry.get("lost"))


def _incident(tell: Callable[[dict[str, Any]], str]) -> Callable[[_Account, float, dict[str, Any]], None]:
    """An event that is kept as it is, told in the words that ``tell`` finds."""

    def keep(account: _Account, at: float, entry: dict[str, Any]) -> None:
        worker = entry.get("worker_id")
        account.incidents_seen += 1
        account.incidents.append(
            Incident(
                time=at,
                what=_text(entry["event"], 80),
                epoch=_whole(entry.get("epoch")),
                worker_id=worker if isinstance(worker, int) else None,
                text=_text(tell(entry), 600),
            )
        )

    return keep


def _worker(entry: dict[str, Any]) -> str:
    """Which worker, and which process: ``worker_pid``, since ``pid`` is the training process."""
    pid = _whole(entry.get("worker_pid"))
    return f"Worker {entry.get('worker_id')}" + (f" (pid {pid})" if pid else "")


def _tell_crash(entry: dict[str, Any]) -> str:
    how = entry.get("signal") or f"exit status {entry.get('exitcode')}"
    index = "" if entry.get("index") is None else f", sample {_text(entry['index'], 200)}"
    tasks = _whole(entry.get("tasks"))
    return (
        f"{_worker(entry)} died: {entry.get('cause')} ({how}), phase {entry.get('phase')}{index}; "
        f"{tasks} task{'' if tasks == 1 else 's'} replayed"
    )


def _tell_hang(entry: dict[str, Any]) -> str:
    index = "" if entry.get("index") is None else f", sample {_text(entry['index'], 200)}"
    return (
        f"{_worker(entry)} was silent for {_number(entry.get('silent_s')):.1f} s in phase "
        f"{entry.get('phase')}{index}, and was killed"
    )


_ACTS: dict[str, Callable[[_Account, float, dict[str, Any]], None]] = {
    "RunStarted": _started,
    "EpochProgressed": _progressed,
    "EpochFinished": _finished,
    "SampleFaulted": _faulted,
    "EventsLost": _lost,
    "WorkerCrashed": _incident(_tell_crash),
    "WorkerHung": _incident(_tell_hang),
    "WorkerRestarted": _incident(
        lambda entry: (
            f"{_worker(entry)} was started again (incarnation {entry.get('incarnation')}) after "
            f"{_number(entry.get('waited_s')):.1f} s"
        )
    ),
    "WorkerRecycled": _incident(
        lambda entry: (
            f"{_worker(entry)} was replaced: it held {_number(entry.get('used_bytes')) / 2**20:,.0f} "
            f"MiB, {_number(entry.get('limit_bytes')) / 2**20:,.0f} MiB are allowed"
        )
    ),
    "PoolShrunk": _incident(
        lambda entry: (
            f"The pool shrank to {entry.get('workers')} workers: {entry.get('reason')}"
            if entry.get("workers")
            else f"The training process loads the rest itself: {entry.get('reason')}"
        )
    ),
    "PoolHealed": _incident(lambda entry: f"The pool grew back to {entry.get('workers')} workers"),
    "PoolResized": _incident(
        lambda entry: (
            f"num_workers=auto: {entry.get('workers')} instead of {entry.get('before')} workers: {entry.get('reason')}"
        )
    ),
    "MemoryLow": _incident(
        lambda entry: (
            f"Memory is low: {_number(entry.get('free_bytes')) / 2**20:,.0f} MiB free, "
            f"{_number(entry.get('wanted_bytes')) / 2**20:,.0f} MiB wanted; {entry.get('remedy')}"
        )
    ),
    "TransportDegraded": _incident(
        lambda entry: (
            f"Batches go through a socket instead of shared memory"
            f"{'' if entry.get('worker_id') is None else ', from worker ' + str(entry['worker_id'])}: "
            f"{entry.get('reason')}"
        )
    ),
    "ShardEnded": _incident(
        lambda entry: (
            f"The share of worker {entry.get('worker_id')} ended early after {entry.get('batches')} batches: "
            f"{entry.get('reason')}"
        )
    ),
}


def _freeze(rank: str, account: _Account) -> RankRun:
    running = [_as_epoch(key, mark, running=True) for key, mark in account.running.items()]
    faults = sorted(account.faults.values(), key=lambda group: (-group.count, group.first))
    return RankRun(
        rank=rank,
        labels=dict(account.labels),
        host=account.host,
        pids=tuple(account.pids),
        versions=dict(account.versions),
        cpus=account.cpus,
        epochs=(*account.epochs, *running),
        # Loaders overlap, and a clock may have been set: a time axis wants order.
        intervals=tuple(sorted(account.intervals, key=lambda interval: interval.end)),
        faults=tuple(faults),
        faults_by_kind=dict(account.by_kind.most_common()),
        faults_by_action=dict(account.by_action.most_common()),
        faults_dropped=account.faults_dropped,
        incidents=tuple(account.incidents),
        incidents_dropped=account.incidents_seen - len(account.incidents),
        lost_events=account.lost_events,
    )


def _as_epoch(key: tuple[int, int], mark: _Mark, *, running: bool) -> Epoch:
    """An epoch that has not told what it came to, from the last reading of it."""
    now = mark.statistics
    told = {name: value for name, value in now.to_dict().items() if name not in ("active_workers", "elapsed_s")}
    summary = _record(
        EpochSummary,
        {
            **told,
            "epoch": key[1],
            "duration_s": now.elapsed_s,
            "batches_per_s": now.batches / now.elapsed_s if now.elapsed_s > 0 else 0.0,
            "bytes_per_s": now.bytes / now.elapsed_s if now.elapsed_s > 0 else 0.0,
            "workers_requested": now.active_workers,
            "workers_at_end": now.active_workers,
            "peak_worker_bytes": max((w.peak_rss_bytes for w in mark.workers if w.worker_id is not None), default=0),
        },
    )
    return Epoch(
        loader=key[0],
        begin=mark.at - now.elapsed_s,
        end=mark.at,
        running=running,
        summary=replace(summary, workers=mark.workers),
    )


def _record(kind: type[R], told: Mapping[str, Any]) -> R:
    """A record from what a line says of it: a field that is missing or of another type is zero, others are ignored."""
    values: dict[str, Any] = {}
    for entry in fields(kind):
        value, wanted = told.get(entry.name), str(entry.type)
        if wanted.startswith("int"):
            values[entry.name] = None if value is None and "None" in wanted else _whole(value)
        elif wanted == "float":
            values[entry.name] = _number(value)
        elif wanted == "bool":
            values[entry.name] = value is True
        elif wanted.startswith("tuple"):
            values[entry.name] = ()
        elif entry.default is MISSING or isinstance(value, str):
            values[entry.name] = _text(value if value is not None else "", 600)
    return kind(**values)


def _workers(told: Any) -> tuple[WorkerSummary, ...]:
    return tuple(
        _record(WorkerSummary, worker)
        for worker in (told if isinstance(told, list) else ())
        if isinstance(worker, dict)
    )


def _busy(workers: tuple[WorkerSummary, ...]) -> dict[int, float]:
    return {_worker_key(worker.worker_id): worker.busy_s for worker in workers}


def _worker_key(worker_id: int | None) -> int:
    return -1 if worker_id is None else worker_id


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float:
    """A finite number; anything else is 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 0.0
    number = float(value)
    return number if math.isfinite(number) else 0.0


def _whole(value: Any) -> int:
    return int(_number(value))


def _text(value: Any, limit: int) -> str:
    """Text that can be written as UTF-8: JSON may hold half of a surrogate pair, which cannot."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _rank_order(name: str) -> tuple[int, int, str]:
    """Numbers by their size, before names."""
    return (0, int(name), "") if name.isascii() and name.isdigit() and len(name) < 10 else (1, 0, name)
