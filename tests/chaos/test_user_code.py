"""Deaths while the trainer computes: its own code, its own processes and its own signal handlers notice nothing."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from robustloader import RecoveryPolicy, RobustDataLoader
from tests.support.datasets import Numbers, note, noted
from tests.support.listener import flat
from tests.support.peek import pids
from tests.support.watch import kill

SIGNALS = [signal.SIGKILL, signal.SIGSEGV]


def user_code() -> None:
    """Enough bytecode and system calls for a pending signal handler to run in."""
    total = 0
    for number in range(20_000):
        total += number
    assert total == 199_990_000
    done = subprocess.run([sys.executable, "-S", "-c", "print(6 * 7)"], capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_nothing_is_raised_in_user_code(number: int) -> None:
    """All workers die between two ``next()``; subprocesses work, and so does the loader."""
    iterator = iter(RobustDataLoader(Numbers(64), batch_size=4, num_workers=2))
    delivered = [next(iterator)]
    for pid in pids(iterator):
        kill(pid, number)
    user_code()
    delivered += list(iterator)
    assert flat(delivered) == list(range(64))


def test_the_users_sigchld_handler_is_called() -> None:
    """And stays the user's."""
    calls: list[int] = []

    def handler(number: int, frame: Any) -> None:
        calls.append(number)

    before = signal.signal(signal.SIGCHLD, handler)
    try:
        iterator = iter(RobustDataLoader(Numbers(64), batch_size=4, num_workers=2))
        delivered = [next(iterator)]
        for pid in pids(iterator):
            kill(pid, signal.SIGKILL)
        user_code()
        assert calls
        delivered += list(iterator)
        assert flat(delivered) == list(range(64))
        assert signal.getsignal(signal.SIGCHLD) is handler
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_without_a_sigchld_handler_none_is_installed() -> None:
    """Another library's assumptions hold."""
    before = signal.getsignal(signal.SIGCHLD)
    list(RobustDataLoader(Numbers(64), batch_size=4, num_workers=2))
    assert signal.getsignal(signal.SIGCHLD) is before


def test_a_stock_loader_beside_it() -> None:
    """torch's own handler watches torch's own workers: it raises nothing when ours die, and its loader goes on."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        stock = iter(DataLoader(Numbers(64), batch_size=4, num_workers=2))
        ours = iter(RobustDataLoader(Numbers(64), batch_size=4, num_workers=2))
        first = [next(stock)], [next(ours)]
        for pid in pids(ours):
            kill(pid, signal.SIGKILL)
        user_code()
        first[0].extend(stock)
        first[1].extend(ours)
        assert flat(first[0]) == flat(first[1]) == list(range(64))
        del stock
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_two_loaders_do_not_disturb_each_other() -> None:
    """The deaths of one are not the other's."""
    one = iter(RobustDataLoader(Numbers(64), batch_size=4, num_workers=1))
    other = iter(RobustDataLoader(Numbers(64), batch_size=4, num_workers=1, recovery=None))
    delivered = [next(one)], [next(other)]
    for _ in range(3):
        for pid in pids(one):
            kill(pid, signal.SIGKILL)
        delivered[0].append(next(one))
        delivered[1].append(next(other))
    delivered[0].extend(one)
    delivered[1].extend(other)
    assert flat(delivered[0]) == flat(delivered[1]) == list(range(64))


def test_two_iterators_of_one_loader() -> None:
    """Each has its own workers; both are recovered."""
    loader = RobustDataLoader(Numbers(64), batch_size=4, num_workers=1)
    one, other = iter(loader), iter(loader)
    delivered = [next(one)], [next(other)]
    assert loader.active_workers == 2
    for iterator in (one, other):
        for pid in pids(iterator):
            kill(pid, signal.SIGKILL)
    delivered[0].extend(one)
    delivered[1].extend(other)
    assert flat(delivered[0]) == flat(delivered[1]) == list(range(64))


def test_threads_of_the_trainer_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restarts happen in a process that has OpenMP threads and a logging lock in use."""
    import logging
    import threading

    stop = threading.Event()

    def chatter() -> None:
        log = logging.getLogger("chatter")
        while not stop.is_set():
            log.warning("x")

    logging.getLogger("chatter").addHandler(logging.NullHandler())
    logging.getLogger("chatter").propagate = False
    threads = [threading.Thread(target=chatter) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        iterator = iter(RobustDataLoader(Numbers(100), batch_size=4, num_workers=2))
        delivered = []
        for number, batch in enumerate(iterator):
            delivered.append(batch)
            (torch.ones(200, 200) @ torch.ones(200, 200)).sum()
            if number in (2, 6, 10):
                for pid in pids(iterator)[:1]:
                    kill(pid, signal.SIGKILL)
        assert flat(delivered) == list(range(100))
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_deaths_in_a_loader_that_a_thread_uses() -> None:
    """Made, used and ended there; the main thread computes meanwhile."""
    delivered: list[int] = []
    errors: list[BaseException] = []

    def train() -> None:
        recovery = RecoveryPolicy(backoff_s=0, max_restarts=100)
        try:
            iterator = iter(RobustDataLoader(Numbers(64), batch_size=4, num_workers=2, recovery=recovery))
            for number, batch in enumerate(iterator):
                delivered.extend(batch.tolist())
                if number % 5 == 0:
                    for pid in pids(iterator):
                        kill(pid, signal.SIGKILL)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    user_code()
    thread.join()
    assert not errors
    assert delivered == list(range(64))


class Garbage:
    """Notes which process it is finalised in; part of a cycle, so that only the garbage collector finds it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.itself = self

    def __del__(self) -> None:
        note(self.path, os.getpid())


class Collects(Numbers):
    """Has its worker look for garbage."""

    def load(self, index: int) -> Any:
        gc.collect()
        return index


def test_the_trainers_garbage_is_not_finalised_in_workers(tmp_path: Path) -> None:
    """What the training process has let go of when it forks is its own: a loader of torch's, say, whose end would reach
    for workers that are not this worker's children."""
    path = str(tmp_path / "finalised")
    gc.disable()
    try:
        Garbage(path)
        loader = RobustDataLoader(Collects(16), batch_size=4, num_workers=2, multiprocessing_context="fork")
        assert flat(loader) == list(range(16))
        assert noted(path) == []
    finally:
        gc.enable()
    gc.collect()
    assert noted(path) == [str(os.getpid())]
