"""The rules for limits: numbers in, plans out."""

from __future__ import annotations

import errno

import pytest

from robustloader.decisions.limits import (
    DESCRIPTORS_KEPT,
    DESCRIPTORS_PER_WORKER,
    RECYCLE_AFTER_TASKS,
    Descriptors,
    Memory,
    Processes,
    batches_held,
    exhaustion_hint,
    gib,
    low_memory,
    plan_arena_bytes,
    plan_lookahead,
    plan_recycle,
    plan_relief,
    plan_start,
    shm_remedy,
)

MIB = 1 << 20
ANY = Processes(free=None)


def need(workers: int, used: int = 10) -> int:
    return used + DESCRIPTORS_KEPT + workers * DESCRIPTORS_PER_WORKER


# --- descriptors and processes ----------------------------------------------------------------------------------------


def test_enough_of_everything() -> None:
    """Nothing is changed."""
    plan = plan_start(8, Descriptors(used=10, soft=1024, hard=4096), Processes(free=8, limit="pids.max"))
    assert (plan.workers, plan.soft, plan.shortages) == (8, None, ())


def test_the_soft_limit_is_raised_as_far_as_needed() -> None:
    """And no further."""
    plan = plan_start(8, Descriptors(used=10, soft=64, hard=4096), ANY)
    assert (plan.workers, plan.soft, plan.shortages) == (8, need(8), ())


@pytest.mark.parametrize("hard", range(0, need(8), 7))
def test_fewer_workers_where_the_hard_limit_is_near(hard: int) -> None:
    """As many as fit; the message has the numbers and the remedy."""
    plan = plan_start(8, Descriptors(used=10, soft=hard, hard=hard), ANY)
    assert plan.workers == 0 or need(plan.workers) <= hard
    assert need(plan.workers + 1) > hard
    assert plan.soft is None
    (shortage,) = plan.shortages
    assert shortage.resource == "descriptors"
    assert (shortage.wanted, shortage.free) == (need(8), hard)
    assert str(need(8)) in shortage.text
    assert str(hard) in shortage.text
    assert "ulimit" in shortage.remedy


def test_both_at_once() -> None:
    """The soft limit goes up to the hard one, and that is not enough."""
    plan = plan_start(8, Descriptors(used=10, soft=64, hard=need(5)), ANY)
    assert (plan.workers, plan.soft) == (5, need(5))


def test_fewer_workers_where_processes_are_few() -> None:
    """The tighter of two limits decides, and both are told of."""
    plan = plan_start(8, Descriptors(used=10, soft=need(5), hard=need(5)), Processes(free=3, limit="pids.max in /x"))
    assert plan.workers == 3
    assert [shortage.resource for shortage in plan.shortages] == ["descriptors", "processes"]
    assert "pids.max in /x" in plan.shortages[1].text


# --- memory -----------------------------------------------------------------------------------------------------------


def look(
    free_mib: int, *, prefetch: int = 4, workers: int = 4, min_workers: int = 1, batch_mib: int = 10, here: int = 0
):
    return plan_lookahead(
        prefetch_factor=prefetch,
        workers=workers,
        min_workers=min_workers,
        batch_bytes=batch_mib * MIB,
        batches_here=here,
        memory=Memory(limit_bytes=1000 * MIB, free_bytes=free_mib * MIB),
        fraction=0.1,
    )


def test_all_fits() -> None:
    """4 workers ahead by 4 hold 21 batches of 10 MiB, beside 100 MiB of headroom."""
    assert batches_held(4, 4) == 21
    plan = look(310)
    assert (plan.prefetch_factor, plan.workers, plan.shortage) == (4, 4, None)


def test_prefetch_goes_first_then_workers() -> None:
    """Each only as far as it must."""
    assert [(plan.prefetch_factor, plan.workers) for plan in map(look, (309, 230, 200, 189, 150, 125, 101))] == [
        (3, 4),
        (2, 4),
        (1, 4),
        (1, 3),
        (1, 2),
        (1, 1),
        (1, 1),
    ]


def test_workers_stay_above_their_minimum() -> None:
    """Even where that is too much."""
    assert look(110, min_workers=3).workers == 3


def test_batches_that_are_here_are_paid_for() -> None:
    """Their memory is no longer free."""
    assert look(210, here=0).prefetch_factor < 4
    assert look(210, here=10).shortage is None


