"""Metrics through OpenTelemetry's API, to whatever the application has set up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from robustloader.events import EpochFinished, Event
from robustloader.telemetry.changes import changes
from robustloader.telemetry.growth import Growth
from robustloader.telemetry.labels import ConfiguredSink, require, resolve_labels

__all__ = ["OpenTelemetrySink"]

# Units are UCUM's, with annotations in braces for things counted
# (https://opentelemetry.io/docs/specs/semconv/general/metrics/).
_COUNTERS = {
    "batches": ("robustloader.batches", "{batch}", "Batches delivered."),
    "samples": ("robustloader.samples", "{sample}", "Samples delivered."),
    "bytes": ("robustloader.io", "By", "Bytes delivered."),
    "wait_s": ("robustloader.wait.time", "s", "Time that the loop waited for data."),
    "step_s": ("robustloader.step.time", "s", "Time that the loop spent between two waits."),
    "tasks": ("robustloader.worker.tasks", "{task}", "Batches loaded, by worker."),
    "busy_s": ("robustloader.worker.time", "s", "Time spent loading, by worker."),
    "epochs": ("robustloader.epochs", "{epoch}", "Epochs that ended."),
    "faults": ("robustloader.faults", "{sample}", "Samples that failed, by kind and by what was done."),
    "crashes": ("robustloader.worker.crashes", "{worker}", "Workers that died, by cause."),
    "hangs": ("robustloader.worker.hangs", "{worker}", "Workers killed because they stayed silent."),
    "restarts": ("robustloader.worker.restarts", "{worker}", "Processes started in a dead worker's place."),
    "recycled": ("robustloader.worker.recycles", "{worker}", "Workers replaced because of their memory."),
    "replayed": ("robustloader.tasks.replayed", "{task}", "Batches given out again after a death."),
    "shards": ("robustloader.shards.ended", "{shard}", "Shares of a stream that ended before their time."),
    "degraded": ("robustloader.transport.degraded", "{worker}", "Workers and epochs that went round the arena."),
    "memory_low": ("robustloader.memory.low", "{time}", "Times that less memory was free than should be."),
}
_GAUGES = {
    "epoch": ("robustloader.epoch", "{epoch}", "Number of the epoch told of last, from 0."),
    "workers": ("robustloader.workers.active", "{worker}", "Worker processes that load now."),
    "ready": ("robustloader.batches.ready", "{batch}", "Batches that lay ready when the loop last asked."),
    "memory": ("robustloader.worker.memory.peak", "By", "Most resident memory of a worker in this epoch."),
}


class OpenTelemetrySink(ConfiguredSink):
    """Records metrics named ``robustloader.…`` with an OpenTelemetry meter.

    Totals move with each :class:`~robustloader.EpochProgressed` (``TelemetryPolicy.progress_s``) and at the end of an
    epoch, failures as they happen; exporting is the SDK's business.

    Runs in: the training process. Instruments are made at the first event.

    Args:
        meter: the meter to record with; None is ``opentelemetry.metrics.get_meter("robustloader")``, which goes to the
            meter provider that the application has set, now or later, and nowhere without one.
        labels: attributes of every measurement; ``rank`` comes by itself where torchrun's RANK is set.

    Raises:
        ImportError: opentelemetry-api is not installed (``robustloader[opentelemetry]``).
    """

    LIVE: ClassVar[tuple[str, ...]] = ("meter",)

    def __init__(self, *, meter: Any = None, labels: Mapping[str, str] | None = None) -> None:
        super().__init__(meter=meter, labels=labels)
        require("opentelemetry", "OpenTelemetrySink", "opentelemetry")
        self.labels: dict[str, str] = resolve_labels(labels)
        self._meter = meter
        self._growth = Growth()
        self._instruments: dict[str, Any] = {}
        self._duration: Any = None

    def receive(self, event: Event) -> None:
        """Record one event."""
        if not self._instruments:
            self._make_instruments()
        for name, value, adds, attributes in changes(event, self._growth):
            instrument = self._instruments[name]
            (instrument.add if adds else instrument.set)(value, {**self.labels, **attributes})
        if isinstance(event, EpochFinished):
            verdict = {**self.labels, "verdict": event.summary.verdict}
            self._duration.record(event.summary.duration_s, verdict)

    def _make_instruments(self) -> None:
        from opentelemetry import metrics

        meter = metrics.get_meter("robustloader") if self._meter is None else self._meter
        made = {key: meter.create_counter(name, unit, text) for key, (name, unit, text) in _COUNTERS.items()}
        made |= {key: meter.create_gauge(name, unit, text) for key, (name, unit, text) in _GAUGES.items()}
        self._duration = meter.create_histogram("robustloader.epoch.duration", "s", "How long epochs took, by verdict.")
        self._instruments = made
