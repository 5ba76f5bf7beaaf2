"""Workers that die once, at any moment and in any way: all samples arrive, once, in order, and nothing is raised."""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import signal
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from robustloader import (
    RecoveryPolicy,
    RobustDataLoader,
    RobustLoaderWarning,
    TaskReplayed,
    TelemetryPolicy,
    WorkerCrashed,
    WorkerRestarted,
)
from tests.support.datasets import (
    CRASHES,
    DEATHS,
    Big,
    Deadly,
    DeadlyCollate,
    DeadlyInit,
    DeadlyItems,
    DeadlyState,
    Death,
    Made,
    Numbers,
)
from tests.support.listener import BrokenSink, Listener, flat
from tests.support.peek import await_bytes, await_idle, pids
from tests.support.watch import Mailbox, await_death, await_gone, kill, post, processes, until

METHODS = ("fork", "forkserver", "spawn")
PLACES = ("item", "items", "collate", "encode", "init")
SIGNALS = ("SIGKILL", "SIGSEGV", "SIGABRT", "SIGBUS")
CAUSES = {"SIGKILL": "killed", "SIGBUS": "shared memory", "exit 0": "exit", "exit 3": "exit"}

QUICK = RecoveryPolicy(backoff_s=0)


class MakeDeadlyState:
    def __init__(self, death: Death) -> None:
        self.death = death

    def __call__(self, index: int) -> Any:
        return DeadlyState(index, self.death)


def deadly(place: str, death: Death, *, size: int = 32, at: int = 13, **kwargs: Any) -> RobustDataLoader[Any]:
    """A loader whose workers meet ``death`` at ``place``, with sample ``at``."""
    dataset: Any = Numbers(size)
    if place == "item":
        dataset = Deadly(size, death, at=at)
    elif place == "items":
        dataset = DeadlyItems(size, death, at=at)
    elif place == "collate":
        kwargs["collate_fn"] = DeadlyCollate(death, at=at)
    elif place == "encode":
        dataset = Made(size, {at: MakeDeadlyState(death)})
        kwargs["collate_fn"] = list
    elif place == "init":
        kwargs["worker_init_fn"] = DeadlyInit(death)
    return RobustDataLoader(dataset, batch_size=4, num_workers=kwargs.pop("num_workers", 2), **kwargs)


def check_one_death(place: str, how: str, method: str, folder: Path) -> None:
    listener, death = Listener(), Death(folder, how)
    loader = deadly(place, death, multiprocessing_context=method, telemetry=listener.policy)
    assert flat(loader) == list(range(32))
    assert death.count == 1
    assert place == "init" or not death.seen_in_trainer
    assert not loader.fault_log, "a single death is nobody's fault"
    (crash,) = listener.of(WorkerCrashed)
    assert crash.cause == CAUSES.get(how, "crash")
    assert crash.signal == (how if how.startswith("SIG") else None)
    assert crash.exitcode == (-getattr(signal, how) if how.startswith("SIG") else int(how[-1]))
    assert crash.phase == place
    assert crash.index == (13 if place == "item" else None)
    restarts = [(event.worker_id, event.incarnation) for event in listener.of(WorkerRestarted)]
    # Where a start takes long, the other worker may have done all the work before there is anybody new.
    assert restarts == [(crash.worker_id, crash.incarnation + 1)] or (method != "fork" and not restarts)
    replayed = {event.task for event in listener.of(TaskReplayed)}
    assert len(replayed) == crash.tasks
    assert place == "init" or 3 in replayed
    summary = loader.summary()
    assert (summary.crashes, summary.restarts, summary.faults) == (1, len(restarts), 0)
    assert summary.complete


@pytest.mark.parametrize("how", DEATHS)
@pytest.mark.parametrize("place", PLACES)
def test_one_death(place: str, how: str, tmp_path: Path) -> None:
    """Everything is delivered exactly once and in order; the event says what happened, where, and to whom."""
    check_one_death(place, how, "fork", tmp_path)


@pytest.mark.parametrize(
    ("method", "place", "how"),
    [("forkserver", "item", "SIGSEGV"), ("forkserver", "init", "SIGKILL"), ("spawn", "item", "SIGKILL")],
)
def test_one_death_under_other_start_methods(method: str, place: str, how: str, tmp_path: Path) -> None:
    """The same."""
    check_one_death(place, how, method, tmp_path)


@pytest.mark.parametrize("how", SIGNALS)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_death_while_idle(how: str, workers: int) -> None:
    """With its results delivered or on their way, and nothing to do."""
    listener = Listener()
    loader = RobustDataLoader(
        Numbers(32), batch_size=4, num_workers=workers, prefetch_factor=1, telemetry=listener.policy
    )
    iterator = iter(loader)
    delivered = [next(iterator)]
    await_idle(iterator, 0, done=2)
    kill(pids(iterator)[0], getattr(signal, how))
    delivered += list(iterator)
    assert flat(delivered) == list(range(32))
    assert [event.phase for event in listener.of(WorkerCrashed)] == ["idle"]
    assert not loader.fault_log


