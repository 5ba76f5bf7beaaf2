"""What holds for every test: nothing leaks, nothing hangs, no core files."""

from __future__ import annotations

import multiprocessing as mp
import resource
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from robustloader.testing import no_leaks

# How long an example takes says something of the machine, not of the code.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

DEADLINE_S = 90
"""A test that takes longer hangs: the slowest ones here take a few seconds on two slow cores.
``deadline`` marks more."""


def pytest_configure(config: pytest.Config) -> None:
    """On a machine with few cores torch advises against the numbers of workers that the tests need."""
    config.addinivalue_line("filterwarnings", "ignore:This DataLoader will create:UserWarning")


@pytest.fixture(autouse=True, scope="session")
def process_settings() -> None:
    """Workers that crash on purpose leave no core files, and forkserver imports torch once for all of them.

    A shell starts what is to run in the background with SIGINT ignored, and programs inherit that: Ctrl-C, which some
    tests send, would reach none of them.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    mp.set_forkserver_preload(["torch"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


@pytest.fixture(autouse=True)
def no_hang(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that does not end fails, and the ones after it still run."""
    marker = request.node.get_closest_marker("deadline")
    deadline_s = DEADLINE_S if marker is None else marker.args[0]

    def expire(number: int, frame: Any) -> None:
        pytest.fail(f"still running after {deadline_s} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(deadline_s)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def leaves_nothing(no_hang: None) -> Iterator[None]:
    """After a test there is no child process, descriptor, thread or shared memory that was not there before.

    The end of an iterator of torch's waits up to five seconds for each of its workers, in the garbage collector too.
    """
    with no_leaks(settle_s=15.0):
        yield
