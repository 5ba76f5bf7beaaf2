"""One loader with no option at its default, and what must be left of it after a framework has had it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import IterableDataset

from robustloader import FaultPolicy, MemoryPolicy, RecoveryPolicy, RobustDataLoader, TelemetryPolicy
from tests.support import parity_data as data
from tests.support.datasets import Numbers, Raising

OURS: dict[str, Any] = {
    "faults": FaultPolicy(action="skip", burst=3),
    "recovery": RecoveryPolicy(max_restarts=1),
    "memory": MemoryPolicy(on_low="warn"),
    "telemetry": TelemetryPolicy(history=2),
    "seeding": "batch",
    "transport": "pipe",
}
TORCHS: dict[str, Any] = {
    "num_workers": 1,
    "collate_fn": data.identity,
    "prefetch_factor": 3,
    "persistent_workers": True,
    "in_order": False,
    "timeout": 77,
    "worker_init_fn": data.reseed_in_init,
}
KEPT = (*OURS, *TORCHS)


def make_loader(**more: Any) -> RobustDataLoader[Any]:
    """A loader with no option at its default."""
    return RobustDataLoader(list(range(10)), **({"batch_size": 2, **TORCHS, **OURS} | more))


def check_kept(rebuilt: Any, original: Any) -> None:
    """The rebuilt loader is ours, with every option as it was given."""
    assert type(rebuilt) is RobustDataLoader
    assert rebuilt is not original
    for name in KEPT:
        assert getattr(rebuilt, name) is getattr(original, name), name
    assert rebuilt.multiprocessing_context is original.multiprocessing_context


class Stream(IterableDataset[int]):
    """An iterable dataset of the first numbers."""

    def __init__(self, size: int = 4) -> None:
        self.size = size

    def __iter__(self) -> Any:
        yield from range(self.size)


class Floats(Numbers):
    """Sample ``i`` is a vector of one number, ``i``, for models."""

    def load(self, index: int) -> Any:
        return torch.tensor([float(index)])


class Broken(Raising):
    """The same; sample 3 raises."""

    def __init__(self, size: int) -> None:
        super().__init__(size, {3: ValueError})

    def load(self, index: int) -> Any:
        return torch.tensor([float(super().load(index))])


class Noisy(Floats):
    """Sample ``i`` is ``i`` and a random number."""

    def load(self, index: int) -> Any:
        return torch.tensor([float(index), torch.rand(())])


class Flawed(Noisy):
    """The same; sample 3 raises."""

    def load(self, index: int) -> Any:
        if index == 3:
            raise ValueError(index)
        return super().load(index)
