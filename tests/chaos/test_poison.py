"""Samples that kill whoever loads them: convicted, recorded, done without, and never run in the training process."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from robustloader import (
    FaultPolicy,
    PoolShrunk,
    RecoveryPolicy,
    RestartBudgetError,
    RobustDataLoader,
    RobustLoaderWarning,
    SampleReplaced,
    WorkerCrashed,
    WorkerCrashError,
)
from robustloader.decisions.blame import OUTSIDE_TRIALS
from tests.chaos.test_deaths import QUICK, deadly
from tests.support.datasets import CRASHES, DEATHS, Deadly, Death, noted
from tests.support.listener import Listener, flat

pytestmark = pytest.mark.filterwarnings("ignore::robustloader.RobustLoaderWarning")


def check_poison(place: str, how: str, folder: Path, **kwargs: Any) -> None:
    listener, death = Listener(), Death(folder, how, times=None)
    loader = deadly(place, death, telemetry=listener.policy, recovery=QUICK, **kwargs)
    iterator = iter(loader)
    batches, infos = [], []
    for batch in iterator:
        batches.append([int(sample) for sample in batch])
        infos.append(iterator.batch_info)
    assert not death.seen_in_trainer
    samples = flat(batches)
    assert [len(batch) for batch in batches] == [4] * 8
    assert [samples[place] for place in range(32) if place != 13] == [place for place in range(32) if place != 13]
    assert samples[13] != 13
    assert infos[3].replaced == {1: (13, samples[13])}
    (record,) = [record for record in loader.fault_log if record.kind == "poison"]
    assert record.index == 13
    assert record.task == 3
    assert record.signal == (how if how.startswith("SIG") else None)
    assert record.pid in {event.pid for event in listener.of(WorkerCrashed)}
    assert record.attempts >= 2
    assert [(event.wanted, event.used) for event in listener.of(SampleReplaced)] == [(13, samples[13])]
    summary = loader.summary()
    assert summary.crashes == death.count == len(listener.of(WorkerCrashed))
    assert summary.workers_at_end == loader.num_workers, "a conviction gives its deaths back"
    assert not listener.of(PoolShrunk)


@pytest.mark.parametrize("how", DEATHS)
@pytest.mark.parametrize("place", ["item", "items", "collate", "encode"])
def test_poison_is_convicted_and_replaced(place: str, how: str, tmp_path: Path) -> None:
    """Its neighbours are delivered, it is named, and every worker is there at the end."""
    check_poison(place, how, tmp_path)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_poison_under_other_start_methods(method: str, tmp_path: Path) -> None:
    """The same."""
    check_poison("item", "SIGSEGV", tmp_path, multiprocessing_context=method, num_workers=1)


@pytest.mark.parametrize("how", ["SIGSEGV", "SIGKILL"])
@pytest.mark.parametrize(
    "options", [{"num_workers": 1}, {"num_workers": 3}, {"seeding": "batch"}, {"prefetch_factor": 8}]
)
def test_poison_in_other_modes(how: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The same."""
    check_poison("item", how, tmp_path, **options)


@pytest.mark.parametrize(("how", "trials"), [*((how, 1) for how in CRASHES), ("SIGKILL", OUTSIDE_TRIALS)])
@pytest.mark.parametrize("poison_after", [1, 2, 3])
def test_how_many_deaths_it_takes(how: str, trials: int, poison_after: int, tmp_path: Path) -> None:
    """``poison_after`` deaths and one in the trial; a kill that may have come from outside needs four trials."""
    death = Death(tmp_path, how, times=None)
    recovery = RecoveryPolicy(backoff_s=0, poison_after=poison_after, max_restarts=20)
    flat(deadly("item", death, recovery=recovery))
    assert death.count == poison_after + trials


def test_a_conviction_warns(tmp_path: Path) -> None:
    """Once, naming the sample."""
    with pytest.warns(RobustLoaderWarning, match="sample 13") as caught:
        flat(deadly("item", Death(tmp_path, "SIGSEGV", times=None), recovery=QUICK))
    assert sum(warning.category is RobustLoaderWarning for warning in caught) == 1


def test_a_conviction_with_warnings_as_errors_loses_nothing(tmp_path: Path) -> None:
    """``next()`` raises it once; then the neighbours and everything else still come."""
    iterator = iter(deadly("item", Death(tmp_path, "SIGSEGV", times=None), recovery=QUICK))
    delivered: list[int] = []
    raised = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while True:
            try:
                delivered += next(iterator).tolist()
            except StopIteration:
                break
            except RobustLoaderWarning:
                raised += 1
                assert raised < 10
    assert raised == 1
    assert set(delivered) == set(range(32)) - {13}
    assert len(delivered) == 32


