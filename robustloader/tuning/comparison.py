"""``compare()``: torch's loader and this one on the user's dataset, bit for bit, and their speeds side by side."""

from __future__ import annotations

import contextlib
import copy
import random
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from robustloader.decisions.differences import Difference, find_difference
from robustloader.decisions.limits import gib, shm_remedy
from robustloader.errors import OptionError, ResourceError
from robustloader.loader import RobustDataLoader
from robustloader.policies import TelemetryPolicy, check_number
from robustloader.system import limits, torch_private
from robustloader.tuning.copying import copy_sharing_data
from robustloader.worker.seeding import preserve_rng, restore_rng, rng_states

__all__ = ["Comparison", "compare"]

BATCHES = 100
"""Compared by default."""

ROUNDS = 4
"""Each loader has so many turns in which its speed counts."""

OURS = ("faults", "recovery", "memory", "telemetry", "seeding", "transport")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Torch's loader against this one.

    Attributes:
        batches: how many were compared (up to the first difference).
        first_difference: between torch's batches (the first) and ours (the second); None where there is none.
        torch_difference: between two runs of torch's own loader: then the dataset itself is not deterministic.
        torch_batches_per_s, our_batches_per_s: medians over the rounds, start of the workers included.
        ratio: ours over torch's, median of the rounds' ratios; above 1 this loader is faster.
        rounds: how many turns each had.
    """

    batches: int
    first_difference: Difference | None
    torch_difference: Difference | None
    torch_batches_per_s: float
    our_batches_per_s: float
    ratio: float
    rounds: int

    @property
    def identical(self) -> bool:
        """Whether all compared batches were the same, bit for bit."""
        return self.first_difference is None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {"identical": self.identical, **asdict(self)}

    def __str__(self) -> str:
        """A few lines: whether they are the same, else where not and why, and how fast each was."""
        if self.identical:
            lines = [f"identical: {self.batches} batches, bit for bit"]
        else:
            lines = ["not identical (first: torch's loader, second: this one)", f"  {self.first_difference}"]
        if self.torch_difference is not None:
            lines += [
                "the dataset is not deterministic: torch's loader differs from itself, with the same seeds",
                f"  {self.torch_difference}",
            ]
        lines.append(
            f"torch {self.torch_batches_per_s:.4g} batches/s, robustloader {self.our_batches_per_s:.4g} batches/s "
            f"(× {self.ratio:.3g}; median of {self.rounds} rounds, start of the workers included)"
        )
        return "\n".join(lines)


def compare(dataset: Any, *, batches: int | None = None, **loader_kwargs: Any) -> Comparison:
    """Load the same batches with torch's loader and with this one, compare them, and measure both.

    Both get the same seeds. Where they differ, torch's loader runs once more, against itself: a dataset that is not
    deterministic (a clock, a process id, an unseeded generator of its own) is told from a difference between loaders.
    Then both load in turn, and their speeds are compared round by round.

    Nothing of the caller's is used up: each run has a copy of the dataset where it loads in this process, of the
    ``sampler``, ``batch_sampler`` and ``generator``, and the global random states are restored.

    *Runs in* the training process, which starts worker processes and ends them.

    Args:
        dataset: map-style or iterable.
        batches: how many to compare; None compares an epoch, at most 100 batches.
        loader_kwargs: arguments of either loader, ``num_workers`` and so on. Those of ours go to ours alone; by default
            it raises where torch's would.

    Raises:
        OptionError: an argument is wrong.
        ValueError: the dataset is empty.
        ResourceError: torch's loader has too little shared memory (``/dev/shm``).
        Exception: whatever the dataset or the arguments raise, in torch's loader or in this one; or the dataset or a
            sampler cannot be copied and would have to be.
    """
    check_number("batches", batches, low=1, whole=True, optional=True)
    runs = _Runs(dataset, BATCHES if batches is None else batches, loader_kwargs)
    with preserve_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        count, difference = _differ(runs.torchs, runs.ours)
        if not count and difference is None:
            raise ValueError("the dataset is empty: there is no batch to compare")
        own = _differ(runs.torchs, runs.torchs)[1] if difference is not None else None
        torchs: list[float] = []
        ours: list[float] = []
        for number in range(ROUNDS):
            for kind, times in ((runs.torchs, torchs), (runs.ours, ours))[:: -1 if number % 2 else 1]:
                times.append(_rate(kind))
    return Comparison(
        batches=count,
        first_difference=difference,
        torch_difference=own,
        torch_batches_per_s=statistics.median(torchs),
        our_batches_per_s=statistics.median(ours),
        ratio=statistics.median(b / a for a, b in zip(torchs, ours, strict=True)),
        rounds=ROUNDS,
    )


class _Runs:
    """Makes runs that begin alike, and use up nothing of the caller's."""

    def __init__(self, dataset: Any, batches: int, loader_kwargs: dict[str, Any]) -> None:
        self._dataset = dataset
        self._batches = batches
        self._ours = {"faults": "raise", "telemetry": TelemetryPolicy(log_epochs=False)}
        self._ours |= {name: value for name, value in loader_kwargs.items() if name in OURS}
        self._common = {name: value for name, value in loader_kwargs.items() if name not in OURS}
        if isinstance(self._common.get("num_workers"), str):
            raise OptionError("num_workers", self._common["num_workers"], "a number: torch's loader takes no other")
        self._in_process = not self._common.get("num_workers")

    def torchs(self, *, apart: bool) -> contextlib.closing[Any]:
        """Torch's batches; ``apart``: with global random streams of their own, so that two runs can take turns."""
        return contextlib.closing(_telling_of_shared_memory(self._load(DataLoader, {}, apart=apart)))

    def ours(self, *, apart: bool) -> contextlib.closing[Any]:
        """This loader's."""
        return contextlib.closing(self._load(RobustDataLoader, self._ours, apart=apart))

    def _load(self, kind: Any, options: dict[str, Any], *, apart: bool) -> Iterator[Any]:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        common = dict(self._common)
        # A sampler's data source is not copied: it is only looked up, or is the dataset itself.
        memo = {id(self._dataset): self._dataset}
        for name in ("sampler", "batch_sampler", "generator"):
            if common.get(name) is not None:
                common[name] = (
                    _copy_generator(common[name]) if name == "generator" else copy.deepcopy(common[name], memo)
                )
        dataset = copy_sharing_data(self._dataset) if self._in_process else self._dataset
        iterator = iter(kind(dataset, **common, **options))
        try:
            for number, batch in enumerate(iterator):
                states = rng_states() if apart else None
                yield batch
                if states is not None:
                    restore_rng(states)
                if number + 1 >= self._batches:
                    return
        finally:
            torch_private.end_iterator(iterator)


