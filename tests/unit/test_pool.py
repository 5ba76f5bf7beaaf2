"""The pool of worker processes, where none can be started: the failure is told, and no descriptor is left."""

from __future__ import annotations

import multiprocessing as mp
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
