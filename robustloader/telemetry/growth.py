"""Running totals of epochs turned into what they grew by: counters of a process only ever go up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robustloader.events import EpochFinished, EpochProgressed

__all__ = ["Growth", "worker_name"]

LOOP_TOTALS = ("batches", "samples", "bytes", "wait_s", "step_s")
WORKER_TOTALS = ("tasks", "busy_s")


class Growth:
    """What the totals of all epochs, told by progress and summary, grew by since they were last told."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, int], dict[tuple[str, str | None], float]] = {}

    def take(self, event: EpochProgressed | EpochFinished) -> dict[tuple[str, str | None], float]:
        """The growth since the last event of the same loader and epoch.

        Returns:
            (name, None) → growth for the loop's totals ``batches``, ``samples``, ``bytes``, ``wait_s`` and ``step_s``;
            (name, worker) → growth for each worker's ``tasks`` and ``busy_s``. A worker is named by its id, the
            training process by "main".
        """
        loop, workers = _totals(event)
        totals: dict[tuple[str, str | None], float] = {(name, None): loop[name] for name in LOOP_TOTALS}
        for worker in workers:
            totals |= {(name, worker_name(worker["worker_id"])): worker[name] for name in WORKER_TOTALS}
        key = (event.loader, event.epoch)
        last = self._last.pop(key, {})
        if isinstance(event, EpochProgressed):
            self._last[key] = totals
        return {name: max(0.0, total - last.get(name, 0.0)) for name, total in totals.items()}


def worker_name(worker_id: int | None) -> str:
    """A worker in a label."""
    return "main" if worker_id is None else str(worker_id)


def _totals(event: EpochProgressed | EpochFinished) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
    if isinstance(event, EpochProgressed):
        return event.statistics, event.workers
    summary = event.summary.to_dict()
    return summary, summary["workers"]
