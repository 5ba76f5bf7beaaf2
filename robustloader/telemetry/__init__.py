"""Counting and telling: summaries of epochs, the log of faults, the recorder that the engine calls, and the sinks.

The sinks' libraries are imported when a sink is made or first used, not with this package.
"""

from __future__ import annotations

from robustloader.telemetry.chrometrace import ChromeTraceSink
from robustloader.telemetry.faultlog import FaultLog
from robustloader.telemetry.histogram import LogHistogram
from robustloader.telemetry.jsonl import JsonlSink
from robustloader.telemetry.merging import MergedSummary, Spread, merge_summaries
from robustloader.telemetry.opentelemetry import OpenTelemetrySink
from robustloader.telemetry.prometheus import PrometheusSink
from robustloader.telemetry.recorder import EpochRecording, Recorder
from robustloader.telemetry.summary import EpochSummary, Statistics, WorkerSummary
from robustloader.telemetry.tensorboard import TensorBoardSink

__all__ = [
    "ChromeTraceSink",
    "EpochRecording",
    "EpochSummary",
    "FaultLog",
    "JsonlSink",
    "LogHistogram",
    "MergedSummary",
    "OpenTelemetrySink",
    "PrometheusSink",
    "Recorder",
    "Spread",
    "Statistics",
    "TensorBoardSink",
    "WorkerSummary",
    "merge_summaries",
]