def test_poison_is_skipped(tmp_path: Path) -> None:
    """Where the policy says so."""
    loader = deadly("item", Death(tmp_path, "SIGSEGV", times=None), recovery=QUICK, faults="skip")
    batches = [batch.tolist() for batch in loader]
    assert [len(batch) for batch in batches] == [4, 4, 4, 3, 4, 4, 4, 4]
    assert 13 not in flat(batches)


@pytest.mark.parametrize("place", ["item", "collate"])
@pytest.mark.parametrize("faults", ["raise", FaultPolicy(action="raise")])
def test_poison_is_raised(place: str, faults: Any, tmp_path: Path) -> None:
    """As a crash of the worker that names the sample, in its batch's turn; the others are delivered."""
    death = Death(tmp_path, "SIGSEGV", times=None)
    iterator = iter(deadly(place, death, recovery=QUICK, faults=faults))
    delivered = [next(iterator) for _ in range(3)]
    with pytest.raises(WorkerCrashError, match=r"segfault|Segmentation") as caught:
        next(iterator)
    assert caught.value.index == 13
    assert caught.value.signal == "SIGSEGV"
    delivered += list(iterator)
    assert flat(delivered) == [index for index in range(32) if not 12 <= index < 16]
    assert not death.seen_in_trainer


@pytest.mark.parametrize("resumed_with", [0, 2])
def test_poison_is_raised_in_each_epoch(resumed_with: int, tmp_path: Path) -> None:
    """Without another death, in the next epoch and in a run that resumes this one, workers or not."""
    death = Death(tmp_path, "SIGSEGV", times=None)
    loader = deadly("item", death, recovery=QUICK, faults="raise")
    check_raised(iter(loader), "killed|Segmentation|segfault")
    deaths = death.count
    check_raised(iter(loader), "sample 13 is not loaded again")
    resumed = deadly("item", death, recovery=QUICK, faults="raise", num_workers=resumed_with)
    resumed.load_state_dict(loader.state_dict())
    check_raised(iter(resumed), "sample 13 is not loaded again")
    assert death.count == deaths
    assert not death.seen_in_trainer


def check_raised(iterator: Any, words: str) -> None:
    delivered = [next(iterator) for _ in range(3)]
    with pytest.raises(WorkerCrashError, match=words) as caught:
        next(iterator)
    assert caught.value.index == 13
    delivered += list(iterator)
    assert flat(delivered) == [index for index in range(32) if not 12 <= index < 16]


def test_poison_is_not_met_again(tmp_path: Path) -> None:
    """Not in the next epoch, not by another iterator, and with a quarantine file not in the next run."""
    path, log = tmp_path / "bad.jsonl", tmp_path / "log"
    death = Death(tmp_path, "SIGSEGV", times=None)
    policy = FaultPolicy(quarantine=path)
    loader = RobustDataLoader(
        Deadly(32, death, at=13, log=log), batch_size=4, num_workers=2, recovery=QUICK, faults=policy
    )
    assert len(flat(loader)) == 32
    deaths, fetched = death.count, noted(log).count("13")
    assert len(flat(loader)) == 32
    again = RobustDataLoader(Deadly(32, death, at=13, log=log), batch_size=4, num_workers=2, faults=policy)
    assert len(flat(again)) == 32
    assert death.count == deaths
    assert noted(log).count("13") == fetched
    (entry,) = map(json.loads, path.read_text().splitlines())
    assert (entry["key"], entry["kind"]) == (13, "poison")


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": None}, {"in_order": False, "batch_size": 4}])
def test_poison_in_batches_of_one_and_out_of_order(options: dict[str, Any], tmp_path: Path) -> None:
    """The number of batches stays."""
    death = Death(tmp_path, "SIGABRT", times=None)
    loader = RobustDataLoader(Deadly(16, death, at=5), num_workers=2, recovery=QUICK, **options)
    batches = list(loader)
    samples = flat(batches) if options["batch_size"] else [int(batch) for batch in batches]
    assert len(batches) == len(loader)
    assert len(samples) == 16
    assert set(samples) >= set(range(16)) - {5}
    assert 5 not in samples


class DeadlyMany(Deadly):
    """Several samples kill."""

    def __init__(self, size: int, death: Death, many: tuple[int, ...]) -> None:
        super().__init__(size, death, at=-1)
        self.many = many

    def load(self, index: int) -> int:
        if index in self.many:
            self.death.strike()
        return index


