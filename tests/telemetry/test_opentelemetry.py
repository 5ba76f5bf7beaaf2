"""Metrics through OpenTelemetry, read with the SDK's own in-memory reader."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from robustloader import OpenTelemetrySink, PoolHealed
from tests.support.telemetry import BATCH_SIZE, BATCHES, run_epoch


def points(reader: InMemoryMetricReader) -> dict[str, list[Any]]:
    """The data points of each metric."""
    data = reader.get_metrics_data()
    assert data is not None
    return {
        metric.name: list(metric.data.data_points)
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def test_a_run_as_metrics() -> None:
    """Totals, failures with attributes, gauges and a histogram of epochs, all with the labels."""
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    summary = run_epoch(OpenTelemetrySink(meter=provider.get_meter("test"), labels={"loader": "train"}))
    read = points(reader)
    provider.shutdown()
    assert all(point.attributes["loader"] == "train" for found in read.values() for point in found)
    assert [point.value for point in read["robustloader.batches"]] == [BATCHES]
    assert [point.value for point in read["robustloader.samples"]] == [BATCHES * BATCH_SIZE]
    assert [point.value for point in read["robustloader.wait.time"]] == [pytest.approx(summary.wait_s)]
    (fault,) = read["robustloader.faults"]
    assert fault.value == 1 and fault.attributes["kind"] == "exception" and fault.attributes["action"] == "replaced"
    (crash,) = read["robustloader.worker.crashes"]
    assert crash.value == 1 and crash.attributes["cause"] == "killed"
    assert sum(point.value for point in read["robustloader.worker.tasks"]) == BATCHES
    assert [point.value for point in read["robustloader.workers.active"]] == [summary.workers_at_end]
    (epochs,) = read["robustloader.epoch.duration"]
    assert epochs.count == 1 and epochs.sum == pytest.approx(summary.duration_s)
    assert epochs.attributes["verdict"] == summary.verdict


def test_without_a_provider_nothing_happens() -> None:
    """The API alone records into the void; a pickle leaves the meter behind."""
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    sink = OpenTelemetrySink(meter=provider.get_meter("test"))
    twin = pickle.loads(pickle.dumps(sink))
    twin.receive(PoolHealed(workers=2))
    assert reader.get_metrics_data() is None
    sink.receive(PoolHealed(workers=2))
    assert points(reader)["robustloader.workers.active"][0].value == 2
    provider.shutdown()
