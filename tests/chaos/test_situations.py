"""The table of situations: every two values of two columns meet in some test here; ``make chaos`` runs all of it."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.chaos import full
from tests.chaos.situations import METHODS, PRODUCT, TRANSPORTS, Mode, Situation, run

Runs = tuple[tuple[Situation, Mode], ...]


def pairs_of(row: Situation, mode: Mode) -> set[Any]:
    """Every two of the values that a run has in its columns."""
    values = (row.name, mode.method, mode.transport, mode.kind, mode.persistent, mode.child)
    return set(itertools.combinations(enumerate(values), 2))


def select(table: Runs) -> Runs:
    """Few runs in which every pair of values meets that meets in the table: always the one with most that is new."""
    left = {run: pairs_of(*run) for run in table}
    chosen = []
    while left:
        best = max(left, key=lambda run: len(left[run]))
        covered = left.pop(best)
        chosen.append(best)
        left = {run: pairs - covered for run, pairs in left.items() if pairs - covered}
    return tuple(chosen)


SELECTION = select(PRODUCT)


@pytest.mark.parametrize(("row", "mode"), SELECTION, ids=[f"{row.number}-{row.name}-{mode}" for row, mode in SELECTION])
def test_situation(row: Situation, mode: Mode, tmp_path: Path) -> None:
    """What must hold does."""
    run(row, mode, tmp_path)


def test_the_selection_covers_all_pairs() -> None:
    """Each pair of values that the whole table has, the selection has."""

    def pairs(table: Runs) -> set[Any]:
        return {pair for run in table for pair in pairs_of(*run)}

    assert pairs(SELECTION) == pairs(PRODUCT)
    assert len(SELECTION) < len(PRODUCT) / 4
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


def test_the_full_table_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run is noted, one that fails with what it said; started again, what is done is not done again."""
    path = tmp_path / "result.json"
    good, bad = "5 a_result_that_cannot_be_pickled fork-arena-map", "0 fails fork-arena-map"
    setting = {"commit": {"hash": "0123", "package": "4567", "dirty": False}}
    monkeypatch.setattr(full, "describe", lambda *code: setting)
    monkeypatch.setattr(
        full,
        "RUNS",
        {good: full.RUNS[good], bad: (Situation(0, "fails", fails, lambda mode: True), full.RUNS[good][1])},
    )
    assert full.main(["--only", good, "--rounds", "2", "-o", str(path)]) == 0
    assert full.main(["--rounds", "2", "-o", str(path)]) == 1
    result = json.loads(path.read_text())
    counts = {name: (row["passed"], row["failed"], len(row["seconds"])) for name, row in result["rows"].items()}
    assert counts == {good: (2, 0, 2), bad: (0, 2, 2)}
    assert "as it must" in result["rows"][bad]["problems"][0]
    assert (result["passed"], result["failed"], result["ok"]) == (2, 2, False)
    assert full.main(["--only", good, "--anew", bad, "--rounds", "2", "-o", str(path)]) == 0
    again = json.loads(path.read_text())["rows"]
    assert again[good] == result["rows"][good]
    assert again[bad]["failed"] == 0
    monkeypatch.setattr(full, "loaded", lambda: "other code")
    assert full.main(["--only", "nothing", "--rounds", "2", "-o", str(path)]) == 0
    assert json.loads(path.read_text())["passed"] == 0


def test_the_code_that_rows_load_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one once a module of the package that is loaded changes, whatever others are changed."""
    before = full.loaded()
    module = ModuleType("robustloader.another")
    module.__file__ = str(tmp_path / "another.py")
    Path(module.__file__).write_text("x = 1\n")
    assert full.loaded() == before
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with_it = full.loaded()
    Path(module.__file__).write_text("x = 2\n")
    assert len({before, with_it, full.loaded()}) == 3
