"""Samples that misbehave: which, how, and how often over all processes."""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.utils.data import Dataset, IterableDataset

from robustloader.errors import OptionError
from robustloader.system import host

__all__ = [
    "Crash",
    "ExhaustMemory",
    "Exit",
    "Hang",
    "InjectedDataset",
    "InjectedStream",
    "Injector",
    "Misbehaviour",
    "Raise",
    "Slow",
]

_STEP_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Misbehaviour:
    """What a sample does instead of, or before, being loaded.

    Args:
        times: how often, over all processes; None does it every time.
    """

    times: int | None = None

    spares_trainer: ClassVar[bool] = True
    """Whether the process that made the injector is left alone: it would die, or never come back."""

    def act(self, index: Any) -> None:
        """Misbehave here and now; returns where the sample is loaded after all."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Raise(Misbehaviour):
    """Raises.

    Args:
        error: an exception type, or a function from the index to an exception.
    """

    error: Callable[[Any], BaseException] = ValueError

    spares_trainer: ClassVar[bool] = False

    def act(self, index: Any) -> None:
        """Raise."""
        raise self.error(f"injected at sample {index!r}" if isinstance(self.error, type) else index)


@dataclass(frozen=True, kw_only=True)
class Slow(Misbehaviour):
    """Takes longer than usual.

    Args:
        seconds: by how much.
    """

    seconds: float = 1.0

    spares_trainer: ClassVar[bool] = False

    def act(self, index: Any) -> None:
        """Sleep."""
        time.sleep(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Hang(Misbehaviour):
    """Never comes back.

    Args:
        in_c: blocked in C with the interpreter lock held, where no Python code of that process runs any more, signal
            handlers included; False sleeps in Python.
    """

    in_c: bool = False

    def act(self, index: Any) -> None:
        """Hang."""
        if self.in_c:
            # A mutex that its own holder waits for: unlike pause(), signals do not bring it back.
            mutex, lock = ctypes.create_string_buffer(64), ctypes.PyDLL(None).pthread_mutex_lock
            lock(mutex)
            lock(mutex)
        while True:
            signal.pause()


@dataclass(frozen=True, kw_only=True)
class Crash(Misbehaviour):
    """Dies of a signal: SIGSEGV by reading address 0, SIGABRT by ``abort()``, others by sending it to itself.

    Args:
        signal: which one.
    """

    signal: int = signal.SIGSEGV

    def act(self, index: Any) -> None:
        """Die, without a core file."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if self.signal == signal.SIGSEGV:
            ctypes.string_at(0)
        elif self.signal == signal.SIGABRT:
            os.abort()
        os.kill(os.getpid(), self.signal)


@dataclass(frozen=True, kw_only=True)
class Exit(Misbehaviour):
    """Ends the process at once, as native code that calls ``exit()`` does.

    Args:
        code: the exit status.
    """

    code: int = 0

    def act(self, index: Any) -> None:
        """Exit."""
        os._exit(self.code)


