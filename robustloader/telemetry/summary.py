"""What an epoch came to: frozen records with their units in their names, and the table people read."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from robustloader.decisions.advice import Verdict
from robustloader.telemetry.table import LABEL, WIDTH, labelled
from robustloader.telemetry.units import as_bytes, as_count, as_percent, as_seconds

__all__ = ["EpochSummary", "Statistics", "WorkerSummary"]

_WORKER_ROWS = 8
_ADVICE_LINES = 4
_SHOWN_RESIZES = 3
_NAMED_STRAGGLERS = 4


@dataclass(frozen=True, kw_only=True)
class WorkerSummary:
    """What one worker did in one epoch, all its incarnations together.

    Attributes:
        worker_id: 0 to ``num_workers - 1``; None is the training process, where it loaded batches itself.
        tasks: batches loaded.
        samples: samples loaded.
        busy_s: seconds spent loading.
        load_p95_s: 95th percentile of the time to load one batch, in seconds (within 3.2 %).
        peak_rss_bytes: most resident memory seen between two tasks, in bytes; 0 where it was not measured.
        restarts: how often a new process took its place after a death.
        busy_fraction: busy_s as a share (0 to 1) of the epoch's duration.
        straggler: whether it takes at least twice as long per batch as the median of the others (ten batches or more).
    """

    worker_id: int | None
    tasks: int
    samples: int
    busy_s: float
    load_p95_s: float
    peak_rss_bytes: int
    restarts: int
    busy_fraction: float = 0.0
    straggler: bool = False


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Where the running epoch stands: a snapshot that never changes.

    Attributes:
        epoch: the epoch begun last, counted from 0 for each loader; None before the first.
        batches: batches delivered.
        samples: samples delivered.
        bytes: bytes delivered.
        elapsed_s: seconds since the epoch began, or that it took once it is over.
        wait_s: seconds the loop waited in ``next()``.
        step_s: seconds the loop spent between two ``next()``.
        wait_fraction: wait_s / (wait_s + step_s), 0 to 1.
        samples_per_s: samples delivered per second since the epoch began.
        faults: samples that failed for good.
        retries: samples that failed and loaded when tried again.
        replaced: failed samples whose place another one took.
        skipped: failed samples that were left out.
        quarantined: samples known to be bad from before, not fetched at all.
        crashes: workers that died, hangs not counted.
        hangs: workers that stayed silent and were killed.
        restarts: processes started in a dead worker's place.
        replayed_tasks: tasks given out again.
        recycled: workers replaced because they held too much memory.
        active_workers: worker processes that load now; 0 loads in the training process.
    """

    epoch: int | None = None
    batches: int = 0
    samples: int = 0
    bytes: int = 0
    elapsed_s: float = 0.0
    wait_s: float = 0.0
    step_s: float = 0.0
    wait_fraction: float = 0.0
    samples_per_s: float = 0.0
    faults: int = 0
    retries: int = 0
    replaced: int = 0
    skipped: int = 0
    quarantined: int = 0
    crashes: int = 0
    hangs: int = 0
    restarts: int = 0
    replayed_tasks: int = 0
    recycled: int = 0
    active_workers: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The snapshot as a plain, JSON-able dict."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class EpochSummary:
    """What one epoch came to. ``str()`` is a table of at most 30 lines of at most 100 columns.

    Percentiles are within 3.2 %; all other numbers are exact.

    Attributes:
        epoch: counted from 0 for each loader.
        complete: whether the epoch ran to its end; False for one that was left early or still runs.
        batches: batches delivered.
        samples: samples delivered.
        bytes: bytes delivered.
        duration_s: seconds from the beginning of the epoch to its end.
        wait_s: seconds the loop waited in ``next()``, the first batch included.
        step_s: seconds the loop spent between two ``next()``.
        wait_fraction: wait_s / (wait_s + step_s), 0 to 1.
        samples_per_s: samples / duration_s.
        batches_per_s: batches / duration_s.
        bytes_per_s: bytes / duration_s.
        wait_p50_s: median time the loop waited for one batch, in seconds.
        wait_p95_s: 95th percentile of it, in seconds.
        wait_p99_s: 99th percentile of it, in seconds.
        load_p50_s: median time it took to load one batch, in seconds.
        load_p95_s: 95th percentile of it, in seconds.
        load_p99_s: 99th percentile of it, in seconds.
        ready_depth_mean: batches that lay ready when one was asked for, on average.
        faults: samples that failed for good.
        retries: samples that failed and loaded when tried again.
        replaced: failed samples whose place another one took.
        skipped: failed samples that were left out.
        quarantined: samples known to be bad from before, not fetched at all.
        crashes: workers that died, hangs not counted.
        hangs: workers that stayed silent and were killed.
        restarts: processes started in a dead worker's place.
        replayed_tasks: tasks given out again.
        recycled: workers replaced because they held too much memory.
        workers_requested: worker processes at the beginning; 0 loads in the training process.
        workers_at_end: worker processes at the end.
        peak_worker_bytes: most resident memory of any one worker process, in bytes; 0 where it was not measured.
        workers: one record per worker that loaded or was restarted.
        verdict: "input-bound" (the loop waits for data 20 % of its time or more after the first batch),
            "compute-bound" (2 % or less), "balanced" (between) or "warm-up" (fewer than 10 batches: too few to tell).
        advice: the one thing worth doing, as a sentence.
        first_wait_s: seconds the loop waited for its first batch, which holds the start of the workers.
        peak_trainer_bytes: most resident memory of the training process since it began, in bytes.
        resizes: what ``num_workers="auto"`` did and why, one line each, oldest first; the last 32.
    """

    epoch: int
    complete: bool
    batches: int
    samples: int
    bytes: int
    duration_s: float
    wait_s: float
    step_s: float
    wait_fraction: float
    samples_per_s: float
    batches_per_s: float
    bytes_per_s: float
    wait_p50_s: float
    wait_p95_s: float
    wait_p99_s: float
    load_p50_s: float
    load_p95_s: float
    load_p99_s: float
    ready_depth_mean: float
    faults: int
    retries: int
    replaced: int
    skipped: int
    quarantined: int
    crashes: int
    hangs: int
    restarts: int
    replayed_tasks: int
    recycled: int
    workers_requested: int
    workers_at_end: int
    peak_worker_bytes: int
    workers: tuple[WorkerSummary, ...]
    verdict: Verdict
    advice: str
    first_wait_s: float = 0.0
    peak_trainer_bytes: int = 0
    resizes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "resizes", tuple(self.resizes))  # JSON has lists: a summary read back is the same

    @property
    def stragglers(self) -> tuple[int, ...]:
        """The workers that take at least twice as long per batch as the median of the others."""
        return tuple(worker.worker_id for worker in self.workers if worker.straggler and worker.worker_id is not None)

    def to_dict(self) -> dict[str, Any]:
        """The summary as a plain, JSON-able dict; ``workers`` is a list of dicts, ``resizes`` one of strings."""
        return {
            **asdict(self),
            "workers": [asdict(worker) for worker in self.workers],
            "resizes": list(self.resizes),
        }

    def __str__(self) -> str:
        lines = [
            f"epoch {self.epoch}: {as_count(self.batches)} batches in {as_seconds(self.duration_s)}"
            + ("" if self.complete else ", not complete"),
            labelled("speed", f"{as_count(self.samples_per_s)} samples/s", f"{as_count(self.batches_per_s)} batches/s",
                  f"{as_bytes(self.bytes_per_s)}/s"),
            labelled("delivered", f"{as_count(self.samples)} samples", as_bytes(self.bytes)),
            labelled("waiting", f"{as_seconds(self.wait_s)} ({as_percent(self.wait_fraction)} of the loop)",
                  f"first batch {as_seconds(self.first_wait_s)}", f"{as_count(self.ready_depth_mean)} batches ready"),
            labelled("computing", f"{as_seconds(self.step_s)}"),
            _columns("per batch", ("p50", "p95", "p99")),
            _columns("  wait", map(as_seconds, (self.wait_p50_s, self.wait_p95_s, self.wait_p99_s))),
            _columns("  load", map(as_seconds, (self.load_p50_s, self.load_p95_s, self.load_p99_s))),
            *_failures(self),
            *_workers(self),
            *_resizes(self),
            labelled("verdict", self.verdict),
            *_paragraph("advice", self.advice),
        ]  # fmt: skip
        return "\n".join(_cut(line.rstrip(), WIDTH) for line in lines)

    def headline(self) -> str:
        """The epoch in one line, for logs."""
        text = (
            f"epoch {self.epoch}{'' if self.complete else ' (not complete)'}: {as_count(self.batches)} batches, "
            f"{as_count(self.samples)} samples in {as_seconds(self.duration_s)} "
            f"({as_count(self.samples_per_s)} samples/s), waited {as_percent(self.wait_fraction)}"
        )
        troubles = [
            f"{name} {as_count(number)}"
            for name, number in (
                ("faults", self.faults),
                ("quarantined", self.quarantined),
                ("crashes", self.crashes),
                ("hangs", self.hangs),
                ("restarts", self.restarts),
            )
            if number
        ]
        return "; ".join([text, *([", ".join(troubles)] if troubles else []), self.verdict])


