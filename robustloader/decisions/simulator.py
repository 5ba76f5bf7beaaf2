"""A loader simulated: workers, processors, load times, crossing, lookahead, the trainer's step, deaths and restarts.

Event-driven and deterministic given a seed; no clock is read and no process started. Batches are loaded in two parts: a
wait (storage, a network), which workers do at the same time, and work, for which they share the processors evenly. The
training process takes batches in order: each crosses, then comes the step. Crossing and step do not use the shared
processors.
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["LoadTime", "Outcome", "Setup", "Survival", "simulate", "survive"]


@dataclass(frozen=True, kw_only=True)
class LoadTime:
    """How long one batch takes one worker that has a processor for itself.

    Attributes:
        mean_s: on average, in seconds.
        kind: "constant"; "exponential"; "skewed": one of ``1 / slow_fraction`` takes ``slow_factor`` times as long as
            the others.
        work_fraction: share of it that needs a processor; the rest is waiting.
        slow_fraction, slow_factor: for "skewed".
    """

    mean_s: float
    kind: Literal["constant", "exponential", "skewed"] = "constant"
    work_fraction: float = 1.0
    slow_fraction: float = 0.01
    slow_factor: float = 50.0

    def draw(self, chance: random.Random) -> float:
        """Seconds for one batch."""
        if self.kind == "exponential":
            return chance.expovariate(1 / self.mean_s)
        if self.kind == "skewed":
            quick = self.mean_s / (1 + self.slow_fraction * (self.slow_factor - 1))
            return quick * (self.slow_factor if chance.random() < self.slow_fraction else 1)
        return self.mean_s


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is simulated.

    Attributes:
        workers: 0 loads in the training process.
        load: time to load a batch.
        cores: processors that the workers share.
        cross_s: of the training process's time, for each batch that comes from a worker.
        step_s: what the trainer does with a batch.
        prefetch_factor: batches ahead per worker.
        start_s: from the start of a worker until it can load.
        death_every_s: mean time between the deaths of one worker (exponential); None for never.
        restart_s: from a death until the successor can load; None: the first death ends the job, as in a loader that
            does not recover.
    """

    workers: int
    load: LoadTime
    cores: float = math.inf
    cross_s: float = 0.0
    step_s: float = 0.0
    prefetch_factor: int = 2
    start_s: float = 0.0
    death_every_s: float | None = None
    restart_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of it.

    Attributes:
        batches: delivered.
        duration_s: until the last step ended, or the job was lost.
        wait_s: of it, the trainer had no batch in hand (crossing included).
        first_batch_s: until the first batch was there.
        deaths: of workers.
        lost: a death ended the job.
    """

    batches: int
    duration_s: float
    wait_s: float
    first_batch_s: float
    deaths: int = 0
    lost: bool = False

    @property
    def batches_per_s(self) -> float:
        """Throughput, from the start."""
        return self.batches / self.duration_s if self.duration_s else math.inf


def simulate(setup: Setup, batches: int, *, seed: int = 0) -> Outcome:
    """Simulate an epoch of so many batches."""
    return (
        _Simulation(setup, batches, random.Random(seed)).run() if setup.workers else _in_process(setup, batches, seed)
    )


def _in_process(setup: Setup, batches: int, seed: int) -> Outcome:
    chance = random.Random(seed)
    loads = [setup.load.draw(chance) for _ in range(batches)]
    waited = math.fsum(loads)
    return Outcome(
        batches=batches,
        duration_s=waited + batches * setup.step_s,
        wait_s=waited,
        first_batch_s=loads[0] if loads else 0.0,
    )


@dataclass
class _Worker:
    """A worker slot: the tasks given to it, and the life that its process is in (events of an earlier one are void)."""

    tasks: list[int] = field(default_factory=list)
    life: int = 0
    up: bool = False
    busy: bool = False
    working: bool = False


class _Simulation:
    """Events lie in two heaps: those at a time, and ends of work, which lie at a *service*: how much work a processor
    would have done that was shared by all from the start (processor sharing in virtual time, so that an arrival does
    not move every other end)."""

    def __init__(self, setup: Setup, batches: int, chance: random.Random) -> None:
        self._setup = setup
        self._batches = batches
        self._chance = chance
        self._workers = [_Worker() for _ in range(setup.workers)]
        self._now = self._service = 0.0
        self._timed: list[tuple[float, int, str, int, int]] = []
        self._ends: list[tuple[float, int, int, int]] = []
        self._working = self._number = 0
        self._loads: dict[int, float] = {}
        self._ready: set[int] = set()
        self._given = self._wanted = self._deaths = 0
        self._waiting = True
        self._waits_since = self._wait_s = 0.0
        self._first_s = 0.0

    def run(self) -> Outcome:
        lost = False
        for number in range(len(self._workers)):
            self._at(self._setup.start_s, "up", number)
        for _ in range(len(self._workers) * self._setup.prefetch_factor):
            self._give()
        while self._wanted < self._batches and not lost:
            kind, number, life = self._advance()
            worker = self._workers[number] if number >= 0 else None
            if worker is not None and life != worker.life:
                continue
            if kind == "died":
                lost = self._die(number)
            elif kind == "up":
                self._come_up(number)
            elif kind == "waited":
                self._work(number)
            elif kind == "loaded":
                self._load_done(number)
            elif kind == "crossed":
                self._crossed()
            else:  # stepped
                self._wanted += 1
                self._want()
        return Outcome(
            batches=self._wanted,
            duration_s=self._now,
            wait_s=self._wait_s + (self._now - self._waits_since if lost and self._waiting else 0.0),
            first_batch_s=self._first_s,
            deaths=self._deaths,
            lost=lost,
        )

    # --- time

    def _at(self, after_s: float, kind: str, number: int = -1) -> None:
        life = self._workers[number].life if number >= 0 else 0
        self._number += 1
        heapq.heappush(self._timed, (self._now + after_s, self._number, kind, number, life))

    def _advance(self) -> tuple[str, int, int]:
        """Go to the next event."""
        while self._ends and self._ends[0][3] != self._workers[self._ends[0][2]].life:
            heapq.heappop(self._ends)
        rate = min(1.0, self._setup.cores / self._working) if self._working else 1.0
        end_s = self._now + (self._ends[0][0] - self._service) / rate if self._ends else math.inf
        if self._timed and self._timed[0][0] <= end_s:
            at, _, kind, number, life = heapq.heappop(self._timed)
            self._service += (at - self._now) * rate if self._working else 0.0
            self._now = at
            return kind, number, life
        service, _, number, life = heapq.heappop(self._ends)
        self._service, self._now = service, end_s
        return "loaded", number, life

    # --- workers

    def _give(self) -> None:
        """The next task, to the worker whose turn it is."""
        if self._given >= self._batches:
            return
        task, number = self._given, self._given % len(self._workers)
        self._given += 1
        self._loads[task] = self._setup.load.draw(self._chance)
        self._workers[number].tasks.append(task)
        self._begin(number)

    def _begin(self, number: int) -> None:
        worker = self._workers[number]
        if not worker.up or worker.busy or not worker.tasks:
            return
        worker.busy = True
        self._at(self._loads[worker.tasks[0]] * (1 - self._setup.load.work_fraction), "waited", number)

    def _work(self, number: int) -> None:
        worker = self._workers[number]
        worker.working = True
        self._working += 1
        work = self._loads[worker.tasks[0]] * self._setup.load.work_fraction
        self._number += 1
        heapq.heappush(self._ends, (self._service + work, self._number, number, worker.life))

    def _load_done(self, number: int) -> None:
        worker = self._workers[number]
        worker.busy = worker.working = False
        self._working -= 1
        task = worker.tasks.pop(0)
        del self._loads[task]
        self._ready.add(task)
        self._begin(number)
        if self._waiting and task == self._wanted:
            self._want()

    def _come_up(self, number: int) -> None:
        self._workers[number].up = True
        if self._setup.death_every_s is not None:
            self._at(self._chance.expovariate(1 / self._setup.death_every_s), "died", number)
        self._begin(number)

    def _die(self, number: int) -> bool:
        """Whether the job is lost."""
        worker = self._workers[number]
        self._deaths += 1
        self._working -= worker.working
        worker.up = worker.busy = worker.working = False
        worker.life += 1
        if self._setup.restart_s is None:
            return True
        self._at(self._setup.restart_s, "up", number)
        return False

    # --- the trainer

    def _want(self) -> None:
        """Take the next batch if it is there, else wait for it."""
        if not self._waiting:
            self._waiting, self._waits_since = True, self._now
        if self._wanted in self._ready:
            self._ready.remove(self._wanted)
            self._waiting = False
            self._wait_s += self._now - self._waits_since + self._setup.cross_s
            self._at(self._setup.cross_s, "crossed")

    def _crossed(self) -> None:
        if not self._wanted:
            self._first_s = self._now
        self._give()
        self._at(self._setup.step_s, "stepped")


# --- many ranks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Survival:
    """Jobs of many ranks, each of which needs all of its ranks.

    Attributes:
        jobs: simulated.
        lost: of these, how many a loader without recovery would have lost.
        lost_expected: share that the exponential law gives.
        deaths_per_job: on average.
        stalled_s_per_job: what the deaths cost a job whose loader recovers, on average: all ranks wait for the one.
    """

    jobs: int
    lost: int
    lost_expected: float
    deaths_per_job: float
    stalled_s_per_job: float


def survive(
    *,
    ranks: int,
    workers: int,
    death_every_s: float,
    duration_s: float,
    stall_s: float,
    jobs: int = 1000,
    seed: int = 0,
) -> Survival:
    """How many jobs survive, by a draw for each worker death.

    Args:
        ranks, workers: ranks of a job, workers of a rank.
        death_every_s: mean time between the deaths of one worker; deaths are independent of each other.
        duration_s: of a job.
        stall_s: what a death costs all ranks where the loader recovers (:func:`simulate` tells).
        jobs: how many are drawn.
        seed: of the draw.
    """
    chance = random.Random(seed)
    rate = ranks * workers / death_every_s
    lost = total = 0
    for _ in range(jobs):
        deaths, now = 0, chance.expovariate(rate)
        while now < duration_s:
            deaths += 1
            now += chance.expovariate(rate)
        lost += deaths > 0
        total += deaths
    return Survival(
        jobs=jobs,
        lost=lost,
        lost_expected=-math.expm1(-rate * duration_s),
        deaths_per_job=total / jobs,
        stalled_s_per_job=total / jobs * stall_s,
    )
