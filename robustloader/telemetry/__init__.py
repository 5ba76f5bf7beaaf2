"""Counting and telling: summaries of epochs, the log of faults, and the recorder that the engine calls."""

from __future__ import annotations

from robustloader.telemetry.faultlog import FaultLog
from robustloader.telemetry.histogram import LogHistogram
from robustloader.telemetry.recorder import EpochRecording, Recorder
from robustloader.telemetry.summary import EpochSummary, Statistics, WorkerSummary

__all__ = [
    "EpochRecording",
    "EpochSummary",
    "FaultLog",
    "LogHistogram",
    "Recorder",
    "Statistics",
    "WorkerSummary",
]
