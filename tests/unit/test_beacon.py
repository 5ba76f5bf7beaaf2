"""The beacon: what a worker is doing, read from another process at any time."""

from __future__ import annotations

import os
import signal
import time

import pytest

from robustloader.system.host import SharedPage
from robustloader.worker import beacon as beacons
from robustloader.worker.beacon import Beacon
from tests.support.watch import await_death, until


def make_beacon() -> Beacon:
    page = SharedPage()
    page.hand_over()
    return Beacon(page)


@pytest.mark.parametrize("phase", range(6))
def test_phases(phase: int) -> None:
    """What is written is read."""
    beacon = make_beacon()
    before = time.monotonic_ns()
    beacon.enter(phase, run=3, task=2**40, position=5, count=7)
    reading = beacon.read()
    assert reading.phase == beacons.PHASES[phase]
    assert (reading.run, reading.task, reading.position, reading.in_flight) == (3, 2**40, 5, 7)
    assert before <= reading.started_ns <= time.monotonic_ns()


def test_one_sample_after_another() -> None:
    """``sample`` names the position, keeps the task, and counts one in flight; spares have negative positions."""
    beacon = make_beacon()
    beacon.enter(beacons.ITEM, run=1, task=9, position=0, count=8)
    for position in (0, 1, 7, -1, -4):
        beacon.sample(position)
        reading = beacon.read()
        assert (reading.phase, reading.run, reading.task, reading.position, reading.in_flight) == (
            "item",
            1,
            9,
            position,
            1,
        )


def test_no_single_sample_is_in_hand() -> None:
    """In collate and while idle."""
    beacon = make_beacon()
    beacon.enter(beacons.COLLATE, run=1, task=9, count=8)
    assert beacon.read().position is None
    beacon.finish()
    assert (beacon.read().phase, beacon.read().position) == ("idle", None)


def test_tasks_are_counted() -> None:
    """``done`` rises by one a task."""
    beacon = make_beacon()
    for number in range(5):
        assert beacon.read().done == number
        beacon.enter(beacons.ITEM, task=number)
        beacon.finish()


def test_dismissal() -> None:
    """The other direction: the training process asks the worker to leave."""
    beacon = make_beacon()
    assert not beacon.dismissed
    beacon.dismiss()
    beacon.enter(beacons.ITEM)
    assert beacon.dismissed


@pytest.mark.parametrize("tasks", range(100, 2000, 100))
def test_a_dead_writers_last_words(tasks: int) -> None:
    """What a killed process wrote stays readable, whatever it was in the middle of."""
    beacon = make_beacon()
    pid = os.fork()
    if not pid:
        for task in range(10**9):
            beacon.enter(beacons.ITEM, task=task, position=task)
            beacon.sample(task)
    try:
        until(lambda: beacon.read().task > tasks)
    finally:
        os.kill(pid, signal.SIGKILL)
        await_death(pid)
        os.waitpid(pid, 0)
    last = beacon.read()
    assert last.phase == "item"
    assert last.task > tasks
    assert last.position in (last.task, last.task - 1)  # killed between the two: the task is the new one
