"""Datasets that fail, kill and block on purpose. They pickle, so they work under every start method.

Unless it says otherwise, sample ``i`` of a dataset here is the integer ``i``: what was delivered shows what was loaded.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from robustloader.testing import Crash, Exit, Injector, Misbehaviour
from tests.support.watch import post, wait_at

# --- ways to fail -----------------------------------------------------------------------------------------------------


class Damaged(Exception):
    """An ordinary data fault."""


def damaged(index: Any) -> BaseException:
    return Damaged(f"cannot decode {index}")


def offline(index: Any) -> BaseException:
    return ConnectionError(f"no route to {index}")


# --- ways to die ------------------------------------------------------------------------------------------------------

DEATHS = ("SIGKILL", "SIGSEGV", "SIGABRT", "SIGBUS", "exit 0", "exit 3")
CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "exit 0", "exit 3")
"""Deaths that only code in the worker itself can bring about."""


def misbehaviour(how: str, times: int | None) -> Misbehaviour:
    """What brings such a death about."""
    if how.startswith("SIG"):
        return Crash(signal=getattr(signal, how), times=times)
    return Exit(code=int(how.removeprefix("exit ")), times=times)


class Death:
    """A death at one place: at most ``times`` over all processes (they count in a file), and never in the trainer.

    Args:
        folder: where the count is kept.
        how: one of ``DEATHS``.
        times: None dies every time.
    """

    def __init__(self, folder: Any, how: str, times: int | None = 1) -> None:
        self.injector = Injector({how: misbehaviour(how, times)}, folder=folder)
        self.how = how

    def strike(self) -> None:
        """Die here, if it is still to happen."""
        self.injector.strike(self.how)

    @property
    def seen_in_trainer(self) -> bool:
        """Whether the training process ran what kills."""
        return bool(self.injector.seen_in_trainer)

    @property
    def count(self) -> int:
        """How often it has happened."""
        return self.injector.count()


# --- a record of what is fetched --------------------------------------------------------------------------------------


def note(path: str, text: object) -> None:
    """Append a line to a file, in one write."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(fd, f"{text}\n".encode())
    os.close(fd)


def noted(path: Any) -> list[str]:
    """The lines of such a file."""
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


# --- map-style --------------------------------------------------------------------------------------------------------


class Numbers(Dataset):
    """Sample ``i`` is ``i``. With ``log``, every fetch is noted in that file."""

    def __init__(self, size: int, *, log: Any = None) -> None:
        self.size = size
        self.log = None if log is None else str(log)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        if self.log is not None:
            note(self.log, int(index))
        return self.load(int(index))

    def load(self, index: int) -> Any:
        return index


class Raising(Numbers):
    """Some samples raise what ``errors[index](index)`` makes."""

    def __init__(self, size: int, errors: Mapping[int, Callable[[Any], BaseException]], *, log: Any = None) -> None:
        super().__init__(size, log=log)
        self.errors = dict(errors)

    def load(self, index: int) -> Any:
        if index in self.errors:
            raise self.errors[index](index)
        return index


class Flaky(Numbers):
    """Each of ``samples`` raises a ``ConnectionError`` the first ``failures`` times, over all processes."""

    def __init__(self, size: int, samples: Sequence[int], failures: int, folder: Any) -> None:
        super().__init__(size)
        self.samples = tuple(samples)
        self.failures = failures
        self.folder = str(folder)

    def load(self, index: int) -> Any:
        if index in self.samples:
            path = f"{self.folder}/tries-{index}"
            note(path, "try")
            if len(noted(path)) <= self.failures:
                raise ConnectionError(f"no route to {index}")
        return index


class WithItems(Raising):
    """Has ``__getitems__``, which raises when any of the indices does."""

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return [self[index] for index in indices]


class Shaped(Numbers):
    """Sample ``i`` is two numbers ``i``; each of ``odd`` has three instead, so that stacking fails."""

    def __init__(self, size: int, odd: Sequence[int]) -> None:
        super().__init__(size)
        self.odd = tuple(odd)

    def load(self, index: int) -> Any:
        return torch.full((3 if index in self.odd else 2,), index)


class Made(Numbers):
    """Some samples are what ``makers[index](index)`` makes."""

    def __init__(self, size: int, makers: Mapping[int, Callable[[Any], Any]]) -> None:
        super().__init__(size)
        self.makers = dict(makers)

    def load(self, index: int) -> Any:
        return self.makers[index](index) if index in self.makers else index


class Deadly(Numbers):
    """Loading sample ``at`` is a death, where ``where`` says: "item", "items", "collate" or "nowhere"."""

    def __init__(self, size: int, death: Death, *, at: int, log: Any = None) -> None:
        super().__init__(size, log=log)
        self.death = death
        self.at = at

    def load(self, index: int) -> Any:
        if index == self.at:
            self.death.strike()
        return index


class DeadlyItems(Deadly):
    """The same, loaded through ``__getitems__``."""

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return [self[index] for index in indices]


class DeadlyCollate:
    """A ``collate_fn`` that dies when sample ``at`` is in the batch."""

    def __init__(self, death: Death, *, at: int) -> None:
        self.death = death
        self.at = at

    def __call__(self, samples: list[Any]) -> Any:
        if self.at in samples:
            self.death.strike()
        return default_collate(samples)


