"""A loader simulated: workers, processors, load times, crossing, lookahead, the trainer's step, deaths and restarts.

Event-driven and deterministic given a seed; no clock is read and no process started. Loading a batch has two parts: a
wait (storage, a network), which any number of workers do at the same time, and work, for which workers and the training
process share the processors. A batch that crosses costs work on both sides: the worker sends, the training process
receives. The training process takes batches in order; a step follows each.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Self

from robustloader.decisions.processors import Lines, Processors, Scheduler, Shared

__all__ = ["LoadTime", "Outcome", "Setup", "Survival", "simulate", "survive"]


@dataclass(frozen=True, kw_only=True)
class LoadTime:
    """How long one batch takes one worker that has a processor for itself.

    Attributes:
        mean_s: on average, in seconds.
        kind: "constant"; "exponential"; "skewed": one of ``1 / slow_fraction`` takes ``slow_factor`` times as long as
            the others; "observed": those of ``observed_s``, in that order, again and again.
        work_fraction: share of it that needs a processor; the rest is waiting.
        slow_fraction, slow_factor: for "skewed".
        observed_s: for "observed"; see :meth:`observed`.
    """

    mean_s: float
    kind: Literal["constant", "exponential", "skewed", "observed"] = "constant"
    work_fraction: float = 1.0
    slow_fraction: float = 0.01
    slow_factor: float = 50.0
    observed_s: tuple[float, ...] = ()

    @classmethod
    def observed(cls, times_s: tuple[float, ...], *, work_fraction: float = 1.0) -> Self:
        """Load times that were measured.

        Raises:
            ValueError: there are none.
        """
        if not times_s:
            raise ValueError("no load time was observed")
        mean_s = math.fsum(times_s) / len(times_s)
        return cls(mean_s=mean_s, kind="observed", work_fraction=work_fraction, observed_s=times_s)

    def draw(self, chance: random.Random) -> Iterator[float]:
        """Seconds for one batch after another, without end."""
        if self.kind == "observed":
            yield from itertools.cycle(self.observed_s)
        quick = self.mean_s / (1 + self.slow_fraction * (self.slow_factor - 1))
        while True:
            if self.kind == "exponential":
                yield chance.expovariate(1 / self.mean_s)
            elif self.kind == "skewed":
                yield quick * (self.slow_factor if chance.random() < self.slow_fraction else 1)
            else:
                yield self.mean_s


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is simulated.

    Attributes:
        workers: 0 loads in the training process.
        load: time to load a batch.
        cores: shared by the workers and the training process; a quota may make it a fraction.
        siblings: hardware threads beyond one a core (SMT): a process there shares a core with another one.
        sibling_gain: what such a second thread adds, as a share of a core.
        scheduler: who has a processor when; None shares all of them evenly at any moment. With one ``cores`` and
            ``siblings`` are whole numbers. It matters where a batch takes less than a millisecond or so.
        contention: how much longer work takes for each further process that runs at the same time, as a share: caches
            and the memory are shared too.
        wake_s: until a process that slept for want of a task, or of a batch, goes on.
        send_s: work of the worker for each batch that crosses.
        cross_s: work of the training process for each batch that crosses.
        step_s: what the trainer does with a batch.
        step_work_fraction: share of the step that needs one of the processors; for the rest it waits for a device.
        prefetch_factor: batches ahead per worker.
        start_s: from the start of a worker until it can load.
        death_every_s: mean time between the deaths of one worker (exponential); None for never.
        restart_s: from a death until the successor can load; None: the first death ends the job, as in a loader that
            does not recover.

    Raises:
        ValueError: there is a scheduler for part of a processor, or for endless ones.
    """

    workers: int
    load: LoadTime
    cores: float = math.inf
    siblings: float = 0.0
    sibling_gain: float = 0.3
    scheduler: Scheduler | None = None
    contention: float = 0.0
    wake_s: float = 0.0
    send_s: float = 0.0
    cross_s: float = 0.0
    step_s: float = 0.0
    step_work_fraction: float = 0.0
    prefetch_factor: int = 2
    start_s: float = 0.0
    death_every_s: float | None = None
    restart_s: float | None = None

    def __post_init__(self) -> None:
        if self.scheduler is not None and not float(self.cores + self.siblings).is_integer():
            raise ValueError(
                f"cores={self.cores}, siblings={self.siblings}: a scheduler needs whole processors; leave it out, or "
                "give whole numbers"
            )

    def processors(self) -> Processors:
        """Those of this machine, with nothing to do yet."""
        if self.scheduler is None:
            return Shared(self.speed)
        return Lines(int(self.cores + self.siblings), self.speed, self.scheduler)

    def speed(self, processes: int) -> float:
        """How fast each of so many processes runs that share the processors evenly, 1 where it is alone on the
        machine."""
        running = min(processes, self.cores + self.siblings)
        slowdown = 1 + self.contention * max(0.0, running - 1)
        if processes <= self.cores:
            return 1 / slowdown
        return (self.cores + self.sibling_gain * (running - self.cores)) / processes / slowdown


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of it.

    Attributes:
        batches: delivered.
        duration_s: until the last step ended, or the job was lost.
        wait_s: of it, the trainer had no batch in hand (crossing included).
        work_s: processor time of all processes.
        first_batch_s: until the first batch was there.
        deaths: of workers.
        lost: a death ended the job.
    """

    batches: int
    duration_s: float
    wait_s: float
    first_batch_s: float
    work_s: float = 0.0
    deaths: int = 0
    lost: bool = False

    @property
    def batches_per_s(self) -> float:
        """Throughput, from the start."""
        return self.batches / self.duration_s if self.duration_s else math.inf


def simulate(setup: Setup, batches: int, *, seed: int = 0) -> Outcome:
    """Simulate an epoch of so many batches."""
    chance = random.Random(seed)
    return _Simulation(setup, batches, chance).run() if setup.workers else _in_process(setup, batches, chance)


def _in_process(setup: Setup, batches: int, chance: random.Random) -> Outcome:
    """One process does everything, one thing after the other."""
    speed = setup.speed(1)
    share, step_share = setup.load.work_fraction, setup.step_work_fraction
    loads = list(itertools.islice(setup.load.draw(chance), batches))
    stretch, step_stretch = 1 - share + share / speed, 1 - step_share + step_share / speed
    waited = math.fsum(loads) * stretch
    return Outcome(
        batches=batches,
        duration_s=waited + batches * setup.step_s * step_stretch,
        wait_s=waited,
        first_batch_s=loads[0] * stretch if loads else 0.0,
        work_s=math.fsum(loads) * share + batches * setup.step_s * step_share,
    )


_TRAINER = -1


@dataclass
class _Worker:
    """A worker slot: the tasks given to it, and the life that its process is in (events of an earlier one are void)."""

    tasks: list[int] = field(default_factory=list)
    life: int = 0
    up: bool = False
    busy: bool = False


class _Simulation:
    """Events at a time lie in a heap here; the processors know when work ends."""

    def __init__(self, setup: Setup, batches: int, chance: random.Random) -> None:
        self._setup = setup
        self._batches = batches
        self._chance = chance
        self._draws = setup.load.draw(chance)
        self._workers = [_Worker() for _ in range(setup.workers)]
        self._processors = setup.processors()
        self._now = 0.0
        self._timed: list[tuple[float, int, str, int, int]] = []
        self._doing: dict[int, str] = {}
        self._number = 0
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
            kind, number = self._advance()
            if kind == "died":
                lost = self._die(number)
            elif kind == "up":
                self._come_up(number)
            elif kind == "waited":
                self._work(number)
            elif kind == "loaded":
                self._load_done(number)
            elif kind == "woken":
                self._want(goes_on=False)
            elif kind == "crossed":
                self._crossed()
            elif kind == "computed":
                self._computed()
            else:
                self._stepped(goes_on=False)
        return Outcome(
            batches=self._wanted,
            duration_s=self._now,
            wait_s=self._wait_s + (self._now - self._waits_since if lost and self._waiting else 0.0),
            work_s=self._processors.work_s,
            first_batch_s=self._first_s,
            deaths=self._deaths,
            lost=lost,
        )

    # --- time

    def _life(self, number: int) -> int:
        return self._workers[number].life if number != _TRAINER else 0

    def _at(self, after_s: float, kind: str, number: int = _TRAINER) -> None:
        self._number += 1
        heapq.heappush(self._timed, (self._now + after_s, self._number, kind, number, self._life(number)))

    def _occupy(self, work_s: float, kind: str, number: int = _TRAINER, *, goes_on: bool = False) -> None:
        """A process has work to do, after which there is an event of this kind."""
        self._doing[number] = kind
        self._processors.begin(number, work_s, goes_on=goes_on)

    def _advance(self) -> tuple[str, int]:
        """Go to the next event that is not void."""
        while True:
            next_s = self._processors.next_s()
            if self._timed and self._timed[0][0] <= self._now + next_s:
                at, _, kind, number, life = heapq.heappop(self._timed)
                self._processors.advance(at - self._now)
                self._now = at
                if life == self._life(number):
                    return kind, number
                continue
            self._processors.advance(next_s)
            self._now += next_s
            done = self._processors.happen()
            if done is not None:
                return self._doing[done], done

    # --- workers

    def _give(self) -> None:
        """The next task, to the worker whose turn it is."""
        if self._given >= self._batches:
            return
        task, number = self._given, self._given % len(self._workers)
        self._given += 1
        self._loads[task] = next(self._draws)
        self._workers[number].tasks.append(task)
        self._begin(number, wake_s=self._setup.wake_s)

    def _begin(self, number: int, *, wake_s: float | None = None) -> None:
        """Load the next batch, if nothing speaks against it; a worker that slept wakes first."""
        worker = self._workers[number]
        if not worker.up or worker.busy or not worker.tasks:
            return
        worker.busy = True
        wait_s = self._loads[worker.tasks[0]] * (1 - self._setup.load.work_fraction)
        if wait_s or wake_s is not None:
            self._at(wait_s + (wake_s or 0.0), "waited", number)
        else:
            self._work(number, goes_on=True)

    def _work(self, number: int, *, goes_on: bool = False) -> None:
        """Load, then send: one piece of work."""
        work_s = self._loads[self._workers[number].tasks[0]] * self._setup.load.work_fraction
        self._occupy(work_s + self._setup.send_s, "loaded", number, goes_on=goes_on)

    def _load_done(self, number: int) -> None:
        worker = self._workers[number]
        worker.busy = False
        task = worker.tasks.pop(0)
        del self._loads[task]
        self._ready.add(task)
        self._begin(number)
        if self._waiting and task == self._wanted:
            self._at(self._setup.wake_s, "woken")

    def _come_up(self, number: int) -> None:
        self._workers[number].up = True
        if self._setup.death_every_s is not None:
            self._at(self._chance.expovariate(1 / self._setup.death_every_s), "died", number)
        self._begin(number, wake_s=0.0)

    def _die(self, number: int) -> bool:
        """Whether the job is lost."""
        worker = self._workers[number]
        self._deaths += 1
        self._processors.stop(number)
        worker.up = worker.busy = False
        worker.life += 1
        if self._setup.restart_s is None:
            return True
        self._at(self._setup.restart_s, "up", number)
        return False

    # --- the trainer

    def _want(self, *, goes_on: bool) -> None:
        """Take the next batch if it is there, else wait for it."""
        if not self._waiting:
            self._waiting, self._waits_since = True, self._now
        if self._wanted in self._ready:
            self._ready.remove(self._wanted)
            self._waiting = False
            self._occupy(self._setup.cross_s, "crossed", goes_on=goes_on)

    def _crossed(self) -> None:
        self._wait_s += self._now - self._waits_since
        if not self._wanted:
            self._first_s = self._now
        self._give()
        work_s = self._setup.step_s * self._setup.step_work_fraction
        if work_s:
            self._occupy(work_s, "computed", goes_on=True)
        else:
            self._computed()

    def _computed(self) -> None:
        wait_s = self._setup.step_s * (1 - self._setup.step_work_fraction)
        if wait_s:
            self._at(wait_s, "stepped")
        else:
            self._stepped(goes_on=True)

    def _stepped(self, *, goes_on: bool) -> None:
        self._wanted += 1
        self._want(goes_on=goes_on)


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
