"""Who takes part: this project's loader, its peers, and the same loader in two settings."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from benchmarks.workloads import Workload
from robustloader import RobustDataLoader, TelemetryPolicy

__all__ = ["OURS", "WORKERS", "Contender", "peers", "policy_pair", "release", "silence_peers", "telemetry_pair"]

OURS = "robustloader"
WORKERS = 2

SPDL_LOOKAHEAD = 12
"""Its sink holds four batches, as the others do, and each stage before it has some more under way."""


@dataclass(frozen=True)
class Contender:
    """Something that loads.

    Attributes:
        name: as the tables call it.
        make: takes a dataset and torch's keyword arguments.
        lookahead: batches that may lie ready, or half ready, when a block begins; as many are not counted.
    """

    name: str
    make: Callable[..., Any]
    lookahead: int = 2 * WORKERS

    def loader(self, workload: Workload, batches: int, folder: Path) -> Any:
        """A loader of so many batches, two workers, everything else as it is by default."""
        return self.make(
            workload.make(batches, folder),
            batch_size=workload.batch_size,
            num_workers=WORKERS,
            collate_fn=workload.collate,
            multiprocessing_context="fork",
        )


def ours(name: str = OURS, **options: Any) -> Contender:
    """This project's loader."""
    return Contender(name, lambda dataset, **common: RobustDataLoader(dataset, **common, **options))


def peers(transport: str) -> tuple[Contender, ...]:
    """All of them, ours first."""
    return (
        ours(transport=transport),
        Contender("torch", lambda dataset, **common: DataLoader(dataset, **common)),
        Contender("torchdata", _torchdata),
        Contender("spdl", _spdl, lookahead=SPDL_LOOKAHEAD),
    )


def _torchdata(dataset: Any, **common: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(dataset, **common)


def _spdl(dataset: Any, *, multiprocessing_context: str, **common: Any) -> Any:
    from spdl.dataloader import get_pytorch_dataloader

    # In order, as the others. It keeps the pickled dataset in shared memory, which it leaves to the exit to remove.
    context = multiprocessing.get_context(multiprocessing_context)
    return get_pytorch_dataloader(dataset, in_order=True, multiprocessing_context=context, **common)


def release(loader: Any) -> None:
    """Give back what a loader would keep until the process ends."""
    shared = getattr(loader, "_shmem", None)
    if shared is not None:
        shared.close()
        shared.unlink()


def silence_peers() -> None:
    """What they warn of on every run says nothing about the run."""
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated", category=UserWarning)


class Deaf:
    """A sink that does nothing with what it is told."""

    def receive(self, event: Any) -> None:
        return None


def policy_pair(transport: str) -> tuple[Contender, ...]:
    """Everything on, as it is by default and with a sink, against everything off."""
    off = {"faults": "raise", "recovery": None, "memory": None, "telemetry": None}
    return (
        ours("all on", transport=transport, telemetry=TelemetryPolicy(sinks=(Deaf(),))),
        ours("all off", transport=transport, **off),
    )


def telemetry_pair(transport: str) -> tuple[Contender, ...]:
    """Telemetry with a sink against none; the other policies as they are by default."""
    return (
        ours("telemetry on", transport=transport, telemetry=TelemetryPolicy(sinks=(Deaf(),))),
        ours("telemetry off", transport=transport, telemetry=None),
    )