_OUT_OF_SHARED_MEMORY = ("shared memory(shm)", "shared memory (shm)", "out of shared memory", "</torch_")
"""In what torch says where ``/dev/shm`` is full. *Source*: ``aten/src/ATen/MapAllocator.cpp``,
``torch/csrc/DataLoader.cpp`` and ``torch/utils/data/dataloader.py`` (torch 2.13)."""


def _telling_of_shared_memory(batches: Iterator[Any]) -> Iterator[Any]:
    """Torch's batches; where they do not fit into ``/dev/shm``, the error says whose they are and what to do."""
    try:
        yield from batches
    except RuntimeError as error:
        if not any(words in str(error) for words in _OUT_OF_SHARED_MEMORY):
            raise
        shared = limits.read_shared_memory(look_for_stale=False)
        size = "there is none" if shared is None else f"{gib(shared.size_bytes)} in all"
        remedy = f"{shm_remedy(limits.container_kind())}; or compare with a smaller batch_size or fewer workers"
        raise ResourceError(
            f"torch's loader has run out of shared memory: its workers put their batches into /dev/shm ({size}), which "
            f"this loader's do not. To compare the two, {remedy}",
            wanted_bytes=0,
            free_bytes=0 if shared is None else shared.free_bytes,
            remedy=remedy,
        ) from error


def _copy_generator(generator: torch.Generator) -> torch.Generator:
    twin = torch.Generator(generator.device)
    twin.set_state(generator.get_state())
    return twin


def _differ(first: Any, second: Any) -> tuple[int, Difference | None]:
    """How many batches two runs share, and where they first differ."""
    end = object()
    with first(apart=True) as ones, second(apart=True) as others:
        number = 0
        while True:
            one, other = next(ones, end), next(others, end)
            if one is end and other is end:
                return number, None
            if one is end or other is end:
                words = ["the end" if batch is end else "a batch" for batch in (one, other)]
                return number, Difference(batch=number, path="batch", what="end", first=words[0], second=words[1])
            found = find_difference(one, other, _compare_leaves)
            if found is not None:
                path, what, left, right = found
                return number, Difference(batch=number, path=path, what=what, first=left, second=right)
            number += 1


def _rate(kind: Any) -> float:
    """Batches a second, from the start of the workers on."""
    begun, count = time.perf_counter(), 0
    with kind(apart=False) as batches:
        for _ in batches:
            count += 1
        return count / (time.perf_counter() - begun)


def _compare_leaves(first: Any, second: Any) -> tuple[str, str, str, str] | bool | None:
    """Tensors and arrays: dtype, shape, then bits; NaNs are alike whatever their bits."""
    if isinstance(first, torch.Tensor):
        if first.dtype != second.dtype:
            return "", "dtype", str(first.dtype), str(second.dtype)
        if first.shape != second.shape:
            return "", "shape", str(tuple(first.shape)), str(tuple(second.shape))
        first, second = first.detach().cpu(), second.detach().cpu()
        if first.layout != torch.strided or first.is_quantized:
            dense = (first, second) if first.is_quantized else (first.to_dense(), second.to_dense())
            return None if torch.equal(*dense) else ("", "value", str(first), str(second))
        wrong = first != second
        if first.is_floating_point() or first.is_complex():
            wrong &= ~(first.isnan() & second.isnan())
        if first.is_floating_point():
            wrong |= (first == 0) & (second == 0) & (first.signbit() != second.signbit())
        return _first_wrong(first, second, wrong.nonzero())
    if isinstance(first, np.ndarray):
        if first.dtype != second.dtype:
            return "", "dtype", str(first.dtype), str(second.dtype)
        if first.shape != second.shape:
            return "", "shape", str(first.shape), str(second.shape)
        different = np.asarray(first != second, dtype=bool)
        if first.dtype.kind in "fcmM":
            different &= ~((first != first) & (second != second))
        return _first_wrong(first, second, np.argwhere(different))
    return False


def _first_wrong(first: Any, second: Any, places: Any) -> tuple[str, str, str, str] | None:
    if not len(places):
        return None
    place = tuple(int(number) for number in places[0])
    path = f"[{', '.join(map(str, place))}]" if place else ""
    return path, "value", repr(first[place].item()), repr(second[place].item())
