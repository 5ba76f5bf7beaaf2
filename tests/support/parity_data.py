"""Datasets, samplers and functions that both loaders are given. Importable by a spawned worker."""

from __future__ import annotations

import hashlib
import random
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

Pair = namedtuple("Pair", ["left", "right"])

COLLATABLE = ("tensor", "list", "dict", "named", "numpy", "text", "int", "float", "mixed", "nested")
ANY_KIND = (*COLLATABLE, "strided", "object", "none")


@dataclass
class Thing:
    """A sample that default_collate does not know."""

    name: str
    values: torch.Tensor
    more: list[Any]


def make_value(kind: str, index: int) -> Any:
    """Sample number ``index`` of a kind."""
    base = torch.arange(6, dtype=torch.float32).reshape(2, 3) + index
    match kind:
        case "tensor":
            return base
        case "list":
            return [base, base.to(torch.int16), index]
        case "dict":
            return {"image": base, "label": index, "name": f"n{index}", "inner": {"weight": index / 3}}
        case "named":
            return Pair(base, Pair(index, float(index)))
        case "numpy":
            return np.arange(4, dtype=np.float64) * index, np.float32(index), np.asfortranarray(base.numpy())
        case "text":
            return f"sample {index}"
        case "int":
            return index
        case "float":
            return index / 7
        case "mixed":
            return (
                base.to(torch.bfloat16),
                base > index + 2,
                torch.complex(base, -base),
                torch.tensor(index, dtype=torch.uint8),
                torch.empty(0, 3),
                np.int64(index),
                np.array(index),
                "text",
                b"bytes",
            )
        case "nested":
            return [{"a": (base, [index, Pair(base, "x")])}, (index, (base.double(),))]
        case "strided":
            big = torch.arange(10_000, dtype=torch.float32) + index
            return {
                "turned": base.t(),
                "spread": base[:, :1].expand(2, 50),
                "slice": big[100:9_000:7],
                "twice": (base, base[0]),
                "fortran": np.asfortranarray(base.numpy()),
                "steps": np.arange(20)[::3],
            }
        case "object":
            return Thing(f"thing {index}", base, [None, index, {"k": base.int()}])
        case "none":
            return None
    raise AssertionError(kind)


def draw() -> tuple[float, float, torch.Tensor]:
    """Something from each of the three global random streams, as an augmentation would."""
    return random.random(), float(np.random.rand()), torch.rand(2)


def whereabouts() -> tuple[int, int, int, str]:
    """What ``get_worker_info()`` says."""
    info = get_worker_info()
    if info is None:
        return (-1, 0, 0, "")
    return (info.id, info.num_workers, info.seed, type(info.dataset).__name__)


def make_sample(kind: str, index: int, *, augment: bool, place: bool) -> Any:
    """A sample: its value, what it drew at random, and where it was made."""
    value = make_value(kind, index)
    if not augment and not place:
        return value
    return [value, draw() if augment else 0, whereabouts() if place else 0]


class Samples(Dataset[Any]):
    """Map-style."""

    def __init__(self, kind: str, size: int, *, augment: bool = True, place: bool = True) -> None:
        self.kind, self.size, self.augment, self.place = kind, size, augment, place

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return make_sample(self.kind, int(index), augment=self.augment, place=self.place)


class SamplesAtOnce(Samples):
    """Map-style, fetched a batch at a time."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        offset = draw()[0] if self.augment else 0.0
        return [[self[index], offset] for index in indices]


class Stream(IterableDataset[Any]):
    """Iterable, sharded by what get_worker_info() says ("info"), by worker_init_fn ("init") or not at all ("none")."""

    def __init__(self, kind: str, size: int, *, shard: str, augment: bool = True, place: bool = True) -> None:
        self.kind, self.size, self.shard, self.augment, self.place = kind, size, shard, augment, place
        self.start, self.step = 0, 1

    def __repr__(self) -> str:  # torch's warnings show it
        return f"{type(self).__name__}({self.kind!r}, {self.size})"

    def __iter__(self) -> Iterator[Any]:
        start, step = self.start, self.step
        info = get_worker_info()
        if self.shard == "info" and info is not None:
            start, step = info.id, info.num_workers
        for index in range(start, self.size, step):
            yield make_sample(self.kind, index, augment=self.augment, place=self.place)


class SizedStream(Stream):
    """Iterable, and says how long it is."""

    def __len__(self) -> int:
        return self.size


class Shared(Dataset[Any]):
    """Map-style: whatever function it is given."""

    def __init__(self, size: int, function: Any) -> None:
        self.size, self.function = size, function

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.function(index)


def shard_in_init(worker_id: int) -> None:
    """A worker_init_fn that gives each worker its share of a Stream."""
    info = get_worker_info()
    assert info is not None
    if isinstance(info.dataset, Stream):
        info.dataset.start, info.dataset.step = worker_id, info.num_workers


def reseed_in_init(worker_id: int) -> None:
    """A worker_init_fn that seeds NumPy itself, as tutorials show."""
    np.random.seed(torch.initial_seed() % 2**32)


def identity(samples: Any) -> Any:
    """A collate_fn that leaves the samples alone."""
    return samples


def random_collate(samples: Any) -> Any:
    """A collate_fn that draws at random too."""
    return samples, draw(), whereabouts()


# --- samplers ---------------------------------------------------------------------------------------------------------


def random_state() -> str:
    """Where the three global random streams are."""
    state = (random.getstate(), [part.tolist() if hasattr(part, "tolist") else part for part in np.random.get_state()])
    return hashlib.sha1(repr(state).encode() + torch.get_rng_state().numpy().tobytes()).hexdigest()[:12]


class LazySampler:
    """Draws from torch's global stream at each step."""

    def __init__(self, size: int, length: int) -> None:
        self.size, self.length, self.log = size, length, []

    def __iter__(self) -> Iterator[int]:
        self.log.append("begun")
        for _ in range(self.length):
            yield int(torch.randint(self.size, ()))
        self.log.append(("over", random_state()))

    def __len__(self) -> int:
        return self.length


