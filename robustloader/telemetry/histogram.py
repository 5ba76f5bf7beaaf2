"""Durations counted in buckets of fixed relative width: cheap to add to, small, and good for percentiles.

The buckets are log-linear, as in HdrHistogram (http://hdrhistogram.org): every power of two is cut into 16 equal parts,
so that a bucket is 3 to 6 % wide and finding it takes a shift and ``int.bit_length``, no logarithm.
"""

from __future__ import annotations

import math

from robustloader.errors import OptionError

__all__ = ["LogHistogram"]

# Counting in units of 64 ns lets 1 µs fall in the first power of two that has 16 whole parts.
_UNIT_BITS = 6
_PART_BITS = 4
_PARTS = 1 << _PART_BITS
# 2**42 ns is 73 minutes; longer durations share the last bucket.
_BUCKETS = (42 - _UNIT_BITS - _PART_BITS) * _PARTS + _PARTS


class LogHistogram:
    """A histogram of durations from 1 µs to 73 min, with at most 3.2 % error in any percentile.

    Shorter durations are told apart to 64 ns, longer ones count as 73 min (``total_ns`` stays exact). One thread adds;
    any thread may read, and sees a state at most a few additions old.

    Attributes:
        count: how many durations were added.
        total_ns: their exact sum, in nanoseconds.
    """

    __slots__ = ("_buckets", "count", "total_ns")

    def __init__(self) -> None:
        self.count = 0
        self.total_ns = 0
        self._buckets = [0] * _BUCKETS

    def add(self, ns: int) -> None:
        """Count one duration.

        Args:
            ns: the duration in nanoseconds; a negative one counts as 0.
        """
        if ns < 0:
            ns = 0
        self.count += 1
        self.total_ns += ns
        units = ns >> _UNIT_BITS
        shift = units.bit_length() - _PART_BITS - 1
        if shift > 0:
            units = (shift << _PART_BITS) + (units >> shift)
        try:
            self._buckets[units] += 1
        except IndexError:
            self._buckets[-1] += 1

    def merge(self, other: LogHistogram) -> None:
        """Add everything that ``other`` counted."""
        self.count += other.count
        self.total_ns += other.total_ns
        self._buckets = [a + b for a, b in zip(self._buckets, other._buckets, strict=True)]

    def percentile(self, fraction: float) -> float:
        """The duration that a given share of all durations does not exceed (nearest rank).

        Args:
            fraction: 0 (the shortest) to 1 (the longest); 0.95 is the 95th percentile.

        Returns:
            The middle of the bucket that holds it, in seconds; 0.0 when nothing was added.

        Raises:
            OptionError: ``fraction`` is not between 0 and 1.
        """
        if not 0.0 <= fraction <= 1.0:
            raise OptionError("fraction", fraction, "a number from 0 to 1")
        buckets = self._buckets.copy()
        rank = max(1, math.ceil(fraction * sum(buckets)))
        for place, number in enumerate(buckets):
            rank -= number
            if rank <= 0:
                return _middle_ns(place) * 1e-9
        return 0.0

    def __repr__(self) -> str:
        return f"<LogHistogram: {self.count} durations, {self.total_ns * 1e-9:.3g} s in total>"


def _middle_ns(place: int) -> float:
    """The middle of a bucket, in nanoseconds."""
    shift = max(0, (place >> _PART_BITS) - 1)
    lower = place - (shift << _PART_BITS) << shift
    return (lower + (1 << shift) / 2) * (1 << _UNIT_BITS)
