"""What an event changes in metrics, the same for every sink that keeps them."""

from __future__ import annotations

from typing import Any

import pytest

from robustloader import MemoryLow, PoolHealed, PoolResized, PoolShrunk, WorkerCrashed, events
from robustloader.telemetry import changes as table
from robustloader.telemetry.changes import Change, changes
from robustloader.telemetry.growth import Growth

CRASHED = WorkerCrashed(
    worker_id=0, incarnation=0, pid=1, exitcode=-9, signal="SIGKILL", cause="killed", phase="item", index=3, tasks=(1,)
)
LOW = MemoryLow(wanted_bytes=2, free_bytes=1, action="adapt", remedy="less")


@pytest.mark.parametrize(
    ("event", "change"),
    [
        (PoolShrunk(workers=1, reason="deaths"), Change("workers", 1, False, {})),
        (PoolHealed(workers=2), Change("workers", 2, False, {})),
        (PoolResized(before=2, workers=4, reason="it waits"), Change("workers", 4, False, {})),
        (CRASHED, Change("crashes", 1, True, {"cause": "killed"})),
        (LOW, Change("memory_low", 1, True, {})),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_event_and_its_change(event: Any, change: Change) -> None:
    """One change, with its labels."""
    assert list(changes(event, Growth())) == [change]


def test_an_event_of_another_kind_changes_nothing() -> None:
    """Also one that does not exist yet."""

    class Unheard(events.Event):
        pass

    assert list(changes(Unheard(), Growth())) == []


def test_every_event_has_its_place() -> None:
    """A new one is counted, or named here as one that summaries tell of."""
    kinds = {kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, events.Event)}
    elsewhere = {events.PoolShrunk, events.PoolHealed, events.PoolResized, events.EpochProgressed, events.EpochFinished}
    not_counted = {events.Event, events.SampleReplaced, events.TaskLoaded, events.BatchDelivered}
    assert kinds - elsewhere - not_counted == set(table._COUNTED)
