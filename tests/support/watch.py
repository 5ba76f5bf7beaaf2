"""Waiting for what happens, in this process and in others: by descriptors and events, never by a guessed pause."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

PATIENCE_S = 30.0
"""How long a test waits for something that must happen. Only a failing test ever waits that long."""


def until(condition: Callable[[], Any], *, what: str = "the condition") -> Any:
    """Wait for something that has no descriptor to wait on (a beacon, ``/proc``); returns what ``condition`` does."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true within {PATIENCE_S:g} s"
        select.select([], [], [], 0.002)
    return value


def await_death(pid: int) -> None:
    """Wait until a child of this process is dead; it stays to be reaped by whoever owns it."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            assert select.select([fd], [], [], PATIENCE_S)[0], f"process {pid} did not end"
        finally:
            os.close(fd)


def kill(pid: int, number: int) -> None:
    """Send a signal that ends the process, and wait for its end. A fork server may have reaped it: then it was killed
    before, and nobody has noticed yet."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    await_death(pid)


def processes(pids: Iterable[int]) -> list[psutil.Process]:
    """Handles that tell these processes from later ones with the same ids; those that are gone are left out."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return found


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended; one whose new parent has not reaped it yet has."""
    try:
        return not process.is_running() or process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def await_gone(handles: Iterable[psutil.Process]) -> None:
    """Wait until none of these processes runs, whoever's children they are."""
    handles = list(handles)
    until(lambda: all(map(is_gone, handles)), what=f"the end of {[handle.pid for handle in handles]}")


class Mailbox:
    """A named pipe in a folder: whoever holds its path, in any process under any start method, can post a line.

    The test that makes it opens it for reading first, so that posting never blocks.
    """

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        os.mkfifo(self.path)
        # Opened for writing as well, so that it does not end when the first sender closes it.
        self._fd = os.open(self.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._text = b""

    def take(self) -> str:
        """The next line, waiting for it."""
        deadline = time.monotonic() + PATIENCE_S
        while b"\n" not in self._text:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self._fd], [], [], left)[0], f"nobody wrote to {self.path}"
            self._text += os.read(self._fd, 65_536)
        line, _, self._text = self._text.partition(b"\n")
        return line.decode()

    def close(self) -> None:
        """Close and remove the pipe."""
        os.close(self._fd)
        os.unlink(self.path)

    def __enter__(self) -> Mailbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def post(path: str, text: object) -> None:
    """Put a line into a mailbox."""
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, f"{text}\n".encode())
    os.close(fd)


class Gate:
    """A named pipe that whoever passes waits at, in C and for ever, until it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        os.mkfifo(self.path)
        self._fd = -1

    def open(self) -> None:
        """Let everyone through, now and later."""
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def close(self) -> None:
        """Remove the pipe; let go first whoever still waits."""
        self.open()
        os.close(self._fd)
        os.unlink(self.path)

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wait_at(path: str) -> None:
    """Wait at a gate, blocked in ``open(2)``."""
    os.close(os.open(path, os.O_RDONLY))
