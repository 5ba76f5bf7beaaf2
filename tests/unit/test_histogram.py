"""Percentiles stay within the promised error, whatever the durations."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustloader.errors import OptionError
from robustloader.telemetry import LogHistogram

MICROSECOND, HOUR = 1_000, 3_600_000_000_000
durations = st.lists(st.integers(MICROSECOND, HOUR), min_size=1, max_size=200)


def filled(values: list[int]) -> LogHistogram:
    histogram = LogHistogram()
    for value in values:
        histogram.add(value)
    return histogram


@given(durations, st.floats(0.0, 1.0))
def test_percentile_is_the_nearest_rank_within_the_bucket_error(values: list[int], fraction: float) -> None:
    """Any percentile is within 3.2 % of the one sorting gives."""
    exact = np.percentile(values, 100 * fraction, method="inverted_cdf") * 1e-9
    assert filled(values).percentile(fraction) == pytest.approx(exact, rel=0.032)


@given(durations)
def test_count_and_total_are_exact(values: list[int]) -> None:
    histogram = filled(values)
    assert (histogram.count, histogram.total_ns) == (len(values), sum(values))


@given(durations, durations)
def test_merging_equals_adding_everything_to_one(left: list[int], right: list[int]) -> None:
    merged = filled(left)
    merged.merge(filled(right))
    both = filled(left + right)
    assert (merged.count, merged.total_ns, merged._buckets) == (both.count, both.total_ns, both._buckets)


@given(st.integers(-(10**20), 10**20))
def test_any_integer_is_counted_once(value: int) -> None:
    """Clocks that jump and hours without end neither raise nor wrap round."""
    histogram = filled([value])
    assert sum(histogram._buckets) == histogram.count == 1
    assert histogram.total_ns == max(0, value)
    assert 0.0 <= histogram.percentile(1.0) < 1.3 * HOUR * 1e-9


@given(st.integers(0, HOUR), st.integers(0, HOUR))
def test_longer_durations_never_fall_in_lower_buckets(a: int, b: int) -> None:
    short, long = sorted((a, b))
    assert filled([short]).percentile(0.5) <= filled([long]).percentile(0.5)


def test_an_empty_histogram_has_zero_percentiles() -> None:
    assert LogHistogram().percentile(0.95) == 0.0


@pytest.mark.parametrize("fraction", [-0.1, 1.1, 95, float("nan")])
def test_percentile_refuses_what_is_no_fraction(fraction: float) -> None:
    with pytest.raises(OptionError, match="fraction"):
        LogHistogram().percentile(fraction)


def test_it_pickles() -> None:
    copied = pickle.loads(pickle.dumps(filled([5_000, 7_000])))
    assert (copied.count, copied.total_ns) == (2, 12_000)
    assert "2 durations" in repr(copied)
