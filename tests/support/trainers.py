"""Training programs that tests run in a process of their own: ``python -m tests.support.trainers NAME ...``.

They talk by lines on standard output; standard error is checked for noise.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import robustloader
from robustloader import RobustDataLoader
from tests.support.datasets import Numbers
from tests.support.peek import await_bytes
from tests.support.watch import post, wait_at

TRANSPORT_VARIABLE = "ROBUSTLOADER_TESTS_TRANSPORT"
"""Names the transport that the program's loaders use."""

INTERRUPTED = "TESTS_INTERRUPTED"
if INTERRUPTED in os.environ:  # a spawned process that will become a worker, while it imports
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)


class Sleeper(Numbers):
    """Sample 1 starts a child of its own, tells a mailbox both process ids, and waits at a gate for ever. Those after
    it are far larger than a socket, so that whoever loads one is stuck in the middle of a frame while nobody reads.
    """

    def __init__(self, mailbox: str, gate: str) -> None:
        super().__init__(64)
        self.mailbox = mailbox
        self.gate = gate

    def load(self, index: int) -> Any:
        if index == 1:
            child = subprocess.Popen(["sleep", "600"])
            post(self.mailbox, f"{os.getpid()} {child.pid}")
            wait_at(self.gate)
        return torch.full((16 << 20,), index, dtype=torch.uint8) if index > 1 else index


def say(*words: object) -> None:
    print(*words, flush=True)


def wait_for_a_line() -> None:
    """Until the test says so."""
    sys.stdin.readline()


def loader(method: str, dataset: Any = None, **kwargs: Any) -> Any:
    options = {
        "batch_size": 1,
        "num_workers": 2,
        "multiprocessing_context": method,
        "transport": os.environ.get(TRANSPORT_VARIABLE, "auto"),
        **kwargs,
    }
    return RobustDataLoader(dataset if dataset is not None else Numbers(64), **options)


def pids(iterator: Any) -> str:
    return " ".join(str(process.pid) for process in iterator._workers)


def sleeping(method: str, mailbox: str, gate: str) -> None:
    """One worker is stuck and owns a child, the other is in the middle of a frame; the trainer waits."""
    iterator = iter(loader(method, Sleeper(mailbox, gate)))
    next(iterator)
    await_bytes(iterator, 0)
    say(pids(iterator))
    wait_for_a_line()


def preempted(method: str) -> None:
    """Handles SIGTERM: takes twenty more batches, then leaves."""
    told = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    iterator = iter(loader(method))
    taken = [int(next(iterator)[0])]
    say(pids(iterator))
    while not told:
        signal.pause()
    taken += [int(next(iterator)[0]) for _ in range(20)]
    assert taken == list(range(21)), taken
    del iterator
    say("saved")


def interrupted(method: str) -> None:
    """Trains until Ctrl-C, all workers at work."""
    iterator: Any = iter(loader(method, Numbers(10**6)))
    while not all(worker.ready for worker in iterator._pool.workers):
        next(iterator)
    say(pids(iterator))
    while True:
        time.sleep(600)


def interrupted_while_starting(method: str) -> None:
    """Everybody was told to leave while the workers were starting, and the trainer takes its last batches."""
    told: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: told.append(number))
    os.environ[INTERRUPTED] = "yes"
    batches = loader(method)
    assert [int(batch[0]) for batch in batches] == list(range(64))
    assert batches.summary().crashes == 0, batches.summary()
    assert not told
    say("saved")


def interrupted_in_next(method: str, mailbox: str, gate: str) -> None:
    """Waits in ``next()`` for a stuck worker when Ctrl-C comes."""
    iterator = iter(loader(method, Sleeper(mailbox, gate)))
    say(pids(iterator))
    for _ in iterator:
        pass


def breaks(method: str) -> None:
    for _ in loader(method):
        break
    say("done")


def deletes(method: str) -> None:
    iterator = iter(loader(method))
    next(iterator)
    del iterator
    say("done")


def raises(method: str) -> None:
    for _ in loader(method):
        raise ValueError("the loss is NaN")


