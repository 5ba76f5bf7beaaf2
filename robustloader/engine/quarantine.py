"""The dead-letter file: samples that failed for good, one JSON object a line, kept across runs."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import KeysView
from typing import Any

from robustloader.decisions.keys import Key, index_key
from robustloader.errors import OptionError, warn_user
from robustloader.events import FaultKind, FaultRecord

__all__ = ["KILLERS", "Quarantine"]

SCHEMA = 1

KILLERS: frozenset[FaultKind] = frozenset(("poison", "hang"))
"""Samples that take a worker along: left out for the rest of the run, with or without a file."""


class Quarantine:
    """The keys of samples that must not be fetched, and the file behind them, if there is one.

    Args:
        path: the file; read now, appended to later, never rewritten. It may not exist yet, its folder must.

    Raises:
        OptionError: the file cannot be read, or a line of it is not one of ours. The file is left as it is.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._path = None if path is None else os.path.abspath(path)  # now: the program may change its folder
        self._writable = True
        self.kinds: dict[Key, FaultKind] = {}
        self.added: dict[Key, FaultKind] = {}
        if self._path is not None:
            self.kinds.update(_read(self._path))

    @property
    def keys(self) -> KeysView[Key]:
        """Which samples are known to be bad."""
        return self.kinds.keys()

    def add(self, index: Any, kind: FaultKind = "poison") -> None:
        """Never fetch this sample again in this run."""
        self.restore(index_key(index), kind)

    def restore(self, key: Key, kind: FaultKind) -> None:
        """The same, for a key that a state has kept. ``added`` holds what is not, or not only, in the file."""
        self.kinds[key] = self.added[key] = kind

    def record(self, fault: FaultRecord) -> None:
        """Never fetch this sample again in this run or, through the file, in a later one."""
        if self._path is None:
            return
        key = index_key(fault.index)
        if key in self.kinds and fault.kind not in KILLERS:
            return
        self.kinds[key] = fault.kind
        line = json.dumps(
            {
                "schema": SCHEMA,
                "key": key,
                "kind": fault.kind,
                "error_type": fault.error_type,
                "message": fault.message,
                "epoch": fault.epoch,
                "time": fault.time,
            }
        )
        try:
            # One write in append mode: several ranks may share the file, and a kill leaves no half line.
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                _append(fd, line.encode() + b"\n")
            finally:
                os.close(fd)
        except OSError as error:
            if self._writable:
                self._writable = False
                warn_user(
                    f"cannot append to the quarantine file {self._path!r} ({error}); "
                    "bad samples are still left out in this run, but the next run will meet them again"
                )


def _append(fd: int, line: bytes) -> None:
    before = os.fstat(fd).st_size
    written = os.write(fd, line)
    if written < len(line):  # the disk is full: half a line would make the file unreadable at the next start
        os.ftruncate(fd, before)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _read(path: str) -> dict[Key, FaultKind]:
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise OptionError("quarantine", path, f"a path in an existing folder ({folder!r} does not exist)")
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().split("\n")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError("quarantine", path, f"a readable JSON-lines file ({error})") from error
    keys: dict[Key, FaultKind] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            schema, key = entry["schema"], entry["key"]
        except (ValueError, TypeError, KeyError) as error:
            raise OptionError(
                "quarantine",
                path,
                f"a quarantine file written by this package, but its line {number} is not "
                f"({type(error).__name__}: {error}); mend or move the file, it was not changed",
            ) from error
        if schema != SCHEMA or not isinstance(key, (int, str)) or isinstance(key, bool):
            raise OptionError(
                "quarantine",
                path,
                f"a quarantine file of schema {SCHEMA}, but its line {number} is not; it was not changed",
            )
        keys[key] = entry.get("kind", "exception")
    return keys