@dataclass(frozen=True, kw_only=True)
class ExhaustMemory(Misbehaviour):
    """Takes memory until the kernel kills the process, or until it has enough: then it kills itself, so that a machine
    without a limit survives the test. It never takes more than half of what is free.

    Args:
        up_to_bytes: what is enough.
    """

    up_to_bytes: int = 1 << 30

    def act(self, index: Any) -> None:
        """Take memory, touching every page, and die."""
        bound = min(self.up_to_bytes, host.free_memory_bytes()[0] // 2)
        held = [b"\1" * _STEP_BYTES for _ in range(bound // _STEP_BYTES)]
        del held[1:]
        os.kill(os.getpid(), signal.SIGKILL)


class Injector:
    """Lets certain samples misbehave. Pickles; counts in files, so that the count survives whoever dies of it.

    What would take the training process along is not done there, only noted: see :attr:`seen_in_trainer`.

    Args:
        plan: index → what that sample does.
        folder: where the counts are kept; None makes a temporary folder that goes with this object.

    *Runs in* any process. The one that makes it counts as the training process.
    """

    def __init__(self, plan: Mapping[Any, Misbehaviour], *, folder: str | os.PathLike[str] | None = None) -> None:
        for index, misbehaviour in plan.items():
            if not isinstance(misbehaviour, Misbehaviour):
                raise OptionError("plan", misbehaviour, f"a Misbehaviour such as Crash() for sample {index!r}")
        self.plan: dict[Any, Misbehaviour] = dict(plan)
        self.trainer: int = os.getpid()
        self._files = {index: f"strikes-{number}" for number, index in enumerate(self.plan)}
        self.folder: str = os.fspath(folder) if folder is not None else tempfile.mkdtemp(prefix="robustloader-testing-")
        if folder is None:
            weakref.finalize(self, _remove, self.folder, self.trainer)

    @classmethod
    def seeded(cls, size: int, rates: Mapping[Misbehaviour, float], *, seed: int) -> Injector:
        """Misbehaviours spread over the indices ``0 .. size - 1``, the same ones for the same seed.

        Args:
            size: number of samples.
            rates: what → which share of the samples (0 to 1), rounded to whole samples.
            seed: of the choice.
        """
        counts = [(misbehaviour, round(rate * size)) for misbehaviour, rate in rates.items()]
        total = sum(count for _, count in counts)
        if total > size or any(count < 0 for _, count in counts):
            raise OptionError("rates", dict(rates), "shares of the samples that add up to 1 at most")
        chosen = iter(random.Random(seed).sample(range(size), total))
        return cls({next(chosen): misbehaviour for misbehaviour, count in counts for _ in range(count)})

    def strike(self, index: Any) -> None:
        """Let sample ``index`` misbehave, if it is planned and still to happen."""
        misbehaviour = self.plan.get(index)
        if misbehaviour is None:
            return
        if misbehaviour.spares_trainer and os.getpid() == self.trainer:
            self._tick("in-trainer")
            return
        if self._tick(self._files[index], misbehaviour.times):
            misbehaviour.act(index)

    def count(self, index: Any = None) -> int:
        """How often sample ``index`` has misbehaved, or all of them together."""
        names = self._files.values() if index is None else [self._files[index]]
        return sum(self._size(name) for name in names)

    @property
    def seen_in_trainer(self) -> int:
        """How often the training process came to a sample that would have killed or hung it."""
        return self._size("in-trainer")

    def _size(self, name: str) -> int:
        path = os.path.join(self.folder, name)
        return os.path.getsize(path) if os.path.exists(path) else 0

    def _tick(self, name: str, limit: int | None = None) -> bool:
        """Count one more, unless ``limit`` are counted already. The lock goes with its holder, however that dies."""
        fd = os.open(os.path.join(self.folder, name), os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if limit is not None and os.fstat(fd).st_size >= limit:
                return False
            os.write(fd, b".")
            return True
        finally:
            os.close(fd)


class InjectedDataset(Dataset[Any]):
    """A map-style dataset, some of whose samples misbehave; everything else is the dataset's own.

    Args:
        dataset: loads the samples.
        injector: its plan names samples by their index.
    """

    def __init__(self, dataset: Any, injector: Injector) -> None:
        self.dataset = dataset
        self.injector = injector

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        self.injector.strike(index)
        return self.dataset[index]


class InjectedStream(IterableDataset[Any]):
    """An iterable dataset that misbehaves where it is about to yield certain samples.

    Args:
        dataset: yields the samples.
        injector: its plan names samples by ``key``.
        key: tells a sample's name from the sample; by default it is the sample itself.
    """

    def __init__(self, dataset: Any, injector: Injector, *, key: Callable[[Any], Any] | None = None) -> None:
        self.dataset = dataset
        self.injector = injector
        self.key = key

    def __iter__(self) -> Iterator[Any]:
        for sample in self.dataset:
            self.injector.strike(sample if self.key is None else self.key(sample))
            yield sample


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked copy that ends first
        shutil.rmtree(folder, ignore_errors=True)
