"""What an iterator needs to know of its loader beyond torch's own arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from robustloader.decisions.adaptation import Adaptation
from robustloader.engine.faults import FaultDesk
from robustloader.engine.progress import Journal, Opened, Resumption
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

    @property
    def upcoming(self) -> int:
        """The number that the next epoch gets."""
        return self._next

    def jump(self, epoch: int) -> None:
        """Let the next epoch be this one."""
        self._next = epoch


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
        journal: where the iterators note what they delivered.
        resume: None, or where the epoch goes on that the next iterator is for.
        opened: None, or what was done for an iterator that begins a whole epoch in a run that goes on.
        stateful_sampler: the sampler that keeps its own state; None where none does.
        adaptation: what ``num_workers="auto"`` has come to, for a map-style dataset; None leaves the number alone.
        iterable, batched: the kind of dataset, and whether the loader makes batches itself.
        batch_size: indices that the sampler gives for a batch that is not the last; 0 where it does not say.
    """

    faults: FaultPolicy
    recovery: RecoveryPolicy | None
    memory: MemoryPolicy | None
    seeding: Seeding
    transport: Transport
    desk: FaultDesk
    recorder: Recorder
    epochs: EpochCounter
    journal: Journal
    resume: Resumption | None
    opened: Opened | None
    stateful_sampler: Any
    iterable: bool
    batched: bool
    batch_size: int
    dataset: Any
    measured: Measured = field(default_factory=Measured)
    adaptation: Adaptation | None = None
