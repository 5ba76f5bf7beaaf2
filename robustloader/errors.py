"""Every error and warning that robustloader raises on its own account.

    RobustLoaderError(Exception)
    ├── OptionError(ValueError)             a wrong constructor or policy argument
    ├── SampleError(RuntimeError)           a sample raised, and its own exception type cannot be rebuilt here
    │   └── FaultBudgetError                more faults than the fault policy allows
    ├── WorkerError(RuntimeError)           a worker process failed
    │   ├── WorkerStartError                it reported that it cannot start
    │   ├── WorkerCrashError                it died
    │   ├── WorkerHangError                 it stayed silent past its deadline
    │   └── RestartBudgetError              workers kept dying until the restart budget was spent
    ├── ResourceError(RuntimeError)         too little memory, shared memory or descriptors
    └── StateError(ValueError)              a state that cannot be loaded
    RobustLoaderWarning(UserWarning)

The second bases keep ``except RuntimeError`` and ``except ValueError`` code working. Facts are attributes; the text
repeats them for people.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustloader.events import Event, FaultRecord

__all__ = [
    "FaultBudgetError",
    "OptionError",
    "ResourceError",
    "RestartBudgetError",
    "RobustLoaderError",
    "RobustLoaderWarning",
    "SampleError",
    "StateError",
    "WorkerCrashError",
    "WorkerError",
    "WorkerHangError",
    "WorkerStartError",
    "hold_warnings",
    "release_warnings",
    "warn_user",
    "warnings_held",
]


class RobustLoaderWarning(UserWarning):
    """Something was survived that the user should know of."""


_OWN_FOLDER = os.path.dirname(os.path.abspath(__file__)) + os.sep


_local = threading.local()


def hold_warnings() -> list[str] | None:
    """Keep this thread's warnings back until :func:`release_warnings`; None where somebody holds them already.

    A warning may be raised, where the user made warnings errors. It must not be in the middle of the books.
    """
    if getattr(_local, "held", None) is not None:
        return None
    held: list[str] = []
    _local.held = held
    return held


def release_warnings(held: list[str] | None) -> None:
    """Emit what was held back; raises the first one where warnings are errors."""
    if held is None:
        return
    _local.held = None
    for text in held:
        warn_user(text)


def warnings_held() -> bool:
    """Whether there are warnings of this thread that :func:`release_warnings` will emit."""
    return bool(getattr(_local, "held", None))


def warn_user(text: str) -> None:
    """Emit a :class:`RobustLoaderWarning` that points at the user's line: the first outside this package and torch.

    Escape sequences, such as an exception may carry in a sample's name, become blanks: they would reach the terminal.
    """
    text = "".join(character if character.isprintable() or character in "\n\t" else " " for character in text)
    held = getattr(_local, "held", None)
    if held is not None:
        held.append(text)
        return
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not frame.f_code.co_filename.startswith(_OWN_FOLDER) and not name.startswith("torch."):
            break
        frame = frame.f_back
        level += 1
    warnings.warn(text, RobustLoaderWarning, stacklevel=level)


class RobustLoaderError(Exception):
    """Base of every error of this package."""


class OptionError(RobustLoaderError, ValueError):
    """An argument has a value that cannot be used.

    Attributes:
        field: name of the argument, as the user typed it.
        value: what was given.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field} must be {allowed}, but got {field}={value!r}")
        self.field = field
        self.value = value
        self.allowed = allowed

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.allowed)


class SampleError(RobustLoaderError, RuntimeError):
    """A sample could not be loaded, and the exception it raised cannot be rebuilt in the training process.

    Attributes:
        index: the index as the sampler yielded it, or None where no single sample is known.
        worker_id: the worker that loaded it, or None for the training process.
        error_type: qualified name of the original exception type.
    """

    def __init__(
        self, message: str, *, index: object = None, worker_id: int | None = None, error_type: str = ""
    ) -> None:
        super().__init__(message)
        self.index = index
        self.worker_id = worker_id
        self.error_type = error_type


