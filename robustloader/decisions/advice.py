"""What an epoch's numbers say: who waits for whom, and the one thing worth changing.

Pure rules over plain numbers. The verdict and the advice look at the loop after its first batch: the first wait holds
the start of the worker processes, which says nothing about how fast they load.

*Sources*: the verdict reads the share of its time that the consumer waits. In grain each node of a pipeline tells the
share of the time that the pipeline waits for it (``ExecutionSummary.Node.wait_time_ratio``,
https://github.com/google/grain/blob/main/grain/proto/execution_summary.proto); here there is one such node. How busy
the producers are tells a steady shortage from bursts: SPDL reads it off the time that they are blocked in ``put`` and
the time that the consumer is blocked in ``get`` (``QueuePerfStats``, ``ave_put_time`` and ``ave_get_time``,
https://facebookresearch.github.io/spdl/latest/optimization_guide/stats.html). The number of batches that lie ready, its
``occupancy_rate``, is told but not judged by: batches come in order, and while one is waited for, later ones pile up
although every worker is busy. The thresholds are argued below, each at its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from robustloader.decisions.limits import plural

__all__ = ["Facts", "Verdict", "WorkerPace", "advise", "find_stragglers", "judge"]

Verdict = Literal["input-bound", "compute-bound", "balanced", "warm-up"]

# The first batches come out of the lookahead that was filled while the workers started (2 per worker by default), so
# a handful of waits tells more about the start than about the epoch.
WARM_UP_BATCHES = 10
# Without these waits the loop would run 1 / (1 - 0.2) = 1.25 times as fast: worth somebody's time.
INPUT_BOUND = 0.2
# Without these waits the loop would run 2 % faster, which is less than two epochs on one machine commonly differ by.
COMPUTE_BOUND = 0.02
# Ten times the rate of damaged files in large web data (about 0.1 %); a few are never worth the line.
FAULTS_HIGH = 0.01
FAULTS_FEW = 5
# Samples differ in cost by chance, but a worker's mean over ten or more tasks seldom by a factor of two.
STRAGGLER = 2.0
STRAGGLER_TASKS = 10
# Below this the workers have time left, so that more of them would not help.
WORKERS_BUSY = 0.5
# An epoch with nothing to load passes some 1,900 batches a second from two workers on two cores (torch 2.13, batches of
# eight integers): pickling, two messages and a wake-up each.
HANDOVER_S = 0.5e-3
# Workers to keep beyond the mean need, since loading times vary.
SPARE_WORKERS = 1.25


@dataclass(frozen=True, kw_only=True)
class WorkerPace:
    """How fast one worker loads.

    Attributes:
        worker_id: 0 to ``num_workers - 1``.
        tasks: batches it loaded.
        busy_s: seconds it spent on them.
    """

    worker_id: int
    tasks: int
    busy_s: float


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the advice follows from.

    Attributes:
        batches: batches delivered.
        samples: samples delivered.
        faults: samples that failed for good.
        wait_s: seconds the loop waited for data, the first batch included.
        first_wait_s: seconds it waited for the first batch.
        step_s: seconds it spent between two waits.
        deaths: crashes and hangs of workers.
        workers_requested: worker processes at the start; 0 loads in the training process.
        workers_at_end: worker processes at the end.
        usable_cpus: CPUs this process may use.
        persistent: whether the workers outlive the epoch.
        pace: the worker processes that loaded something.
    """

    batches: int
    samples: int
    faults: int
    wait_s: float
    first_wait_s: float
    step_s: float
    deaths: int
    workers_requested: int
    workers_at_end: int
    usable_cpus: int
    persistent: bool = False
    pace: Sequence[WorkerPace] = ()

    @property
    def wait_fraction(self) -> float:
        """Share (0 to 1) of the loop's time after the first batch came that it waited for data."""
        return _share(self._steady_wait_s, self._steady_wait_s + self.step_s)

    @property
    def busy_fraction(self) -> float:
        """Share (0 to 1) of that time that a worker was loading, on average over the workers asked for."""
        busy_s = sum(worker.busy_s for worker in self.pace)
        return min(1.0, _share(busy_s, self.workers_requested * (self._steady_wait_s + self.step_s)))

    @property
    def load_mean_s(self) -> float:
        """Seconds it takes to load a batch, on average; in the training process, what the loop waits for one."""
        if self.workers_requested == 0:
            return _share(self._steady_wait_s, self.batches)
        return _share(sum(worker.busy_s for worker in self.pace), sum(worker.tasks for worker in self.pace))

    @property
    def _steady_wait_s(self) -> float:
        return max(0.0, self.wait_s - self.first_wait_s)


def judge(facts: Facts) -> Verdict:
    """Who waits for whom.

    Returns:
        "warm-up" below 10 batches (too few to tell), "input-bound" where the loop waits for data 20 % of its time or
        more, "compute-bound" at 2 % or less, else "balanced".
    """
    if facts.batches < WARM_UP_BATCHES:
        return "warm-up"
    if facts.wait_fraction >= INPUT_BOUND:
        return "input-bound"
    if facts.wait_fraction <= COMPUTE_BOUND:
        return "compute-bound"
    return "balanced"


