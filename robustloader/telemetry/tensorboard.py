"""Curves for TensorBoard, beside those of the training itself."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

from robustloader.errors import OptionError
from robustloader.events import EpochFinished, EpochProgressed, Event, SampleFaulted, WorkerCrashed, WorkerHung
from robustloader.telemetry.deferral import tell_the_rest
from robustloader.telemetry.growth import Growth
from robustloader.telemetry.labels import ConfiguredSink, fill_in, require, resolve_labels

__all__ = ["TensorBoardSink"]

_EPOCH_CURVES = (
    "duration_s",
    "samples_per_s",
    "batches_per_s",
    "bytes_per_s",
    "wait_fraction",
    "wait_p50_s",
    "wait_p95_s",
    "wait_p99_s",
    "load_p50_s",
    "load_p95_s",
    "load_p99_s",
    "ready_depth_mean",
    "faults",
    "retries",
    "crashes",
    "hangs",
    "restarts",
    "workers_at_end",
    "peak_worker_bytes",
    "peak_trainer_bytes",
)


class TensorBoardSink(ConfiguredSink):
    """Writes scalars with torch's ``SummaryWriter``.

    ``robustloader/epoch/…`` at the end of each epoch, over the epoch's number, and its table as text;
    ``robustloader/live/…`` with each :class:`~robustloader.EpochProgressed`, over the batches delivered so far in all
    epochs; ``robustloader/total/faults`` and ``…/deaths`` as they happen, over those batches too.

    Runs in: the training process; torch's writer has a thread of its own and is made at the first event. What is
    written is flushed at the end of each epoch, and by the writer every two minutes.

    Args:
        log_dir: the run's folder, made where it is missing, with fields as in :class:`~robustloader.JsonlSink`
            (``"runs/input-{rank}"``); TensorBoard tells runs apart by folder.
        writer: a ``SummaryWriter`` of yours instead; closing it is your business.
        prefix: first part of every tag; give loaders that share a folder prefixes of their own.
        labels: written once, as text; ``rank`` comes by itself where torchrun's RANK is set.

    Raises:
        ImportError: tensorboard is not installed (``robustloader[tensorboard]``).
        OptionError: not exactly one of log_dir and writer is given.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        *,
        writer: Any = None,
        prefix: str = "robustloader",
        labels: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(log_dir=log_dir, writer=writer, prefix=prefix, labels=labels)
        if (log_dir is None) == (writer is None):
            raise OptionError("log_dir", log_dir, "a folder, or else a writer")
        if writer is None:
            require("tensorboard", "TensorBoardSink", "tensorboard")
        self.labels: dict[str, str] = resolve_labels(labels)
        self.log_dir: str | None = (
            None if log_dir is None else os.path.abspath(fill_in("log_dir", log_dir, self.labels))
        )
        self._prefix = prefix
        self._owned = writer is None
        self._writer = writer
        self._greeted = False
        self._pid = os.getpid()
        self._growth = Growth()
        self._batches = 0
        self._faults = self._deaths = 0
        self._closed = False

    def __reduce__(self) -> tuple[Any, ...]:
        # A writer stays where it is; what another process writes goes into a file of its own in the same folder.
        log_dir = self._options["log_dir"] or self._options["writer"].log_dir
        return functools.partial(
            type(self), log_dir, **{name: self._options[name] for name in ("prefix", "labels")}
        ), ()

    def receive(self, event: Event) -> None:
        """Write what an event says."""
        if self._closed:
            return
        if os.getpid() != self._pid:
            if not self._owned:  # a forked copy of the user's writer lacks its thread, and would block for ever
                return
            self.renew()
        if isinstance(event, EpochProgressed):
            self._progress(event)
        elif isinstance(event, EpochFinished):
            self._finish(event)
        elif isinstance(event, SampleFaulted):
            self._faults += event.fault.action not in ("retried", "quarantined")
            self._scalar("total/faults", self._faults, self._batches, event.time)
        elif isinstance(event, WorkerHung) or (isinstance(event, WorkerCrashed) and event.cause != "hang"):
            self._deaths += 1
            self._scalar("total/deaths", self._deaths, self._batches, event.time)

    def close(self) -> None:
        """Flush and close the writer, where it is the sink's own. Idempotent."""
        tell_the_rest()
        self._closed = True
        if self._owned and self._writer is not None and os.getpid() == self._pid:
            self._writer.close()

    def _progress(self, event: EpochProgressed) -> None:
        growth = self._growth.take(event)
        self._batches += int(growth["batches", None])
        looped_s = growth["wait_s", None] + growth["step_s", None]
        curves = {
            "wait_fraction": growth["wait_s", None] / looped_s if looped_s > 0 else 0.0,
            "samples_per_s": growth["samples", None] / looped_s if looped_s > 0 else 0.0,
            "ready_batches": event.ready,
            "active_workers": event.statistics["active_workers"],
            "peak_worker_bytes": max((worker["peak_rss_bytes"] for worker in event.workers), default=0),
        }
        for name, value in curves.items():
            self._scalar(f"live/{name}", value, self._batches, event.time)

    def _finish(self, event: EpochFinished) -> None:
        self._batches += int(self._growth.take(event)["batches", None])
        for name in _EPOCH_CURVES:
            self._scalar(f"epoch/{name}", getattr(event.summary, name), event.epoch, event.time)
        # TensorBoard renders Markdown: indented text stays a table.
        table = "\n".join("    " + line for line in str(event.summary).splitlines())
        self._open().add_text(f"{self._prefix}/epoch/summary", table, event.epoch, event.time)
        self._open().flush()

    def _scalar(self, name: str, value: float, step: int, time_s: float) -> None:
        self._open().add_scalar(f"{self._prefix}/{name}", value, step, time_s)

    def _open(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # type: ignore[attr-defined,unused-ignore]

            self._writer = SummaryWriter(self.log_dir)
        if not self._greeted:
            self._greeted = True
            if self.labels:
                text = ", ".join(f"{name}={value}" for name, value in self.labels.items())
                self._writer.add_text(f"{self._prefix}/labels", text, 0)
        return self._writer
