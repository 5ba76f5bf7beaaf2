"""Finding the members of a group that keep it from working, by asking only whether subsets work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustloader.decisions.isolation import find_misfits


class Asked:
    """Counts the questions, and sees that they are proper ones."""

    def __init__(self, works: Callable[[Sequence[int]], bool]) -> None:
        self.works = works
        self.calls = 0

    def __call__(self, members: Sequence[int]) -> bool:
        self.calls += 1
        assert members, "an empty group was asked about"
        assert list(members) == sorted(set(members)), "members out of order or twice"
        return self.works(members)


def same(kinds: Sequence[int]) -> Callable[[Sequence[int]], bool]:
    """As stacking works: a group works when all its members are of one kind."""
    return lambda members: len({kinds[member] for member in members}) <= 1


@given(st.integers(1, 300), st.data())
def test_finds_exactly_the_members_that_never_work(count: int, data: st.DataObject) -> None:
    """Members that fail in any company are found, and nobody else; about ``k log n`` questions a start."""
    bad = data.draw(st.sets(st.integers(0, count - 1), max_size=8))
    ask = Asked(lambda members: not bad.intersection(members))
    assert find_misfits(count, ask) == sorted(bad)
    assert ask.calls <= 3 * (2 + 2 * (len(bad) + 1) * (math.ceil(math.log2(count)) + 1))


@given(st.integers(3, 200), st.data())
def test_finds_the_odd_shapes(count: int, data: st.DataObject) -> None:
    """A minority that does not stack with the others, and stacks by itself, is told from the majority wherever the
    first, the middle or the last member belongs to the majority."""
    odd = data.draw(st.sets(st.integers(0, count - 1), max_size=(count - 1) // 2))
    kinds = [int(member in odd) for member in range(count)]
    if {0, count // 2, count - 1} <= odd:
        return  # no start in the majority: another test says what holds then
    assert find_misfits(count, Asked(same(kinds))) == sorted(odd)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_what_is_left_works(kinds: list[int]) -> None:
    """Whatever the group, the rest works together, and nobody was left out who fits the rest."""
    works = same(kinds)
    out = find_misfits(len(kinds), works)
    kept = [member for member in range(len(kinds)) if member not in out]
    assert not kept or works(kept)
    assert kept
    for member in out:
        assert not works(sorted([*kept, member]))


def test_the_first_one_odd() -> None:
    """All others are not thrown out for its sake."""
    assert find_misfits(64, Asked(same([1] + [0] * 63))) == [0]


@pytest.mark.parametrize("count", [1, 2, 33])
def test_nobody_works(count: int) -> None:
    """Then everybody is a misfit."""
    assert find_misfits(count, lambda members: False) == list(range(count))


@pytest.mark.parametrize("count", [1, 2, 33])
def test_everybody_works(count: int) -> None:
    """What failed once has passed: nobody is left out."""
    assert find_misfits(count, lambda members: True) == []


def test_one_of_a_hundred_is_cheap() -> None:
    """Far fewer questions than members."""
    ask = Asked(lambda members: 57 not in members)
    assert find_misfits(128, ask) == [57]
    assert ask.calls <= 20
