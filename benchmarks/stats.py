"""The few statistics that the results are made of. Pure: numbers in, numbers out."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Interval", "Spread", "paired_ratio", "spread"]

DRAWS = 2_000
"""Resamples per interval: the ends of a 95 % interval then lie still to about a tenth of its width."""


class Spread(NamedTuple):
    """The median and the quartiles."""

    median: float
    low: float
    high: float


class Interval(NamedTuple):
    """A median ratio and the 95 % bootstrap interval of that median."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def paired_ratio(above: Sequence[float], below: Sequence[float], *, seed: int = 0) -> Interval:
    """The median of ``above / below``, round by round: what slows both in one round leaves its ratio alone.

    The interval is the percentile bootstrap over rounds: rounds, not batches, are what is independent.

    Raises:
        ValueError: the two do not have the same rounds, or none.
    """
    if len(above) != len(below) or not above:
        raise ValueError(f"paired rounds are needed, got {len(above)} and {len(below)}")
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    chance = random.Random(seed)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(DRAWS))
    tail = round(DRAWS * 0.025)
    return Interval(statistics.median(ratios), medians[tail], medians[-1 - tail])
