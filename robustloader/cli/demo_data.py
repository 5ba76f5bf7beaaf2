"""The demo's files: real digits as JPEG images, some of them damaged, and the dataset that reads them.

All damage lies in the files. Two files carry a mark in their JPEG comment: one stands for an image that crashes its
decoder, one for an image that a flaky storage serves only at the third request.
"""

from __future__ import annotations

import ctypes
import io
import resource
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, get_worker_info

__all__ = ["SIDE", "DigitFiles", "Material", "write_files"]

SIDE = 640  # pixels of the stored images: about 2 ms to decode, as a small photograph takes
SMALL = 24  # pixels of what the network sees
TEST_FRACTION = 0.2
DAMAGED_PER_KIND = 11  # of 1,438 training files and four kinds: 3 %

CRASHES = b"crashes its decoder"
HICCUPS = b"loads at the third request"

Sample = tuple[torch.Tensor, int, int]


class DigitFiles(Dataset[Sample]):
    """Images of digits in files: ``dataset[i]`` is (image of shape 1×24×24 in [-1, 1], digit, i).

    Every exception names the file.
    """

    def __init__(self, paths: Sequence[Path], digits: Sequence[int]) -> None:
        self.paths = list(paths)
        self.digits = list(digits)
        self._requests: Counter[Path] = Counter()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        try:
            image = Image.open(path)
        except OSError as error:
            raise OSError(f"{path}: not an image ({path.stat().st_size:,} bytes)") from error
        with image:
            mark = image.info.get("comment")
            if mark == CRASHES:
                crash_worker(path)
            if mark == HICCUPS:
                self._hiccup(path)
            try:
                image.load()
            except OSError as error:
                raise OSError(f"{path}: {error}") from error
            pixels = np.asarray(image)
            if pixels.shape != (SIDE, SIDE, 3):
                raise ValueError(f"{path}: expected {SIDE}x{SIDE} RGB, got shape {pixels.shape} ({image.mode})")
            small = image.resize((SMALL, SMALL), Image.Resampling.BOX).convert("L")
        values = np.asarray(small, dtype=np.float32) / 127.5 - 1.0
        return torch.from_numpy(values).unsqueeze(0), self.digits[index], index

    def _hiccup(self, path: Path) -> None:
        """Fail twice, then let the request pass, and so on from the beginning."""
        self._requests[path] += 1
        turn = self._requests[path] % 3
        if turn:
            raise ConnectionError(f"{path}: the storage reset the connection (request {turn})")

    def without(self, indices: Iterable[int]) -> DigitFiles:
        """The same files but for some."""
        left = sorted(set(range(len(self))).difference(indices))
        return DigitFiles([self.paths[i] for i in left], [self.digits[i] for i in left])


def crash_worker(path: Path) -> None:
    """Read address 0, as a decoder with a bug may. Refuses outside of a worker process, which is made to be lost."""
    if get_worker_info() is None:
        raise RuntimeError(f"{path}: this file crashes the process that loads it, and this one is not a worker")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # leave no core file behind
    ctypes.string_at(0)


@dataclass(frozen=True, kw_only=True)
class Material:
    """What the demo trains on. ``damaged`` maps an index of ``train`` to what was done to its file."""

    train: DigitFiles
    test: DigitFiles
    damaged: dict[int, str]
    crashing: int
    hiccuping: int

    @property
    def lost(self) -> set[int]:
        """The indices of ``train`` that can never be loaded."""
        return {*self.damaged, self.crashing}


def write_files(folder: Path, *, seed: int, written: Callable[[int], Any] = lambda count: None) -> Material:
    """Write the 1,797 digits that scikit-learn ships as JPEG files, then damage some of the training files.

    Args:
        folder: an existing folder; gets the folders ``train`` and ``test``.
        seed: decides the split, the noise and which files are damaged.
        written: called with 1 after each file.
    """
    rng = np.random.default_rng(seed)
    digits = load_digits()
    order = rng.permutation(len(digits.images))
    held_out = int(len(order) * TEST_FRACTION)
    # A photograph's grain makes decoding the work that it is in practice; a few tiles of it are cheap to make.
    grain = [rng.integers(-16, 17, (SIDE, SIDE, 3), dtype=np.int16) for _ in range(4)]

    def write(name: str, position: int, index: int) -> tuple[Path, int]:
        digit = int(digits.target[index])
        path = folder / name / f"{position:04d}-digit-{digit}.jpg"
        path.write_bytes(_encode(_picture(digits.images[index], grain[position % len(grain)])))
        written(1)
        return path, digit

    parts = {"test": order[:held_out], "train": order[held_out:]}
    datasets = {}
    # Encoding is done in C without the interpreter's lock, so threads do share the work.
    with ThreadPoolExecutor(2) as pool:
        for name, indices in parts.items():
            (folder / name).mkdir()
            files = list(pool.map(lambda at, name=name: write(name, *at), enumerate(indices)))
            datasets[name] = DigitFiles([path for path, _ in files], [digit for _, digit in files])

    train = datasets["train"]
    chosen = [int(i) for i in rng.choice(len(train), len(DAMAGE) * DAMAGED_PER_KIND + 2, replace=False)]
    crashing, hiccuping = chosen.pop(), chosen.pop()
    _mark(train.paths[crashing], CRASHES)
    _mark(train.paths[hiccuping], HICCUPS)
    damaged = {index: list(DAMAGE)[i % len(DAMAGE)] for i, index in enumerate(chosen)}
    for index, kind in damaged.items():
        path = train.paths[index]
        path.write_bytes(DAMAGE[kind](path.read_bytes(), rng))
    return Material(train=train, test=datasets["test"], damaged=damaged, crashing=crashing, hiccuping=hiccuping)


def _picture(digit: NDArray[np.float64], grain: NDArray[np.int16]) -> Image.Image:
    """An 8×8 digit with values 0 to 16 as a large grey RGB image with grain."""
    small = Image.fromarray((digit * 13 + 20).astype(np.uint8))
    large = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.int16)
    return Image.fromarray((large[..., None] + grain).clip(0, 255).astype(np.uint8))


def _encode(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80, **options)
    return buffer.getvalue()


def _mark(path: Path, comment: bytes) -> None:
    with Image.open(path) as image:
        marked = _encode(image, comment=comment)
    path.write_bytes(marked)


def _truncate(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(len(data) * rng.uniform(0.1, 0.9))]


def _empty(data: bytes, rng: np.random.Generator) -> bytes:
    return b""


def _garble(data: bytes, rng: np.random.Generator) -> bytes:
    return rng.bytes(len(data))


def _to_cmyk(data: bytes, rng: np.random.Generator) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        return _encode(image.convert("CMYK"))


DAMAGE: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "truncated": _truncate,
    "empty": _empty,
    "garbage": _garble,
    "wrong mode": _to_cmyk,
}
