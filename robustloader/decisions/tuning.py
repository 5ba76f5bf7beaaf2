"""Which numbers of workers to measure, in which order, when to stop, and which one to recommend.

Numbers in, plans out: nothing here loads anything or reads a clock.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from robustloader.decisions.limits import (
    Descriptors,
    Memory,
    Processes,
    batches_held,
    gib,
    headroom_bytes,
    plan_start,
    plural,
)

__all__ = [
    "KNEE_GAIN",
    "OVERSUBSCRIPTION",
    "Advice",
    "Block",
    "Ceiling",
    "Explorer",
    "Model",
    "Row",
    "Verdict",
    "advise",
    "duration",
    "plan_ceiling",
    "plan_grid",
    "tell_trouble",
]

KNEE_GAIN = 0.05
"""More workers must bring at least so much more throughput to be worth having."""

OVERSUBSCRIPTION = 4
"""Workers per processor at most, for samples that mostly wait (for storage, a network)."""

MAX_ROUNDS = 8
STEADY_ROUNDS = 3
"""A recommendation that stood for so many rounds is taken."""

STRIDE = 2
"""Upwards the search takes so many steps of the grid at once; it comes back where it has gone too far."""

HOPELESS = 0.7
"""A candidate below this share of the best throughput is not measured again."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """One turn of one candidate: counted batches after a warm-up.

    Attributes:
        batches: counted.
        elapsed_s: for these.
        first_batch_s: from ``iter()`` to the first batch.
        worker_bytes: what the largest worker held for itself; 0 where unknown.
        samples: that were delivered, those of the warm-up included.
        faults: samples that failed for good meanwhile.
        deaths: crashes and hangs of workers meanwhile.
        fault_causes, death_causes: names of exception types, and of signals, as far as they are known.
    """

    batches: int
    elapsed_s: float
    first_batch_s: float
    worker_bytes: int = 0
    samples: int = 0
    faults: int = 0
    deaths: int = 0
    fault_causes: frozenset[str] = frozenset()
    death_causes: frozenset[str] = frozenset()

    @property
    def rate(self) -> float:
        """Batches per second."""
        return self.batches / self.elapsed_s


@dataclass(frozen=True, kw_only=True)
class Model:
    """How long a batch should take, from what one process shows.

    Attributes:
        load_s: to load and collate one batch in one process.
        cpu_s: processor time in that.
        cross_s: for one batch to cross from a worker.
        cpus: processors for this rank.
        step_s: what the trainer does with a batch.
    """

    load_s: float
    cpu_s: float
    cross_s: float
    cpus: float
    step_s: float = 0.0

    def batch_s(self, workers: int) -> float:
        """Seconds a batch: the slowest of trainer, workers and processors."""
        if not workers:
            return self.load_s + self.step_s
        alone = (self.load_s + self.cross_s) / workers
        processors = (self.cpu_s + self.cross_s) / self.cpus
        return max(self.step_s + self.cross_s, alone, processors, 1e-9)

    def knee(self, grid: Iterable[int]) -> int:
        """The smallest of ``grid`` that is within the knee's gain of the best."""
        periods = {workers: self.batch_s(workers) for workers in sorted(grid)}
        best = min(periods.values())
        return next(workers for workers, period in periods.items() if best >= period * (1 - KNEE_GAIN))


# --- limits -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """At most so many workers, and what says so."""

    workers: int
    reason: str


