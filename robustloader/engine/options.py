"""What an iterator needs to know of its loader beyond torch's own arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from robustloader.engine.faults import FaultDesk
from robustloader.policies import FaultPolicy, MemoryPolicy, RecoveryPolicy, Seeding, Transport
from robustloader.telemetry import Recorder

__all__ = ["EngineOptions", "EpochCounter", "Measured"]


class EpochCounter:
    """Numbers the epochs of a loader from 0. An object of its own, so that no iterator need hold its loader."""

    def __init__(self) -> None:
        self._next = 0

    def next(self) -> int:
        """The number of the epoch that begins now."""
        epoch = self._next
        self._next += 1
        return epoch


@dataclass
class Measured:
    """What a loader's epochs have shown so far, and what has been said about it.

    Attributes:
        batch_bytes: size of the largest batch; 0 before the first.
        warned: what the user was warned of; once is enough.
    """

    batch_bytes: int = 0
    warned: set[str] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Settings and shared bookkeeping of one loader.

    Attributes:
        epochs: numbers the epochs of the loader, over all its iterators.
        iterable, batched: the kind of dataset, and whether the loader makes batches itself.
    """

    faults: FaultPolicy
    recovery: RecoveryPolicy | None
    memory: MemoryPolicy | None
    seeding: Seeding
    transport: Transport
    desk: FaultDesk
    recorder: Recorder
    epochs: EpochCounter
    iterable: bool
    batched: bool
    dataset: Any
    measured: Measured = field(default_factory=Measured)