class DeadlyInit:
    """A ``worker_init_fn`` that dies in worker ``worker``."""

    def __init__(self, death: Death, *, worker: int = 0) -> None:
        self.death = death
        self.worker = worker

    def __call__(self, worker_id: int) -> None:
        if worker_id == self.worker:
            self.death.strike()


class KillEveryWorker:
    """A ``worker_init_fn`` that no worker survives."""

    def __init__(self, how: int = signal.SIGKILL) -> None:
        self.trainer = os.getpid()
        self.how = how

    def __call__(self, worker_id: int) -> None:
        if os.getpid() != self.trainer:
            os.kill(os.getpid(), self.how)


class DeadlyState:
    """Reducing or rebuilding it is a death: what a batch holds, or a dataset that cannot be shipped."""

    def __init__(self, index: int, death: Death) -> None:
        self.index = index
        self.death = death

    def __int__(self) -> int:
        return self.index

    def __getstate__(self) -> Any:
        self.death.strike()
        return self.__dict__


class Big(Numbers):
    """Sample ``i`` is ``nbytes`` bytes, all of value ``i``."""

    def __init__(self, size: int, nbytes: int) -> None:
        super().__init__(size)
        self.nbytes = nbytes

    def load(self, index: int) -> Any:
        return torch.full((self.nbytes,), index, dtype=torch.uint8)


class Blocking(Numbers):
    """Sample ``at`` tells ``mailbox`` its process id and then waits at ``gate``; ``once`` lets later tries through."""

    def __init__(self, size: int, *, at: int, mailbox: str, gate: str, once: str | None = None) -> None:
        super().__init__(size)
        self.at = at
        self.mailbox = mailbox
        self.gate = gate
        self.once = once

    def load(self, index: int) -> Any:
        if index == self.at:
            self.get_stuck_in_here()
        return index

    def get_stuck_in_here(self) -> None:
        if self.once is not None:
            try:
                os.close(os.open(self.once, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
        post(self.mailbox, os.getpid())
        wait_at(self.gate)


class Random(Numbers):
    """Sample ``i`` comes with a random number of each kind; every eighth waits for nothing in particular."""

    def load(self, index: int) -> Any:
        return index, int(torch.randint(1 << 30, ()))


class UnpicklesBadly(Numbers):
    """Cannot be rebuilt in a worker that was not forked."""

    def __setstate__(self, state: Any) -> None:
        raise FileNotFoundError("the archive is not mounted here")


class CannotPickle(Numbers):
    """Holds what does not pickle."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.handle = lambda: None


# --- iterable ---------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """The numbers from 0, shared out among the workers by ``get_worker_info()``.

    Args:
        errors: numbers that raise instead of being yielded. The stream goes on after that.
        death: with ``at``, a death before that number is yielded.
    """

    def __init__(
        self,
        size: int,
        *,
        errors: Mapping[int, Callable[[Any], BaseException]] | None = None,
        death: Death | None = None,
        at: int = -1,
    ) -> None:
        self.size = size
        self.errors = dict(errors or {})
        self.death = death
        self.at = at
        self.share: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        first, step = self.share or ((info.id, info.num_workers) if info else (0, 1))
        return _Walk(self, iter(range(first, self.size, step)))


class _Walk:
    """An iterator that goes on after it has raised, as readers of archives do."""

    def __init__(self, stream: Stream, numbers: Iterator[int]) -> None:
        self.stream = stream
        self.numbers = numbers

    def __iter__(self) -> _Walk:
        return self

    def __next__(self) -> int:
        number = next(self.numbers)
        if number == self.stream.at and self.stream.death is not None:
            self.stream.death.strike()
        if number in self.stream.errors:
            raise self.stream.errors[number](number)
        return number


class Generated(Stream):
    """The same, as a generator: it is over when it has raised."""

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()


class MadeStream(Stream):
    """Some numbers are what ``makers[number](number)`` makes."""

    def __init__(self, size: int, makers: Mapping[int, Callable[[Any], Any]]) -> None:
        super().__init__(size)
        self.makers = dict(makers)

    def __iter__(self) -> Iterator[Any]:
        for number in super().__iter__():
            yield self.makers[number](number) if number in self.makers else number


class BigStream(Stream):
    """Each number is ``nbytes`` bytes of that value."""

    def __init__(self, size: int, nbytes: int) -> None:
        super().__init__(size)
        self.nbytes = nbytes

    def __iter__(self) -> Iterator[Any]:
        for number in super().__iter__():
            yield torch.full((self.nbytes,), number, dtype=torch.uint8)


class CannotBegin(Stream):
    """Raises where a worker asks for its iterator."""

    def __iter__(self) -> Any:
        raise FileNotFoundError("the archive is not mounted here")


class Unshared(Stream):
    """Shared out by ``share_out``, a ``worker_init_fn``, as torch's documentation shows; each worker's copy differs."""

    def __iter__(self) -> Iterator[Any]:
        first, step = self.share or (0, 1)
        return _Walk(self, iter(range(first, self.size, step)))


def share_out(worker_id: int) -> None:
    """Give this worker's copy of the dataset its share."""
    info = get_worker_info()
    info.dataset.share = (worker_id, info.num_workers)
