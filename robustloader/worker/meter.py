"""How much memory a worker has for itself, measured no more often than it can matter."""

from __future__ import annotations

import contextlib
import time

import psutil

from robustloader.system import limits

__all__ = ["MemoryMeter"]

_SHARE = 0.05
"""A measurement walks the page tables, about a millisecond per gigabyte: no more of the worker's time than this, ..."""

_CERTAIN = 1.25
"""... unless resident memory has grown so far beyond the bound that there can hardly be a doubt."""

_LOOK_AGAIN_S = 10.0
"""Writing to shared pages makes them private without a change in size: look once in a while all the same."""


class MemoryMeter:
    """Tells when this process holds more memory of its own than ``limit_bytes`` (None: never).

    What counts are private pages, which the end of the process would give back, and not the libraries and the dataset
    that a forked worker shares with its parent, nor the batches in the arena. They are dear to count. Resident memory
    is cheap, and private memory grows at most as fast: so it is measured only when resident memory has grown enough
    since the last time, or pages that were shared may have been written to.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self._limit = limit_bytes
        self._process = psutil.Process() if limit_bytes is not None else None
        self._held = self._resident = 0
        self._due = 0.0

    def excess_bytes(self, peak_bytes: int) -> int:
        """Bytes held, if they are more than allowed; 0 otherwise.

        Args:
            peak_bytes: the most resident memory so far. It cannot have been too much below that.
        """
        if self._limit is None or peak_bytes <= self._limit:
            return 0
        with contextlib.suppress(OSError, psutil.Error):  # out of descriptors: the sample's own error tells of it
            self._measure()
        return self._held if self._held > self._limit else 0

    def _measure(self) -> None:
        assert self._limit is not None
        assert self._process is not None
        now = time.monotonic()
        resident = self._process.memory_info().rss
        may_hold = self._held + max(0, resident - self._resident)
        early = now < self._due and may_hold <= _CERTAIN * self._limit
        needless = may_hold <= self._limit and now < self._due + _LOOK_AGAIN_S
        if self._held and (early or needless):
            return
        self._held, self._resident = limits.private_bytes(), resident
        self._due = now + (time.monotonic() - now) / _SHARE
