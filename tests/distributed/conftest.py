"""Jobs of several ranks start several interpreters, each with torch: that takes its time on a slow machine."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

DEADLINE_S = 240


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """The rule for all tests, with more time."""

    def expire(number: int, frame: Any) -> None:
        pytest.fail(f"still running after {DEADLINE_S} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(DEADLINE_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
