"""Numbers as people say them, in the words that an epoch's summary uses."""

from __future__ import annotations

import time

from robustloader.telemetry.summary import _bytes as as_bytes
from robustloader.telemetry.summary import _count as as_count
from robustloader.telemetry.summary import _percent as as_percent
from robustloader.telemetry.summary import _seconds as as_seconds

__all__ = ["as_bytes", "as_clock", "as_count", "as_percent", "as_seconds"]


def as_clock(at: float) -> str:
    """A Unix time as date and time in UTC: a report is read on other machines than the run was made on."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))