class EagerSampler:
    """Draws its whole permutation inside ``iter()``; notes when that was and how far it was read."""

    def __init__(self, size: int, generator: torch.Generator | None = None) -> None:
        self.size, self.generator, self.log = size, generator, []

    def __iter__(self) -> Iterator[int]:
        self.log.append(("iter", random_state()))
        order = torch.randperm(self.size, generator=self.generator).tolist()
        random.random()
        return self._read(order)

    def _read(self, order: list[int]) -> Iterator[int]:
        for index in order:
            self.log.append(index)
            yield index
        self.log.append("end")

    def __len__(self) -> int:
        return self.size


class EagerBatches(EagerSampler):
    """The same, in batches of sizes that vary; as lists and tuples in turn."""

    def __iter__(self) -> Iterator[Any]:
        self.log.append(("iter", random_state()))
        order = torch.randperm(self.size, generator=self.generator).tolist()
        return self._batches(order)

    def _batches(self, order: list[int]) -> Iterator[Any]:
        for number, begin in enumerate(range(0, len(order), 3)):
            batch = order[begin : begin + 1 + number % 3]
            self.log.append(tuple(batch))
            yield tuple(batch) if number % 2 else batch
        self.log.append("end")

    def __len__(self) -> int:
        return -(-self.size // 3)


# --- exceptions -------------------------------------------------------------------------------------------------------


class OneArgumentError(Exception):
    """Can be rebuilt from a text."""


class TwoArgumentsError(Exception):
    """Cannot be rebuilt from a text."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code, self.reason = code, reason


class MessageError(Exception):
    """Takes its text as a keyword, as some libraries' errors do."""

    message = "default"

    def __init__(self, *, message: str) -> None:
        super().__init__(message)
        self.message = message


class HostileError(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text for you")


class Raising(Samples):
    """Raises at some indices."""

    def __init__(self, size: int, at: dict[int, Any], *, collect: bool = False) -> None:
        super().__init__("int", size, augment=False, place=False)
        self.at = at

    def __getitem__(self, index: int) -> Any:
        make = self.at.get(index)
        if make is not None:
            raise make()
        return super().__getitem__(index)


class RaisingStream(Stream):
    """Raises instead of a sample, and goes on: an iterator class, since a generator would be over."""

    def __init__(self, size: int, at: dict[int, Any]) -> None:
        super().__init__("int", size, shard="none", augment=False, place=False)
        self.at = at

    def __iter__(self) -> Iterator[Any]:
        return _RaisingIterator(self)


class _RaisingIterator:
    def __init__(self, stream: RaisingStream) -> None:
        self.stream, self.next = stream, 0

    def __iter__(self) -> _RaisingIterator:
        return self

    def __next__(self) -> Any:
        index, self.next = self.next, self.next + 1
        if index >= self.stream.size:
            raise StopIteration
        make = self.stream.at.get(index)
        if make is not None:
            raise make()
        return index


def value_error() -> Exception:
    return ValueError("bad sample\nover two lines")


def key_error() -> Exception:
    return KeyError("missing key")


def one_argument_error() -> Exception:
    return OneArgumentError("one")


def two_arguments_error() -> Exception:
    return TwoArgumentsError(7, "two")


def message_error() -> Exception:
    return MessageError(message="by keyword")


def os_error() -> Exception:
    return FileNotFoundError(2, "No such file", "x.png")


def unicode_error() -> Exception:
    return UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")


def assertion_error() -> Exception:
    return AssertionError


def grouped_error() -> Exception:
    try:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error
    except ValueError as error:
        return error


def stop_iteration() -> Exception:
    return StopIteration("from a map-style dataset")


def hostile_error() -> Exception:
    return HostileError()


def failing_init(worker_id: int) -> None:
    """A worker_init_fn that fails in one worker."""
    if worker_id == 0:
        raise OSError("no such device")


def failing_collate(samples: Any) -> Any:
    """A collate_fn that fails for a batch that holds a 5."""
    if 5 in samples:
        raise TypeError("cannot collate 5")
    return torch.tensor(samples)


class FailingSampler:
    """A sampler that raises after ``after`` indices."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __iter__(self) -> Iterator[int]:
        yield from range(self.after)
        raise LookupError("the sampler broke")

    def __len__(self) -> int:
        return 100


class BrokenIterSampler(FailingSampler):
    """A sampler whose ``iter()`` raises."""

    def __iter__(self) -> Iterator[int]:
        raise LookupError("no iterator")


class BrokenIterStream(Stream):
    """An iterable dataset whose ``iter()`` raises."""

    def __iter__(self) -> Iterator[Any]:
        raise LookupError("no stream")
