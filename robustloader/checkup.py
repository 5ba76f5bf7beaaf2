"""``doctor()``: the machine's limits in one table, before they bite."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset

from robustloader.decisions.verdicts import Check, HostFacts, SampleFacts, judge_host
from robustloader.engine.inprocess import batch_nbytes, count_tensors
from robustloader.loader import RobustDataLoader
from robustloader.policies import MemoryPolicy, check_number
from robustloader.system import host, limits

__all__ = ["HostReport", "doctor"]

_WIDTH = 100
_NAME = 15
_VERDICT = 8


@dataclass(frozen=True)
class HostReport:
    """What the machine allows, judged for a loader.

    Attributes:
        checks: one :class:`Check` per limit: ``name``, ``verdict`` ("ok", "warning" or "problem"), ``finding``,
            ``remedy`` and ``facts``.
    """

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no problem. Warnings are none: with them a loader works, if perhaps not torch's."""
        return not any(check.verdict == "problem" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "ok": self.ok,
            "checks": [
                {
                    "name": check.name,
                    "verdict": check.verdict,
                    "finding": check.finding,
                    "remedy": check.remedy,
                    "facts": check.facts,
                }
                for check in self.checks
            ],
        }

    def __str__(self) -> str:
        """A table of at most 100 columns; a remedy stands under its finding, after an arrow."""
        lines = []
        for check in self.checks:
            head = f"{check.name:<{_NAME}} {check.verdict:<{_VERDICT}} "
            lines += _wrapped(check.finding, head)
            if check.remedy:
                lines += _wrapped(check.remedy, f"{'':<{len(head)}}-> ")
        counts = {word: sum(check.verdict == word for check in self.checks) for word in ("problem", "warning")}
        told = [f"{count} {word}{'' if count == 1 else 's'}" for word, count in counts.items() if count]
        return "\n".join([*lines, "", ", ".join(told) if told else "all is well"])


def doctor(
    dataset: Any = None,
    *,
    batch_size: int | None = 1,
    num_workers: int | None = None,
    prefetch_factor: int = 2,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> HostReport:
    """Look at everything that limits a loader on this machine.

    With a dataset, one batch is loaded by one worker process, and the plan is judged by its size: the memory that the
    lookahead will take, and what torch's own loader would do on this ``/dev/shm``. That worker is the only thing that
    is started, and nothing is changed.

    *Runs in* the process whose limits are asked for: they may differ from one shell, container or job to the next.

    Args:
        dataset: a dataset to measure one batch of; None looks at the machine alone.
        batch_size: samples in a batch, as for the loader.
        num_workers: worker processes planned; None takes one per usable processor.
        prefetch_factor: batches loaded ahead per worker, as planned.
        collate_fn: as for the loader.

    Raises:
        OptionError: an argument is wrong.
        Exception: whatever the dataset raises.
    """
    check_number("num_workers", num_workers, whole=True, optional=True)
    check_number("prefetch_factor", prefetch_factor, low=1, whole=True)
    check_number("batch_size", batch_size, low=1, whole=True, optional=True)
    cpus, ranks = limits.usable_cpus(), limits.local_world_size()
    sample = None if dataset is None else _measure(dataset, batch_size, collate_fn)
    facts = HostFacts(
        cpus=cpus,
        ranks=ranks,
        memory=limits.read_memory(),
        shared=limits.read_shared_memory(),
        descriptors=limits.open_descriptors(),
        processes=limits.read_processes(count_all=True),
        kills_group=limits.memory_kills_group(),
        start_methods=limits.start_methods(),
        sharing=limits.sharing_strategy(),
        container=limits.container_kind(),
        pidfd=host.has_pidfd(),
        workers=max(1, cpus // ranks) if num_workers is None else num_workers,
        prefetch_factor=prefetch_factor,
        batch_size=batch_size,
        headroom_fraction=MemoryPolicy().headroom_fraction,
        sample=sample,
    )
    return HostReport(judge_host(facts))


def _measure(dataset: Any, batch_size: int | None, collate_fn: Callable[[list[Any]], Any] | None) -> SampleFacts:
    """Load one batch in a worker process, so that whatever it does to its process it does not do to this one."""
    if not isinstance(dataset, IterableDataset):
        dataset = _Head(dataset, batch_size or 1)
    loader: RobustDataLoader[Any] = RobustDataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=collate_fn,
        num_workers=1,
        prefetch_factor=1,
        faults="raise",
        memory=None,
    )
    batches: Any = iter(loader)
    try:
        batch = next(batches)
        load_s = batches.batch_info.load_s
    except StopIteration:
        raise ValueError("the dataset is empty: there is no batch to measure") from None
    finally:
        batches.close()
    return SampleFacts(
        batch_bytes=batch_nbytes(batch),
        tensors=count_tensors(batch),
        load_s=load_s,
        worker_bytes=loader.summary().peak_worker_bytes,
    )


class _Head:
    """The first samples of a map-style dataset: the worker must not go on to load a second batch."""

    def __init__(self, dataset: Any, samples: int) -> None:
        self.dataset = dataset
        self.samples = samples

    def __len__(self) -> int:
        return min(self.samples, len(self.dataset))

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


def _wrapped(text: str, head: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)
