"""A run as one screen of a terminal: rich renderables, made from the same records as the page.

Imports rich, which is an extra: the command imports this module only when it needs it.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from robustloader.report.run import Interval, RankRun, Run, thin_intervals
from robustloader.telemetry.units import as_bytes, as_clock, as_count, as_line, as_percent, as_seconds

__all__ = ["make_screen"]

_BARS = " ▁▂▃▄▅▆▇█"
_TONES = {"input-bound": "red", "balanced": "yellow", "compute-bound": "green", "warm-up": "cyan"}
# A panel's borders and padding, left and right.
_FRAME = 4


def make_screen(run: Run, *, name: str, width: int, height: int, note: str = "") -> RenderableType:
    """One frame.

    Args:
        run: what to show.
        name: what is watched, for the title.
        width: columns of the terminal.
        height: its lines; lists are cut to fit.
        note: a line for the foot, such as the keys.
    """
    lead = run.leading
    if lead is None or not lead.epochs:
        waiting = (
            "No progress yet: the first line comes some seconds after the first batch."
            if lead
            else ("The file holds no events yet.")
        )
        first = Panel(Text(waiting), title=_plain(name), title_align="left")
        troubles = Panel(
            _troubles(run, max(1, height - 8), width - _FRAME), title="faults and deaths", title_align="left"
        )
        return Group(first, *([troubles] if lead else []), *_foot(run, note))
    foot = _foot(run, note)
    several = len(run.ranks) > 1
    # The head takes up to eleven lines with a comparison of ranks, nine without; a table's borders, header and count of
    # those left out take four. A small window shows the ranks rather than the workers of one.
    left = height - (11 if several else 9) - len(foot) - 2
    with_workers = not several or left - 8 >= 6
    room = max(1, (left - 4 * (several + with_workers)) // (1 + several + with_workers))
    parts: list[RenderableType] = [_head(run, lead, name, width - _FRAME)]
    if several:
        parts.append(Panel(_ranks(run, room), title="ranks", title_align="left"))
    if with_workers:
        parts.append(Panel(_workers(lead, room), title="workers", title_align="left"))
    parts.append(Panel(_troubles(run, room, width - _FRAME), title="faults and deaths", title_align="left"))
    return Group(*parts, *foot)


def _head(run: Run, lead: RankRun, name: str, width: int) -> Panel:
    now = lead.epochs[-1]
    summary = now.summary
    recent = lead.intervals[-1] if lead.intervals else None
    status = "running" if now.running else "complete" if summary.complete else "left early"
    lines = [
        Text.assemble((f" {lead.verdict} ", f"reverse {_TONES.get(lead.verdict, 'cyan')}"), "  ", _plain(lead.advice)),
        Text(
            f"epoch {summary.epoch} ({status})   {as_count(summary.batches)} batches   "
            f"{as_count(summary.samples)} samples in {as_seconds(summary.duration_s)}   "
            f"{summary.workers_at_end} workers"
        ),
        Text(
            f"now {as_count(recent.samples_per_s if recent else 0.0)} samples/s   waiting "
            f"{as_percent(recent.wait_fraction if recent else 0.0)}   whole run "
            f"{as_count(lead.samples_per_s)} samples/s, {as_percent(lead.facts.wait_fraction)}"
        ),
        _line("samples/s", [interval.samples_per_s for interval in lead.intervals], lead.intervals, width, "blue"),
        _line("waiting", [interval.wait_fraction for interval in lead.intervals], lead.intervals, width, "yellow"),
    ]
    if len(run.ranks) > 1:
        lines.append(_plain(run.comparison.reason))
    rank = f", rank {lead.rank}" if len(run.ranks) > 1 else ""
    return Panel(Group(*lines), title=_plain(f"{name}{rank}"), title_align="left")


def _line(label: str, values: Sequence[float], intervals: Sequence[Interval], width: int, colour: str) -> Text:
    """The newest values as a row of bars; shares are drawn against 1, rates against the highest."""
    room = max(8, width - 24)
    if label == "waiting":
        newest, top, told = [i.wait_fraction for i in intervals[-room:]], 1.0, as_percent(values[-1]) if values else ""
    else:
        newest = list(values[-room:])
        top, told = max(newest, default=0.0), as_count(newest[-1]) if newest else ""
    bars = "".join(_BARS[min(8, max(0, round(8 * value / top)))] if top > 0 else " " for value in newest)
    return Text.assemble((f"{label:<10}", "dim"), (bars, colour), " ", told)


def _ranks(run: Run, room: int) -> RenderableType:
    table = _table("rank", "samples/s", "waiting", "faults", "lost", "memory")
    ordered = sorted(run.ranks, key=lambda rank: rank.rank != run.comparison.slowest)
    for rank in ordered[:room]:
        slow = rank.rank == run.comparison.slowest
        table.add_row(
            _plain(rank.rank + (" (slowest)" if slow else "")),
            as_count(rank.samples_per_s),
            as_percent(rank.facts.wait_fraction),
            as_count(rank.facts.faults),
            as_count(rank.facts.deaths),
            as_bytes(rank.peak_worker_bytes) if rank.peak_worker_bytes else "-",
            style="bold red" if slow else "",
        )
    return _and_more(table, len(ordered) - room, "ranks")


def _workers(lead: RankRun, room: int) -> RenderableType:
    workers = lead.epochs[-1].summary.workers
    if not workers:
        return Text("none has told of its work yet", style="dim")
    recent = thin_intervals(lead.intervals[-6:], 1)[0] if lead.intervals else None
    table = _table("worker", "loading", "batches", "load p95", "memory", "restarts")
    for worker in workers[:room]:
        key = -1 if worker.worker_id is None else worker.worker_id
        share = recent.busy_s.get(key, 0.0) / recent.duration_s if recent and recent.duration_s > 0 else 0.0
        share = min(1.0, share)
        table.add_row(
            "main" if key == -1 else str(key),
            Text.assemble(
                ("█" * round(12 * share), "blue"), ("░" * (12 - round(12 * share)), "dim"), f" {share:>4.0%}"
            ),
            as_count(worker.tasks),
            as_seconds(worker.load_p95_s),
            as_bytes(worker.peak_rss_bytes) if worker.peak_rss_bytes else "-",
            as_count(worker.restarts) if worker.restarts else "-",
        )
    return _and_more(table, len(workers) - room, "workers")


def _troubles(run: Run, room: int, width: int) -> RenderableType:
    """The newest of what went wrong, on all ranks."""
    told: list[tuple[float, str, str]] = []
    for rank in run.ranks:
        prefix = f"rank {rank.rank}: " if len(run.ranks) > 1 else ""
        told += [(mark.time, "red" if mark.what in ("WorkerCrashed", "WorkerHung") else "", prefix + mark.text)
                 for mark in rank.incidents]  # fmt: skip
        told += [
            (group.last, "yellow", f"{prefix}sample {group.sample} {group.kind} ×{group.count}, {group.action}: "
                                   f"{group.error_type} {group.message}")
            for group in rank.faults
        ]  # fmt: skip
    if not told:
        return Text("none", style="green")
    lines = []
    for at, style, text in sorted(told, reverse=True)[:room]:
        line = Text.assemble((as_clock(at)[11:] + " ", "dim"), (as_line(text), style))
        line.truncate(width, overflow="ellipsis")
        lines.append(line)
    return Group(*lines)


def _foot(run: Run, note: str) -> list[Text]:
    lines = [Text(as_line(told), style="yellow") for told in run.notes if "no end" not in told]
    return [*lines, Text(as_line(note), style="dim")] if note else lines


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", expand=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or column == "loading" else "right", no_wrap=True)
    return table


def _and_more(table: Table, left: int, what: str) -> RenderableType:
    return Group(table, Text(f"and {left} more {what}", style="dim")) if left > 0 else table


def _plain(text: str) -> Text:
    """Text of the run's, in which nothing is markup."""
    return Text(as_line(text))
