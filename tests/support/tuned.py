"""Datasets to measure and to compare."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info


class Drawing(Dataset):
    """Draws from all three global generators, and from two of its own."""

    def __init__(self, samples: int = 64) -> None:
        self.samples = samples
        self.own = random.Random(5)
        self.calls = 0

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        self.calls += 1
        self.own.random()
        return torch.tensor([index, random.random(), np.random.random(), torch.rand(()).item()])


class Waiting(Dataset):
    """Two milliseconds of waiting a sample."""

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(0.002)
        return torch.tensor(index)


class Stream(IterableDataset):
    """Numbers, and it knows how many it has given."""

    def __init__(self, samples: int = 10_000) -> None:
        self.samples = samples
        self.given = 0

    def __iter__(self) -> Iterator[int]:
        for number in range(self.samples):
            self.given += 1
            yield number


class Clock(Dataset):
    """Not deterministic from sample 9 on, deep inside its structure."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        odd = float(time.perf_counter_ns() ^ os.getpid()) if index == 9 else 0.0
        return {
            "label": index,
            "image": (torch.full((2, 3), float("nan")), torch.tensor([0.0, odd], dtype=torch.float64)),
        }


class Fails(Dataset):
    """Raises."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        raise OSError("no such photograph")


class NoCopy(Waiting):
    """Cannot be pickled, so no copy of it can be had."""

    def __init__(self) -> None:
        self.key = lambda: 1
        self.numbers = itertools.count()


class Troubled(Drawing):
    """Every twentieth sample is damaged; the fourth ends the worker that loads it."""

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 3 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        if index % 20 == 13:
            raise OSError("no such photograph")
        return super().__getitem__(index)


class Says(Drawing):
    """Every sample raises what it was given."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def __getitem__(self, index: int) -> torch.Tensor:
        raise RuntimeError(self.text)


class Large(Drawing):
    """Samples of 4 MB."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(1000, 1000)


class Chatty(Drawing):
    """Prints: the module that makes it, and each sample, through Python and through the descriptor."""

    def __getitem__(self, index: int) -> torch.Tensor:
        print("sample through Python", flush=True)
        os.write(1, b"sample through the descriptor\n")
        return super().__getitem__(index)


def make_chatty() -> Chatty:
    print("making")
    print("to the first standard output", file=sys.__stdout__)
    return Chatty()


def make_empty() -> Drawing:
    return Drawing(0)
