"""``num_workers="auto"`` while it runs: measures window by window, and asks the pure rules what to do.

What they say is done by the iterator, by way of the crew. *Runs in* the thread that calls ``next()``.
"""

from __future__ import annotations

import threading
import time

import psutil

from robustloader.decisions.adaptation import Adaptation, Step, Window
from robustloader.decisions.limits import Room
from robustloader.engine.crew import Crew
from robustloader.engine.memory import MemoryGuard
from robustloader.system import host, limits

__all__ = ["Adapter"]

WINDOW_NS = 250_000_000
"""Long against the jitter of a scheduler, short against an epoch: the first steps should pay within it."""

WINDOW_BATCHES = 10
"""At least: a handful of waits tells more about a few samples than about the pool."""

TURNS = 3
"""At least so many batches of each worker: they come together."""

INTERRUPTION_NS = 1_000_000_000
INTERRUPTION = 10
"""A pause of the loop this long, and so many times as long as its other steps together, is no step (a validation, a
checkpoint): what was measured around it is thrown away."""


class Adapter:
    """One per iterator.

    Args:
        rules: of the loader.
    """

    def __init__(self, rules: Adaptation, crew: Crew, guard: MemoryGuard) -> None:
        self._rules = rules
        self._crew = crew
        self._guard = guard
        self._ranks = limits.local_world_size()
        self._prefetch = 1
        self._resizing = False
        self._skip = self._workers = self._batches = self._least = 0
        self._wait_ns = self._busy_ns = self._begun_ns = self._due_ns = self._last_ns = self._longest_ns = 0
        self._cpu: dict[int, tuple[int, int]] = {}
        self._own_cpu_ns = 0
        self._loop = (0, 0)

    def settle(self, lookahead: int) -> None:
        """Measure from here on, once ``lookahead`` batches have gone by: those were loaded while workers started, or by
        another pool."""
        self._resizing = self._crew.resizing
        self._skip = max(1, lookahead)

    def delivered(self, wait_ns: int, load_ns: int, now_ns: int, prefetch_factor: int) -> Step | None:
        """A batch was delivered; the step to take now, or None.

        Args:
            wait_ns: what the loop waited for it.
            load_ns: what its worker took to load it.
            now_ns: the time.
            prefetch_factor: batches ahead per worker, as it is.
        """
        if self._skip:
            if not (self._resizing and self._crew.resizing):
                self._resizing = False
                self._skip -= 1
                if not self._skip:
                    self._open(now_ns)
            return None
        self._batches += 1
        self._wait_ns += wait_ns
        self._busy_ns += load_ns
        step_ns = now_ns - wait_ns - self._last_ns
        self._last_ns = now_ns
        if step_ns > self._longest_ns:
            self._longest_ns = step_ns
        if now_ns < self._due_ns or self._batches < self._least or self._batches % self._workers:
            return None
        self._prefetch = prefetch_factor
        return self._close(now_ns)

    def cannot_exceed(self, workers: int) -> None:
        """More than ``workers`` could not be had: nobody tries again."""
        self._rules.cannot_exceed(workers)

    # --- windows

    def _open(self, now_ns: int) -> None:
        self._workers = max(1, self._crew.size)
        self._least = max(WINDOW_BATCHES, TURNS * self._workers)
        self._batches = self._wait_ns = self._busy_ns = self._longest_ns = 0
        self._begun_ns = self._last_ns = now_ns
        self._due_ns = now_ns + WINDOW_NS
        self._cpu = self._read_cpu()
        self._own_cpu_ns = time.process_time_ns()
        self._loop = _read_loop()

    def _close(self, now_ns: int) -> Step | None:
        """End a window and begin the next; the step that follows from it."""
        crew, workers, elapsed_ns = self._crew, self._workers, now_ns - self._begun_ns
        if crew.memory_killed and self._rules.limit is None:
            self.cannot_exceed(crew.size)
        cpu = self._read_cpu()
        thread, before_ns = self._loop
        now_thread, after_ns = _read_loop()
        loop_ns = after_ns - before_ns if thread == now_thread else 0
        both = [(self._cpu[pid], now) for pid, now in cpu.items() if pid in self._cpu]
        window = Window(
            workers=workers,
            batches=self._batches,
            elapsed_s=elapsed_ns / 1e9,
            wait_s=self._wait_ns / 1e9,
            busy_s=self._busy_ns / 1e9,
            worker_cpu_s=sum(now[0] - then[0] for then, now in both) / 1e9,
            queued_s=sum(now[1] - then[1] for then, now in both) / 1e9,
            trainer_cpu_s=(time.process_time_ns() - self._own_cpu_ns) / 1e9,
            loop_busy_s=loop_ns / 1e9,
        )
        rest_ns = elapsed_ns - self._wait_ns - self._longest_ns
        interrupted = self._longest_ns > max(INTERRUPTION_NS, INTERRUPTION * rest_ns)
        steady = workers == crew.size and crew.whole and set(cpu) == set(self._cpu)
        self._open(now_ns)
        if interrupted or not steady:  # a pause, or a death: nothing to go by
            return None
        return self._rules.observe(window, self._room)

    def _read_cpu(self) -> dict[int, tuple[int, int]]:
        """Processor time of each worker so far, and how long it waited for one, by pid."""
        pids = [worker.pid for worker in self._crew.pool.workers if worker.pid is not None and not worker.dismissed]
        readings = {pid: host.cpu_time_ns(pid) for pid in pids}
        return {pid: (cpu_ns, host.queue_time_ns(pid)) for pid, cpu_ns in readings.items() if cpu_ns is not None}

    # --- limits

    def _room(self, extra: int) -> Room:
        """How many further workers there is room for now."""
        if self._crew.memory_low or any(slot.state == "retired" for slot in self._crew.slots):
            return Room(workers=0, reason="memory, or deaths of workers, have made the pool smaller")
        return self._guard.room(
            extra, prefetch_factor=self._prefetch, worker_bytes=self._largest_worker(), ranks=self._ranks
        )

    def _largest_worker(self) -> int:
        """Bytes that the largest worker holds for itself."""
        largest = 0
        for worker in self._crew.pool.workers:
            try:
                largest = max(largest, int(psutil.Process(worker.pid).memory_full_info().uss))
            except (psutil.Error, OSError):
                continue
        return largest


def _read_loop() -> tuple[int, int]:
    """This thread, and how long it has been on a processor or waited for one, in nanoseconds."""
    thread = threading.get_native_id()
    return thread, time.thread_time_ns() + host.queue_time_ns(thread)
