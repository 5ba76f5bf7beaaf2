"""What tuning found: as a table, as JSON, and as a plot."""

from __future__ import annotations

import dataclasses
import itertools
import os
import textwrap
from dataclasses import dataclass
from typing import Any

from robustloader.decisions.tuning import Row, Verdict, duration

__all__ = ["TuningReport", "check_plot"]

_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class TuningReport:
    """The measured numbers of workers, and the recommended one.

    Attributes:
        best: the recommended ``num_workers``.
        rows: one :class:`~robustloader.decisions.tuning.Row` per measured number, ascending.
        verdict: "data is not your bottleneck", "data is the bottleneck", "as fast as possible" (no ``step_s``), or
            "unfinished": the search was cut short before the number that promises most had its turn.
        reason: why this number, in words.
        complete: False after Ctrl-C, or where the time did not suffice for every candidate.
        batch_size: samples in a batch, at most an epoch's; None where the dataset makes its own batches.
        step_s: the trainer's step that was assumed, in seconds.
        load_s, cpu_s, cross_s: of one batch: loading it in one process, processor time in that, crossing from a worker.
        batch_bytes: size of a batch.
        ceiling, ceiling_reason: the most workers that were allowed here, and what says so.
        notes: what else is worth knowing.
    """

    best: int
    rows: tuple[Row, ...]
    verdict: Verdict
    reason: str
    complete: bool
    batch_size: int | None
    step_s: float
    load_s: float
    cpu_s: float
    cross_s: float
    batch_bytes: int
    ceiling: int
    ceiling_reason: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**dataclasses.asdict(self), "rows": [dataclasses.asdict(row) for row in self.rows]} | {
            "notes": list(self.notes)
        }

    def __str__(self) -> str:
        """A table of at most 100 columns, and the recommendation below it."""
        lines = [
            f"one batch: {duration(self.load_s)} to load, {duration(self.cpu_s)} of that on a processor; "
            f"{duration(self.cross_s)} to cross; {self.batch_bytes / 2**20:.3g} MiB",
            "",
            f"{'workers':>7}  {'batches/s':>11}  {'range':>17}  {'gain':>7}  {'ideal':>11}  {'first batch':>11}  "
            f"{'waiting':>7}",
        ]
        for row in self.rows:
            gain = "" if row.gain is None else f"{row.gain:+.0%}"
            spread = f"{_number(row.low)}–{_number(row.high)}"
            waiting = f"{row.wait_fraction:.0%}" if self.step_s else ""
            mark = "  <-" if row.num_workers == self.best else ""
            lines.append(
                f"{row.num_workers:>7}  {_number(row.batches_per_s):>11}  {spread:>17}  {gain:>7}  "
                f"{_number(row.ideal_batches_per_s):>11}  {duration(row.first_batch_s):>11}  {waiting:>7}{mark}"
            )
        lines += ["", f"num_workers={self.best}: {self.verdict}"]
        lines += textwrap.wrap(self.reason, _WIDTH)
        for note in self.notes:
            lines += textwrap.wrap(f"Note: {note}", _WIDTH)
        if not self.complete:
            lines.append("The search was cut short: this is the best of what was measured.")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw throughput with the ideal line, the marginal gain, and the time to the first batch, against workers.

        The suffix of ``path`` says which format. Needs matplotlib (extra ``tune``).

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        workers = [row.num_workers for row in self.rows]
        figure = Figure(figsize=(8, 8), layout="constrained")
        FigureCanvasAgg(figure)
        speed, gain, first = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.4, 1.4))
        rates = [row.batches_per_s for row in self.rows]
        below = [row.batches_per_s - row.low for row in self.rows]
        above = [row.high - row.batches_per_s for row in self.rows]
        speed.plot(workers, [row.ideal_batches_per_s for row in self.rows], "--", color="#878787", label="ideal")
        speed.errorbar(workers, rates, yerr=(below, above), marker="o", capsize=3, color="#2166ac", label="measured")
        modelled = [row.model_batches_per_s for row in self.rows]
        if None not in modelled:
            speed.plot(workers, modelled, ":", color="#b2182b", label="model")
        speed.axvline(self.best, color="#4d9221", linewidth=6, alpha=0.25, label=f"recommended: {self.best}")
        speed.set_ylim(0, 1.6 * max(row.high for row in self.rows))
        speed.set_ylabel("batches/s")
        speed.set_title(f"num_workers={self.best}: {self.verdict}", loc="left")
        speed.legend(frameon=False, ncols=4, loc="upper left")
        for before, row in itertools.pairwise(self.rows):
            added = row.num_workers - before.num_workers
            each = (row.batches_per_s - before.batches_per_s) / added
            gain.bar(before.num_workers + added / 2, each, width=0.9 * added, color="#92c5de")
        gain.axhline(0, color="black", linewidth=0.6)
        gain.set_ylabel("gain in batches/s\nper worker added")
        first.plot(workers, [1e3 * row.first_batch_s for row in self.rows], marker="o", color="#762a83")
        first.set_ylim(bottom=0)
        first.set_ylabel("first batch, ms")
        first.set_xlabel("num_workers")
        first.set_xticks(workers)
        for axes in (speed, gain, first):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.3)
        figure.savefig(path)


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raise what :meth:`TuningReport.plot` would, as far as it can be known before there is anything to draw.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the suffix is of no format that it writes.
        OSError: the file cannot be written. One that is there already is not changed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = FigureCanvasAgg.get_supported_filetypes()
    suffix = os.path.splitext(path)[1].removeprefix(".").lower()
    if suffix and suffix not in known:
        raise ValueError(
            f"{os.fspath(path)!r} has a suffix of no format that is known: one of {', '.join(sorted(known))}"
        )
    file = os.fspath(path) if suffix else f"{os.fspath(path)}.{FigureCanvasAgg.get_default_filetype()}"
    there = os.path.lexists(file)
    if there and not os.path.isfile(file) and not os.path.isdir(file):
        return  # a device, or a pipe, which only its reader can open
    with open(file, "ab"):
        pass
    if not there:
        os.remove(file)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"
