"""What an event means for metrics, whoever keeps them: which counter it adds to, which gauge it sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from robustloader.events import (
    EpochFinished,
    EpochProgressed,
    Event,
    MemoryLow,
    PoolHealed,
    PoolResized,
    PoolShrunk,
    SampleFaulted,
    ShardEnded,
    TaskReplayed,
    TransportDegraded,
    WorkerCrashed,
    WorkerHung,
    WorkerRecycled,
    WorkerRestarted,
)
from robustloader.telemetry.growth import Growth, worker_name

__all__ = ["Change", "changes"]


class Change(NamedTuple):
    """One change of one metric.

    Attributes:
        name: of the counter or gauge, as the sinks' tables have it.
        value: what a counter grows by, or what a gauge stands at.
        adds: whether it is a counter.
        attributes: what tells it from others of its name, in the order of the tables.
    """

    name: str
    value: float
    adds: bool
    attributes: dict[str, str | bool]


def _nothing(event: Any) -> dict[str, str | bool]:
    return {}


_COUNTED: dict[type[Event], tuple[str, Callable[[Any], dict[str, str | bool]]]] = {
    SampleFaulted: ("faults", lambda event: {"kind": event.fault.kind, "action": event.fault.action}),
    WorkerCrashed: ("crashes", lambda event: {"cause": event.cause}),
    WorkerHung: ("hangs", _nothing),
    WorkerRestarted: ("restarts", _nothing),
    WorkerRecycled: ("recycled", _nothing),
    TaskReplayed: ("replayed", _nothing),
    MemoryLow: ("memory_low", _nothing),
    ShardEnded: ("shards", _nothing),
    TransportDegraded: ("degraded", _nothing),
}


def changes(event: Event, growth: Growth) -> Iterator[Change]:
    """What the event changes, in order; nothing where it is of no kind that is counted.

    Args:
        event: what happened.
        growth: the sink's own: what totals of epochs it has been told of.
    """
    match event:
        case EpochProgressed():
            yield from _grown(event, growth)
            yield Change("workers", event.statistics["active_workers"], False, {})
            yield Change("ready", event.ready, False, {})
            for worker in event.workers:
                yield _memory(worker["worker_id"], worker["peak_rss_bytes"])
        case EpochFinished(summary=summary):
            yield from _grown(event, growth)
            yield Change("epochs", 1, True, {"complete": summary.complete})
            yield Change("workers", summary.workers_at_end, False, {})
            for loader in summary.workers:
                yield _memory(loader.worker_id, loader.peak_rss_bytes)
        case PoolShrunk(workers=workers) | PoolHealed(workers=workers) | PoolResized(workers=workers):
            yield Change("workers", workers, False, {})
        case _ if type(event) in _COUNTED:
            name, attributes = _COUNTED[type(event)]
            yield Change(name, 1, True, attributes(event))


def _grown(event: EpochProgressed | EpochFinished, growth: Growth) -> Iterator[Change]:
    yield Change("epoch", event.epoch, False, {})
    for (name, worker), amount in growth.take(event).items():
        yield Change(name, amount, True, {} if worker is None else {"worker": worker})


def _memory(worker_id: int | None, peak_rss_bytes: int) -> Change:
    return Change("memory", peak_rss_bytes, False, {"worker": worker_name(worker_id)})