def exits(method: str) -> None:
    for _ in loader(method):
        sys.exit(7)


def ends(method: str) -> None:
    """The interpreter ends with a live iterator, kept by a global."""
    globals()["kept"] = iter(loader(method, persistent_workers=True))
    next(globals()["kept"])
    say("done")


def ends_in_a_cycle(method: str) -> None:
    """The same, where only the garbage collector could find it."""
    cycle: list[Any] = [iter(loader(method))]
    cycle.append(cycle)
    next(cycle[0])
    say("done")


def ends_whole(method: str) -> None:
    """Persistent workers, two epochs, end."""
    data = loader(method, persistent_workers=True)
    for _ in range(2):
        assert [int(batch[0]) for batch in data] == list(range(64))
    say("done")


def ends_while_restarting(method: str) -> None:
    """The interpreter ends while a dead worker's successor is still on its way."""
    iterator = iter(loader(method))
    next(iterator)
    for process in iterator._workers:
        os.kill(process.pid, signal.SIGKILL)
    next(iterator)
    globals()["kept"] = iterator
    say("done")


def in_a_child(method: str) -> None:
    """The trainer is itself a (non-daemonic) multiprocessing child, and leaves an iterator alive."""
    context = mp.get_context(method)
    process = context.Process(target=ends, args=(method,))
    process.start()
    process.join()
    say("exit code", process.exitcode)


def forks(method: str) -> None:
    """A forked copy of the trainer leaves the workers alone, whichever way it ends; the trainer goes on."""
    iterator = iter(loader(method, Numbers(40), persistent_workers=True))
    workers = pids(iterator)
    # One batch of each: a worker that is still starting would die of multiprocessing's SIGTERM, and be replaced.
    taken = [int(next(iterator)[0]) for _ in workers]
    for way in ("return", "exit", "shutdown", "delete"):
        child = os.fork()
        if not child:
            if way == "shutdown":
                iterator._shutdown_workers()
            elif way == "delete":
                del iterator
                gc.collect()
            elif way == "return":
                # multiprocessing's own exit function terminates and joins what it takes for its children, and says on
                # standard error that it may not: the workers survive the one, the test closes its ears to the other.
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                sys.exit(0)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, (way, status)
        taken += [int(next(iterator)[0]) for _ in range(5)]
        assert pids(iterator) == workers, way
    taken += [int(batch[0]) for batch in iterator]
    assert taken == list(range(40)), taken
    say("done")


def forks_and_leaves_a_child(method: str, mailbox: str, gate: str) -> None:
    """A forked child outlives the trainer; the workers must not."""
    iterator = iter(loader(method, Sleeper(mailbox, gate)))
    next(iterator)
    say(pids(iterator))
    child = os.fork()
    if not child:
        os.close(1)
        os.close(2)
        signal.pause()
        os._exit(0)
    say(child)
    wait_for_a_line()


def two_loaders(method: str, mailbox: str, gate: str) -> None:
    """The second loader's workers are forked while the first one's live."""
    one = iter(loader(method, Sleeper(mailbox, gate)))
    next(one)
    other = iter(loader(method))
    next(other)
    say(pids(one), pids(other))
    wait_for_a_line()


def one_without_signals(method: str) -> None:
    """Checks what a worker's own subprocess inherits: default actions, not ignored signals."""
    from tests.support.trainers import Inherits

    data = loader(method, Inherits(2), num_workers=1)
    say(*[int(batch[0]) for batch in data])


class Inherits(Numbers):
    """Sample ``i`` is the bit mask of signals that a subprocess of the worker ignores."""

    def load(self, index: int) -> int:
        text = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
        (line,) = [line for line in text.splitlines() if line.startswith("SigIgn")]
        ignored = int(line.split()[1], 16)
        return int(bool(ignored & (1 << (signal.SIGINT - 1) | 1 << (signal.SIGTERM - 1))))


TRAINERS: dict[str, Callable[..., None]] = {
    name: value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__module__", "") == __name__
}

if __name__ == "__main__":
    assert robustloader
    TRAINERS[sys.argv[1]](*sys.argv[2:])
