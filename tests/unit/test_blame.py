"""Who is to blame for a death. Healthy samples must never be convicted, poison always is."""

from __future__ import annotations

import random

import pytest

from robustloader.decisions.blame import OUTSIDE_TRIALS, Blame, Cause

PROOF: tuple[Cause, ...] = ("crash", "exit", "shared memory", "hang")
OUTSIDE: tuple[Cause, ...] = ("killed", "unknown")


@pytest.mark.parametrize("cause", PROOF)
@pytest.mark.parametrize("poison_after", [1, 2, 5])
def test_a_sample_that_crashes_is_tried_and_convicted(cause: Cause, poison_after: int) -> None:
    """``poison_after`` deaths bring the trial, one death in the trial convicts, all deaths are given back."""
    blame = Blame(poison_after)
    for _ in range(poison_after - 1):
        assert blame.sample_died(7, cause, on_trial=False).action == "replay"
    assert blame.sample_died(7, cause, on_trial=False).action == "trial"
    verdict = blame.sample_died(7, cause, on_trial=True)
    assert (verdict.action, verdict.refund, verdict.deaths) == ("convict", poison_after + 1, poison_after + 1)
    assert blame.deaths_of(7) == 0


@pytest.mark.parametrize("cause", [*PROOF, *OUTSIDE, "memory"])
def test_no_number_of_deaths_convicts_without_a_trial(cause: Cause) -> None:
    """Only a death in the trial convicts."""
    blame = Blame(2)
    actions = {blame.sample_died(7, cause, on_trial=False).action for _ in range(100)}
    assert actions == {"replay", "trial"}


@pytest.mark.parametrize("cause", OUTSIDE)
def test_a_kill_from_outside_needs_several_trials_in_a_row(cause: Cause) -> None:
    """SIGKILL without a sign of the memory killer may have hit the trial by chance."""
    blame = Blame(1)
    blame.sample_died(7, cause, on_trial=False)
    actions = [blame.sample_died(7, cause, on_trial=True).action for _ in range(OUTSIDE_TRIALS)]
    assert actions == ["trial"] * (OUTSIDE_TRIALS - 1) + ["convict"]


def test_an_acquittal_forgets_everything() -> None:
    """A sample that survives its trial begins anew, and so does its count of trials."""
    blame = Blame(1)
    for _ in range(20):
        assert blame.sample_died(7, "killed", on_trial=False).action == "trial"
        for _ in range(OUTSIDE_TRIALS - 1):
            assert blame.sample_died(7, "killed", on_trial=True).action == "trial"
        blame.acquit(7)
        assert blame.deaths_of(7) == 0


def test_the_first_memory_kill_blames_nobody() -> None:
    """The kernel takes whoever is largest."""
    blame = Blame(1)
    assert blame.sample_died(7, "memory", on_trial=False).action == "replay"
    assert blame.sample_died(7, "memory", on_trial=False).action == "trial"
    assert blame.sample_died(7, "memory", on_trial=True).action == "convict"


def test_a_first_memory_kill_in_a_trial_repeats_it() -> None:
    """It may have been anybody's memory."""
    blame = Blame(1)
    assert blame.sample_died(7, "crash", on_trial=False).action == "trial"
    assert blame.sample_died(7, "memory", on_trial=True).action == "trial"
    assert blame.sample_died(7, "memory", on_trial=True).action == "convict"


def test_cases_are_kept_apart() -> None:
    """Deaths of one sample say nothing about another."""
    blame = Blame(2)
    assert blame.sample_died(1, "crash", on_trial=False).action == "replay"
    assert blame.sample_died("s:1", "crash", on_trial=False).action == "replay"
    assert blame.sample_died(1, "crash", on_trial=False).action == "trial"


@pytest.mark.parametrize("poison_after", [1, 2, 3])
def test_a_task_is_loaded_carefully_and_then_condemned(poison_after: int) -> None:
    """When no sample can be named, the whole task goes in the end, with its deaths given back."""
    blame = Blame(poison_after)
    assert blame.task_died(3, "crash", careful=False).action == "careful"
    deaths = 1
    while (verdict := blame.task_died(3, "crash", careful=True)).action == "careful":
        deaths += 1
        assert deaths < 20
    assert verdict.action == "condemn"
    assert verdict.refund == verdict.deaths == deaths + 1 == poison_after + 1


def test_a_task_is_never_condemned_before_it_was_loaded_carefully() -> None:
    """Careless deaths, however many, only ask for care."""
    blame = Blame(1)
    assert {blame.task_died(3, "crash", careful=False).action for _ in range(50)} == {"careful"}


@pytest.mark.parametrize("cause", [*OUTSIDE, "memory"])
def test_a_task_killed_from_outside_has_more_chances(cause: Cause) -> None:
    """As many more as a sample's trial has."""
    blame = Blame(2)
    actions = [blame.task_died(3, cause, careful=True).action for _ in range(3 + OUTSIDE_TRIALS)]
    assert actions == ["careful"] * (2 + OUTSIDE_TRIALS) + ["condemn"]


def test_a_task_that_came_back_is_clear() -> None:
    """Its deaths are forgotten."""
    blame = Blame(1)
    blame.task_died(3, "crash", careful=False)
    blame.arrived(3)
    assert blame.task_died(3, "crash", careful=False).deaths == 1


@pytest.mark.parametrize("seed", range(5))
def test_random_kills_convict_nobody(seed: int) -> None:
    """A kill every second somewhere in two workers, samples of 0.2 s: a trial is hit about one time in ten, and 20,000
    deaths still convict no healthy sample more than once in a very long while."""
    rng = random.Random(seed)
    blame = Blame(2)
    convicted = 0
    for _ in range(20_000):
        sample = rng.randrange(200)
        judgement = blame.sample_died(sample, "killed", on_trial=False)
        while judgement.action == "trial":
            if rng.random() < 0.1:
                judgement = blame.sample_died(sample, "killed", on_trial=True)
            else:
                blame.acquit(sample)
                break
        convicted += judgement.action == "convict"
    assert convicted <= 4  # 20,000 deaths make about 10,000 trials, of which one in ten thousand convicts
