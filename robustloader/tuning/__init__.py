"""Measuring loaders on the user's own dataset: how many workers, and whether this loader's batches are torch's."""

from __future__ import annotations

from robustloader.tuning.comparison import Comparison, compare
from robustloader.tuning.report import TuningReport
from robustloader.tuning.search import tune

__all__ = ["Comparison", "TuningReport", "compare", "tune"]
