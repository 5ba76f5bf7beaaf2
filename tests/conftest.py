"""What holds for every test: nothing leaks, nothing hangs, no core files."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing as mp
import os
import re
import resource
import signal
import time
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from typing import Any

import psutil
import pytest

DEADLINE_S = 90
"""A test that takes longer hangs: the slowest ones here take a few seconds on two slow cores."""

SETTLE_S = 5.0
"""Processes that were told to leave may take a moment to be gone."""


def pytest_configure(config: pytest.Config) -> None:
    """On a machine with few cores torch advises against the numbers of workers that the tests need."""
    config.addinivalue_line("filterwarnings", "ignore:This DataLoader will create:UserWarning")


@pytest.fixture(autouse=True, scope="session")
def process_settings() -> None:
    """Workers that crash on purpose leave no core files, and forkserver imports torch once for all of them."""
    mp.set_forkserver_preload(["torch"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A test that does not end fails, and the ones after it still run."""

    def expire(number: int, frame: Any) -> None:
        pytest.fail(f"still running after {DEADLINE_S} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(DEADLINE_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def no_leaks(no_hang: None) -> Iterator[None]:
    """After a test there is no child process, descriptor or shared memory that was not there before."""
    children, descriptors, shared = _children(), _descriptors(), _shared_memory()
    yield
    deadline = time.monotonic() + SETTLE_S
    while True:
        mp.active_children()  # reaps
        left = _children().keys() - children.keys()
        opened = {fd: name for fd, name in _descriptors().items() if descriptors.get(fd) != name}
        grown = len(_descriptors()) > len(descriptors)
        mapped = _shared_memory() - shared
        if not (left or (opened and grown) or mapped) or time.monotonic() > deadline:
            break
        gc.collect()  # slow with torch loaded, so only where something seems to be left
        time.sleep(0.02)
    told = []
    if left:
        told.append(f"processes: {[_describe(_children().get(pid)) for pid in left]}")
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    if opened and grown:
        told.append(f"descriptors: {opened}")
    if mapped:
        told.append(f"in /dev/shm: {sorted(mapped)}")
    if told:
        pytest.fail("leaked " + "; ".join(told))


def _helpers() -> set[int | None]:
    """Processes that multiprocessing starts once and keeps."""
    return {
        getattr(resource_tracker._resource_tracker, "_pid", None),
        getattr(forkserver._forkserver, "_forkserver_pid", None),
    }


def _children() -> dict[int, psutil.Process]:
    """Every descendant that runs."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.pid not in _helpers() and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process
    return found


def _describe(process: psutil.Process | None) -> str:
    try:
        return f"{process.pid} {process.name()}" if process is not None else "gone meanwhile"
    except psutil.NoSuchProcess:
        return "gone meanwhile"


def _descriptors() -> dict[int, str]:
    """Open descriptors and what they lead to, without those that multiprocessing's helpers need."""
    kept = {
        getattr(resource_tracker._resource_tracker, "_fd", None),
        getattr(forkserver._forkserver, "_forkserver_alive_fd", None),
    }
    found = {}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):
                found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _shared_memory() -> set[str]:
    """Entries of /dev/shm that may be ours: no semaphores (any program's, and nothing here makes any), and of torch's,
    which carry a process id, only this process's and its children's: other programs of the machine make them too.
    """
    family = {os.getpid(), *(process.pid for process in psutil.Process().children(recursive=True))}
    found = set()
    for name in os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else ():
        owner = re.match(r"torch_(\d+)_", name)
        if not name.startswith("sem.") and (owner is None or int(owner[1]) in family):
            found.add(name)
    return found
