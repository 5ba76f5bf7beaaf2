"""Batches are the trainer's own: they stay good for as long as they are held, whatever becomes of the loader."""

from __future__ import annotations

import gc
import io
import os
import signal
import threading
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from robustloader import RobustDataLoader, TransportDegraded
from robustloader.testing import processes_of

SHAPE = (3, 64, 64)  # 48 KiB of float32: an extent of its own even where small tensors stay in the frame


class Numbered(Dataset[Any]):
    """Sample ``i`` is full of ``i``."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return torch.full(SHAPE, float(index)), index
