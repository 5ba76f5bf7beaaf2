"""The pin-memory thread: in order, errors come back, and it ends. The copy itself is the device's business."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from robustloader.engine.pinning import Pinner
from tests.support.watch import PATIENCE_S


class Pinners:
    """Makes pinners that copy nothing, and knows when something can be taken."""

    def __init__(self) -> None:
        self.woken = threading.Semaphore(0)
        self.made: list[Pinner] = []

    def make(self, pin: Any) -> Pinner:
        pinner = Pinner(pin, None, self.woken.release)
        self.made.append(pinner)
        return pinner

    def take(self, pinner: Pinner, count: int) -> list[Any]:
        taken: list[Any] = []
        while len(taken) < count:
            assert self.woken.acquire(timeout=PATIENCE_S)
            taken.extend(pinner.take())
        return taken


@pytest.fixture
def pinners() -> Any:
    pinners = Pinners()
    yield pinners
    for pinner in pinners.made:
        pinner.stop()
        assert not pinner.alive


def test_batches_come_back_in_order(pinners: Pinners) -> None:
    """Each with its token, pinned in a thread of its own."""
    threads = set()

    def pin(batch: int) -> int:
        threads.add(threading.current_thread().name)
        return batch * 10

    pinner = pinners.make(pin)
    for number in range(20):
        pinner.submit(f"token {number}", number)
    assert pinners.take(pinner, 20) == [(f"token {number}", number * 10, None) for number in range(20)]
    assert threads == {"pt_data_pin"}


def test_a_pin_memory_method_that_raises(pinners: Pinners) -> None:
    """The error comes back with its token, and the thread goes on."""

    def pin(batch: int) -> int:
        return 10 // batch

    pinner = pinners.make(pin)
    for number in (5, 0, 2):
        pinner.submit(number, number)
    first, failed, last = pinners.take(pinner, 3)
    assert (first[1:], last[1:]) == ((2, None), (5, None))
    assert isinstance(failed[2], ZeroDivisionError)
    assert pinner.alive


def test_stopping_twice(pinners: Pinners) -> None:
    """Ends the thread after the batch in hand; a second time does nothing."""
    pinner = pinners.make(lambda batch: batch)
    pinner.submit(1, 1)
    pinner.stop()
    pinner.stop()
    assert not pinner.alive
    assert pinner.take() == [(1, 1, None)]
