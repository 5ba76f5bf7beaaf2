"""The samples that failed, kept for the user to read: the newest ones in full, all of them counted."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, overload

from robustloader.errors import OptionError
from robustloader.events import FaultRecord
from robustloader.telemetry.units import as_line

__all__ = ["FaultLog"]

# A record with its traceback takes about 2 KB, so that a full log holds about 20 MB.
_CAPACITY = 10_000
_SHOWN = 20
_COLUMNS = (8, 11, 16, 44, 12)


class FaultLog(Sequence[FaultRecord]):
    """The newest :class:`~robustloader.FaultRecord` objects, oldest first, and counts of all there ever were.

    Samples that failed and then loaded ("retried") and samples that were known to be bad ("quarantined") are in the
    log too: look at ``action``. Appending and reading are safe from any thread.

    Args:
        capacity: how many records are kept, a whole number; older ones are dropped, but stay counted.
    """

    # Without a lock, since loaders are copied and pickled, and since a lock held while another thread forks would be
    # held for ever in the child: appending to a deque is atomic, and each thread counts in a tally of its own.

    def __init__(self, capacity: int = _CAPACITY) -> None:
        if not isinstance(capacity, int) or capacity < 1:
            raise OptionError("capacity", capacity, "a whole number of at least 1")
        self._records: deque[FaultRecord] = deque(maxlen=capacity)
        self._tallies: dict[int, dict[tuple[str, str], int]] = {}

    @property
    def total(self) -> int:
        """How many records there ever were, the dropped ones included."""
        return sum(self._counts().values())

    @property
    def dropped(self) -> int:
        """How many of the oldest records are no longer kept."""
        return max(0, self.total - len(self))

    def append(self, record: FaultRecord) -> None:
        """Add a record."""
        self._records.append(record)
        tally = self._tallies.setdefault(threading.get_ident(), {})
        key = (record.kind, record.error_type)
        tally[key] = tally.get(key, 0) + 1

    def by_kind(self) -> dict[str, int]:
        """How many records there ever were of each kind, most frequent first."""
        return self._sums(0)

    def by_error_type(self) -> dict[str, int]:
        """How many records there ever were of each exception type (empty: none, as in a crash), most frequent first."""
        return self._sums(1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the kept records as JSON lines, oldest first; an index that is not JSON-able is written as ``repr``.

        The file appears at once or not at all: what was there before is replaced only when all is written.

        Args:
            path: the file to write; its folder must exist.

        Raises:
            OSError: the file cannot be written.
        """
        target = Path(path)
        draft = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            with draft.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(_plain(record)) + "\n" for record in self)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise

    @overload
    def __getitem__(self, index: int) -> FaultRecord: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[FaultRecord, ...]: ...
    def __getitem__(self, index: int | slice) -> FaultRecord | tuple[FaultRecord, ...]:
        if isinstance(index, slice):
            return tuple(self._records.copy())[index]
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[FaultRecord]:
        # A copy is atomic; a deque that grows while it is iterated raises.
        return iter(self._records.copy())

    def __repr__(self) -> str:
        kinds = ", ".join(f"{kind} {number}" for kind, number in self.by_kind().items())
        return f"<FaultLog: {self.total} records{f' ({kinds})' if kinds else ''}, {self.dropped} dropped>"

    def __str__(self) -> str:
        """A table of the newest 20 records."""
        if not self.total:
            return "no faults"
        newest = self[-_SHOWN:]
        kinds = ", ".join(f"{kind} {number:,}" for kind, number in self.by_kind().items())
        header = f"fault records: {self.total:,} ({kinds})"
        if len(newest) < self.total:
            header += f", the newest {len(newest)}"
        if self.dropped:
            header += f", {self.dropped:,} older ones dropped"
        rows = [("time", "kind", "index", "error", "action"), *map(_row, newest)]
        return "\n".join([header, *("  ".join(map(_cell, row, _COLUMNS)).rstrip() for row in rows)])

    def __getstate__(self) -> dict[str, Any]:
        tallies = {thread: dict(tally) for thread, tally in list(self._tallies.items())}
        return {"_records": self._records.copy(), "_tallies": tallies}

    def __deepcopy__(self, memo: dict[int, Any]) -> FaultLog:
        # Records never change, and what they hold (indices of any type) need not be copyable.
        copied = FaultLog.__new__(FaultLog)
        copied.__dict__.update(self.__getstate__())
        return copied

    def _counts(self) -> Counter[tuple[str, str]]:
        counts: Counter[tuple[str, str]] = Counter()
        for tally in list(self._tallies.values()):
            counts.update(dict(tally))
        return counts

    def _sums(self, part: int) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for key, number in self._counts().items():
            sums[key[part]] += number
        return dict(sums.most_common())


def _plain(record: FaultRecord) -> dict[str, Any]:
    """The record as a JSON-able dict. ``asdict`` would deep-copy indices, which may be any object."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {**values, "index": _jsonable(record.index), "replacement": _jsonable(record.replacement)}


def _jsonable(index: Any) -> Any:
    try:
        json.dumps(index, allow_nan=False)
    except Exception:
        return _repr(index)
    return index


def _repr(index: Any) -> str:
    try:
        return repr(index)
    except Exception:
        return object.__repr__(index)


def _row(record: FaultRecord) -> tuple[str, ...]:
    clock = time.strftime("%H:%M:%S", time.localtime(record.time))
    name = record.error_type.rpartition(".")[2]
    error = f"{name}: {record.message}" if name else record.message or record.signal or ""
    return clock, record.kind, _repr(record.index), error, record.action


def _cell(text: str, width: int) -> str:
    text = " ".join(as_line(text).split())
    return f"{text:<{width}}" if len(text) <= width else text[: width - 1] + "…"
