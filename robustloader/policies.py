"""What the user may choose: small frozen option objects that compare, print and pickle.

A policy checks itself when it is made and raises :class:`~robustloader.OptionError` naming the field, the value and
what is allowed. Units are in the names; ``None`` means off or unlimited.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tenacity import stop_after_attempt, wait_exponential, wait_random
from tenacity.stop import stop_base
from tenacity.wait import wait_base

from robustloader.errors import OptionError
from robustloader.events import FaultAction, Sink

__all__ = [
    "RECORDED_AS",
    "TRANSIENT",
    "Action",
    "FaultPolicy",
    "MemoryPolicy",
    "RecoveryPolicy",
    "Retry",
    "Seeding",
    "TelemetryPolicy",
    "Transport",
    "check_choice",
    "check_number",
]

Action = Literal["raise", "skip", "replace"]
RECORDED_AS: dict[Action, FaultAction] = {"raise": "raised", "skip": "skipped", "replace": "replaced"}
"""What the record of a fault says of the action that was taken."""
Seeding = Literal["worker", "batch"]
Transport = Literal["auto", "arena", "pipe"]

TRANSIENT: tuple[type[Exception], ...] = (ConnectionError, TimeoutError, InterruptedError, BlockingIOError)
FATAL: tuple[type[BaseException], ...] = (
    NameError,
    SyntaxError,
    ImportError,
    RecursionError,
    MemoryError,
    NotImplementedError,
)


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    allowed = tuple(choices)
    if not isinstance(value, str) or value not in allowed:
        raise OptionError(name, value, "one of " + ", ".join(map(repr, allowed)))


def check_number(
    name: str,
    value: object,
    *,
    low: float = 0.0,
    high: float = math.inf,
    whole: bool = False,
    optional: bool = False,
    above: bool = False,
) -> None:
    """Raise unless ``value`` is a finite number in ``[low, high]`` (``(low, high]`` with ``above``)."""
    if optional and value is None:
        return
    kind: tuple[type, ...] = (int,) if whole else (int, float)
    good = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)  # type: ignore[arg-type]
    if good and (value > low if above else value >= low) and value <= high:  # type: ignore[operator]
        return
    bounds = f"greater than {low:g}" if above else f"at least {low:g}"
    if high != math.inf:
        bounds += f" and at most {high:g}"
    noun = "a whole number " if whole else "a number "
    raise OptionError(name, value, noun + bounds + (", or None" if optional else ""))


def check_bool(name: str, value: object) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise OptionError(name, value, "True or False")


def check_exceptions(name: str, value: object) -> None:
    """Raise unless ``value`` is a tuple of exception types."""
    if isinstance(value, tuple) and all(isinstance(t, type) and issubclass(t, BaseException) for t in value):
        return
    raise OptionError(name, value, "a tuple of exception types")


@dataclass(frozen=True, kw_only=True, eq=False)
class Retry:
    """When and how a sample that failed is tried again, in the worker that failed, before it counts as a fault.

    Args:
        stop: a tenacity stop strategy; ``stop_after_attempt(3)`` is the first attempt and two more. It must end:
            ``tenacity.stop_never`` is refused.
        wait: a tenacity wait strategy, in seconds. The default starts at 0.05 s, doubles up to 2 s, and adds up to
            0.1 s of jitter, so that a sample costs about as much as a slow batch, never a stalled run.
        on: exception types worth a retry. The default is what a network or a busy file system raises in passing:
            ``ConnectionError``, ``TimeoutError``, ``InterruptedError``, ``BlockingIOError``. An ``OSError`` that says
            the machine has run out of something (EMFILE, ENFILE, ENOSPC, EDQUOT, ENOMEM) is retried whatever stands
            here, since it says nothing about the sample.
    """

    stop: stop_base = field(default_factory=lambda: stop_after_attempt(3))
    wait: wait_base = field(default_factory=lambda: wait_exponential(multiplier=0.05, max=2.0) + wait_random(0, 0.1))
    on: tuple[type[BaseException], ...] = TRANSIENT

    def __post_init__(self) -> None:
        if not callable(self.stop) or type(self.stop).__name__ == "_stop_never":
            raise OptionError("stop", self.stop, "a tenacity stop strategy that ends, such as stop_after_attempt(3)")
        if not callable(self.wait):
            raise OptionError("wait", self.wait, "a tenacity wait strategy, such as wait_exponential(max=2)")
        check_exceptions("on", self.on)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Retry):
            return NotImplemented
        # tenacity's strategies do not define equality: two are the same when their types and settings are.
        return self.on == other.on and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash((type(self.stop), type(self.wait), self.on))

    def __repr__(self) -> str:
        return f"Retry(stop={_describe(self.stop)}, wait={_describe(self.wait)}, on={_names(self.on)})"


@dataclass(frozen=True, kw_only=True)
class FaultPolicy:
    """What to do with a sample that raises.

    Args:
        action: "replace" puts another sample of the same epoch in its place, so that the number of batches and their
            sizes stay as the sampler asked; "skip" yields smaller batches, never empty ones; "raise" raises.
        retry: how often and how fast a passing failure is tried again; None never retries.
        fatal: exception types that always raise, whatever ``action`` says, because every sample would fail alike.
        burst: faults allowed at any time, a whole number of samples. The default of 16 lets a run begin with a bad
            batch or two.
        max_fraction: faults allowed on top, as a fraction (0 to 1) of the samples fetched. The default of 0.05 is far
            above real rates of damaged files (about 0.1 % in large web data) and far below a wrong path.
        quarantine: path of a JSON-lines file. Every sample that failed for good is appended to it, and it is read when
            the loader is made, so that known bad samples are never fetched again. None keeps no file.
    """

    action: Action = "replace"
    retry: Retry | None = field(default_factory=Retry)
    fatal: tuple[type[BaseException], ...] = FATAL
    burst: int = 16
    max_fraction: float = 0.05
    quarantine: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        check_choice("action", self.action, get_args(Action))
        if self.retry is not None and not isinstance(self.retry, Retry):
            raise OptionError("retry", self.retry, "a Retry or None")
        check_exceptions("fatal", self.fatal)
        check_number("burst", self.burst, whole=True)
        check_number("max_fraction", self.max_fraction, high=1.0)
        if self.quarantine is not None and (
            self.quarantine == "" or not isinstance(self.quarantine, (str, os.PathLike))
        ):
            raise OptionError("quarantine", self.quarantine, "a path or None")


@dataclass(frozen=True, kw_only=True)
class RecoveryPolicy:
    """What to do when a worker process dies or hangs.

    Args:
        max_restarts: restart credit, a whole number: one is spent per death, one comes back per 50 delivered batches,
            and it is full again after the pool has shrunk.
        backoff_s: pause before the second restart in a row, in seconds; it doubles with each further one. The first
            restart is immediate.
        max_backoff_s: upper bound of that pause, in seconds.
        poison_after: deaths with the same sample in hand before that sample is tried alone in a fresh worker; only
            a death in that trial convicts it.
        hang_after_s: seconds of silence, per sample in flight, after which a worker is killed and its tasks replayed;
            None never does. The loader's ``timeout``, where set, is such a deadline per task.
        stall_report_s: seconds after which a silent worker is reported in the log, without touching it; None never.
        start_timeout_s: seconds a worker may take from its start to its first word (imports, unpickling the dataset,
            ``worker_init_fn``), while the loop waits; None waits for ever.
        min_workers: the pool does not shrink below this many processes while it can have any.
        in_process: whether the training process itself loads what is left once ``min_workers`` cannot be kept.
            It never does so where what killed the workers would take it along: crash signals, memory kills, exits and
            hangs.
    """

    max_restarts: int = 8
    backoff_s: float = 0.1
    max_backoff_s: float = 10.0
    poison_after: int = 2
    hang_after_s: float | None = None
    stall_report_s: float | None = 120.0
    start_timeout_s: float | None = 120.0
    min_workers: int = 1
    in_process: bool = True

    def __post_init__(self) -> None:
        check_number("max_restarts", self.max_restarts, whole=True)
        check_number("backoff_s", self.backoff_s)
        check_number("max_backoff_s", self.max_backoff_s)
        if self.max_backoff_s < self.backoff_s:
            raise OptionError("max_backoff_s", self.max_backoff_s, f"at least backoff_s ({self.backoff_s:g})")
        check_number("poison_after", self.poison_after, low=1, whole=True)
        check_number("hang_after_s", self.hang_after_s, above=True, optional=True)
        check_number("stall_report_s", self.stall_report_s, above=True, optional=True)
        check_number("start_timeout_s", self.start_timeout_s, above=True, optional=True)
        check_number("min_workers", self.min_workers, low=1, whole=True)
        check_bool("in_process", self.in_process)


@dataclass(frozen=True, kw_only=True)
class MemoryPolicy:
    """What to do when the machine's limits come near: memory, open files, processes.

    Open files and processes are looked at before workers are started, memory before each epoch, again with the first
    batch, whose size tells what the lookahead will take, and at most once a second while the epoch runs.

    Args:
        on_low: "warn" says so with the numbers and the remedy, "raise" raises
            :class:`~robustloader.ResourceError`. "adapt" raises the soft limit of open files, or starts fewer workers;
            where memory is low it loads fewer batches ahead, then takes workers away (map-style datasets), and says
            what it did.
        headroom_fraction: share (0 to 1) of the control group's or the host's memory that should stay free. The
            default of 0.1 leaves the trainer room to grow before the kernel's memory killer looks for a victim.
        max_worker_bytes: a worker that holds more than this many bytes of memory of its own (what its end would give
            back: unique set size) is replaced by a fresh process between two tasks, from its eighth task on; None
            never. Map-style datasets only: a stream would have to be read again from its beginning.
        max_arena_bytes: how many bytes the batches on their way from the workers may take in shared memory. None is
            not unlimited: it takes half of what is free above the headroom when the workers are started. With 0 every
            batch goes through a socket.
    """

    on_low: Literal["warn", "raise", "adapt"] = "adapt"
    headroom_fraction: float = 0.1
    max_worker_bytes: int | None = None
    max_arena_bytes: int | None = None

    def __post_init__(self) -> None:
        check_choice("on_low", self.on_low, ("warn", "raise", "adapt"))
        check_number("headroom_fraction", self.headroom_fraction, high=1.0)
        check_number("max_worker_bytes", self.max_worker_bytes, low=1, whole=True, optional=True)
        check_number("max_arena_bytes", self.max_arena_bytes, whole=True, optional=True)


@dataclass(frozen=True, kw_only=True)
class TelemetryPolicy:
    """What to tell, and whom.

    Args:
        sinks: objects with a ``receive(event)`` method; see :class:`~robustloader.Sink`.
        log_epochs: whether each epoch ends with one line at level INFO in ``logging.getLogger("robustloader")``.
        history: how many epoch summaries are kept, a whole number.
        progress_s: seconds between two :class:`~robustloader.EpochProgressed` of a running epoch, which sinks get (no
            sinks, no events); more often than that nobody looks at a dashboard. None sends none.
    """

    sinks: tuple[Sink, ...] = ()
    log_epochs: bool = True
    history: int = 128
    progress_s: float | None = 5.0

    def __post_init__(self) -> None:
        if not isinstance(self.sinks, tuple):
            raise OptionError("sinks", self.sinks, "a tuple of sinks; for one sink write (sink,)")
        for sink in self.sinks:
            if not callable(getattr(sink, "receive", None)):
                raise OptionError("sinks", self.sinks, "a tuple of objects with a receive(event) method")
        check_bool("log_epochs", self.log_epochs)
        check_number("history", self.history, low=1, whole=True)
        check_number("progress_s", self.progress_s, above=True, optional=True)


def _describe(strategy: Any) -> str:
    """A tenacity strategy as text: they have no ``repr`` of their own, and may hold others."""
    if isinstance(strategy, (tuple, list)):
        return "(" + ", ".join(map(_describe, strategy)) + ")"
    if not isinstance(strategy, (stop_base, wait_base)):
        return repr(strategy)
    settings = ", ".join(f"{name}={_describe(value)}" for name, value in vars(strategy).items())
    return f"{type(strategy).__name__}({settings})"


def _names(types: tuple[type, ...]) -> str:
    return "(" + ", ".join(t.__name__ for t in types) + ("," if len(types) == 1 else "") + ")"
