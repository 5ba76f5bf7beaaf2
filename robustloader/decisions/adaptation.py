"""How many workers ``num_workers="auto"`` goes on with: the loop's waits and the pool's work in, steps out.

A search between two bounds that only close. Each step is a trial: the throughput before is remembered, and after the
step it decides whether the new number stays. What a trial has shown to be too few becomes the *floor*, what brought
nothing the *roof*; later steps stay strictly between the two, so that on input that does not change their number is
bounded by the logarithm of what the machine allows. Both are forgotten when loading or the trainer's step has become
another, and each time that takes twice as long.

Nothing here reads a clock or starts a process.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from robustloader.decisions.limits import Room, plural
from robustloader.decisions.tuning import KNEE_GAIN, OVERSUBSCRIPTION

__all__ = ["Adaptation", "Step", "Window", "pooled"]

WINDOWS = 4
"""So many windows are looked at together; a decision that may do harm waits for all of them."""

GROW_WAIT = 0.1
"""Share of its time that the loop must wait before workers are added: below it, 1 / (1 - 0.1) = 1.11 times the speed is
all that any number of workers could bring."""

NEVER_WAITS = 0.02
"""Below this share the loop counts as not waiting; the verdict "compute-bound" of a summary has the same bound."""

IDLE_CORES = 0.2
"""Share of its processors that the job must leave unused before workers are added: nobody can use more than all."""

POOL_BUSY = 0.5
"""Below this share of time the workers are hardly what the loop waits for, but handing over, or one slow batch that
holds up the others."""

SPARE_WORKERS = 1.25
"""Workers to keep beyond the mean need, since loading times vary."""

CLEAR_LOSS = 0.85
"""Below this share of the throughput before, a trial is lost at once."""

NO_LOSS = 0.97
"""What fewer workers must keep of the throughput before: two windows of one machine commonly differ by so much."""

MORE_WAIT = 0.03
"""How much more of its time the loop may wait with fewer workers."""

ANOTHER = 0.33
"""Loading or stepping is another once it takes so much more, or less, of what a batch took altogether."""

STRANGE_WINDOWS = 3
PATIENCE = 16
"""Windows before the bounds may be forgotten; twice as many each time after that."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """What a stretch of an epoch has shown.

    Attributes:
        workers: that loaded, all the time.
        batches: delivered.
        elapsed_s: how long it took.
        wait_s: of it, the loop waited for batches.
        busy_s: what the workers took to load these batches, added up.
        worker_cpu_s: processor time of the workers.
        queued_s: how long the workers waited for a processor, because others had them all.
        trainer_cpu_s: processor time of the training process.
        loop_busy_s: how long the thread that takes the batches was on a processor, or waited for one.
    """

    workers: int
    batches: int
    elapsed_s: float
    wait_s: float
    busy_s: float
    worker_cpu_s: float
    queued_s: float
    trainer_cpu_s: float
    loop_busy_s: float

    @property
    def rate(self) -> float:
        """Batches per second."""
        return self.batches / self.elapsed_s

    @property
    def wait_share(self) -> float:
        """Share of the time that the loop waited, 0 to 1."""
        return min(1.0, self.wait_s / self.elapsed_s)

    @property
    def starved_share(self) -> float:
        """Share of the time that the loop waited and did nothing, 0 to 1: unpacking a batch is a wait to the loop, but
        no worker could spare it."""
        return max(0.0, min(self.wait_share, 1 - self.loop_busy_s / self.elapsed_s))

    @property
    def work(self) -> float:
        """How many workers were at work on average. A worker also packs and sends, which its processor time shows."""
        return max(self.busy_s, self.worker_cpu_s) / self.elapsed_s

    @property
    def used_cores(self) -> float:
        """How many processors workers and trainer used, on average."""
        return (self.worker_cpu_s + self.trainer_cpu_s) / self.elapsed_s

    @property
    def cores_each(self) -> float:
        """How much of a processor a worker uses, where it need not wait for one: on a busy machine, work that waits for
        a processor must not look like a worker that waits for storage, or for its turn."""
        undisturbed_s = max(self.workers * self.elapsed_s - self.queued_s, self.worker_cpu_s)
        return min(1.0, self.worker_cpu_s / undisturbed_s) if undisturbed_s > 0 else 1.0

    @property
    def busy_share(self) -> float:
        """Share of their time that the workers were at work, 0 to 1."""
        return min(1.0, self.work / self.workers)

    @property
    def period_s(self) -> float:
        """Seconds a batch."""
        return self.elapsed_s / self.batches

    @property
    def load_s(self) -> float:
        """Seconds a batch, for its worker."""
        return self.busy_s / self.batches

    @property
    def step_s(self) -> float:
        """Seconds a batch, for the loop without its waits."""
        return max(0.0, self.elapsed_s - self.wait_s) / self.batches


def pooled(windows: Iterable[Window]) -> Window:
    """Several windows with the same workers as one."""
    all_of_them = list(windows)
    return Window(
        workers=all_of_them[-1].workers,
        batches=sum(window.batches for window in all_of_them),
        elapsed_s=math.fsum(window.elapsed_s for window in all_of_them),
        wait_s=math.fsum(window.wait_s for window in all_of_them),
        busy_s=math.fsum(window.busy_s for window in all_of_them),
        worker_cpu_s=math.fsum(window.worker_cpu_s for window in all_of_them),
        queued_s=math.fsum(window.queued_s for window in all_of_them),
        trainer_cpu_s=math.fsum(window.trainer_cpu_s for window in all_of_them),
        loop_busy_s=math.fsum(window.loop_busy_s for window in all_of_them),
    )


@dataclass(frozen=True, kw_only=True)
class Step:
    """Go on with so many ``workers``, and why."""

    workers: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """What there was before the step that is on trial."""

    before: Window

    @property
    def workers(self) -> int:
        return self.before.workers


@dataclass(kw_only=True)
class Adaptation:
    """Decides step by step; told of every window, in order. One per loader: the next epoch goes on where one ended.

    Attributes:
        workers: as many as there should be.
        cores: processors for this rank.
        least: never fewer workers than this.
        floor: so many, or fewer, were too few.
        roof: so many, or more, brought nothing; None while nobody knows.
        limit: so many could not be had (a worker did not start, or memory ran out): never more than that again.
    """

    workers: int
    cores: int
    least: int = 1
    floor: int = 0
    roof: int | None = None
    limit: int | None = None
    _recent: deque[Window] = field(default_factory=lambda: deque(maxlen=WINDOWS))
    _trial: _Trial | None = None
    _usual: Window | None = None
    _strange: int = 0
    _since_forgotten: int = 0
    _patience: int = PATIENCE
    _refused: int = 0

    def observe(self, window: Window, room: Callable[[int], Room]) -> Step | None:
        """The step that follows from one more window, or None.

        Args:
            window: what was seen since the last one. Where its ``workers`` are not those of the last step, somebody
                else has changed them, and what was on trial is not judged.
            room: how many of so many further workers the machine has room for; asked only where more are wanted.
        """
        if window.workers != self.workers:
            self._start_over(window.workers)
        self._recent.append(window)
        self._since_forgotten += 1
        self._refused = max(0, self._refused - 1)
        seen = pooled(self._recent)
        if self._trial is not None:
            verdict = self._judge(self._trial, seen)
            if verdict is None:
                return None
            if not verdict:
                return self._go_back(self._trial, seen)
            self._keep(self._trial, seen)
        self._forget_if_another(seen)
        return self._grow(seen, room) or self._shrink(seen)

    def cannot_exceed(self, workers: int) -> None:
        """More than ``workers`` could not be had."""
        self.limit = workers if self.limit is None else min(self.limit, workers)
        self._start_over(min(self.workers, workers))

    def _start_over(self, workers: int) -> None:
        """The pool was changed by somebody else: the windows before do not count."""
        self._recent.clear()
        self._trial = self._usual = None
        self._strange, self.workers = 0, workers

    # --- trials

    def _judge(self, trial: _Trial, seen: Window) -> bool | None:
        """Whether the step was worth it; None while that is open."""
        ratio = seen.rate / trial.before.rate
        if ratio < CLEAR_LOSS:
            return False
        complete = len(self._recent) == WINDOWS
        if seen.workers > trial.workers:
            added = seen.workers / trial.workers - 1
            if ratio >= 1 + max(KNEE_GAIN, added / 4):
                return True
            return ratio >= 1 + KNEE_GAIN if complete else None
        if not complete:
            return None
        return ratio >= NO_LOSS and seen.wait_share <= trial.before.wait_share + MORE_WAIT

    def _keep(self, trial: _Trial, seen: Window) -> None:
        self._trial = None
        if seen.workers > trial.workers:
            self.floor = max(self.floor, trial.workers)
        else:
            self.roof = trial.workers

    def _go_back(self, trial: _Trial, seen: Window) -> Step:
        change = seen.rate / trial.before.rate - 1
        after = f"{plural(seen.workers, 'worker')} loaded {seen.rate:.3g} batches/s"
        speed = f"{after}, {trial.workers} {trial.before.rate:.3g}"
        if seen.workers > trial.workers:
            self.roof = seen.workers
            reason = f"{speed}: {change:+.0%} is not worth more workers"
        else:
            self.floor = max(self.floor, seen.workers)
            waits = f"the loop waited {seen.wait_share:.0%} instead of {trial.before.wait_share:.0%} of its time"
            reason = f"{speed}, and {waits}: fewer are too few"
        return self._step(trial.workers, reason, None)

    def _step(self, workers: int, reason: str, trial: _Trial | None) -> Step:
        self.workers, self._trial = workers, trial
        self._recent.clear()
        self._usual, self._strange = None, 0
        return Step(workers=workers, reason=reason)

    # --- more, fewer

    def _grow(self, seen: Window, room: Callable[[int], Room]) -> Step | None:
        workers, used = seen.workers, seen.used_cores
        if seen.starved_share < GROW_WAIT or used > (1 - IDLE_CORES) * self.cores:
            return None
        if seen.busy_share < POOL_BUSY and len(self._recent) < WINDOWS:
            return None
        enough = math.ceil(self.cores / max(seen.cores_each, 1 / OVERSUBSCRIPTION) - 0.1)
        target = min(2 * workers, enough)
        if seen.wait_share < 1:
            target = min(target, math.ceil(workers / (1 - seen.wait_share) * SPARE_WORKERS))
        if self.roof is not None:
            target = min(target, (workers + self.roof) // 2)
        if self.limit is not None:
            target = min(target, self.limit)
        if target <= workers or self._refused:
            return None
        fits = room(target - workers)
        if fits.workers <= 0:
            self._refused = PATIENCE  # looking costs a little, and memory does not come back every quarter of a second
            return None
        target = min(target, workers + fits.workers)
        reason = f"the loop waited {seen.wait_share:.0%} of its time, with {used:.2g} of {self.cores} processors in use"
        if fits.reason:
            reason += f"; no more than that: {fits.reason}"
        return self._step(target, reason, _Trial(before=seen))

    def _shrink(self, seen: Window) -> Step | None:
        workers = seen.workers
        if len(self._recent) < WINDOWS:
            return None
        never_waits = seen.wait_share <= NEVER_WAITS
        if not never_waits and seen.busy_share >= POOL_BUSY:
            return None
        half = math.ceil((workers + self.floor) / 2)
        target = max(math.ceil(seen.work * SPARE_WORKERS), half, self.floor + 1, self.least, 1)
        if target >= workers:
            return None
        waits = "hardly waited" if never_waits else f"waited {seen.wait_share:.0%} of its time, but not for loading"
        were = "was" if workers == 1 else "were"
        reason = f"the loop {waits}: {plural(workers, 'worker')} {were} busy {seen.busy_share:.0%}"
        return self._step(target, reason, _Trial(before=seen))

    # --- another situation

    def _forget_if_another(self, seen: Window) -> None:
        """Open the bounds again when a batch costs its worker or the loop another time than when they were found."""
        if len(self._recent) < WINDOWS:
            return
        usual = self._usual
        if usual is None:
            self._usual = seen
            return
        scale = ANOTHER * usual.period_s
        load = abs(seen.load_s - usual.load_s) / usual.workers
        self._strange = self._strange + 1 if max(load, abs(seen.step_s - usual.step_s)) > scale else 0
        if self._strange >= STRANGE_WINDOWS and self._since_forgotten >= self._patience:
            self.floor, self.roof = 0, None
            self._usual, self._strange, self._since_forgotten = None, 0, 0
            self._patience *= 2
