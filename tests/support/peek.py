"""Looks behind the public face, all in one place: what a test needs to hit a worker at a known moment."""

from __future__ import annotations

import array
import fcntl
import termios
from typing import Any

from tests.support.watch import until


def pids(iterator: Any) -> list[int]:
    """The worker processes' ids, in the order of the worker ids (torch's own ``_workers``)."""
    return [process.pid for process in iterator._workers]


def await_idle(iterator: Any, worker: int, *, done: int) -> None:
    """Wait until a worker has finished ``done`` tasks and waits for the next one (or sends the last)."""

    def idle() -> bool:
        reading = iterator._pool.workers[worker].beacon.read()
        return bool(reading.phase == "idle" and reading.done > done)  # it counts its start, too

    until(idle, what=f"worker {worker} idle after {done} tasks")


def await_bytes(iterator: Any, worker: int) -> None:
    """Wait until something a worker sent lies unread in the training process's socket."""
    fd = iterator._pool.workers[worker].channel.fileno()

    def pending() -> bool:
        count = array.array("i", [0])
        fcntl.ioctl(fd, termios.FIONREAD, count)
        return count[0] > 0

    until(pending, what=f"bytes from worker {worker}")
