"""What a run came to, read back from its events: frozen records, one per thing people ask about.

Times are Unix seconds, durations seconds, sizes bytes. Nothing here reads a file or a clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from statistics import median
from typing import Any

from robustloader.decisions.advice import Facts, Verdict, WorkerPace, advise, judge
from robustloader.telemetry import EpochSummary

__all__ = [
    "Comparison",
    "Epoch",
    "FaultGroup",
    "Incident",
    "Interval",
    "RankRun",
    "Run",
    "Source",
    "WorkerTotal",
    "compare_ranks",
    "merge_intervals",
    "thin_intervals",
]

# Ranks in step deliver the same number of samples per second but for the noise of where each stands in its loop.
_RATE_GAP = 0.9
# Five points of the loop's time: half a minute in ten. Less is not worth looking for on another machine.
_WAIT_GAP = 0.05


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A stretch of one epoch, between two readings of its counters.

    Attributes:
        begin: when it began, Unix seconds.
        end: when it ended.
        epoch: the epoch it lies in (the last one, after merging).
        loader: which loader of the process.
        batches: batches delivered in it.
        samples: samples delivered in it.
        bytes: bytes delivered in it.
        wait_s: seconds the loop waited in it.
        step_s: seconds the loop computed in it.
        ready: batches that lay ready at its end; None where that was not told.
        active_workers: worker processes at its end.
        busy_s: worker id → seconds it loaded in it; -1 is the training process.
        rss_bytes: worker id → most resident memory so far in the epoch, in bytes.
    """

    begin: float
    end: float
    epoch: int
    loader: int = 0
    batches: int = 0
    samples: int = 0
    bytes: int = 0
    wait_s: float = 0.0
    step_s: float = 0.0
    ready: int | None = None
    active_workers: int = 0
    busy_s: Mapping[int, float] = field(default_factory=dict)
    rss_bytes: Mapping[int, int] = field(default_factory=dict)

    @property
    def duration_s(self) -> float:
        """Seconds from its beginning to its end."""
        return max(0.0, self.end - self.begin)

    @property
    def samples_per_s(self) -> float:
        """Samples delivered per second in it."""
        return _ratio(self.samples, self.duration_s)

    @property
    def wait_fraction(self) -> float:
        """Share (0 to 1) of the loop's time in it that was waiting."""
        return _ratio(self.wait_s, self.wait_s + self.step_s)


def merge_intervals(first: Interval, second: Interval) -> Interval:
    """One interval for two neighbours: counts and durations add up exactly, states are those of the later one."""
    return Interval(
        begin=min(first.begin, second.begin),
        end=max(first.end, second.end),
        epoch=second.epoch,
        loader=second.loader,
        batches=first.batches + second.batches,
        samples=first.samples + second.samples,
        bytes=first.bytes + second.bytes,
        wait_s=first.wait_s + second.wait_s,
        step_s=first.step_s + second.step_s,
        ready=first.ready if second.ready is None else second.ready,
        active_workers=second.active_workers,
        busy_s={
            worker: first.busy_s.get(worker, 0.0) + second.busy_s.get(worker, 0.0)
            for worker in sorted({*first.busy_s, *second.busy_s})
        },
        rss_bytes={
            worker: max(first.rss_bytes.get(worker, 0), second.rss_bytes.get(worker, 0))
            for worker in sorted({*first.rss_bytes, *second.rss_bytes})
        },
    )


def thin_intervals(intervals: Sequence[Interval], limit: int) -> list[Interval]:
    """At most ``limit`` intervals that add up to the same: neighbours are merged up to an even width in time."""
    thinned = list(intervals)
    if len(thinned) <= max(1, limit):
        return thinned
    span = max(interval.end for interval in thinned) - min(interval.begin for interval in thinned)
    # By width and not by number: what was thinned before is not thinned again before its neighbours are as wide.
    width = max(span / max(1, limit), 1e-6)
    while len(thinned) > max(1, limit):
        merged: list[Interval] = []
        for interval in thinned:
            both = merge_intervals(merged[-1], interval) if merged else interval
            if merged and both.end - both.begin <= width:
                merged[-1] = both
            else:
                merged.append(interval)
        thinned, width = merged, 2 * width
    return thinned


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One epoch of one loader: ``summary`` is what it came to, or came to so far while ``running``."""

    loader: int
    begin: float
    end: float
    running: bool
    summary: EpochSummary


@dataclass(frozen=True, kw_only=True)
class FaultGroup:
    """What went wrong with one sample, however often.

    Attributes:
        kind: as in a ``FaultRecord``.
        sample: the sample's index as text.
        error_type: the exception's type; empty for a crash.
        message: what the last one said.
        action: what was done about the last one.
        count: how often.
        first: when first, Unix seconds.
        last: when last.
        epoch: the epoch of the last one.
        traceback: where the last one was raised; empty where there is none.
    """

    kind: str
    sample: str
    error_type: str
    message: str
    action: str
    count: int
    first: float
    last: float
    epoch: int
    traceback: str = ""


@dataclass(frozen=True, kw_only=True)
class Incident:
    """Something that happened to a worker or to the pool: ``what`` is the event's name, ``text`` says it in words."""

    time: float
    what: str
    epoch: int
    worker_id: int | None
    text: str


