"""Programs that run under a limit of their own, and datasets that run into one. Each program prints one JSON object."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from robustloader import (
    MemoryLow,
    MemoryPolicy,
    PoolShrunk,
    RecoveryPolicy,
    ResourceError,
    RobustDataLoader,
    WorkerCrashed,
    doctor,
)
from tests.support.listener import Listener, flat

MIB = 1 << 20

# --- datasets ---------------------------------------------------------------------------------------------------------

_leaked: list[bytearray] = []


def leak(size: int) -> None:
    """Lose memory for good, and touch it, in a worker only."""
    if get_worker_info() is not None:
        _leaked.append(bytearray(b"x") * size)


class Leaky(Dataset):
    """Sample ``i`` is ``i``, and costs the worker ``size`` bytes for ever."""

    def __init__(self, samples: int, size: int) -> None:
        self.samples = samples
        self.size = size

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        leak(self.size)
        return torch.tensor(index)


class LeakyStream(IterableDataset):
    """The same as a stream, dealt out to the workers in turn."""

    def __init__(self, samples: int, size: int) -> None:
        self.samples = samples
        self.size = size

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        for number in range(info.id, self.samples, info.num_workers):
            leak(self.size)
            yield torch.tensor(number)


class Large(Dataset):
    """Sample ``i`` is ``size`` bytes of tensor, filled with ``i``."""

    def __init__(self, samples: int = 8, size: int = 38 * MIB) -> None:
        self.samples = samples
        self.size = size

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((self.size // 4,), float(index))


class Exhausting(Dataset):
    """Sample ``i`` is ``i``; those in ``bad`` raise ``OSError(number)``, ``times`` times in each process."""

    def __init__(self, samples: int, bad: set[int], number: int = errno.EMFILE, times: int = 1 << 30) -> None:
        self.samples = samples
        self.bad = bad
        self.number = number
        self.times = times
        self.raised: dict[int, int] = {}

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        if index in self.bad and self.raised.get(index, 0) < self.times:
            self.raised[index] = self.raised.get(index, 0) + 1
            raise OSError(self.number, os.strerror(self.number), f"/data/{index}.jpg")
        return torch.tensor(index)


class Hoarder(Dataset):
    """Opens a file per sample and keeps it, where little is allowed: the descriptors of its process really run out."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.files: list[Any] = []

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        if not self.files:
            room = len(os.listdir("/proc/self/fd")) + 8
            resource.setrlimit(resource.RLIMIT_NOFILE, (room, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        self.files.append(os.open(os.devnull, os.O_RDONLY))
        return torch.tensor(index)


def make_large() -> Large:
    return Large()


LARGE = Large(2, 8)
NUMBER = 5


def make_nothing() -> None:
    return None


def make_trouble() -> None:
    raise FileNotFoundError("no such folder")


# --- programs ---------------------------------------------------------------------------------------------------------


def tell(**facts: Any) -> None:
    print(json.dumps(facts))


def descriptors(soft: str, hard: str, on_low: str, recovers: str) -> None:
    """Load with 8 workers where few files may be open."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(soft), int(hard)))
    listener = Listener()
    facts: dict[str, Any] = {"error": "", "remedy": ""}
    try:
        loader: Any = RobustDataLoader(
            Leaky(96, 0),
            batch_size=4,
            num_workers=8,
            memory=MemoryPolicy(on_low=on_low),  # type: ignore[arg-type]
            recovery=RecoveryPolicy() if recovers == "yes" else None,
            telemetry=listener.policy,
        )
        batches = iter(loader)
        facts["workers"] = loader.active_workers
        facts["samples"] = flat(batches)
    except ResourceError as error:
        facts["error"], facts["remedy"] = str(error), error.remedy
    facts["shrunk"] = [event.workers for event in listener.of(PoolShrunk)]
    facts["crashes"] = len(listener.of(WorkerCrashed))
    tell(**facts, soft=resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def no_descriptor() -> None:
    """Run out of files, in the training process, after ``iter()``; have some again from the eleventh batch on."""
    loader: Any = RobustDataLoader(Leaky(64, 0), num_workers=2, transport="pipe")
    batches = iter(loader)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    files = []
    with contextlib.suppress(OSError):
        while True:
            files.append(os.dup(0))
    guard = batches._guard
    room = guard.room(1, prefetch_factor=2, worker_bytes=1, ranks=1)
    explained = guard.explain(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    seen = flat(next(batches) for _ in range(10))
    sized = [guard._sized]
    for number in files:
        os.close(number)
    seen += flat(batches)
    sized.append(guard._sized)
    tell(seen=seen, sized=sized, room=[room.workers, room.reason], explained=str(explained))


def small_shm() -> None:
    """What doctor says of torch's loader, what torch's loader does, and what this one does."""
    dataset = Large()
    report = doctor(dataset, batch_size=1, num_workers=2)
    torch_says = ""
    try:
        for _ in DataLoader(dataset, batch_size=1, num_workers=2):
            pass
    except RuntimeError as error:
        torch_says = str(error)
    seen = [float(batch[0, -1]) for batch in RobustDataLoader(dataset, batch_size=1, num_workers=2)]
    checks = {check.name: [check.verdict, check.finding, check.remedy] for check in report.checks}
    tell(ok=report.ok, checks=checks, torch=torch_says, seen=seen)


def small_memory(group: str) -> None:
    """Join a control group, and plan to hold more batches than it has room for."""
    with open(f"{group}/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))
    dataset = Large(40, 32 * MIB)
    report = doctor(dataset, num_workers=4, prefetch_factor=8)
    listener = Listener()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        loader = RobustDataLoader(dataset, num_workers=4, prefetch_factor=8, telemetry=listener.policy)
        seen = [float(batch[0, -1]) for batch in loader]
    low = listener.of(MemoryLow)
    tell(
        seen=seen,
        low=[(event.action, event.wanted_bytes, event.free_bytes) for event in low],
        warned=[str(warning.message) for warning in warned],
        crashes=len(listener.of(WorkerCrashed)),
        checks={check.name: [check.verdict, check.remedy, check.facts] for check in report.checks},
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "This DataLoader will create")
    programs = (descriptors, no_descriptor, small_shm, small_memory)
    next(program for program in programs if program.__name__ == sys.argv[1])(*sys.argv[2:])
