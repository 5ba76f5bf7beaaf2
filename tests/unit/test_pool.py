"""The pool of worker processes, where none can be started: the failure is told, and no descriptor is left."""

from __future__ import annotations

import errno
import multiprocessing as mp
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from robustloader.engine.pool import NotStarted, Pool
from robustloader.testing import Leaks


def make_setup(**details: Any) -> Any:
    """None of these workers gets so far as to read it."""
    return None


@pytest.fixture(params=["fork", "forkserver", "spawn"])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    pool = Pool(mp.get_context(request.param), make_setup)
    yield pool
    pool.stop()


def check_refused(pool: Pool, kind: type[BaseException], times: int = 3) -> None:
    before = Leaks.now()
    for incarnation in range(times):
        pool.start_aside(0, incarnation, run=0)
        (happening,) = pool.wait(10.0)
        assert isinstance(happening, NotStarted)
        assert isinstance(happening.error, kind)
        del happening
    assert not Leaks.now().since(before)


@pytest.mark.parametrize("pool", ["forkserver", "spawn"], indirect=True)
def test_a_start_for_which_there_is_no_thread(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the limit of threads and processes is reached."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    check_refused(pool, RuntimeError)


@pytest.mark.parametrize("pool", ["fork"], indirect=True)
def test_a_fork_that_is_refused(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipes that ``multiprocessing`` had made for the process are closed."""

    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refuse)
    check_refused(pool, BlockingIOError)
