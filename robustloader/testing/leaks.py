"""What is left behind: processes, descriptors, threads and shared memory."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing as mp
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker

import psutil

__all__ = ["Leaks", "no_leaks"]


@dataclass(frozen=True)
class Leaks:
    """What there is now of what can leak; the difference of two is what did.

    Attributes:
        processes: descendants that run: process id → name and command line.
        descriptors: this process's: number → what it leads to.
        threads: Python threads: identity → name.
        shared_memory: entries of ``/dev/shm`` that may be this process's or its children's.
    """

    processes: dict[int, str]
    descriptors: dict[int, str]
    threads: dict[int, str]
    shared_memory: frozenset[str]

    @classmethod
    def now(cls) -> Leaks:
        """Look around. Reaps children that have ended."""
        mp.active_children()
        threads = {thread.ident or 0: thread.name for thread in threading.enumerate() if thread.is_alive()}
        return cls(_processes(), _descriptors(), threads, _shared_memory())

    def since(self, before: Leaks) -> Leaks:
        """What is there now and was not before.

        A descriptor that leads elsewhere than before counts only where there are more of them than before: libraries
        close one and open another.
        """
        opened = {fd: name for fd, name in self.descriptors.items() if before.descriptors.get(fd) != name}
        return Leaks(
            {pid: name for pid, name in self.processes.items() if pid not in before.processes},
            opened if len(self.descriptors) > len(before.descriptors) else {},
            {ident: name for ident, name in self.threads.items() if ident not in before.threads},
            _without_strangers(self.shared_memory - before.shared_memory),
        )

    def __bool__(self) -> bool:
        return bool(self.processes or self.descriptors or self.threads or self.shared_memory)

    def __str__(self) -> str:
        told = []
        if self.processes:
            told.append(f"processes: {list(self.processes.values())}")
        if self.descriptors:
            told.append(f"descriptors: {self.descriptors}")
        if self.threads:
            told.append(f"threads: {list(self.threads.values())}")
        if self.shared_memory:
            told.append(f"in /dev/shm: {sorted(self.shared_memory)}")
        return "; ".join(told) or "nothing"


@contextlib.contextmanager
def no_leaks(*, settle_s: float = 5.0) -> Iterator[None]:
    """Fail with an ``AssertionError`` that names what the block leaves behind; processes left behind are killed.

    Args:
        settle_s: how long, in seconds, whatever is about to go may take.
    """
    before = Leaks.now()
    yield
    deadline = time.monotonic() + settle_s
    while leaked := Leaks.now().since(before):
        if time.monotonic() > deadline:
            for pid in leaked.processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"leaked {leaked}")
        gc.collect()  # slow with torch loaded, so only where something seems to be left
        time.sleep(0.02)


def _processes() -> dict[int, str]:
    helpers = {  # that multiprocessing starts once and keeps
        getattr(resource_tracker._resource_tracker, "_pid", None),
        getattr(forkserver._forkserver, "_forkserver_pid", None),
    }
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.pid not in helpers and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = f"{process.pid} {' '.join(process.cmdline()) or process.name()}"
    return found


def _descriptors() -> dict[int, str]:
    kept = {  # what multiprocessing's helpers need
        getattr(resource_tracker._resource_tracker, "_fd", None),
        getattr(forkserver._forkserver, "_forkserver_alive_fd", None),
    }
    found = {}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):
                found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _shared_memory() -> frozenset[str]:
    """No semaphores (any program's), and of torch's files, which carry a process id, only this family's."""
    family = {os.getpid(), *(process.pid for process in psutil.Process().children(recursive=True))}
    found = set()
    for name in os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else ():
        owner = re.match(r"torch_(\d+)_", name)
        if not name.startswith("sem.") and (owner is None or int(owner[1]) in family):
            found.add(name)
    return frozenset(found)


def _without_strangers(names: frozenset[str]) -> frozenset[str]:
    """Without what a process outside this family has mapped: other programs of the machine use ``/dev/shm`` as well."""
    if not names:
        return names
    family = {os.getpid(), *(process.pid for process in psutil.Process().children(recursive=True))}
    theirs: set[str] = set()
    for process in psutil.process_iter():
        if process.pid not in family:
            with contextlib.suppress(psutil.Error, OSError):
                theirs.update(os.path.basename(entry.path) for entry in process.memory_maps(grouped=True))
    return names - theirs
