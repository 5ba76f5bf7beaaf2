"""The workloads: what is loaded, in which batches, and why it is there.

Where the crossing is the question, the dataset hands out views of what is already there, so that fetching costs next
to nothing. Samples depend on their index alone (augmentations too): every loader must yield the very same batches.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

__all__ = ["WORKLOADS", "Workload", "spin"]

KEPT = 64
"""Samples that a dataset of large samples holds; more would only measure the caches of the machine."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One thing to load.

    Attributes:
        name: as the thresholds and the tables call it.
        what: one line for the table.
        batch_size: samples in a batch.
        dataset: makes a dataset of so many samples; files that it needs go into the folder.
        collate: the ``collate_fn``, None for torch's default.
        granule: blocks are whole multiples of so many batches, because batches differ in cost.
        check_batches: how many batches are compared before anything is timed.
    """

    name: str
    what: str
    batch_size: int
    dataset: Callable[[int, Path], Dataset[Any]]
    collate: Callable[[list[Any]], Any] | None = None
    granule: int = 1
    check_batches: int = 6

    def make(self, batches: int, folder: Path) -> Dataset[Any]:
        """A dataset of so many batches."""
        return self.dataset(batches * self.batch_size, folder)

    @property
    def collate_fn(self) -> Callable[[list[Any]], Any]:
        """What puts a batch together."""
        return self.collate or default_collate


def spin(seconds: float) -> None:
    """Use the processor for so long: time of this thread, so that being preempted does not count as work."""
    until = time.thread_time_ns() + int(seconds * 1e9)
    while time.thread_time_ns() < until:
        pass


class Views(Dataset[Any]):
    """``sample[i]`` of tensors (or arrays) that are there from the start, alone, in a tuple or in a dict."""

    def __init__(self, length: int, source: Any) -> None:
        self.length = length
        self.source = source

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.source, dict):
            return {key: value[index % len(value)] for key, value in self.source.items()}
        return tuple(value[index % len(value)] for value in self.source)


def tiny(length: int, folder: Path) -> Dataset[Any]:
    """Rows of a table, and a label."""
    return Views(length, (torch.arange(10_240.0).reshape(1024, 10), torch.arange(1024)))


def images(dtype: torch.dtype) -> Callable[[int, Path], Dataset[Any]]:
    """Decoded images, and a label."""

    def make(length: int, folder: Path) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (KEPT, 3, 224, 224), generator=generator, dtype=torch.uint8)
        return Views(length, (pixels.to(dtype), torch.arange(KEPT)))

    return make


def tokens(length: int, folder: Path) -> Dataset[Any]:
    """What a language model takes."""
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels")
    base = torch.arange(256 * 512).reshape(256, 512)
    return Views(length, {name: base + place for place, name in enumerate(names)})


class Many(Dataset[Any]):
    """Small tensors, each with memory of its own, as a dataset makes them."""

    def __init__(self, length: int, folder: Path) -> None:
        self.length = length
        self.rows = torch.arange(16_000.0).reshape(1000, 16)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index % 1000].clone()


def as_list(samples: list[Any]) -> list[Any]:
    """A batch that stays a list of its samples."""
    return samples


def arrays(length: int, folder: Path) -> Dataset[Any]:
    """Arrays, and a label."""
    pixels = np.random.default_rng(0).random((KEPT, 3, 112, 112), dtype=np.float32)
    return Views(length, (pixels, np.arange(KEPT)))


def stack_arrays(samples: list[Any]) -> dict[str, Any]:
    """A batch of arrays, no tensor in it."""
    pixels, labels = zip(*samples, strict=True)
    return {"pixels": np.stack(pixels), "labels": np.array(labels)}


class Text(Dataset[Any]):
    """A document of about 300 characters, and its title."""

    def __init__(self, length: int, folder: Path) -> None:
        chance = random.Random(0)
        words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyzäöüß", k=chance.randint(2, 9))) for _ in range(500)]
        self.length = length
        self.samples = [
            (" ".join(chance.choices(words, k=50)), " ".join(chance.choices(words, k=5))) for _ in range(1024)
        ]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[str, str]:
        return self.samples[index % 1024]


class PurePython(Dataset[Any]):
    """A transform in plain Python: a checksum over the bytes of a record, about 100 µs."""

    def __init__(self, length: int, folder: Path) -> None:
        self.length = length
        self.records = [random.Random(i).randbytes(1024) for i in range(256)]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        low, high, features = 1, 0, []
        for place, value in enumerate(self.records[index % 256]):
            low = (low + value) % 65521
            high = (high + low) % 65521
            if place % 32 == 31:
                features.append(high / 65521)
        return torch.tensor(features)


class Jpeg(Dataset[Any]):
    """Files, decoded, cropped, flipped and scaled as a training on photographs does."""

    FILES = 64

    def __init__(self, length: int, folder: Path) -> None:
        from PIL import Image

        self.length = length
        self.paths = [folder / f"{number}.jpg" for number in range(self.FILES)]
        chance = np.random.default_rng(0)
        for path in self.paths:
            if not path.exists():
                coarse = chance.integers(0, 256, (24, 32, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        chance = random.Random(index)  # drawn from the index: every loader must make the same image
        data = self.paths[index % self.FILES].read_bytes()
        with Image.open(io.BytesIO(data)) as file:
            image = file.convert("RGB")
        side = chance.randint(224, 375)
        left, top = chance.randint(0, 500 - side), chance.randint(0, 375 - side)
        box = (left, top, left + side, top + side)
        image = image.resize((224, 224), Image.Resampling.BILINEAR, box=box)
        if chance.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels.to(torch.float32).div_(255), index % 10


class Storage(Dataset[Any]):
    """Remote storage: 2 ms of waiting for each sample."""

    def __init__(self, length: int, folder: Path) -> None:
        self.length = length
        self.rows = torch.arange(64.0 * 256).reshape(64, 256)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(0.002)
        return self.rows[index % 64]


class Skewed(Dataset[Any]):
    """50 µs of work for a sample, and for one in each hundred 50 times as much."""

    def __init__(self, length: int, folder: Path) -> None:
        self.length = length
        self.rows = torch.arange(64.0 * 256).reshape(64, 256)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        slow = random.Random(index // 100).randrange(100) == index % 100
        spin(0.0025 if slow else 0.00005)
        return self.rows[index % 64]


class Paced(Dataset[Any]):
    """Work that makes two workers deliver about 1,000 batches of one sample a second."""

    def __init__(self, length: int, folder: Path) -> None:
        self.length = length
        self.rows = torch.arange(64.0 * 16).reshape(64, 16)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        spin(0.0018)
        return self.rows[index % 64]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(name="tiny", what="32 × 10 float32 and a label", batch_size=32, dataset=tiny),
        Workload(name="image-u8", what="64 × 3×224×224 uint8, 9.6 MB", batch_size=64, dataset=images(torch.uint8)),
        Workload(name="image-f32", what="64 × 3×224×224 float32, 38 MB", batch_size=64, dataset=images(torch.float32)),
        Workload(name="tokens", what="dict of five int64 [32, 512]", batch_size=32, dataset=tokens),
        Workload(
            name="many",
            what="list of 1,000 small tensors",
            batch_size=1000,
            dataset=Many,
            collate=as_list,
            check_batches=1,
        ),
        Workload(name="numpy", what="NumPy arrays, 9.6 MB", batch_size=64, dataset=arrays, collate=stack_arrays),
        Workload(name="text", what="lists of 256 documents and titles", batch_size=256, dataset=Text),
        Workload(name="cpu", what="32 × a pure-Python transform", batch_size=32, dataset=PurePython),
        Workload(name="jpeg", what="16 JPEG files decoded and augmented", batch_size=16, dataset=Jpeg),
        Workload(name="io", what="8 × 2 ms of waiting for storage", batch_size=8, dataset=Storage),
        Workload(name="skewed", what="32 samples, 1 % of them 50 × slower", batch_size=32, dataset=Skewed, granule=25),
        Workload(name="paced", what="2 ms of work a batch and worker", batch_size=1, dataset=Paced),
    )
}
"""By name. ``paced`` serves the comparison of telemetry on and off."""
