"""A short soak: dozens of kills at random moments over random configurations, and nothing is wrong afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import soak


def test_a_short_soak(tmp_path: Path) -> None:
    """``make soak`` for a few seconds."""
    path = tmp_path / "result.json"
    assert soak.main(["--seconds", "15", "--seed", "5", "-o", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["problems"] == []
    assert result["counts"]["deaths"] >= 20


def test_a_short_conviction_run(tmp_path: Path) -> None:
    """``make soak`` with ``--convict``, for a few seconds."""
    path = tmp_path / "result.json"
    assert soak.main(["--convict", "--seconds", "8", "--seed", "5", "-o", str(path)]) == 0
    assert json.loads(path.read_text())["counts"]["deaths"] >= 1


def test_a_soak_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Samples that are not what they should be, and memory that grows."""
    path = tmp_path / "result.json"
    honest = soak.Samples.__getitem__

    def damaged(self: soak.Samples, index: int) -> object:
        content = honest(self, index)
        content[-1] += index == 3
        return content

    case = soak.Case("map", "fork", soak.TRANSPORTS[0], 1, 2, True, "worker", 2, 64, 0.0, 10, 1, False, False, 60.0, 1)
    monkeypatch.setattr(soak.Samples, "__getitem__", damaged)
    monkeypatch.setattr(soak.Case, "draw", lambda rng: case)
    assert soak.main(["--seconds", "0.1", "-o", str(path)]) == 1
    (first, *_) = json.loads(path.read_text())["problems"]
    assert "damaged" in first["problem"]
    assert soak.growth_bytes([0] * 12 + [1 << 30] * 4) == 1 << 30
    assert soak.growth_bytes([1 << 30] * 4 + [5] * 12) == 0


@pytest.mark.parametrize(
    ("delivered", "problem"),
    [([[0, 1], [2, 3]], "lost"), ([[0, 1], [2, 3], [2, 3]], "twice"), ([[2, 3], [0, 1], [4, 5]], "out of order")],
)
def test_the_check_of_an_epoch_can_fail(delivered: list[list[int]], problem: str) -> None:
    """A lost batch, a doubled one, two in the wrong order."""
    case = soak.Case("map", "fork", "pipe", 1, 2, True, "worker", 2, 64, 0.0, 3, 1, False, False, 60.0, 1)
    with pytest.raises(AssertionError, match=problem):
        soak.check_epoch(case, delivered, [batch[0] // 2 for batch in delivered])
