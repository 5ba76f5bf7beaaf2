"""The summaries of many ranks as one: what all of them did together, how far they differ, and which one is the worst.

Pure: nothing is sent anywhere. How the summaries of other ranks come here is the user's choice, ``all_gather_object``
or the files of :class:`JsonlSink`.
"""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from robustloader.decisions.advice import Verdict
from robustloader.errors import OptionError
from robustloader.telemetry.summary import EpochSummary, WorkerSummary
from robustloader.telemetry.table import LABEL, WIDTH, labelled
from robustloader.telemetry.units import as_bytes, as_count, as_percent, as_seconds

__all__ = ["MergedSummary", "Spread", "merge_summaries"]


_SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {
    "batches": ("batches", as_count),
    "samples": ("samples", as_count),
    "wait_s": ("waiting", as_seconds),
    "step_s": ("computing", as_seconds),
    "load_p95_s": ("load p95", as_seconds),
    "faults": ("faults", as_count),
    "crashes": ("crashes", as_count),
    "restarts": ("restarts", as_count),
    "peak_worker_bytes": ("memory", as_bytes),
}
"""What is spread over the ranks, and how it is shown."""

_SUMMED = (
    "batches",
    "samples",
    "bytes",
    "wait_s",
    "step_s",
    "faults",
    "retries",
    "replaced",
    "skipped",
    "quarantined",
    "crashes",
    "hangs",
    "restarts",
    "replayed_tasks",
    "recycled",
    "workers_requested",
    "workers_at_end",
)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How far the ranks differ in one number.

    Attributes:
        lowest: of the ranks' numbers, in the unit of the field.
        median: of them.
        highest: of them.
        lowest_rank: the first rank with the lowest.
        highest_rank: the first rank with the highest.
    """

    lowest: float
    median: float
    highest: float
    lowest_rank: int
    highest_rank: int


@dataclass(frozen=True, kw_only=True)
class MergedSummary:
    """One epoch of all ranks. ``str()`` is a table of at most 30 lines of at most 100 columns.

    Attributes:
        epoch: counted from 0 for each loader.
        ranks: how many summaries there were.
        complete: whether the epoch ran to its end on every rank.
        in_step: whether every rank was given the same number of batches.
        batches: delivered by all ranks together.
        samples: delivered by all ranks together.
        bytes: delivered by all ranks together.
        duration_s: seconds that the slowest rank took.
        samples_per_s: all samples in that time.
        bytes_per_s: all bytes in that time.
        wait_s: seconds in ``next()``, of all ranks together.
        step_s: seconds between two ``next()``, of all ranks together.
        wait_fraction: wait_s / (wait_s + step_s), 0 to 1.
        faults: as in :class:`EpochSummary`, like all that follow of all ranks together.
        retries: samples that loaded when tried again.
        replaced: samples whose place another one took.
        skipped: samples that were left out.
        quarantined: samples known to be bad, not fetched.
        crashes: workers that died.
        hangs: workers that were silent and killed.
        restarts: processes started in a dead worker's place.
        replayed_tasks: tasks given out again.
        recycled: workers replaced because they held too much memory.
        workers_requested: worker processes at the beginning.
        workers_at_end: worker processes at the end.
        peak_worker_bytes: resident memory of the largest worker of any rank.
        peak_trainer_bytes: resident memory of the largest training process of any rank.
        worst_rank: the rank that waited longest for its batches. Where ranks step together, the others wait for it in
            their collectives, which counts as their ``step_s``.
        verdict: of that rank.
        advice: of that rank.
        spreads: how far the ranks differ, by the name of the field.
    """

    epoch: int
    ranks: int
    complete: bool
    in_step: bool
    batches: int
    samples: int
    bytes: int
    duration_s: float
    samples_per_s: float
    bytes_per_s: float
    wait_s: float
    step_s: float
    wait_fraction: float
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
    peak_trainer_bytes: int
    worst_rank: int
    verdict: Verdict
    advice: str
    spreads: Mapping[str, Spread]

    def to_dict(self) -> dict[str, Any]:
        """The summary as a plain, JSON-able dict."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**plain, "spreads": {name: asdict(spread) for name, spread in self.spreads.items()}}

    def __str__(self) -> str:
        batches = self.spreads["batches"]
        step = (
            f"{as_count(batches.highest)} batches each"
            if self.in_step
            else f"NOT IN STEP: {as_count(batches.lowest)} batches on rank {batches.lowest_rank}, "
            f"{as_count(batches.highest)} on rank {batches.highest_rank}"
        )
        lines = [
            f"epoch {self.epoch} of {self.ranks} ranks: {step}, in {as_seconds(self.duration_s)}"
            + ("" if self.complete else ", not complete"),
            labelled("speed", f"{as_count(self.samples_per_s)} samples/s", f"{as_bytes(self.bytes_per_s)}/s"),
            labelled("delivered", f"{as_count(self.samples)} samples", as_bytes(self.bytes)),
            labelled(
                "waiting",
                f"{as_percent(self.wait_fraction)} of all loops",
                f"most on rank {self.worst_rank}: {as_seconds(self.spreads['wait_s'].highest)}",
            ),
            *self._failures(),
            labelled("workers", f"{self.workers_requested} at the start, {self.workers_at_end} at the end"),
            f"{'per rank':<{LABEL}}{'lowest':>12} {'rank':>6}{'median':>13}{'highest':>13} {'rank':>6}",
            *self._rows(),
            labelled("verdict", f"{self.verdict} (rank {self.worst_rank})"),
            *textwrap.wrap(
                self.advice,
                WIDTH,
                initial_indent=f"{'advice':<{LABEL}}",
                subsequent_indent=" " * LABEL,
                max_lines=4,
                break_on_hyphens=False,
            ),
        ]
        return "\n".join(line.rstrip() for line in lines)

    def _failures(self) -> list[str]:
        rows = [
            ("faults", ("replaced", "skipped", "retries", "quarantined")),
            ("crashes", ("hangs", "restarts", "replayed_tasks", "recycled")),
        ]
        lines = []
        for name, others in rows:
            parts = [f"{as_count(getattr(self, other))} {other.replace('_', ' ')}" for other in others]
            told = [part for part, other in zip(parts, others, strict=True) if getattr(self, other)]
            lines.append(labelled(name, as_count(getattr(self, name)) if getattr(self, name) else "none", *told))
        return lines

    def _rows(self) -> list[str]:
        lines = []
        for name, (label, say) in _SHOWN.items():
            spread = self.spreads[name]
            if spread.highest:
                lines.append(
                    f"{'  ' + label:<{LABEL}}{say(spread.lowest):>12} {spread.lowest_rank:>6}{say(spread.median):>13}"
                    f"{say(spread.highest):>13} {spread.highest_rank:>6}"
                )
        return lines


