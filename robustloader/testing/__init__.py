"""Fault injection: samples that raise, hang and crash on purpose, a killer of workers, and a check for leaks.

For tests of training jobs: everything pickles, works under every start method and with torch's own loader, and does
what it was told as often as it was told, also across the deaths of the processes that do it.
"""

from robustloader.testing.injection import (
    Crash,
    ExhaustMemory,
    Exit,
    Hang,
    InjectedDataset,
    InjectedStream,
    Injector,
    Misbehaviour,
    Raise,
    Slow,
)
from robustloader.testing.killer import WorkerKiller
from robustloader.testing.leaks import Leaks, no_leaks

__all__ = [
    "Crash",
    "ExhaustMemory",
    "Exit",
    "Hang",
    "InjectedDataset",
    "InjectedStream",
    "Injector",
    "Leaks",
    "Misbehaviour",
    "Raise",
    "Slow",
    "WorkerKiller",
    "no_leaks",
]
