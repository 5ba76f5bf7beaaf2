"""The table of situations: every two values of two columns meet in some test here; ``make chaos`` runs all of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from allpairspy import AllPairs

from tests.chaos.situations import KINDS, METHODS, PRODUCT, SITUATIONS, TRANSPORTS, Mode, Situation, run

COLUMNS: list[list[Any]] = [SITUATIONS, list(METHODS), list(TRANSPORTS), list(KINDS), [False, True], [False, True]]


def possible(values: list[Any]) -> bool:
    """Whether some row of the table begins with these values."""
    return any(
        all(mine == theirs for mine, theirs in zip(values, as_values(row, mode), strict=False)) for row, mode in PRODUCT
    )


def as_values(row: Situation, mode: Mode) -> list[Any]:
    return [row, mode.method, mode.transport, mode.kind, mode.persistent, mode.child]


SELECTION = [(values[0], Mode(*values[1:])) for values in AllPairs(COLUMNS, filter_func=possible)]


@pytest.mark.parametrize(("row", "mode"), SELECTION, ids=[f"{row.number}-{row.name}-{mode}" for row, mode in SELECTION])
def test_situation(row: Situation, mode: Mode, tmp_path: Path) -> None:
    """What must hold does."""
    run(row, mode, tmp_path)


def test_the_selection_covers_all_pairs() -> None:
    """Each pair of values that the whole table has, the selection has."""

    def pairs(table: Any) -> set[Any]:
        return {
            pair
            for row, mode in table
            for pair in itertools.combinations(enumerate([row.name, *as_values(row, mode)[1:]]), 2)
        }

    assert pairs(SELECTION) == pairs(PRODUCT)
    assert set(SELECTION) <= set(PRODUCT)


def test_every_situation_is_there() -> None:
    """The numbers from 1 to 13, under each start method."""
    for method in METHODS:
        assert {row.number for row, mode in PRODUCT if mode.method == method} == set(range(1, 14))


def fails(mode: Mode, folder: Path) -> None:
    raise AssertionError("as it must")


@pytest.mark.parametrize("child", [False, True])
def test_a_row_can_fail(child: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a child, whose words are heard."""
    row = Situation(0, "fails", fails, lambda mode: True)
    monkeypatch.setattr("tests.chaos.situations.SITUATIONS", [row])
    with pytest.raises(AssertionError, match="as it must"):
        run(row, Mode("fork", TRANSPORTS[0], "map", False, child), tmp_path)
