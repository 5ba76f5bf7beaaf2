"""Reading a run back from its events, and showing it: as a page, and live in a terminal."""

from __future__ import annotations

from robustloader.report.files import Tail, find_parts, read_run
from robustloader.report.reader import RunReader
from robustloader.report.run import Epoch, FaultGroup, Incident, Interval, RankRun, Run, Source

__all__ = [
    "Epoch",
    "FaultGroup",
    "Incident",
    "Interval",
    "RankRun",
    "Run",
    "RunReader",
    "Source",
    "Tail",
    "find_parts",
    "read_run",
]
