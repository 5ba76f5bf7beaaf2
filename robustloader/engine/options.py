"""What an iterator needs to know of its loader beyond torch's own arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from robustloader.engine.faults import FaultDesk
from robustloader.policies import FaultPolicy, RecoveryPolicy, Seeding
from robustloader.telemetry import Recorder

__all__ = ["EngineOptions"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Settings and shared bookkeeping of one loader.

    Attributes:
        next_epoch: numbers the epochs of the loader, from 0, over all its iterators.
        iterable, batched: the kind of dataset, and whether the loader makes batches itself.
    """

    faults: FaultPolicy
    recovery: RecoveryPolicy | None
    seeding: Seeding
    desk: FaultDesk
    recorder: Recorder
    next_epoch: Callable[[], int]
    iterable: bool
    batched: bool
    dataset: Any