class FaultBudgetError(SampleError):
    """More samples failed than ``FaultPolicy.burst`` and ``FaultPolicy.max_fraction`` allow.

    Attributes:
        faults: how many samples failed.
        samples: how many samples were fetched.
        records: the kept :class:`~robustloader.FaultRecord` objects, oldest first.
    """

    def __init__(self, message: str, *, faults: int, samples: int, records: Sequence[FaultRecord]) -> None:
        last = records[-1] if records else None
        super().__init__(
            message,
            index=last.index if last else None,
            worker_id=last.worker_id if last else None,
            error_type=last.error_type if last else "",
        )
        self.faults = faults
        self.samples = samples
        self.records: tuple[FaultRecord, ...] = tuple(records)


class WorkerError(RobustLoaderError, RuntimeError):
    """A worker process failed.

    Attributes:
        worker_id: the worker, 0 to ``num_workers - 1``; None where no single worker is meant.
        pid: its process id.
    """

    def __init__(self, message: str, *, worker_id: int | None = None, pid: int | None = None) -> None:
        super().__init__(message)
        self.worker_id = worker_id
        self.pid = pid


class WorkerStartError(WorkerError):
    """A worker reported that it cannot start; ``__cause__`` holds the reason where it could be rebuilt."""


class WorkerCrashError(WorkerError):
    """A worker process died.

    Attributes:
        exitcode: as ``multiprocessing.Process.exitcode`` (minus the signal number for a signal).
        signal: name of the signal that killed it, such as ``"SIGKILL"``, or None.
        index: the sample it was loading, or None.
        hint: what usually causes this and what to do.
    """

    def __init__(
        self,
        message: str,
        *,
        worker_id: int | None = None,
        pid: int | None = None,
        exitcode: int | None = None,
        signal: str | None = None,
        index: object = None,
        hint: str = "",
    ) -> None:
        super().__init__(message, worker_id=worker_id, pid=pid)
        self.exitcode = exitcode
        self.signal = signal
        self.index = index
        self.hint = hint


class WorkerHangError(WorkerError):
    """A worker stayed silent past its deadline. Not a ``TimeoutError``: that is an ``OSError``, which users catch for
    files.

    Attributes:
        index: the sample it was loading, or None.
        silent_s: how long it had been silent, in seconds.
        stack: the worker's Python stacks, as text, where they could be taken.
    """

    def __init__(
        self,
        message: str,
        *,
        worker_id: int | None = None,
        pid: int | None = None,
        index: object = None,
        silent_s: float = 0.0,
        stack: str = "",
    ) -> None:
        super().__init__(message, worker_id=worker_id, pid=pid)
        self.index = index
        self.silent_s = silent_s
        self.stack = stack


class RestartBudgetError(WorkerError):
    """Workers kept dying until the restart budget was spent, and going on in the training process is off or unsafe.

    Attributes:
        history: the recovery events that led here, oldest first.
    """

    def __init__(
        self, message: str, *, history: Sequence[Event] = (), worker_id: int | None = None, pid: int | None = None
    ) -> None:
        super().__init__(message, worker_id=worker_id, pid=pid)
        self.history: tuple[Event, ...] = tuple(history)


class ResourceError(RobustLoaderError, RuntimeError):
    """The machine has too little of something the loader needs.

    Attributes:
        wanted_bytes: how many bytes are needed; 0 where it is not memory that is short.
        free_bytes: how many bytes there are; 0 likewise.
        remedy: what to change.
    """

    def __init__(self, message: str, *, wanted_bytes: int, free_bytes: int, remedy: str) -> None:
        super().__init__(message)
        self.wanted_bytes = wanted_bytes
        self.free_bytes = free_bytes
        self.remedy = remedy


class StateError(RobustLoaderError, ValueError):
    """A saved state cannot be used here.

    Attributes:
        expected: what the loader can use.
        found: what the state holds.
    """

    def __init__(self, message: str, *, expected: object = None, found: object = None) -> None:
        super().__init__(message)
        self.expected = expected
        self.found = found