def merge_summaries(summaries: Iterable[EpochSummary | Mapping[str, Any] | str]) -> MergedSummary:
    """One epoch of all ranks, from the summary of each.

    Sends nothing and waits for nobody: gather the summaries with a collective of your own, or read them from files.

    Args:
        summaries: in order of rank, each an :class:`EpochSummary`, its ``to_dict()``, or that as JSON; all of the same
            epoch.

    Raises:
        OptionError: there are none, one of them is no summary, or they are of different epochs.
    """
    told = [_read(rank, summary) for rank, summary in enumerate(summaries)]
    if not told:
        raise OptionError("summaries", [], "at least one summary")
    epochs = sorted({summary.epoch for summary in told})
    if len(epochs) > 1:
        raise OptionError("summaries", epochs, "summaries of one epoch, but these are of several")
    spreads = {name: _spread([getattr(summary, name) for summary in told]) for name in _SHOWN}
    worst = told[spreads["wait_s"].highest_rank]
    sums: dict[str, Any] = {name: sum(getattr(summary, name) for summary in told) for name in _SUMMED}
    duration_s = max(summary.duration_s for summary in told)
    loop_s = sums["wait_s"] + sums["step_s"]
    return MergedSummary(
        epoch=epochs[0],
        ranks=len(told),
        complete=all(summary.complete for summary in told),
        in_step=spreads["batches"].lowest == spreads["batches"].highest,
        duration_s=duration_s,
        samples_per_s=sums["samples"] / duration_s if duration_s else 0.0,
        bytes_per_s=sums["bytes"] / duration_s if duration_s else 0.0,
        wait_fraction=sums["wait_s"] / loop_s if loop_s else 0.0,
        peak_worker_bytes=max(summary.peak_worker_bytes for summary in told),
        peak_trainer_bytes=max(summary.peak_trainer_bytes for summary in told),
        worst_rank=spreads["wait_s"].highest_rank,
        verdict=worst.verdict,
        advice=worst.advice,
        spreads=spreads,
        **sums,
    )


def _spread(numbers: list[float]) -> Spread:
    lowest, highest = min(numbers), max(numbers)
    return Spread(
        lowest=lowest,
        median=statistics.median(numbers),
        highest=highest,
        lowest_rank=numbers.index(lowest),
        highest_rank=numbers.index(highest),
    )


def _read(rank: int, summary: object) -> EpochSummary:
    """A summary again, from whatever form it came in; what a newer version has added is left out."""
    if isinstance(summary, EpochSummary):
        return summary
    wanted = "an EpochSummary, its to_dict(), or that as JSON"
    if isinstance(summary, str):
        try:
            summary = json.loads(summary)
        except ValueError as error:
            raise OptionError(f"summaries[{rank}]", summary, wanted) from error
    if not isinstance(summary, Mapping):
        raise OptionError(f"summaries[{rank}]", summary, wanted)
    missing = [each.name for each in fields(EpochSummary) if each.default is MISSING and each.name not in summary]
    if missing:
        raise OptionError(f"summaries[{rank}]", dict(summary), f"{wanted}; this one lacks {', '.join(missing)}")
    known = {each.name for each in fields(WorkerSummary)}
    workers = tuple(
        WorkerSummary(**{name: value for name, value in worker.items() if name in known})
        for worker in summary["workers"]
    )
    values = {each.name: summary[each.name] for each in fields(EpochSummary) if each.name in summary}
    return EpochSummary(**{**values, "workers": workers})