@dataclass(frozen=True, kw_only=True)
class WorkerTotal:
    """What one worker did in the whole run; ``worker_id`` -1 is the training process."""

    worker_id: int
    tasks: int = 0
    samples: int = 0
    busy_s: float = 0.0
    load_p95_s: float = 0.0
    peak_rss_bytes: int = 0
    restarts: int = 0


@dataclass(frozen=True, kw_only=True)
class RankRun:
    """One rank's part of a run.

    Attributes:
        rank: its label ``rank``, or the name of its file where it has none.
        labels: all labels of its lines.
        host: the machine it ran on last.
        pids: its training processes, oldest first; several where the job was started again.
        versions: of Python and the libraries.
        cpus: CPUs it may use; 0 where that was not told.
        epochs: its epochs in the order in which they ended, running ones last.
        intervals: its progress over time, oldest first.
        faults: the samples that failed, most frequent first.
        faults_by_kind: fault records of each kind, those not kept one by one included.
        faults_by_action: fault records by what was done.
        faults_dropped: records of samples that are counted, but not among ``faults``.
        incidents: what happened to workers and pool, oldest first.
        incidents_dropped: older ones that are not kept.
        lost_events: events that the writer could not write.
    """

    rank: str
    labels: Mapping[str, str]
    host: str
    pids: tuple[int, ...]
    versions: Mapping[str, str]
    cpus: int
    epochs: tuple[Epoch, ...]
    intervals: tuple[Interval, ...]
    faults: tuple[FaultGroup, ...]
    faults_by_kind: Mapping[str, int]
    faults_by_action: Mapping[str, int]
    faults_dropped: int
    incidents: tuple[Incident, ...]
    incidents_dropped: int
    lost_events: int

    @cached_property
    def duration_s(self) -> float:
        """Seconds spent in epochs."""
        return sum(epoch.summary.duration_s for epoch in self.epochs)

    @cached_property
    def samples_per_s(self) -> float:
        """Samples per second over all epochs."""
        return _ratio(self.total("samples"), self.duration_s)

    @cached_property
    def facts(self) -> Facts:
        """What verdict and advice follow from: the whole run, the first wait of each epoch left out."""
        last = self.epochs[-1].summary if self.epochs else None
        return Facts(
            batches=int(self.total("batches")),
            samples=int(self.total("samples")),
            faults=int(self.total("faults")),
            wait_s=self.total("wait_s"),
            first_wait_s=self.total("first_wait_s"),
            step_s=self.total("step_s"),
            deaths=int(self.total("crashes") + self.total("hangs")),
            workers_requested=last.workers_requested if last else 0,
            workers_at_end=last.workers_at_end if last else 0,
            usable_cpus=self.cpus or 1,
            pace=tuple(
                WorkerPace(worker_id=worker.worker_id, tasks=worker.tasks, busy_s=worker.busy_s)
                for worker in self.workers
                if worker.worker_id >= 0 and worker.tasks
            ),
        )

    @cached_property
    def workers(self) -> tuple[WorkerTotal, ...]:
        """Its workers, all epochs together."""
        totals: dict[int, WorkerTotal] = {}
        for epoch in self.epochs:
            for worker in epoch.summary.workers:
                key = -1 if worker.worker_id is None else worker.worker_id
                old = totals.get(key, WorkerTotal(worker_id=key))
                totals[key] = WorkerTotal(
                    worker_id=key,
                    tasks=old.tasks + worker.tasks,
                    samples=old.samples + worker.samples,
                    busy_s=old.busy_s + worker.busy_s,
                    load_p95_s=max(old.load_p95_s, worker.load_p95_s),
                    peak_rss_bytes=max(old.peak_rss_bytes, worker.peak_rss_bytes),
                    restarts=old.restarts + worker.restarts,
                )
        return tuple(totals[key] for key in sorted(totals))

    @property
    def verdict(self) -> Verdict:
        """Who waits for whom, over the whole run."""
        return judge(self.facts)

    @property
    def advice(self) -> str:
        """The one thing worth doing, as a sentence."""
        return advise(self.facts)

    @property
    def peak_worker_bytes(self) -> int:
        """Most resident memory of any one worker."""
        return max((epoch.summary.peak_worker_bytes for epoch in self.epochs), default=0)

    @property
    def running(self) -> bool:
        """Whether an epoch had begun and not ended when the file was read."""
        return any(epoch.running for epoch in self.epochs)

    def total(self, name: str) -> float:
        """The sum of a number of the summaries over all epochs."""
        return float(sum(getattr(epoch.summary, name) for epoch in self.epochs))


