"""A run as one HTML page that needs nothing else: no network, no other file.

Everything that comes from the run goes through Jinja2's escaping, or into a JSON island in which ``<`` cannot occur; a
content security policy lets only the two scripts run that are written here.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import robustloader
from robustloader.report.run import Epoch, Interval, RankRun, Run, thin_intervals
from robustloader.telemetry.units import as_bytes, as_clock, as_count, as_percent, as_seconds

__all__ = ["make_page"]

# A chart is some 1,000 pixels wide; all ranks together share what a page of 3 MB can hold.
_POINTS = 600
_NUMBERS = 200_000
_ROWS = 60
_ROWS_IN_ALL = 1_500
_FAULT_ROWS = 200
_INCIDENT_ROWS = 200
_LANES = 32
_MARKS = 2_000
_MARKED = ("WorkerCrashed", "WorkerHung", "WorkerRestarted", "WorkerRecycled")
_VERDICTS = {
    "input-bound": "The loop waits for data",
    "compute-bound": "The loop computes, data is there",
    "balanced": "Loading and computing are balanced",
    "warm-up": "Too early to tell",
}
_KINDS = {
    "exception": "the sample raised",
    "crash": "its worker died",
    "hang": "its worker stayed silent",
    "poison": "kills workers, proved alone",
    "collate": "collate_fn raised",
    "unpicklable": "could not be sent",
    "undecodable": "could not be received",
}


@dataclass(frozen=True, kw_only=True)
class _Span:
    """Neighbouring epochs in one row of a table."""

    name: str
    epochs: tuple[Epoch, ...]

    def total(self, name: str) -> float:
        return float(sum(getattr(epoch.summary, name) for epoch in self.epochs))

    @property
    def samples_per_s(self) -> float:
        duration_s = self.total("duration_s")
        return self.total("samples") / duration_s if duration_s > 0 else 0.0

    @property
    def wait_fraction(self) -> float:
        loop_s = self.total("wait_s") + self.total("step_s")
        return self.total("wait_s") / loop_s if loop_s > 0 else 0.0

    @property
    def verdict(self) -> str:
        verdicts = {str(epoch.summary.verdict) for epoch in self.epochs if epoch.summary.verdict}
        if any(epoch.running for epoch in self.epochs):
            return "running"
        return verdicts.pop() if len(verdicts) == 1 else "mixed" if verdicts else "not finished"


def make_page(run: Run, *, made_at: float) -> str:
    """The page as text; write it as UTF-8.

    Args:
        run: what to show.
        made_at: when it is made, Unix seconds; the page says so.
    """
    template = files("robustloader.report").joinpath("page.html.j2").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "bytes": as_bytes,
        "clock": as_clock,
        "count": as_count,
        "percent": as_percent,
        "seconds": as_seconds,
    }
    lead = run.leading
    rows = max(4, min(_ROWS, _ROWS_IN_ALL // max(1, len(run.ranks))))
    scripts = [_asset("vendor/uPlot.iife.min.js"), _asset("page.js")]
    faults = sorted(
        ((rank, group) for rank in run.ranks for group in rank.faults), key=lambda pair: (-pair[1].count, pair[1].first)
    )
    incidents = sorted(
        ((rank, incident) for rank in run.ranks for incident in rank.incidents), key=lambda pair: -pair[1].time
    )
    return environment.from_string(template).render(
        run=run,
        lead=lead,
        made_at=made_at,
        version=robustloader.__version__,
        headline=_headline(run),
        tone=_tone(run),
        tables=[(rank, _spans(rank.epochs, rows), thin_intervals(rank.intervals, rows)) for rank in run.ranks],
        workers=[(rank, rank.workers) for rank in run.ranks],
        kinds=_kinds(run),
        kind_words=_KINDS,
        faults=faults[:_FAULT_ROWS],
        faults_hidden=max(0, len(faults) - _FAULT_ROWS) + sum(rank.faults_dropped for rank in run.ranks),
        incidents=incidents[:_INCIDENT_ROWS],
        incidents_hidden=max(0, len(incidents) - _INCIDENT_ROWS) + sum(rank.incidents_dropped for rank in run.ranks),
        lanes=_LANES,
        data=_island(_chart_data(run)),
        css=Markup(_asset("vendor/uPlot.min.css") + _asset("page.css")),
        scripts=[Markup(script) for script in scripts],
        policy="default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
        "script-src " + " ".join(map(_digest, scripts)),
    )


def _headline(run: Run) -> str:
    lead = run.leading
    if lead is None:
        return "No events"
    if not lead.total("batches"):
        return "No batch yet"
    return _VERDICTS.get(lead.verdict, lead.verdict)


def _tone(run: Run) -> str:
    """How the verdict is coloured; the words say the same."""
    lead = run.leading
    if lead is None or not lead.total("batches") or lead.verdict == "warm-up":
        return "calm"
    return {"input-bound": "bad", "balanced": "fair"}.get(lead.verdict, "good")


def _kinds(run: Run) -> list[tuple[str, int]]:
    sums: dict[str, int] = {}
    for rank in run.ranks:
        for kind, number in rank.faults_by_kind.items():
            sums[kind] = sums.get(kind, 0) + number
    return sorted(sums.items(), key=lambda pair: -pair[1])


def _spans(epochs: Sequence[Epoch], rows: int) -> list[_Span]:
    """The epochs in at most so many rows; several loaders keep apart."""
    spans: list[_Span] = []
    loaders = sorted({epoch.loader for epoch in epochs})
    for loader in loaders:
        own = [epoch for epoch in epochs if epoch.loader == loader]
        size = max(1, -(-len(own) * len(loaders) // rows))
        for begin in range(0, len(own), size):
            part = tuple(own[begin : begin + size])
            first, last = part[0].summary.epoch, part[-1].summary.epoch
            name = str(first) if len(part) == 1 else f"{first} to {last}"
            spans.append(_Span(name=name if len(loaders) == 1 else f"{name}, loader {loader}", epochs=part))
    return spans


def _chart_data(run: Run) -> dict[str, Any]:
    lanes = sum(4 + 2 * min(_LANES, len(_lane_ids(rank))) for rank in run.ranks)
    points = max(30, min(_POINTS, _NUMBERS // max(1, lanes)))
    lead = run.leading
    return {
        "lead": run.ranks.index(lead) if lead else 0,
        "ranks": [_rank_data(rank, points, max(50, _MARKS // len(run.ranks))) for rank in run.ranks],
    }


def _rank_data(rank: RankRun, points: int, most_marks: int) -> dict[str, Any]:
    """Columns for the charts; a row of nulls is a pause, over which no line is drawn."""
    rows = _with_pauses(thin_intervals(rank.intervals, points))
    ids = _lane_ids(rank)[:_LANES]
    marks = [mark for mark in rank.incidents if mark.what in _MARKED]

    def column(take: Any) -> list[Any]:
        return [None if isinstance(row, float) else take(row) for row in rows]

    return {
        "name": rank.rank,
        "begin": [round(row if isinstance(row, float) else row.begin, 3) for row in rows],
        "end": [round(row if isinstance(row, float) else row.end, 3) for row in rows],
        "rate": column(lambda row: _short(row.samples_per_s)),
        "wait": column(lambda row: _short(1e3 * row.wait_s / row.batches) if row.batches else None),
        "step": column(lambda row: _short(1e3 * row.step_s / row.batches) if row.batches else None),
        "pool": column(lambda row: row.active_workers),
        "memory": column(lambda row: _memory(row)[0]),
        "memoryAll": column(lambda row: _memory(row)[1]),
        "lanes": [
            {
                "name": "trainer" if worker == -1 else f"worker {worker}",
                "id": worker,
                "busy": column(lambda row, worker=worker: _busy_percent(row, worker)),
            }
            for worker in ids
        ],
        "marks": [
            {"t": round(mark.time, 3), "what": mark.what, "lane": mark.worker_id, "text": mark.text}
            for mark in marks[-most_marks:]
        ],
        "marksHidden": max(0, len(marks) - most_marks) + rank.incidents_dropped,
    }


def _with_pauses(intervals: Sequence[Interval]) -> list[Interval | float]:
    rows: list[Interval | float] = []
    usual = sorted(interval.duration_s for interval in intervals)[len(intervals) // 2] if intervals else 0.0
    for interval in intervals:
        last = rows[-1] if rows else None
        if isinstance(last, Interval) and interval.begin - last.end > max(1.0, 3 * usual):
            rows.append((last.end + interval.begin) / 2)
        rows.append(interval)
    return rows


def _lane_ids(rank: RankRun) -> list[int]:
    """Workers first, then the training process where it loaded batches itself."""
    ids = {worker for interval in rank.intervals for worker in interval.busy_s}
    return sorted(ids, key=lambda worker: (worker == -1, worker))


def _busy_percent(row: Interval, worker: int) -> int | None:
    if worker not in row.busy_s or row.duration_s <= 0:
        return None
    return min(100, round(100 * row.busy_s[worker] / row.duration_s))


def _memory(row: Interval) -> tuple[float | None, float | None]:
    """The largest worker and all workers together, in MiB."""
    held = [size for worker, size in row.rss_bytes.items() if worker >= 0 and size]
    return (_short(max(held) / 2**20), _short(sum(held) / 2**20)) if held else (None, None)


def _short(number: float) -> float:
    """Four digits are more than a pixel shows."""
    return float(f"{number:.4g}")


def _asset(name: str) -> str:
    return files("robustloader.report").joinpath(*name.split("/")).read_text("utf-8")


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _island(data: Any) -> Markup:
    """JSON within a script element, in which nothing can end the element or begin a comment."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
