"""Spares come from the sampler's own indices, and depend on nothing that happens at run time."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from robustloader.decisions.spares import SpareReservoir

BATCHES = st.lists(st.lists(st.integers(0, 10_000), max_size=70), min_size=1, max_size=40)


def filled(batches: list[list[int]], *, seed: int = 1, epoch: int = 0, capacity: int = 1024) -> SpareReservoir:
    reservoir = SpareReservoir(seed=seed, epoch=epoch, capacity=capacity)
    for task, indices in enumerate(batches):
        reservoir.observe(task, indices)
    return reservoir


@given(BATCHES, st.integers(-(2**70), 2**70), st.integers(0, 100), st.integers(1, 32), st.integers(0, 50))
def test_only_indices_that_were_observed(
    batches: list[list[int]], seed: int, epoch: int, capacity: int, count: int
) -> None:
    """Whatever the seed and the size, a spare is something the sampler yielded."""
    reservoir = filled(batches, seed=seed, epoch=epoch, capacity=capacity)
    seen = {index for indices in batches for index in indices}
    spares = reservoir.draw(len(batches) - 1, count)
    assert set(spares) <= seen
    assert len(spares) <= count
    assert len(reservoir) <= capacity
    assert bool(spares) == (bool(seen) and count > 0)


@given(BATCHES, st.integers(0, 2**63), st.integers(0, 20), st.integers(1, 8))
def test_the_same_walk_gives_the_same_spares(batches: list[list[int]], seed: int, task: int, round: int) -> None:
    """Determined by seed, epoch, task, round and the walk; drawing changes nothing."""
    one, other = filled(batches, seed=seed), filled(batches, seed=seed)
    for _ in range(3):
        one.draw(task + 1, 5)
    assert one.draw(task, 4, round=round) == other.draw(task, 4, round=round)


def test_slots_of_one_draw_are_different() -> None:
    """A draw does not offer one slot twice."""
    reservoir = filled([list(range(k * 8, k * 8 + 8)) for k in range(64)])
    for task in range(64):
        for count in (1, 4, 12, 40):
            spares = reservoir.draw(task, count)
            assert len(set(spares)) == len(spares)


def test_enough_are_drawn() -> None:
    """With plenty to draw from, a draw is as long as it was asked to be."""
    for size in (8, 64, 100, 1_000):
        reservoir = filled([[k] for k in range(size)])
        lengths = {len(reservoir.draw(task, 6)) for task in range(5, size)}
        assert lengths == {6}, f"of {size}"


def test_small_reservoirs_are_used_up() -> None:
    """Where there are fewer spares than wanted, every one of them is offered: the only good one may be any."""
    for size in (1, 2, 3, 4, 6, 8, 9, 12):
        for seed in range(100):
            reservoir = filled([[k] for k in range(size)], seed=seed)
            assert set(reservoir.draw(size - 1, size)) == set(range(size)), f"{size} spares, seed {seed}"


def test_rounds_differ() -> None:
    """A task that could not be filled gets others the next time."""
    reservoir = filled([[k] for k in range(1_000)])
    draws = {reservoir.draw(900, 4, round=round) for round in range(1, 9)}
    assert len(draws) == 8


@given(BATCHES, st.integers(0, 39), st.integers(1, 8), st.integers(0, 39))
def test_how_far_the_walk_has_got_does_not_matter(
    batches: list[list[int]], task: int, round: int, further: int
) -> None:
    """A task draws the same from a walk that has just got far enough for it and from one that is far ahead."""
    enough = filled(batches[: task + round])
    ahead = filled(batches[: task + round + further])
    assert enough.draw(task, 6, round=round) == ahead.draw(task, 6, round=round)


def test_later_rounds_reach_the_tasks_that_follow() -> None:
    """A task whose own indices are all bad, at the very beginning, finds those of the next tasks."""
    reservoir = filled([[0], [1], [2], [3]])
    assert reservoir.draw(0, 9) == (0,)
    assert set(reservoir.draw(0, 9, round=3)) == {0, 1, 2}


def test_closed_tasks_are_forgotten() -> None:
    """What is kept for draws follows the tasks under way, not the length of the epoch."""
    reservoir = filled([])
    for task in range(10_000):
        reservoir.observe(task, [task])
        if task >= 5:
            reservoir.close(task - 5)
    assert len(reservoir._open) == 5
    assert len(reservoir._changes) <= 6
    assert len(reservoir._offers) <= 6
    assert reservoir.draw(9_997, 4)
    assert reservoir.draw(3, 4) == ()


def test_seed_epoch_and_task_matter() -> None:
    """Two epochs do not replace alike."""
    batches = [[k] for k in range(500)]
    base = filled(batches).draw(3, 4)
    assert filled(batches, seed=2).draw(3, 4) != base
    assert filled(batches, epoch=1).draw(3, 4) != base
    assert filled(batches).draw(4, 4) != base


def test_variety_over_a_long_epoch() -> None:
    """Late indices get in: spares do not all come from the beginning."""
    reservoir = filled([list(range(k * 32, k * 32 + 32)) for k in range(2_000)], capacity=64)
    drawn: list[Any] = [spare for task in range(1_800, 2_000) for spare in reservoir.draw(task, 4)]
    assert len(set(drawn)) > 30
    assert sum(spare >= 32_000 for spare in drawn) > len(drawn) // 10


def test_any_object_is_an_index() -> None:
    """Indices need not be hashable, nor comparable."""
    batches: list[list[Any]] = [[{"path": "a"}, ["b", 1]], [object()]]
    reservoir = filled(batches)  # type: ignore[arg-type]
    assert len(reservoir) == 3
    assert all(any(spare is index for indices in batches for index in indices) for spare in reservoir.draw(1, 3))