def _failures(summary: EpochSummary) -> list[str]:
    """One or two lines: what samples and what workers did wrong, zeros left out."""
    sample_parts = _nonzero(
        (summary.replaced, "replaced"),
        (summary.skipped, "skipped"),
        (summary.retries, "retried"),
        (summary.quarantined, "quarantined"),
    )
    worker_parts = _nonzero(
        (summary.hangs, "hangs"),
        (summary.restarts, "restarts"),
        (summary.replayed_tasks, "tasks replayed"),
        (summary.recycled, "recycled"),
    )
    faults = as_count(summary.faults) if summary.faults else "none"
    crashes = as_count(summary.crashes) if summary.crashes else "none"
    if not (summary.faults or summary.crashes or sample_parts or worker_parts):
        return [labelled("failures", "faults none, crashes none")]
    return [labelled("faults", faults, *sample_parts), labelled("crashes", crashes, *worker_parts)]


def _workers(summary: EpochSummary) -> list[str]:
    """The workers as a table; of more than eight, the slowest, and one line for the others."""
    requested, left = summary.workers_requested, summary.workers_at_end
    lines = [
        labelled("workers", str(requested) if requested else "none, loaded in the training process")
        if requested == left
        else labelled("workers", f"{requested} at the start, {left} at the end")
    ]
    if summary.peak_worker_bytes or summary.peak_trainer_bytes:
        lines.append(
            labelled(
                "memory",
                *([f"{as_bytes(summary.peak_worker_bytes)} the largest worker"] if summary.peak_worker_bytes else []),
                *(
                    [f"{as_bytes(summary.peak_trainer_bytes)} the training process"]
                    if summary.peak_trainer_bytes
                    else []
                ),
            )
        )
    if summary.stragglers:
        named, others = summary.stragglers[:_NAMED_STRAGGLERS], summary.stragglers[_NAMED_STRAGGLERS:]
        lines[0] += f"   stragglers {', '.join(map(str, named))}{f' and {len(others)} more' if others else ''}"
    shown: Sequence[WorkerSummary] = summary.workers
    folded: Sequence[WorkerSummary] = ()
    if not shown:
        return lines
    if len(shown) > _WORKER_ROWS:
        slowest_first = sorted(shown, key=lambda worker: worker.load_p95_s, reverse=True)
        shown, folded = slowest_first[: _WORKER_ROWS - 1], slowest_first[_WORKER_ROWS - 1 :]
    lines.append(_columns("  worker", ("batches", "samples", "busy", "load p95", "memory", "restarts")))
    lines += [
        _columns(
            "  main" if worker.worker_id is None else f"  {worker.worker_id}",
            (
                as_count(worker.tasks),
                as_count(worker.samples),
                as_percent(worker.busy_fraction),
                as_seconds(worker.load_p95_s),
                as_bytes(worker.peak_rss_bytes) if worker.peak_rss_bytes else "-",
                as_count(worker.restarts) if worker.restarts else "-",
            ),
        )
        for worker in shown
    ]
    if folded:
        lines.append(
            f"  and {len(folded)} faster ones: {as_count(sum(w.tasks for w in folded))} batches, load p95 at most "
            f"{as_seconds(max(w.load_p95_s for w in folded))}, {as_count(sum(w.restarts for w in folded))} restarts"
        )
    return lines


def _resizes(summary: EpochSummary) -> list[str]:
    """What became of ``num_workers="auto"``: the last steps, each on a line."""
    shown = summary.resizes[-_SHOWN_RESIZES:]
    return [labelled("auto" if number == 0 else "", step) for number, step in enumerate(shown)]


def _nonzero(*parts: tuple[int, str]) -> list[str]:
    return [f"{as_count(number)} {name}" for number, name in parts if number]


def _columns(label: str, cells: Any) -> str:
    return f"{label:<{LABEL}}" + " ".join(f"{cell:>12}" for cell in cells)


def _paragraph(label: str, text: str) -> list[str]:
    wrapper = textwrap.TextWrapper(WIDTH - LABEL, max_lines=_ADVICE_LINES, placeholder=" …", break_on_hyphens=False)
    lines = wrapper.wrap(text) or [""]
    return [labelled(label if number == 0 else "", line) for number, line in enumerate(lines)]


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 1] + "…"
