"""Datasets and checks for what goes to a device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

LARGE = 256 * 1024
"""Elements of a float sample that fills a megabyte: what takes a copy long enough to be raced."""


class Pair(NamedTuple):
    """A named tuple survives pinning as one."""

    image: Tensor
    label: Tensor


class Own:
    """A batch of a class of the user's, with a ``pin_memory`` of its own."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def pin_memory(self) -> Own:
        return Own(self.data.pin_memory())


class Refuses(Own):
    """One that cannot be pinned."""

    def pin_memory(self) -> Own:
        raise LookupError("not pinned today")


def collate_own(samples: list[Tensor]) -> Own:
    """A ``collate_fn``."""
    return Own(torch.stack(samples))


def collate_refuses(samples: list[Tensor]) -> Own:
    """A ``collate_fn`` whose second batch cannot be pinned."""
    batch = torch.stack(samples)
    return Refuses(batch) if bool((batch == 3).any()) else Own(batch)


@dataclass(frozen=True)
class Shaped(Dataset[Any]):
    """Samples of one shape, each known by its index."""

    kind: str
    samples: int = 12

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        image = torch.full((3, 8, 8), float(index))
        label = torch.tensor(index)
        match self.kind:
            case "tensor":
                return label
            case "pair":
                return Pair(image, label)
            case "dict":
                return {"image": image, "label": label, "name": f"sample {index}", "nested": [label, (image, 1.5)]}
            case "tiny":
                return index
            case "large":
                return torch.full((LARGE,), float(index))
            case _:
                raise ValueError(self.kind)


class Numbers(IterableDataset[Tensor]):
    """A stream, split among the workers."""

    def __init__(self, samples: int = 24) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Tensor]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(first, self.samples, step):
            yield torch.full((LARGE // 8,), float(index))


def tensors_in(batch: Any) -> list[Tensor]:
    """Every tensor of a batch, in order."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Own):
        return [batch.data]
    if isinstance(batch, dict):
        return [tensor for value in batch.values() for tensor in tensors_in(value)]
    if isinstance(batch, (list, tuple)):
        return [tensor for value in batch for tensor in tensors_in(value)]
    return []


def told(batch: Any) -> Any:
    """A batch as something that can be compared: structure, types, values, and whether each tensor is pinned.

    Of a large tensor's values only a digest: pytest would take longer than a test may to tell two such lists apart.
    """
    if isinstance(batch, Tensor):
        large = batch.numel() > 1024
        values = hashlib.sha256(batch.numpy().tobytes()).hexdigest() if large else batch.tolist()
        return ("tensor", str(batch.dtype), tuple(batch.shape), batch.is_pinned(), values)
    if isinstance(batch, Own):
        return (type(batch).__name__, told(batch.data))
    if isinstance(batch, dict):
        return {key: told(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return (type(batch).__name__, [told(value) for value in batch])
    return batch