@pytest.mark.parametrize("many", [(12, 13), (0, 1, 2, 3), (3, 13, 23), (31,), (0,)])
@pytest.mark.parametrize("workers", [1, 2])
def test_several_poisons(many: tuple[int, ...], workers: int, tmp_path: Path) -> None:
    """Each is convicted for itself, healthy ones never; also where they fill a batch."""
    death = Death(tmp_path, "SIGSEGV", times=None)
    loader = RobustDataLoader(DeadlyMany(32, death, many), batch_size=4, num_workers=workers, recovery=QUICK)
    batches = [batch.tolist() for batch in loader]
    samples = flat(batches)
    assert [len(batch) for batch in batches] == [4] * 8
    assert not set(samples) & set(many)
    assert all(samples[index] == index for index in range(32) if index not in many)
    assert sorted(record.index for record in loader.fault_log if record.kind == "poison") == sorted(many)


class DeadlyTogether(DeadlyMany):
    """Whoever is the second of them in one process kills it."""

    def __init__(self, size: int, death: Death, many: tuple[int, ...]) -> None:
        super().__init__(size, death, many)
        self.met: set[int] = set()

    def load(self, index: int) -> int:
        if index in self.many:
            self.met.add(index)
            if len(self.met) > 1:
                self.death.strike()
        return index


@pytest.mark.parametrize("action", ["replace", "skip", "raise"])
@pytest.mark.parametrize("many", [(12, 13), (12, 13, 14, 15)])
def test_samples_that_kill_only_in_company(many: tuple[int, ...], action: Any, tmp_path: Path) -> None:
    """Each survives its trial; after a few deaths their batch does without one after the other, or is an error."""
    death = Death(tmp_path, "SIGSEGV", times=None)
    loader = RobustDataLoader(
        DeadlyTogether(32, death, many),
        batch_size=4,
        num_workers=2,
        faults=FaultPolicy(action=action),
        recovery=RecoveryPolicy(backoff_s=0),
    )
    iterator, samples, raised = iter(loader), [], 0
    while True:
        try:
            samples += next(iterator).tolist()
        except WorkerCrashError:
            raised += 1
        except StopIteration:
            break
    assert not death.seen_in_trainer
    assert death.count <= 4 * len(many)
    lost = set(range(32)) - set(samples)
    assert raised == (action == "raise")
    if action == "raise":
        assert lost == {12, 13, 14, 15}
        return
    assert lost
    assert lost < set(many)
    assert len(samples) == (32 if action == "replace" else 32 - len(lost))
    assert {(record.kind, record.index) for record in loader.fault_log} == {("crash", index) for index in lost}


@pytest.mark.parametrize("how", ["SIGSEGV", "SIGKILL", "exit 0"])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("max_restarts", [0, 1, 2, 3])
def test_poison_and_a_small_budget(how: str, workers: int, max_restarts: int, tmp_path: Path) -> None:
    """However little credit there is: it ends, the sample never runs in the training process, and what was not
    delivered is in the log or in the error."""
    death = Death(tmp_path, how, times=None)
    recovery = RecoveryPolicy(backoff_s=0, max_restarts=max_restarts)
    loader = deadly("item", death, num_workers=workers, recovery=recovery, at=2)
    delivered: list[Any] = []
    try:
        for batch in loader:
            delivered.append(batch.tolist())
    except RestartBudgetError as error:
        assert error.history
        assert flat(delivered) == list(range(len(flat(delivered))))
        assert how != "SIGKILL", "kills from outside would leave the training process alone"
    else:
        samples = flat(delivered)
        assert [len(batch) for batch in delivered] == [4] * 8
        assert all(samples[index] == index for index in range(32) if index != 2)
        assert [record.index for record in loader.fault_log if record.action != "retried"][:1] == [2]
    assert not death.seen_in_trainer


def test_no_replacement_is_poison(tmp_path: Path) -> None:
    """A bad sample in every batch draws spares, among them poison that no batch had come to yet: it is found, too."""

    class BadAndDeadly(DeadlyMany):
        def load(self, index: int) -> int:
            if index % 4 == 0:
                raise ValueError("bad")
            return super().load(index)

    death = Death(tmp_path, "SIGSEGV", times=None)
    loader = RobustDataLoader(
        BadAndDeadly(32, death, (1, 5, 9)),
        batch_size=4,
        num_workers=2,
        recovery=QUICK,
        faults=FaultPolicy(burst=100),
    )
    batches = [batch.tolist() for batch in loader]
    assert [len(batch) for batch in batches] == [4] * 8
    assert not set(flat(batches)) & {1, 5, 9}
    assert {record.index for record in loader.fault_log if record.kind == "poison"} == {1, 5, 9}
    assert not death.seen_in_trainer