def test_low_memory_that_batches_did_not_bring_about() -> None:
    """Without a batch's size, or below the headroom already, the lookahead is short and the workers stay."""
    for plan in (look(99, batch_mib=0), look(50)):
        assert (plan.prefetch_factor, plan.workers) == (1, 4)
        assert plan.shortage is not None
        assert "headroom_fraction=0.1" in plan.shortage.text
    assert look(101, batch_mib=0).shortage is None


def test_the_shortage_has_the_numbers() -> None:
    """For people, and as numbers."""
    shortage = look(200).shortage
    assert shortage is not None
    assert (shortage.wanted, shortage.free) == (310 * MIB, 200 * MIB)
    for word in ("200 MiB", "1,000 MiB", "100 MiB", "210 MiB", "21 batches of 10 MiB"):
        assert word in shortage.text.replace("0.977 GiB", "1,000 MiB"), word


def test_relief_while_an_epoch_runs() -> None:
    """Lookahead, then what it took, then workers down to the minimum, then nothing."""
    steps = []
    prefetch, workers, trimmed = 4, 3, False
    while (
        step := plan_relief(prefetch_factor=prefetch, workers=workers, min_workers=2, can_shrink=True, trimmed=trimmed)
    ) != "none":
        steps.append(step)
        prefetch, trimmed = 1, trimmed or step == "idle"
        workers -= step == "workers"
    assert steps == ["prefetch", "idle", "workers"]
    assert plan_relief(prefetch_factor=1, workers=3, min_workers=2, can_shrink=False, trimmed=True) == "none"


def test_low_is_less_than_the_headroom() -> None:
    """Exactly that much will do."""
    assert low_memory(Memory(limit_bytes=1000, free_bytes=100), 0.1) is None
    assert low_memory(Memory(limit_bytes=1000, free_bytes=99), 0.1) is not None
    assert low_memory(Memory(limit_bytes=1000, free_bytes=0), 0) is None


def test_the_arena_is_finite() -> None:
    """Half of what is free above the headroom, never negative; a bound of the user's stands."""
    memory = Memory(limit_bytes=1000, free_bytes=300)
    assert plan_arena_bytes(None, memory, 0.1) == 100
    assert plan_arena_bytes(None, memory, 0.5) == 0
    assert plan_arena_bytes(7, memory, 0.1) == 7


# --- recycling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "limit", "finished", "verdict"),
    [
        (101, 100, RECYCLE_AFTER_TASKS, "recycle"),
        (100, 100, RECYCLE_AFTER_TASKS, "keep"),
        (101, None, RECYCLE_AFTER_TASKS, "keep"),
        (101, 100, RECYCLE_AFTER_TASKS - 1, "too low"),
    ],
)
def test_recycling(held: int, limit: int | None, finished: int, verdict: str) -> None:
    """A worker above its bound goes, unless it has only just come."""
    assert plan_recycle(held_bytes=held, limit_bytes=limit, finished=finished) == verdict


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (errno.EMFILE, "ulimit -n"),
        (errno.ENFILE, "fs.file-max"),
        (errno.ENOSPC, "--shm-size"),
        (errno.EDQUOT, "quota"),
        (errno.ENOMEM, "memory"),
    ],
)
def test_hints(number: int, word: str) -> None:
    """Each names what ran out and what to do."""
    assert word in exhaustion_hint(OSError(number, "x"))


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "x"), OSError("x"), ValueError(24), KeyError(errno.EMFILE)])
def test_other_errors_have_no_hint(error: Exception) -> None:
    """They are the data's."""
    assert exhaustion_hint(error) == ""


def test_sizes_for_people() -> None:
    """In the unit that fits."""
    assert [gib(size) for size in (0, 2048, 38 * MIB, 64 << 30, 2000 << 30)] == [
        "0 KiB",
        "2 KiB",
        "38 MiB",
        "64 GiB",
        "2,000 GiB",
    ]


def test_remedies_for_shared_memory() -> None:
    """Each in its own words."""
    assert "docker run --shm-size" in shm_remedy("docker")
    assert "podman run --shm-size" in shm_remedy("podman")
    assert "medium: Memory" in shm_remedy("kubernetes")
    assert "mount -o remount" in shm_remedy("none")
