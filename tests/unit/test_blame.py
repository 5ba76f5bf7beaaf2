"""Who is to blame for a death. Healthy samples must never be convicted, poison always is."""

from __future__ import annotations

import random

import pytest

from robustloader.decisions.blame import OUTSIDE_TRIALS, Blame, Cause, ShardBlame

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


# --- samples that kill only in company --------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", PROOF)
def test_whoever_crashes_where_another_was_cleared_is_left_out(cause: Cause) -> None:
    """Once a suspect of the same batch has survived its trial; all its deaths are given back."""
    blame = Blame(2)
    for _ in range(2):
        judgement = blame.sample_died(7, cause, on_trial=False, task=3)
    assert judgement.action == "trial"
    blame.trial_passed(7, 3)
    assert blame.sample_died(8, cause, on_trial=False, task=3).action == "replay"
    verdict = blame.sample_died(8, cause, on_trial=False, task=3)
    assert (verdict.action, verdict.refund, verdict.deaths) == ("exclude", 2, 2)


def test_another_batch_knows_nothing_of_it() -> None:
    """Nor does the same one once it has arrived."""
    blame = Blame(1)
    blame.sample_died(7, "crash", on_trial=False, task=3)
    blame.trial_passed(7, 3)
    assert blame.sample_died(8, "crash", on_trial=False, task=4).action == "trial"
    blame.arrived(3)
    assert blame.sample_died(9, "crash", on_trial=False, task=3).action == "trial"


@pytest.mark.parametrize("cause", [*OUTSIDE, "memory"])
def test_kills_from_outside_leave_nobody_out(cause: Cause) -> None:
    """They clear nobody of crashes, and are no crashes where somebody was."""
    blame = Blame(1)
    blame.sample_died(6, "memory", on_trial=False, task=3)
    blame.sample_died(6, cause, on_trial=False, task=3)
    blame.trial_passed(6, 3)
    assert blame.sample_died(7, "crash", on_trial=False, task=3).action == "trial"
    blame.trial_passed(7, 3)
    actions = {blame.sample_died(8, cause, on_trial=False, task=3).action for _ in range(20)}
    assert actions <= {"replay", "trial"}


# --- shares of a stream -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", PROOF)
def test_a_share_that_dies_by_itself_ends(cause: Cause) -> None:
    """Wherever in the batch that was: nobody outside did it."""
    blame = ShardBlame()
    assert [blame.died((3, "item", place), cause, poison_after=2) for place in range(3)] == [0, 0, 3]


@pytest.mark.parametrize("cause", [*OUTSIDE, "memory"])
def test_a_share_that_is_killed_at_one_sample_ends(cause: Cause) -> None:
    """As many deaths as a sample needs to be suspected, and then convicted in trials."""
    blame = ShardBlame()
    deaths = [blame.died((3, "item", 1), cause, poison_after=2) for _ in range(2 + OUTSIDE_TRIALS)]
    assert deaths == [0] * (1 + OUTSIDE_TRIALS) + [2 + OUTSIDE_TRIALS]


def test_kills_all_over_a_batch_end_no_share() -> None:
    """Each hits another sample than the one before."""
    blame = ShardBlame()
    for number in range(1_000):
        assert not blame.died((3, "item", number % 2), "killed", poison_after=2)


def random_kills(rng: random.Random, blame: ShardBlame, *, batches: int, batch_size: int, kill_share: float) -> int:
    """A share loads so many batches, and each sample is hit with this chance: how often that would have ended it."""
    ended = task = position = 0
    while task < batches:
        if rng.random() < kill_share:
            ended += bool(blame.died((task, "item", position), "killed", poison_after=2))
            position = 0
        elif position + 1 < batch_size:
            position += 1
        else:
            task, position, blame = task + 1, 0, ShardBlame()
    return ended


@pytest.mark.parametrize("seed", range(5))
def test_random_kills_end_no_share(seed: int) -> None:
    """Samples of 0.2 s, four in a batch, a kill every second over two workers: a worker is hit in one batch of three,
    and in 5,000 batches no share ends, though batches die six times in a row."""
    rng = random.Random(seed)
    assert random_kills(rng, ShardBlame(), batches=5_000, batch_size=4, kill_share=0.1) == 0
    assert random_kills(rng, ShardBlame(), batches=5_000, batch_size=1, kill_share=0.7) > 0, "the check can fail"
