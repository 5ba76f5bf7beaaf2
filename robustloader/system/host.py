"""How processes share the processors, how they are tied together, and how they end.

What the machine allows them is in :mod:`robustloader.system.limits`; the three readings that are needed everywhere have
their names here as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import signal
import time
import weakref
from collections.abc import Iterator
from multiprocessing import reduction, resource_tracker
from typing import Any

from robustloader.system.cgroups import read_text
from robustloader.system.limits import free_memory_bytes, memory_kills, usable_cpus

__all__ = [
    "InheritedFd",
    "Lifeline",
    "SharedPage",
    "close_in_forked_children",
    "cpu_time_ns",
    "free_memory_bytes",
    "has_pidfd",
    "hold_lifeline",
    "memory_kills",
    "open_pidfd",
    "prefer_to_be_killed",
    "queue_time_ns",
    "release_signals",
    "signal_name",
    "signals_held",
    "usable_cpus",
    "yield_to_others",
]

# --- processor time ---------------------------------------------------------------------------------------------------


def yield_to_others() -> None:
    """Tell the scheduler that waking this process is no reason to interrupt another one.

    A worker that is sent a task would otherwise push the training process off its processor there and then, in the
    middle of handing out a batch, while another processor may be idle.
    *Source*: sched(7), SCHED_BATCH.
    """
    with contextlib.suppress(OSError, AttributeError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def cpu_time_ns(pid: int) -> int | None:
    """Processor time of another process so far, in nanoseconds; None where it is gone.

    One system call, where reading ``/proc`` takes some fifty microseconds and counts in hundredths of a second.
    *Source*: clock_getcpuclockid(3); the clock's number is made as in Linux's ``include/linux/posix-timers.h``
    (``make_process_cpuclock`` of ``CPUCLOCK_SCHED``).
    """
    try:
        return time.clock_gettime_ns((~pid << 3) | 2)
    except OSError:
        return None


def queue_time_ns(pid: int) -> int:
    """How long a thread (a process's number names its first one) has waited for a processor while it could have run, in
    nanoseconds; 0 where the kernel does not tell.

    *Source*: ``/proc/<pid>/schedstat``, the second number (Linux's ``Documentation/scheduler/sched-stats.rst``).
    """
    numbers = read_text(f"/proc/{pid}/schedstat").split()
    return int(numbers[1]) if len(numbers) == 3 else 0


# --- signals ----------------------------------------------------------------------------------------------------------

_TO_EVERYBODY = (signal.SIGINT, signal.SIGTERM)
"""Signals that a terminal or a scheduler sends to a whole job, and that are the training process's business."""


@contextlib.contextmanager
def signals_held(start_method: str) -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back in this thread while it starts a process, which begins with them held back, too.

    A process that is still importing would answer them with a traceback of its own, or die. It calls
    ``release_signals`` once it has handlers. Nothing is lost: what arrives here meanwhile is delivered at the end. The
    processes of a forkserver are not started from here: they take no notice.
    """
    if start_method == "forkserver":  # a server that is started now would hold them back for ever
        yield
        return
    if start_method == "spawn":  # starting it in between would let them through again
        resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_EVERYBODY)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def release_signals() -> None:
    """In a started process: from here on its handlers see to Ctrl-C and SIGTERM."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TO_EVERYBODY)


def signal_name(exitcode: int | None) -> str | None:
    """``"SIGKILL"`` for -9; None for an exit that was no signal."""
    if exitcode is None or exitcode >= 0:
        return None
    try:
        return signal.Signals(-exitcode).name
    except ValueError:
        return f"signal {-exitcode}"


# --- the end of a process ---------------------------------------------------------------------------------------------


def open_pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None where the system refuses it.

    Unlike the sentinel of ``multiprocessing``, it does not stay silent while a child of the dead process lives.
    """
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def has_pidfd() -> bool:
    """Whether the system lets a process be watched by descriptor."""
    fd = open_pidfd(os.getpid())
    if fd is not None:
        os.close(fd)
    return fd is not None


def prefer_to_be_killed() -> None:
    """Tell the kernel to take this process before the training process when memory runs out."""
    with contextlib.suppress(OSError, ValueError):
        now = int(read_text("/proc/self/oom_score_adj") or 0)
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(str(min(1000, now + 200)))


# --- what a forked child must let go of: lifelines --------------------------------------------------------------------

_closed_after_fork: weakref.WeakSet[Any] = weakref.WeakSet()


def close_in_forked_children(thing: Any) -> None:
    """Call ``thing.close()`` first of all in every process forked from this one.

    A worker forked later would otherwise hold the other workers' lifelines open, and they would outlive the trainer.
    """
    _closed_after_fork.add(thing)


def _close_inherited() -> None:
    for thing in list(_closed_after_fork):
        thing.close()
    _closed_after_fork.clear()


os.register_at_fork(after_in_child=_close_inherited)


class Lifeline:
    """A pipe that ties a worker's life to the training process, whatever the start method.

    Only the training process holds the write end. When it is gone, however it went, the kernel closes it and signals
    the read end's owner: the worker's process group, with SIGKILL. It reaches a worker stuck in C code and the
    worker's own children. ``PR_SET_PDEATHSIG`` would not do: under forkserver the parent is the server, and under fork
    it fires when the forking *thread* ends.

    The training process keeps the read end, too. The pipe then outlives the worker, and :meth:`cut` reaches what a dead
    one has left behind. The kernel keeps the owner as a reference to the group itself: once the worker is reaped, its
    number may be somebody else's, and ``killpg`` would kill whoever that is.
    *Source*: ``f_modown`` and ``send_sigio`` in Linux's ``fs/fcntl.c``.
    """

    def __init__(self) -> None:
        self.read_fd = self._write_fd = -1  # should os.pipe() fail
        self._handed_over = False
        self.read_fd, self._write_fd = os.pipe()
        close_in_forked_children(self)

    def hand_over(self) -> None:
        """The worker has the read end, or never will: no process that is forked from here on needs it."""
        self._handed_over = True

    def cut(self) -> None:
        """SIGKILL to the process group that holds it, whether or not its leader is still there; then let go.

        A byte makes the read end ready although a process that was forked behind Python's back has the write end, too.
        """
        if self._write_fd >= 0:
            with contextlib.suppress(OSError):  # no memory for the byte: closing needs none
                os.write(self._write_fd, b"\0")
            os.close(self._write_fd)
            self._write_fd = -1
        self.close()

    def close(self) -> None:
        """Let go of it. In the training process this ends the worker, where it lives.

        What one that left of its own accord has started may stay: the read end goes first, and with it, where nobody
        else has it, the signal.
        """
        if self._handed_over and self.read_fd >= 0:
            os.close(self.read_fd)
            self.read_fd = -1
        if self._write_fd >= 0:
            os.close(self._write_fd)
            self._write_fd = -1

    def __del__(self) -> None:
        self.hand_over()
        self.close()


def hold_lifeline(read_fd: int) -> None:
    """In a worker: become a process group of its own that dies when the training process does.

    *Source*: fcntl(2), "I/O availability signals": F_SETOWN with a negative value names a process group, F_SETSIG the
    signal; pipe(7): closing the last write end makes the read end ready.
    """
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    read_fd = os.dup(read_fd)  # under fork, the trainer's object for the other descriptor is collected here some day
    fcntl.fcntl(read_fd, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(read_fd, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(read_fd, fcntl.F_SETFL, fcntl.fcntl(read_fd, fcntl.F_GETFL) | os.O_ASYNC | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(read_fd, 0)
    if poll.poll(0):  # the trainer was gone before the signal was armed
        os._exit(1)


# --- what goes along to a worker --------------------------------------------------------------------------------------


class InheritedFd:
    """A descriptor that survives the way to a worker process under fork, forkserver and spawn."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def take(self) -> int:
        """The descriptor's number in this process; call once."""
        return self._fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive_fd, (reduction.DupFd(self._fd),)


def _receive_fd(holder: Any) -> InheritedFd:
    return InheritedFd(holder.detach())


class SharedPage:
    """One page of memory that the training process and a worker both see.

    Lives in a memfd: nothing in ``/dev/shm``, nothing left behind by a SIGKILL.
    """

    def __init__(self, fd: int | None = None) -> None:
        self._fd = -1  # should there be no descriptor
        if fd is None:
            fd = os.memfd_create("robustloader-beacon")
            os.ftruncate(fd, mmap.PAGESIZE)
        self._fd = fd
        self.memory = mmap.mmap(fd, mmap.PAGESIZE)

    def hand_over(self) -> None:
        """Close the descriptor; the mapping stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive_page, (reduction.DupFd(self._fd),)

    def __del__(self) -> None:
        self.hand_over()


def _receive_page(holder: Any) -> SharedPage:
    return SharedPage(holder.detach())
