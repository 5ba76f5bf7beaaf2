"""What the two sides say to each other, one class per message.

Training process to worker: :class:`Fetch`, :class:`Trial`, :class:`Resume`, :class:`Released`, :class:`Trim`.
Worker to training process: :class:`Ready`, :class:`Resumed`, :class:`StartFailed`, :class:`Fetched`, :class:`Unfilled`,
:class:`Failed`, :class:`Exhausted`, :class:`TrialPassed`, :class:`Trimmed`.

``run`` numbers the epochs of one iterator, so that what a worker still loads of an abandoned epoch is told apart.
"""

from __future__ import annotations

import pickle
import traceback
from dataclasses import dataclass
from typing import Any, NamedTuple

from robustloader.events import FaultAction, FaultKind

__all__ = [
    "TRACEBACK_CHARS",
    "Exhausted",
    "Failed",
    "Fault",
    "Fetch",
    "Fetched",
    "Raised",
    "Ready",
    "Released",
    "Report",
    "Resume",
    "Resumed",
    "StartFailed",
    "Trial",
    "TrialPassed",
    "Trim",
    "Trimmed",
    "Unfilled",
    "as_plain",
    "from_plain",
]

MESSAGE_CHARS = 4_096
TRACEBACK_CHARS = 16_384


class Fetch(NamedTuple):
    """Load one batch. ``spares``, ``avoid``, ``careful``, ``verify`` are as in the ledger's ``Task``."""

    run: int
    task: int
    indices: Any
    spares: tuple[Any, ...] = ()
    avoid: tuple[int, ...] = ()
    careful: bool = False
    verify: bool = False


class Trial(NamedTuple):
    """Load, collate and encode one suspected sample alone, and throw the result away."""

    run: int
    task: int
    position: int
    index: Any


class Resume(NamedTuple):
    """A new epoch begins: what is fetched from now on belongs to ``run``.

    ``base_seed`` is that of ``seeding="batch"``; a worker's own stream goes on.
    """

    run: int
    epoch: int
    base_seed: int


class Released(NamedTuple):
    """Nothing to do: only that memory of the arena may be used again, which goes along with any message."""


class Trim(NamedTuple):
    """Memory is low: give back to the system what lies idle in the arena, and say so."""


class Trimmed(NamedTuple):
    """What :class:`Trim` asked for is done."""


class Resumed(NamedTuple):
    """A worker of an iterable dataset begins the epoch ``run`` with these random states: a successor will need them."""

    run: int
    rng: Any


class Ready(NamedTuple):
    """The worker has its dataset, has run ``worker_init_fn`` and waits for its first task."""

    pid: int


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception on its way to another process: its type where that can be pickled, its text always.

    Attributes:
        type_pickle: the exception type, pickled; None where it cannot be.
        error_type: the type's qualified name.
        message: ``str()`` of the exception, cut.
        traceback: the formatted traceback, cut.
        where: torch's words for the place, such as ``"in DataLoader worker process 0"``.
    """

    type_pickle: bytes | None
    error_type: str
    message: str
    traceback: str
    where: str

    @classmethod
    def of(cls, error: BaseException, where: str) -> Raised:
        """Describe ``error``; survives a ``__str__`` that raises, a local class and 10 MB of text."""
        try:
            message = str(error)
        except BaseException:
            message = f"<{type(error).__name__} whose __str__ raises>"
        try:
            text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        except BaseException:
            text = f"Traceback (not printable)\n{type(error).__name__}: {_cut(message, MESSAGE_CHARS)}\n"
        try:
            type_pickle = pickle.dumps(type(error), pickle.HIGHEST_PROTOCOL)
        except Exception:
            type_pickle = None
        return cls(
            type_pickle, type(error).__qualname__, _cut(message, MESSAGE_CHARS), _cut(text, TRACEBACK_CHARS), where
        )


class Fault(NamedTuple):
    """One sample that failed in a worker. ``position`` is its place in the task, -1 for a spare or none; ``hint`` says
    what to do where the machine ran out of something."""

    kind: FaultKind
    index: Any
    position: int
    error_type: str
    message: str
    traceback: str
    attempts: int
    action: FaultAction
    replacement: Any = None
    transient: bool = False
    hint: str = ""


class Report(NamedTuple):
    """What was out of the ordinary about a task; absent when nothing was.

    Attributes:
        faults: every fault, retried ones included.
        replaced: position → (wanted, used) index.
        skipped: positions left out.
        ended: why the shard ended before its time, or "".
    """

    faults: tuple[Fault, ...] = ()
    replaced: dict[int, tuple[Any, Any]] = {}  # noqa: RUF012 - never mutated; a NamedTuple default
    skipped: tuple[int, ...] = ()
    ended: str = ""


class Fetched(NamedTuple):
    """A batch; it follows in the same frame. ``samples`` counts what is in it. ``held_bytes`` is the memory that the
    worker has for itself, once that is more than it may have; 0 otherwise.

    ``calls``, here and below, is how often the worker has read from its stream (iterable datasets). ``trouble`` says
    why the batch did not go through the arena, where it should have. It began to load at ``begun_ns`` on the monotonic
    clock, which all processes of a machine share, took ``load_ns``, and was sent at ``sent_ns``. ``snapshot`` is the
    pickled state after it of a dataset or stream that keeps its own; a string says why there is none.
    """

    run: int
    task: int
    samples: int
    load_ns: int
    rss_bytes: int
    report: Report | None = None
    calls: int = 0
    trouble: str = ""
    begun_ns: int = 0
    sent_ns: int = 0
    held_bytes: int = 0
    snapshot: bytes | str | None = None


class Unfilled(NamedTuple):
    """The spares did not suffice: ``avoid`` are the positions known to be bad by now."""

    run: int
    task: int
    avoid: tuple[int, ...]
    report: Report
    calls: int = 0


class Failed(NamedTuple):
    """The task ends with an exception that the trainer is to see; ``fault`` names the sample where one is known."""

    run: int
    task: int
    raised: Raised
    report: Report
    calls: int = 0


class Exhausted(NamedTuple):
    """The worker's share of an iterable dataset has ended; ``task`` gets no batch. ``end`` is the pickled state that a
    dataset which keeps its own has then."""

    run: int
    task: int
    report: Report | None = None
    calls: int = 0
    end: bytes | None = None


class TrialPassed(NamedTuple):
    """The suspected sample loaded (or raised an ordinary exception) without taking the worker along."""

    run: int
    task: int
    position: int


class StartFailed(NamedTuple):
    """The worker cannot work: its dataset does not unpickle, or ``worker_init_fn`` raised."""

    raised: Raised


_KINDS: tuple[type[Any], ...] = (
    Fetch,
    Trial,
    Resume,
    Ready,
    Resumed,
    StartFailed,
    Fetched,
    Unfilled,
    Failed,
    Exhausted,
    TrialPassed,
    Released,
    Trim,
    Trimmed,
)
_NUMBERS = {kind: number for number, kind in enumerate(_KINDS)}


def as_plain(message: Any) -> tuple[Any, ...]:
    """A message as the number of its class and its fields. Such a tuple takes a quarter of the time to pickle that an
    object takes whose class must be looked up by name, on either side."""
    number = _NUMBERS.get(type(message))
    return (None, message) if number is None else (number, *message)


def from_plain(plain: tuple[Any, ...]) -> Any:
    """The message again."""
    number = plain[0]
    return plain[1] if number is None else tuple.__new__(_KINDS[number], plain[1:])


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... ({len(text) - 2 * half:,} characters left out) ...\n{text[-half:]}"