@pytest.mark.parametrize("how", SIGNALS)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_death_in_the_middle_of_a_frame(how: str, workers: int) -> None:
    """A batch far larger than a socket, the trainer not reading: the half that came is thrown away."""
    loader = RobustDataLoader(Big(6, 16 << 20), batch_size=1, num_workers=workers, prefetch_factor=1)
    iterator = iter(loader)
    await_idle(iterator, 0, done=1)
    await_bytes(iterator, 0)
    kill(pids(iterator)[0], getattr(signal, how))
    batches = list(iterator)
    assert [(int(batch[0, 0]), int(batch[0, -1]), batch.shape) for batch in batches] == [
        (number, number, (1, 16 << 20)) for number in range(6)
    ]
    assert not loader.fault_log


def test_a_death_between_two_frames_of_many() -> None:
    """Killed again and again while large batches pour in."""
    loader = RobustDataLoader(
        Big(24, 8 << 20), batch_size=1, num_workers=2, recovery=RecoveryPolicy(max_restarts=100, backoff_s=0)
    )
    iterator = iter(loader)
    rng = random.Random(1)
    for number, batch in enumerate(iterator):
        assert torch.equal(batch, torch.full((1, 8 << 20), number, dtype=torch.uint8))
        if number % 3 == 0:
            alive = pids(iterator)
            if alive:
                kill(rng.choice(alive), signal.SIGKILL)
    assert number == 23
    assert not loader.fault_log


@pytest.mark.parametrize("method", ["forkserver"])
def test_a_death_in_the_middle_of_a_frame_under_other_start_methods(method: str) -> None:
    """The same."""
    loader = RobustDataLoader(Big(4, 16 << 20), batch_size=1, num_workers=1, multiprocessing_context=method)
    iterator = iter(loader)
    await_idle(iterator, 0, done=1)
    await_bytes(iterator, 0)
    kill(pids(iterator)[0], signal.SIGKILL)
    assert [int(batch[0, 0]) for batch in iterator] == [0, 1, 2, 3]


class Telling(Numbers):
    """Tells a mailbox that sample ``at`` is about to be loaded."""

    def __init__(self, size: int, mailbox: str, *, at: int) -> None:
        super().__init__(size)
        self.mailbox = mailbox
        self.at = at

    def load(self, index: int) -> Any:
        if index == self.at:
            post(self.mailbox, index)
        return index


def test_a_finished_batch_and_then_a_death(tmp_path: Path) -> None:
    """What had arrived in full is not loaded again; what had not is, once."""
    with Mailbox(tmp_path / "mailbox") as mailbox:
        dataset = Telling(16, mailbox.path, at=8)
        iterator = iter(RobustDataLoader(dataset, batch_size=4, num_workers=1, prefetch_factor=3, memory=None))
        mailbox.take()  # who loads the third batch has sent the first two
        kill(pids(iterator)[0], signal.SIGKILL)
        attempts = []
        for number, batch in enumerate(iterator):
            assert batch.tolist() == list(range(4 * number, 4 * number + 4))
            attempts.append(iterator.batch_info.attempts)
    assert attempts[:2] == [1, 1]
    assert len(attempts) == 4


class HasAChild(Numbers):
    """Sample 9 starts a program, tells a mailbox of it, and dies, the first time."""

    def __init__(self, size: int, mailbox: str, death: Death) -> None:
        super().__init__(size)
        self.mailbox = mailbox
        self.death = death

    def load(self, index: int) -> Any:
        if index == 9 and not self.death.count:
            post(self.mailbox, subprocess.Popen(["sleep", "600"]).pid)
            self.death.strike()
        return index


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSEGV", "exit 0"])
@pytest.mark.parametrize("method", METHODS)
def test_the_death_of_a_worker_that_has_a_child(method: str, how: str, tmp_path: Path) -> None:
    """It is noticed although the child lives on, and the child goes with it."""
    with Mailbox(tmp_path / "mailbox") as mailbox:
        dataset = HasAChild(32, mailbox.path, Death(tmp_path, how))
        loader = RobustDataLoader(dataset, batch_size=4, num_workers=1, multiprocessing_context=method)
        assert flat(loader) == list(range(32))
        await_gone(processes([int(mailbox.take())]))


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_that_has_a_child_and_was_reaped(method: str, tmp_path: Path) -> None:
    """The child goes with it although its process id tells nothing any more: ``active_children``, like every start of
    a process, reaps all that have ended."""
    with Mailbox(tmp_path / "mailbox") as mailbox:
        dataset = HasAChild(32, mailbox.path, Death(tmp_path, "SIGKILL"))
        batches = iter(RobustDataLoader(dataset, batch_size=4, num_workers=1, multiprocessing_context=method))
        delivered = [next(batches)]
        (worker,) = pids(batches)
        child = processes([int(mailbox.take())])
        await_death(worker)
        mp.active_children()
        until(lambda: not processes([worker]), what="the end of the worker's number")
        assert flat([*delivered, *batches]) == list(range(32))
        await_gone(child)


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_that_has_a_child_and_whose_death_nobody_noticed(method: str, tmp_path: Path) -> None:
    """The child goes when the iterator does."""
    with Mailbox(tmp_path / "mailbox") as mailbox:
        dataset = HasAChild(32, mailbox.path, Death(tmp_path, "SIGKILL"))
        batches = iter(RobustDataLoader(dataset, batch_size=4, num_workers=1, multiprocessing_context=method))
        next(batches)
        child = processes([int(mailbox.take())])
        for worker in pids(batches):
            await_death(worker)
        del batches
        await_gone(child)


