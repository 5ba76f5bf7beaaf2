"""Events as JSON lines: one file per process, one line per event."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from robustloader.errors import OptionError, warn_user
from robustloader.events import Event
from robustloader.telemetry.deferral import tell_the_rest
from robustloader.telemetry.labels import ConfiguredSink, fill_in, resolve_labels
from robustloader.telemetry.plain import as_json

__all__ = ["SCHEMA", "JsonlSink"]

SCHEMA = 1
"""The version of the lines; it changes when a reader would have to."""

_START = b'{"schema": '
# A line is at most an event with a traceback of 16,384 characters, each escaped in six: far below this.
_LONGEST_LINE = 1 << 20
# After a failure the next attempt: a full disk is seldom mended sooner, and an attempt costs a system call or two.
_RETRY_S = 60.0
# How often to see that the file is still where it was: what a clean-up takes away in between is gone as the rest is.
_LOOK_S = 1.0
_ENVELOPE = frozenset(("schema", "event", "time", "epoch", "labels", "host"))


class JsonlSink(ConfiguredSink):
    """Appends every event to a file, one JSON object a line.

    A line is ``{"schema": 1, "event": <class name>, "time": <Unix seconds>, "epoch": …, "labels": {…}, "pid": <of the
    training process>, "host": …}`` and the event's own fields; the ``pid`` of an event about a worker is
    ``worker_pid``. Values that JSON lacks become lists or their ``repr``. The first line of each file, and of each run
    that appends to it, is ``RunStarted``, with ``versions`` and ``cpus``.

    *Flushing*: each event is one ``write`` to a file opened with ``O_APPEND``, at once: it survives the end of the
    process, however sudden, but not a power failure in the seconds before the kernel writes it to the disk. A half line
    that a full disk or a kill left at the end of the file is taken away when the file is next opened.

    *Failing*: a folder that does not exist is an error at once. Whatever the file system refuses later (disk full, no
    permission) is one warning; events are lost until an attempt, made every 60 s, succeeds, and then an ``EventsLost``
    line says how many. A file that somebody moves or removes is begun anew within a second of events, with a warning
    unless another one has taken its place.

    Runs in: the training process; any number of loaders and threads may share one. The file is opened at the first
    event, so that worker processes that import the user's script open nothing.

    Args:
        path: the file. ``{rank}``, ``{local_rank}``, ``{host}``, ``{pid}`` and the names of labels are filled in, as in
            ``"run-{rank}.jsonl"``: each process needs a file of its own.
        labels: written to every line; ``rank`` comes by itself where torchrun's RANK is set.
        max_bytes: size, in bytes, at which a file is renamed to ``<path>.1`` (and that to ``<path>.2`` …) and a new one
            begun. The default of 100 MB holds about ten days of progress lines with 8 workers.
        backups: how many renamed files are kept; 0 keeps none.

    Raises:
        OptionError: the folder does not exist, the file is something else, or an option is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        labels: Mapping[str, str] | None = None,
        max_bytes: int = 100_000_000,
        backups: int = 9,
    ) -> None:
        super().__init__(path=path, labels=labels, max_bytes=max_bytes, backups=backups)
        self.labels: dict[str, str] = resolve_labels(labels)
        self.path: str = os.path.abspath(fill_in("path", path, self.labels))
        for name, value, low in (("max_bytes", max_bytes, 1), ("backups", backups, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise OptionError(name, value, f"a whole number of at least {low}")
        self._max_bytes = max_bytes
        self._backups = backups
        if not os.path.isdir(os.path.dirname(self.path)):
            raise OptionError("path", self.path, "a file in a folder that exists; make the folder first")
        self._check_content()
        self._host = socket.gethostname()
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a signal handler may close what it interrupts
        self._fd: int | None = None
        self._size = self._lost = 0
        self._retry_at_s = self._look_at_s = 0.0
        self._warned = self._closed = False

    def receive(self, event: Event) -> None:
        """Append one event."""
        if os.getpid() != self._pid:
            # A forked copy of the training process: a descriptor and a lock of its own, neither held by a thread that
            # exists only in the original.
            self._close_fd()
            if self._closed:
                return
            self.renew()
        with self._lock:
            if self._closed:
                return
            now_s = time.monotonic()
            if now_s < self._retry_at_s:
                self._lost += 1
                return
            try:
                missing = self._look(now_s)
                self._append(self._line(event))
            except OSError as error:
                self._lost += 1
                self._retry_at_s = now_s + _RETRY_S
                self._close_fd()
                if not self._warned:
                    self._warned = True
                    warn_user(
                        f"telemetry cannot be written to {self.path}: {error}; training goes on, events are lost until "
                        f"it can be (tried every {_RETRY_S:g} s)"
                    )
            else:
                if missing:
                    warn_user(f"somebody moved or removed {self.path}, to which telemetry is written; it is begun anew")

    def close(self) -> None:
        """Close the file; events that come later are not written. Idempotent."""
        tell_the_rest()
        with self._lock:
            self._closed = True
            self._close_fd()

    def __enter__(self) -> JsonlSink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self._close_fd()

    def _look(self, now_s: float) -> bool:
        """Let go of a file that the path no longer leads to; whether it leads to none now."""
        if self._fd is None or now_s < self._look_at_s:
            return False
        self._look_at_s = now_s + _LOOK_S
        try:
            if not os.path.samestat(os.stat(self.path), os.fstat(self._fd)):
                self._close_fd()
        except (FileNotFoundError, NotADirectoryError):
            self._close_fd()
            return True
        except OSError:  # writing may still go well
            pass
        return False

    def _line(self, event: Event) -> bytes:
        fields = {"worker_pid" if name == "pid" else name: value for name, value in event.to_dict().items()}
        return self._encode(
            type(event).__name__,
            event.time,
            {"epoch": event.epoch},
            {name: value for name, value in fields.items() if name not in _ENVELOPE},
        )

    def _encode(self, event: str, time_s: float, head: Mapping[str, Any], rest: Mapping[str, Any]) -> bytes:
        envelope = {"schema": SCHEMA, "event": event, "time": time_s, **head, "labels": self.labels}
        line = {**envelope, "pid": self._pid, "host": self._host, **rest}
        # ASCII only: lone surrogates and exotic line ends, which some readers split at, are escaped.
        return json.dumps(as_json(line), ensure_ascii=True, allow_nan=False).encode() + b"\n"

    def _append(self, line: bytes) -> None:
        if self._fd is None:
            self._open()
        elif self._size + len(line) > self._max_bytes:
            self._rotate()
        if self._lost:
            lost = self._encode("EventsLost", time.time(), {}, {"lost": self._lost})
            self._write(lost)
            self._lost = 0
        self._write(line)

    def _write(self, line: bytes) -> None:
        assert self._fd is not None
        while line:  # more than once only where the disk is full, and then the second attempt raises
            written = os.write(self._fd, line)
            self._size += written
            line = line[written:]

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._size = heal(self._fd)
        if self._size >= self._max_bytes:
            self._rotate()
        else:
            self._write(self._started())

    def _rotate(self) -> None:
        """Begin a new file, and rename those there are."""
        self._close_fd()
        if self._backups:
            for number in range(self._backups - 1, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{self.path}.{number}", f"{self.path}.{number + 1}")
            os.replace(self.path, f"{self.path}.1")
        else:
            os.unlink(self.path)
        self._open()

    def _started(self) -> bytes:
        versions = {"python": platform.python_version()} | {
            name: version for name in ("robustloader", "torch", "numpy") if (version := _version(name)) is not None
        }
        return self._encode("RunStarted", time.time(), {}, {"versions": versions, "cpus": len(os.sched_getaffinity(0))})

    def _close_fd(self) -> None:
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = None

    def _check_content(self) -> None:
        """Refuse to append to what is not a file of ours; one that cannot be read now is seen to when it is opened."""
        with contextlib.suppress(OSError):
            if os.path.isdir(self.path):
                raise OptionError("path", self.path, "a file, not a folder")
            if not os.path.isfile(self.path):  # nothing yet, or a device or a pipe
                return
            with open(self.path, "rb") as file:
                head = file.read(len(_START))
            if not _START.startswith(head[: len(_START)]):
                raise OptionError("path", self.path, "a new file, or one that a JsonlSink wrote; this one is neither")


def heal(fd: int) -> int:
    """Take away the half line at the end of a file, if there is one; returns the size in bytes.

    Only what begins as our lines do is taken away. Anything else gets the line end that it lacks.
    """
    size = os.fstat(fd).st_size
    if not size:
        return 0
    tail = os.pread(fd, _LONGEST_LINE, max(0, size - _LONGEST_LINE))
    fragment = tail[tail.rfind(b"\n") + 1 :]
    if not fragment:
        return size
    if fragment.startswith(_START) or _START.startswith(fragment):
        os.ftruncate(fd, size - len(fragment))
        return size - len(fragment)
    os.write(fd, b"\n")
    return size + 1


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