@dataclass(frozen=True, kw_only=True)
class Source:
    """How a file was to read.

    Attributes:
        path: as given.
        lines: lines with an event that was understood.
        damaged: lines that are no event.
        newer: lines of a schema newer than this reader's.
        unknown: lines with an event that this reader does not know, by name.
        truncated: whether the last line has no end: it is still being written, or its writer was killed.
    """

    path: str
    lines: int = 0
    damaged: int = 0
    newer: int = 0
    unknown: Mapping[str, int] = field(default_factory=dict)
    truncated: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader of a report must know about it, as sentences."""
        told = []
        if self.newer:
            told.append(
                f"{self.path}: {_lines(self.newer)} written by a newer robustloader and left out; upgrade this one "
                "to read them."
            )
        if self.damaged:
            told.append(f"{self.path}: {_lines(self.damaged)} damaged and left out.")
        if self.unknown:
            names = ", ".join(sorted(self.unknown))
            told.append(f"{self.path}: {_lines(sum(self.unknown.values()))} of an unknown kind and left out ({names}).")
        if self.truncated:
            told.append(
                f"{self.path}: the last line has no end and was left out; the run goes on, or was killed while writing."
            )
        if not (self.lines or self.newer or self.damaged or self.unknown):
            told.append(f"{self.path}: holds no events yet.")
        return tuple(told)

    @property
    def sound(self) -> bool:
        """Whether nothing was lost: an unfinished last line or an unknown event is no damage."""
        return bool(self.lines) and not (self.damaged or self.newer)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Which rank holds the others up: ``slowest`` is its name, None where they are even; ``reason`` says why."""

    slowest: str | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """A whole run: its ranks by name, and how its files were to read."""

    ranks: tuple[RankRun, ...]
    sources: tuple[Source, ...]

    @cached_property
    def comparison(self) -> Comparison:
        """Which rank holds the others up."""
        return compare_ranks(self.ranks)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader must know about the files, and about events that were never written."""
        lost = tuple(
            f"Rank {rank.rank}: {rank.lost_events:,} events could not be written (disk full, or no permission)."
            for rank in self.ranks
            if rank.lost_events
        )
        return (*(note for source in self.sources for note in source.notes), *lost)

    @property
    def sound(self) -> bool:
        """Whether every file could be read in full and none of them is empty."""
        return bool(self.sources) and all(source.sound for source in self.sources)

    @property
    def leading(self) -> RankRun | None:
        """The rank to look at first: the slowest, or the first one."""
        named = [rank for rank in self.ranks if rank.rank == self.comparison.slowest]
        return next(iter((*named, *self.ranks)), None)

    def to_dict(self) -> dict[str, Any]:
        """The run as a plain, JSON-able dict, with what follows from it (verdict, advice, slowest rank)."""
        ranks = []
        for rank in self.ranks:
            ranks.append(
                {
                    **_plain(rank),
                    "verdict": rank.verdict,
                    "advice": rank.advice,
                    "samples_per_s": rank.samples_per_s,
                    "duration_s": rank.duration_s,
                    "workers": _plain(rank.workers),
                }
            )
        return {
            "schema": 1,
            "slowest_rank": self.comparison.slowest,
            "slowest_reason": self.comparison.reason,
            "sound": self.sound,
            "notes": list(self.notes),
            "sources": _plain(self.sources),
            "ranks": ranks,
        }


def compare_ranks(ranks: Sequence[RankRun]) -> Comparison:
    """Which rank holds the others up.

    Ranks that are not tied to each other differ in samples per second: below 90 % of the median is slow. Ranks that
    wait for each other at every step (DDP) all go at the pace of the slowest, where the others' waiting counts as
    computing: there the slowest is the one that itself waits for data most, by five points of its time more than the
    median.
    """
    worked = [rank for rank in ranks if rank.total("batches")]
    if len(worked) < 2:
        return Comparison(
            slowest=None, reason="There is one rank only." if worked else "No rank has delivered a batch."
        )
    usual = median(rank.samples_per_s for rank in worked)
    slow = min(worked, key=lambda rank: rank.samples_per_s)
    if slow.samples_per_s < _RATE_GAP * usual:
        return Comparison(
            slowest=slow.rank,
            reason=f"Rank {slow.rank} is the slowest: {slow.samples_per_s:,.1f} samples/s, the median of the ranks is "
            f"{usual:,.1f}.",
        )
    shares = {rank.rank: rank.facts.wait_fraction for rank in worked}
    waiting = max(shares, key=lambda name: shares[name])
    typical = median(shares.values())
    if shares[waiting] >= typical + _WAIT_GAP:
        return Comparison(
            slowest=waiting,
            reason=f"Rank {waiting} is the slowest: it waits for data {shares[waiting]:.1%} of its time, the median of "
            f"the ranks is {typical:.1%}. Ranks in step all go at its pace.",
        )
    return Comparison(slowest=None, reason="The ranks are even: in samples per second, and in waiting for data.")


def _plain(value: Any) -> Any:
    """Records, tuples and mappings as what JSON has; only what these records are made of."""
    if isinstance(value, EpochSummary):
        return value.to_dict()
    if hasattr(value, "__dataclass_fields__"):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    return value


def _lines(number: int) -> str:
    return f"{number:,} line{' is' if number == 1 else 's are'}"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