def test_all_workers_at_once() -> None:
    """Nobody is left for a moment."""
    listener = Listener()
    loader = RobustDataLoader(Numbers(64), batch_size=4, num_workers=3, telemetry=listener.policy, recovery=QUICK)
    iterator = iter(loader)
    delivered = [next(iterator)]
    for pid in pids(iterator):
        os.kill(pid, signal.SIGKILL)
    delivered += list(iterator)
    assert flat(delivered) == list(range(64))
    assert len(listener.of(WorkerRestarted)) == 3


def test_a_sink_that_breaks_at_a_death_with_warnings_as_errors() -> None:
    """``next()`` raises the warning once; what the dead worker held is loaded all the same."""
    policy = TelemetryPolicy(sinks=(BrokenSink(),))
    iterator = iter(RobustDataLoader(Numbers(32), batch_size=4, num_workers=2, telemetry=policy))
    delivered = next(iterator).tolist()
    for pid in pids(iterator):
        kill(pid, signal.SIGKILL)
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
    assert delivered == list(range(32))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("workers", [1, 3])
def test_random_kills_lose_nothing_and_convict_nobody(seed: int, workers: int) -> None:
    """Dozens of kills at random moments, short samples: no sample is lost, doubled, replaced or blamed."""
    rng = random.Random(seed)
    listener = Listener()
    loader = RobustDataLoader(
        Numbers(800),
        batch_size=4,
        num_workers=workers,
        telemetry=listener.policy,
        recovery=RecoveryPolicy(max_restarts=1_000, backoff_s=0),
    )
    iterator = iter(loader)
    delivered = []
    for batch in iterator:
        delivered.append(batch)
        if rng.random() < 0.2 and (alive := pids(iterator)):
            os.kill(rng.choice(alive), signal.SIGKILL)
    assert flat(delivered) == list(range(800))
    assert not loader.fault_log
    assert len(listener.of(WorkerCrashed)) > 10


def test_a_hundred_deaths_leave_no_descriptors() -> None:
    """A process that replaces its workers for days must not run out."""
    loader = RobustDataLoader(
        Numbers(420), batch_size=4, num_workers=1, recovery=RecoveryPolicy(max_restarts=1_000, backoff_s=0)
    )
    iterator = iter(loader)
    next(iterator)
    counts = []
    for _ in iterator:
        counts.append(len(os.listdir("/proc/self/fd")))
        for pid in pids(iterator):
            kill(pid, signal.SIGKILL)
    assert len(counts) > 100
    assert max(counts[-10:]) <= max(counts[:10])


@pytest.mark.parametrize("how", ["SIGKILL", "exit 0"])
def test_deaths_of_several_workers_in_one_epoch(how: str, tmp_path: Path) -> None:
    """One after another, each of them once."""
    death = Death(tmp_path, how, times=5)
    recovery = RecoveryPolicy(backoff_s=0, poison_after=6)
    loader = deadly("item", death, num_workers=3, recovery=recovery)
    assert flat(loader) == list(range(32))
    assert death.count == 5
    assert not loader.fault_log


@pytest.mark.parametrize("how", CRASHES)
def test_a_death_survived_in_the_trial(how: str, tmp_path: Path) -> None:
    """Two deaths make a sample suspect; it passes its trial and is delivered like any other."""
    death = Death(tmp_path, how, times=2)
    loader = deadly("item", death, recovery=QUICK)
    assert flat(loader) == list(range(32))
    assert death.count == 2
    assert not loader.fault_log


def test_seeding_by_batch_survives_deaths_bit_for_bit(tmp_path: Path) -> None:
    """A replayed batch holds the very random numbers that the dead worker would have made."""
    from tests.support.datasets import Random

    class DeadlyRandom(Random):
        def __init__(self, size: int, death: Death) -> None:
            super().__init__(size)
            self.death = death

        def load(self, index: int) -> Any:
            value = super().load(index)
            if index == 13:
                self.death.strike()
            return value

    def run(times: int) -> Any:
        folder = tmp_path / str(times)
        folder.mkdir()
        loader = RobustDataLoader(
            DeadlyRandom(32, Death(folder, "SIGKILL", times=times)),
            batch_size=4,
            num_workers=2,
            seeding="batch",
            generator=torch.Generator().manual_seed(7),
        )
        return [(indices.tolist(), values.tolist()) for indices, values in loader]

    assert run(1) == run(0)