def plan_ceiling(
    *,
    cpus: int,
    ranks: int,
    load_s: float,
    cpu_s: float,
    memory: Memory,
    headroom_fraction: float,
    batch_bytes: int,
    worker_bytes: int,
    prefetch_factor: int,
    descriptors: Descriptors,
    processes: Processes,
) -> Ceiling:
    """How many workers this rank may have.

    Samples that use the processor get one worker per processor of this rank's share; samples that mostly wait get more,
    as far as their processor time fits, and at most :data:`OVERSUBSCRIPTION` times as many.
    """
    share = max(1, cpus // max(1, ranks))
    busy = min(1.0, max(cpu_s / load_s if load_s > 0 else 1.0, 1 / OVERSUBSCRIPTION))
    workers = max(share, math.floor(share / busy))
    reason = f"{plural(share, 'processor')} for this rank"
    if workers > share:
        reason += f", and each worker waits at least {1 - busy:.0%} of its time"
    start = plan_start(workers, descriptors, processes)
    if start.workers < workers:
        workers, reason = start.workers, start.shortages[-1].text
    free = (memory.free_bytes - headroom_bytes(memory, headroom_fraction)) // max(1, ranks)
    fit = workers
    while fit and batches_held(fit, prefetch_factor) * batch_bytes + fit * worker_bytes > free:
        fit -= 1
    if fit < workers:
        workers, reason = fit, f"{gib(max(0, free))} of memory are free for this rank above the headroom"
    return Ceiling(workers=workers, reason=reason)


def plan_grid(ceiling: int) -> tuple[int, ...]:
    """Numbers of workers worth telling apart: each, then steps of a third to a half, and the ceiling itself."""
    grid, step = [], 1
    number = 0
    while number <= ceiling:
        grid.append(number)
        if number >= 4 * step:
            step *= 2
        number += step
    return tuple(sorted({*grid, ceiling}))


# --- the search -------------------------------------------------------------------------------------------------------


@dataclass
class Explorer:
    """Says which candidate is measured next.

    It begins with the model's knee, its neighbours, and none to two workers; after each round it looks further up while
    that still pays, halves the gaps beside the knee, and drops what is far from it or hopeless. The order turns round
    from round to round, so that a drift of the machine does not favour one.

    Attributes:
        grid: candidates, ascending.
        model: where to begin; None begins with all of them.
        blocks: what was measured, by workers.
    """

    grid: tuple[int, ...]
    model: Model | None
    blocks: dict[int, list[Block]] = field(default_factory=dict)
    _round: int = 0
    _queue: list[int] = field(default_factory=list)
    _active: set[int] = field(default_factory=set)
    _knees: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.model is None:
            self._active = set(self.grid)
            return
        place = self.grid.index(self.model.knee(self.grid))
        self._active = {*self.grid[max(0, place - 1) : place + 2], *(n for n in self.grid if n <= 2)}

    def limit(self, ceiling: int) -> None:
        """Leave out what is above ``ceiling``: a measurement showed that it would not fit."""
        self.grid = tuple(number for number in self.grid if number <= ceiling)
        self._active = (self._active & set(self.grid)) | set(self.grid[-1:])
        self._queue = [number for number in self._queue if number <= ceiling]

    def next(self) -> int | None:
        """The candidate to measure now; None when the answer stands."""
        if not self._queue:
            if self._round:
                self._review()
            if self._settled():
                return None
            self._queue = sorted(self._active, reverse=bool(self._round % 2))
            self._round += 1
        return self._queue.pop(0) if self._queue else None

    def record(self, workers: int, block: Block) -> None:
        """What a turn has shown."""
        self.blocks.setdefault(workers, []).append(block)

    def drop(self, workers: int) -> None:
        """A candidate cannot be measured."""
        self.grid = tuple(number for number in self.grid if number != workers)
        self._active.discard(workers)

    @property
    def pending(self) -> bool:
        """Whether a candidate that should be measured has not been."""
        return bool(self._active - set(self.blocks))

    @property
    def rates(self) -> dict[int, float]:
        """Median batches per second, by workers; what was measured and has turned out not to fit is left out."""
        allowed = sorted(self.blocks.keys() & set(self.grid))
        return {n: statistics.median(block.rate for block in self.blocks[n]) for n in allowed}

    def _review(self) -> None:
        rates = self.rates
        if not rates:
            return
        best = max(rates.values())
        knee = choose(rates)
        self._knees.append(knee)
        if self.model is None:  # the caller named the candidates: all of them stay that have a chance
            self._active = {n for n in self._active if rates.get(n, best) >= HOPELESS * best}
            return
        below = max((n for n in rates if n < knee), default=None)
        above = min((n for n in rates if n > knee), default=None)
        self._active = {n for n in (below, knee, above) if n in self.grid and rates[n] >= HOPELESS * best}
        # Both neighbours of the knee must have been seen, else nobody knows that it is one: halve the gaps.
        self._add_middle(-1 if below is None else below, knee)
        if above is not None:
            self._add_middle(knee, above)
        else:
            self._active.update([n for n in self.grid if n > knee][:STRIDE][-1:])

    def _add_middle(self, low: int, high: int) -> None:
        between = [number for number in self.grid if low < number < high]
        if between:
            self._active.add(between[len(between) // 2])

    def _settled(self) -> bool:
        if self._round >= MAX_ROUNDS or not self._active:
            return True
        recent = self._knees[-STEADY_ROUNDS:]
        return len(recent) == STEADY_ROUNDS and len(set(recent)) == 1 and not self.pending


def choose(rates: dict[int, float]) -> int:
    """The fewest workers whose throughput is within :data:`KNEE_GAIN` of the best."""
    best = max(rates.values())
    return next(workers for workers in sorted(rates) if rates[workers] * (1 + KNEE_GAIN) > best)


# --- the answer -------------------------------------------------------------------------------------------------------

Verdict = Literal["data is the bottleneck", "data is not your bottleneck", "as fast as possible", "unfinished"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured for one number of workers.

    Attributes:
        num_workers: worker processes; 0 loads in the training process.
        batches_per_s, low, high: median over rounds, and the extremes.
        first_batch_s: from ``iter()`` to the first batch, median.
        gain: throughput over that of the row before, less 1; None in the first.
        ideal_batches_per_s: one process's throughput times the workers, at most what ``step_s`` allows.
        model_batches_per_s: what the model expected; None without one.
        wait_fraction: share of the loop that waits for data; 1 where there is no step.
        rounds: how often it had its turn.
        faults: samples that failed for good in these rounds.
        deaths: crashes and hangs of workers in these rounds.
    """

    num_workers: int
    batches_per_s: float
    low: float
    high: float
    first_batch_s: float
    gain: float | None
    ideal_batches_per_s: float
    model_batches_per_s: float | None
    wait_fraction: float
    rounds: int
    faults: int = 0
    deaths: int = 0


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Rows, the recommended one, and why."""

    rows: tuple[Row, ...]
    best: int
    verdict: Verdict
    reason: str


def advise(
    blocks: dict[int, list[Block]],
    *,
    model: Model | None,
    step_s: float,
    ceiling: Ceiling | None,
    untried: int | None = None,
) -> Advice:
    """The recommendation that follows from what was measured.

    What was measured above the ceiling (it may have come down meanwhile, as workers proved large) stays in the rows and
    is not recommended; where all of it is above, the ceiling itself is.

    ``untried`` is the number that the model expects to be best, where it had no turn: if it promises more than the best
    of what was measured, the answer is unfinished, and says so.

    Raises:
        ValueError: nothing was measured.
    """
    if not any(blocks.values()):
        raise ValueError("nothing was measured")
    rows: list[Row] = []
    unit = _unit_rate(blocks, model)
    for workers in sorted(blocks):
        rates = [block.rate for block in blocks[workers]]
        rate = statistics.median(rates)
        ideal = unit * max(1, workers)
        if step_s:
            ideal = min(1 / step_s, ideal) if workers else 1 / (1 / unit + step_s)
        rows.append(
            Row(
                num_workers=workers,
                batches_per_s=rate,
                low=min(rates),
                high=max(rates),
                first_batch_s=statistics.median(block.first_batch_s for block in blocks[workers]),
                gain=rate / rows[-1].batches_per_s - 1 if rows else None,
                ideal_batches_per_s=ideal,
                model_batches_per_s=1 / model.batch_s(workers) if model else None,
                wait_fraction=min(1.0, max(0.0, 1 - rate * step_s)),
                rounds=len(rates),
                faults=sum(block.faults for block in blocks[workers]),
                deaths=sum(block.deaths for block in blocks[workers]),
            )
        )
    allowed = [row for row in rows if ceiling is None or row.num_workers <= ceiling.workers]
    if ceiling is not None and not allowed:
        reason = f"Nothing that was measured fits, and {ceiling.workers} is the most that does: {ceiling.reason}."
        return Advice(rows=tuple(rows), best=ceiling.workers, verdict="as fast as possible", reason=reason)
    best = choose({row.num_workers: row.batches_per_s for row in allowed})
    chosen = next(row for row in rows if row.num_workers == best)
    verdict: Verdict = "as fast as possible"
    if step_s:
        enough = chosen.wait_fraction <= KNEE_GAIN
        verdict = "data is not your bottleneck" if enough else "data is the bottleneck"
    if untried is not None and model is not None and verdict != "data is not your bottleneck":
        more = model.batch_s(best) / model.batch_s(untried)
        if more > 1 + KNEE_GAIN:
            reason = (
                f"It is the best of those that had their turn. num_workers={untried} had none, and of that the model "
                f"expects {more:.3g} × the throughput: give the search more time (seconds)."
            )
            return Advice(rows=tuple(rows), best=best, verdict="unfinished", reason=reason)
    reason = _reason(allowed, chosen, verdict, step_s, ceiling)
    if ceiling is not None and len(allowed) < len(rows) and ceiling.reason not in reason:
        reason += f" More than {ceiling.workers} do not fit: {ceiling.reason}."
    return Advice(rows=tuple(rows), best=best, verdict=verdict, reason=reason)


def tell_trouble(blocks: dict[int, list[Block]]) -> list[str]:
    """Samples that failed and workers that died while it was measured: they cost time, which the rates hold."""
    told = []
    turns = [block for each in blocks.values() for block in each]
    deaths, faults = sum(block.deaths for block in turns), sum(block.faults for block in turns)
    if deaths:
        where = ", ".join(str(n) for n in sorted(blocks) if any(block.deaths for block in blocks[n]))
        causes = _causes(block.death_causes for block in turns)
        told.append(
            f"workers died or hung {_times(deaths)}{causes} with num_workers={where}: what is told of these numbers is "
            "how fast workers are restarted, not how fast they load. Mend that first"
        )
    if faults:
        samples = faults + sum(block.samples for block in turns)
        told.append(
            f"{faults:,} of {samples:,} samples failed for good{_causes(block.fault_causes for block in turns)}: what "
            "they cost is part of what was measured"
        )
    return told


def _causes(known: Iterable[frozenset[str]]) -> str:
    names = sorted(frozenset().union(*known))
    return f" ({', '.join(names)})" if names else ""


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number:,} times"


def duration(seconds: float) -> str:
    """For people: three digits, milliseconds below one second."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def _unit_rate(blocks: dict[int, list[Block]], model: Model | None) -> float:
    """Batches per second of one process that does nothing else."""
    if model is not None and model.load_s > 0:
        return 1 / model.load_s
    least = min(blocks)
    return statistics.median(block.rate for block in blocks[least]) / max(1, least)


def _reason(rows: list[Row], chosen: Row, verdict: Verdict, step_s: float, ceiling: Ceiling | None) -> str:
    fastest = max(rows, key=lambda row: row.batches_per_s)
    words = []
    if verdict == "data is not your bottleneck":
        words.append(
            f"Data is not your bottleneck: with num_workers={chosen.num_workers} a loop with steps of "
            f"{duration(step_s)} waits {chosen.wait_fraction:.1%} of its time."
        )
    elif verdict == "data is the bottleneck":
        words.append(
            f"Data is the bottleneck: with num_workers={chosen.num_workers} the loop still waits "
            f"{chosen.wait_fraction:.0%} of its time."
        )
    else:
        words.append(
            f"A training step longer than {duration(1 / chosen.batches_per_s)} a batch would not wait for "
            f"num_workers={chosen.num_workers}."
        )
    if fastest is not chosen:
        words.append(
            f"num_workers={fastest.num_workers} was {fastest.batches_per_s / chosen.batches_per_s - 1:.1%} faster, "
            f"less than the {KNEE_GAIN:.0%} that more workers must bring."
        )
    elif chosen is rows[-1]:
        cause = f": {ceiling.reason}" if ceiling and ceiling.workers <= chosen.num_workers else " of those measured"
        words.append(f"It is the largest number{cause}.")
    else:
        words.append("More workers, as far as measured, were no faster.")
    if chosen.num_workers == 0 and len(rows) > 1:
        words.append("Loading in the training process costs no crossing, and that is what counts here.")
    return " ".join(words)
