"""A trainer in which abandoned epochs are collected at the worst moment, while the thread that collects holds the lock
of a sink: ``python -m tests.support.collecting SINK WORKERS FOLDER``.
"""

from __future__ import annotations

import faulthandler
import gc
import sys
import threading
import warnings
from typing import Any

from robustloader import ChromeTraceSink, EpochFinished, Event, JsonlSink, RobustDataLoader, Sink, TelemetryPolicy
from tests.support.datasets import Numbers, Raising, damaged

WITHIN_S = 60.0
LEFT_EARLY = 5
BAD = 3

left_early: list[Any] = []
"""Iterators, each in a cycle of its own."""


def collect() -> None:
    """One of them is dropped, and the collector comes by."""
    if left_early:
        left_early.pop()
        gc.collect()


class Index(int):
    """An index that takes so much memory to print that a collection is due."""

    def __repr__(self) -> str:
        collect()
        return str(int(self))


class Locked:
    """A sink of the user's, with a lock as in many a library."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.finished = 0

    def receive(self, event: Event) -> None:
        with self.lock:
            self.finished += isinstance(event, EpochFinished)
            collect()


def make_sink(name: str, folder: str) -> Sink:
    match name:
        case "jsonl":
            return JsonlSink(f"{folder}/run.jsonl")
        case "trace":
            return ChromeTraceSink(f"{folder}/trace.json")
    return Locked()


def main(name: str, workers: int, folder: str) -> None:
    """One epoch to its end, with a damaged sample, while ``LEFT_EARLY`` others go."""
    faulthandler.dump_traceback_later(WITHIN_S, exit=True)
    sink = make_sink(name, folder)
    telemetry = TelemetryPolicy(sinks=(sink,))
    other: RobustDataLoader[int] = RobustDataLoader(Numbers(8), 2, num_workers=workers, telemetry=telemetry)
    for _ in range(LEFT_EARLY):
        batches = iter(other)
        next(batches)
        left_early.append([batches])
        left_early[-1].append(left_early[-1])
    del batches
    loader: RobustDataLoader[int] = RobustDataLoader(
        Raising(8, {BAD: damaged}), 2, sampler=list(map(Index, range(8))), num_workers=workers, telemetry=telemetry
    )
    for _ in loader:
        if name == "loop":  # which calls the same writer by itself
            assert isinstance(sink, Locked)
            with sink.lock:
                collect()
    while left_early:
        collect()
    loader.summary()
    if isinstance(sink, Locked):
        print(sink.finished + next_told(sink, telemetry))


def next_told(sink: Locked, telemetry: TelemetryPolicy) -> int:
    """What was put off is told with the next event, at the latest."""
    before = sink.finished
    for _ in RobustDataLoader(Numbers(2), 2, telemetry=telemetry):
        pass
    return sink.finished - before - 1


if __name__ == "__main__":
    gc.disable()  # it comes by when it is told to, and only then
    warnings.simplefilter("ignore")
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