def advise(facts: Facts) -> str:
    """The one thing worth doing, as one sentence of at most 96 characters for numbers of usual size."""
    trouble = _on_trouble(facts)
    if trouble:
        return trouble
    verdict = judge(facts)
    if verdict == "warm-up":
        return f"Fewer than {WARM_UP_BATCHES} batches are too few to tell who waits for whom."
    if verdict == "input-bound":
        return _on_input_bound(facts)
    started = _on_slow_start(facts)
    if started:
        return started
    if verdict == "compute-bound":
        return _on_compute_bound(facts)
    return _on_straggler(facts) or _on_balanced(facts)


def find_stragglers(pace: Sequence[WorkerPace]) -> tuple[int, ...]:
    """The workers whose mean time per task is at least twice the median of the others', in the order of their ids.

    Workers with fewer than ten tasks are left out: a few expensive samples make no straggler.
    """
    means = _means(pace)
    if len(means) < 2:
        return ()
    return tuple(worker for worker in sorted(means) if means[worker] >= STRAGGLER * _usual(means, worker) > 0)


def _means(pace: Sequence[WorkerPace]) -> dict[int, float]:
    return {worker.worker_id: worker.busy_s / worker.tasks for worker in pace if worker.tasks >= STRAGGLER_TASKS}


def _usual(means: Mapping[int, float], but: int) -> float:
    """The median of the other workers' means."""
    return median(mean for worker, mean in means.items() if worker != but)


def _on_trouble(facts: Facts) -> str:
    """What went wrong comes before what went slowly."""
    share = _share(facts.faults, facts.samples + facts.faults)
    if facts.faults >= FAULTS_FEW and share >= FAULTS_HIGH:
        return f"{_percent(share)} of the samples failed ({facts.faults:,}): see loader.fault_log."
    if facts.deaths and facts.workers_at_end < facts.workers_requested:
        return (
            f"Deaths shrank the pool from {facts.workers_requested} to {facts.workers_at_end} workers: "
            "see what killed them in the log."
        )
    return ""


def _on_slow_start(facts: Facts) -> str:
    """Workers that start anew for each epoch may cost more than the epoch's own waits."""
    loop_s = facts.wait_s + facts.step_s
    if facts.workers_requested and not facts.persistent and facts.first_wait_s >= INPUT_BOUND * loop_s > 0:
        return (
            f"The first batch took {facts.first_wait_s:.3g} s of {loop_s:.3g} s: "
            "persistent_workers=True starts workers only once."
        )
    return ""


def _on_input_bound(facts: Facts) -> str:
    workers, cpus = facts.workers_requested, facts.usable_cpus
    # Loading has to become wait + step over step times as fast; that many times the workers, if they all are busy.
    speedup = 1.0 / max(1e-9, 1.0 - facts.wait_fraction)
    load_s = facts.load_mean_s
    if 0 < load_s < HANDOVER_S:
        remedy = "try num_workers=0, or larger batches" if workers else "larger batches cost less each"
        return f"A batch loads in {1e6 * load_s:.0f} µs, faster than a worker hands it over: {remedy}."
    if workers == 0:
        wanted = max(1, min(math.ceil(speedup), cpus))
        return f"Loading runs in the training process: num_workers={wanted} would load while it computes."
    straggler = _on_straggler(facts)
    if straggler:
        return straggler
    if facts.busy_fraction < WORKERS_BUSY:
        return (
            f"Workers are busy only {_percent(facts.busy_fraction)} of the time: "
            "loading comes in bursts, raise prefetch_factor."
        )
    if workers < cpus:
        wanted = max(workers + 1, min(math.ceil(workers * speedup), cpus))
        return f"{plural(workers, 'worker')} cannot keep up, {cpus} CPUs are usable: try num_workers={wanted}."
    return (
        f"{plural(workers, 'worker')} on {plural(cpus, 'usable CPU')} cannot keep up: "
        "make samples cheaper (cache, precompute, resize)."
    )


def _on_straggler(facts: Facts) -> str:
    """Batches come in order, so that one slow worker holds up the others."""
    means = _means(facts.pace)
    if len(means) < 2:
        return ""
    slowest = max(means, key=lambda worker: means[worker])
    usual = _usual(means, slowest)
    if usual <= 0 or means[slowest] < STRAGGLER * usual:
        return ""
    return (
        f'Worker {slowest} takes {means[slowest] / usual:.3g}x as long as the others: see its data, or seeding="batch".'
    )


def _on_compute_bound(facts: Facts) -> str:
    workers = facts.workers_requested
    wanted = max(1, math.ceil(workers * facts.busy_fraction * SPARE_WORKERS))
    if facts.pace and wanted < workers:
        return f"Data is not your bottleneck, and num_workers={wanted} would do as well."
    return "Data is not your bottleneck: only a faster training step makes this faster."


def _on_balanced(facts: Facts) -> str:
    waits = f"The loop waits {_percent(facts.wait_fraction)} of its time for data"
    workers = facts.workers_requested
    if 0 < workers < facts.usable_cpus and facts.busy_fraction >= WORKERS_BUSY:
        return f"{waits}: num_workers={workers + 1} may win some of it back."
    return f"{waits}: nothing needs to change."


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %" if fraction < 0.995 else f"{100 * fraction:.0f} %"
