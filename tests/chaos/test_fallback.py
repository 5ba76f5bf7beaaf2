"""When workers keep dying: fewer of them, then none, then the training process, or an error that tells the story."""

from __future__ import annotations

import errno
import multiprocessing as mp
import os
import random
import signal
import time
from collections.abc import Iterator
from multiprocessing.context import ForkContext, ForkProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from robustloader import (
    PoolHealed,
    PoolShrunk,
    RecoveryPolicy,
    RestartBudgetError,
    RobustDataLoader,
    WorkerCrashed,
    WorkerCrashError,
)
from robustloader.system import host
from tests.chaos.test_deaths import deadly
from tests.support.datasets import DEATHS, DeadlyInit, Death, KillEveryWorker, Numbers, Stream
from tests.support.listener import Listener, flat
from tests.support.peek import pids
from tests.support.watch import kill

BROKE = RecoveryPolicy(max_restarts=2, backoff_s=0)


class Rolls(Numbers):
    """Draws from all three generators; tells who loaded, and what ``get_worker_info`` says."""

    def load(self, index: int) -> Any:
        info = get_worker_info()
        assert info is not None
        assert info.num_workers == 3
        return index, os.getpid(), random.random() + float(np.random.rand()) + float(torch.rand(()))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "timeout": {"timeout": 60},
    "prefetch": {"prefetch_factor": 5},
    "persistent": {"persistent_workers": True},
    "generator": {"generator": torch.Generator().manual_seed(3), "shuffle": True},
    "context": {"multiprocessing_context": "fork"},
    "in any order": {"in_order": False},
    "everything": {
        "timeout": 60,
        "prefetch_factor": 5,
        "persistent_workers": True,
        "generator": torch.Generator().manual_seed(3),
        "multiprocessing_context": "fork",
        "seeding": "batch",
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_pool_shrinks_and_then_the_training_process_loads(options: dict[str, Any]) -> None:
    """Step by step, told in events, with any of torch's arguments set, and with the trainer's own randomness
    untouched."""
    listener = Listener()
    loader = RobustDataLoader(
        Rolls(24),
        batch_size=4,
        num_workers=3,
        worker_init_fn=KillEveryWorker(),
        recovery=BROKE,
        telemetry=listener.policy,
        **options,
    )
    for _ in range(2):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        iterator = iter(loader)
        if "generator" not in options:
            torch.manual_seed(5)  # the base seed is drawn from the trainer's generator, as in torch
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
        batches = list(iterator)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert np.random.get_state()[1].tolist() == states[2]  # type: ignore[index]
        assert sorted(flat(batch[0] for batch in batches)) == list(range(24))
        if "shuffle" not in options:
            assert flat(batch[0] for batch in batches) == list(range(24))
        assert {int(pid) for batch in batches for pid in batch[1]} == {os.getpid()}
        assert get_worker_info() is None
        assert loader.active_workers == 0
    first_epoch = [event.workers for event in listener.of(PoolShrunk) if event.epoch == 0]
    assert first_epoch == [2, 1, 0]
    # Two restarts of credit, full again after each shrink.
    assert sum(event.epoch == 0 for event in listener.of(WorkerCrashed)) >= 3
    assert not loader.fault_log


def test_kills_from_outside_until_nobody_is_left() -> None:
    """In the middle of an epoch: exact, and ``batch_info`` tells who loaded."""
    listener = Listener()
    loader = RobustDataLoader(Numbers(200), batch_size=4, num_workers=2, recovery=BROKE, telemetry=listener.policy)
    iterator = iter(loader)
    delivered, loaders = [], set()
    for batch in iterator:
        delivered.append(batch)
        loaders.add(iterator.batch_info.worker_id)
        for pid in pids(iterator):
            kill(pid, signal.SIGKILL)
    assert flat(delivered) == list(range(200))
    assert [event.workers for event in listener.of(PoolShrunk)] == [1, 0]
    assert loaders >= {0, 1, None}
    assert loader.summary().workers_at_end == 0


def test_the_pool_grows_back() -> None:
    """Fifty delivered batches for each restart in the budget after it shrank; each step is an event and in the log."""
    listener = Listener()
    loader = RobustDataLoader(Numbers(600), batch_size=4, num_workers=2, recovery=BROKE, telemetry=listener.policy)
    iterator = iter(loader)
    delivered = [next(iterator)]
    while not listener.of(PoolShrunk):
        for pid in pids(iterator)[:1]:
            kill(pid, signal.SIGKILL)
        delivered.append(next(iterator))
    shrunk = len(delivered)
    assert len(pids(iterator)) <= 1
    for batch in iterator:
        delivered.append(batch)
        if listener.of(PoolHealed):
            break
    assert [event.workers for event in listener.of(PoolHealed)] == [2]
    assert len(delivered) - shrunk >= 50 * BROKE.max_restarts - 1
    delivered += iterator
    assert flat(delivered) == list(range(600))
    summary = loader.summary()
    assert (summary.workers_requested, summary.workers_at_end) == (2, 2)


@pytest.mark.parametrize("min_workers", [1, 2, 3])
def test_min_workers(min_workers: int) -> None:
    """The pool does not shrink below it: it is kept, or given up."""
    listener = Listener()
    recovery = RecoveryPolicy(max_restarts=1, backoff_s=0, min_workers=min_workers)
    loader = RobustDataLoader(
        Numbers(24),
        batch_size=4,
        num_workers=3,
        worker_init_fn=KillEveryWorker(),
        recovery=recovery,
        telemetry=listener.policy,
    )
    assert flat(loader) == list(range(24))
    assert [event.workers for event in listener.of(PoolShrunk)] == [*range(2, min_workers - 1, -1), 0]


def test_in_process_false() -> None:
    """Then it is an error, with the history of how it came to that."""
    recovery = RecoveryPolicy(max_restarts=2, backoff_s=0, in_process=False)
    loader = RobustDataLoader(
        Numbers(24), batch_size=4, num_workers=2, worker_init_fn=KillEveryWorker(), recovery=recovery
    )
    with pytest.raises(RestartBudgetError, match="in_process=False") as caught:
        list(loader)
    assert isinstance(caught.value, RuntimeError)
    names = [type(event).__name__ for event in caught.value.history]
    assert names.count("WorkerCrashed") >= 3
    assert "PoolShrunk" in names
    assert "WorkerCrashed" in str(caught.value)
    assert "SIGKILL" in str(caught.value)


@pytest.mark.parametrize("how", ["SIGSEGV", "SIGABRT", "SIGBUS"])
def test_crashes_do_not_come_to_the_training_process(how: str, tmp_path: Path) -> None:
    """What killed them would kill it too."""
    death = Death(tmp_path, how, times=None)
    loader = RobustDataLoader(
        Numbers(24), batch_size=4, num_workers=2, worker_init_fn=DeadlyInit(death, worker=0), recovery=BROKE
    )
    samples = []
    try:
        for batch in loader:
            samples += batch.tolist()
    except RestartBudgetError as error:
        assert how in str(error)
    else:
        assert samples == list(range(24)), "worker 1 is well and does it alone"
    assert not death.seen_in_trainer

    loader = RobustDataLoader(
        Numbers(24),
        batch_size=4,
        num_workers=2,
        worker_init_fn=KillEveryWorker(getattr(signal, how)),
        recovery=BROKE,
    )
    with pytest.raises(RestartBudgetError, match=how):
        list(loader)


def test_the_error_comes_again() -> None:
    """Who asks on gets the same answer."""
    recovery = RecoveryPolicy(max_restarts=0, backoff_s=0, in_process=False)
    iterator = iter(RobustDataLoader(Numbers(24), batch_size=4, num_workers=1, recovery=recovery))
    for pid in pids(iterator):
        kill(pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(RestartBudgetError):
            for _ in iterator:
                pass


# --- without recovery -------------------------------------------------------------------------------------------------

TORCH_WORDS = {
    "SIGKILL": r"DataLoader worker \(pid \d+\) is killed by signal: Killed",
    "SIGSEGV": r"DataLoader worker \(pid \d+\) is killed by signal: Segmentation fault",
    "SIGABRT": r"DataLoader worker \(pid \d+\) is killed by signal: Aborted",
    "SIGBUS": r"DataLoader worker \(pid \d+\) is killed by signal: Bus error",
    "exit 0": r"DataLoader worker \(pid\(?s?\)? \d+\) exited unexpectedly",
    "exit 3": r"DataLoader worker \(pid \d+\) exited unexpectedly with exit code 3",
}


@pytest.mark.parametrize("how", DEATHS)
def test_without_recovery_a_death_is_raised(how: str, tmp_path: Path) -> None:
    """From ``next()``, as a ``RuntimeError`` in torch's words, with the facts as attributes."""
    death = Death(tmp_path, how)
    loader = deadly("item", death, recovery=None)
    iterator = iter(loader)
    started = pids(iterator)
    with pytest.raises(RuntimeError, match=TORCH_WORDS[how]) as caught:
        list(iterator)
    error = caught.value
    assert isinstance(error, WorkerCrashError)
    assert error.pid in started
    assert error.worker_id == started.index(error.pid)
    assert error.index == 13
    assert error.signal == (how if how.startswith("SIG") else None)
    assert error.exitcode == (-getattr(signal, how) if how.startswith("SIG") else int(how[-1]))
    assert error.hint
    assert loader.active_workers == 0
    with pytest.raises(WorkerCrashError):
        next(iterator)


def test_strict_mode_survives_a_death_after_the_end() -> None:
    """Nobody misses a worker whose work is done."""
    iterator = iter(RobustDataLoader(Numbers(8), batch_size=4, num_workers=1, recovery=None, persistent_workers=True))
    assert flat(iterator) == list(range(8))
    kill(pids(iterator)[0], signal.SIGKILL)
    iterator._shutdown_workers()


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_memory_kill_shrinks_the_pool_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credit or no credit: fewer workers need less. The first one blames no sample."""
    kills = [0]
    monkeypatch.setattr(host, "memory_kills", lambda: kills[0])
    listener = Listener()
    loader = RobustDataLoader(Numbers(64), batch_size=4, num_workers=3, telemetry=listener.policy)
    iterator = iter(loader)
    delivered = [next(iterator)]
    kills[0] += 1
    kill(pids(iterator)[1], signal.SIGKILL)
    delivered += list(iterator)
    assert flat(delivered) == list(range(64))
    (crash,) = listener.of(WorkerCrashed)
    assert crash.cause == "memory"
    assert [event.workers for event in listener.of(PoolShrunk)] == [2]
    assert not loader.fault_log


def test_memory_kills_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training process does not take over what the memory did not suffice for."""
    kills = [0]
    monkeypatch.setattr(host, "memory_kills", lambda: kills[0])
    loader = RobustDataLoader(Numbers(200), batch_size=4, num_workers=2)
    iterator = iter(loader)
    delivered = []
    with pytest.raises(RestartBudgetError):
        for batch in iterator:
            delivered.append(batch)
            for pid in pids(iterator):
                kills[0] += 1
                kill(pid, signal.SIGKILL)
    assert flat(delivered) == list(range(len(flat(delivered))))


# --- processes that cannot be started ---------------------------------------------------------------------------------


class Refusing(ForkContext):
    """A context with room for so many processes at a time, and for so many starts in all."""

    def __init__(self, room: int, starts: int = 1_000) -> None:
        self.room = room
        self.starts = starts
        self.started: list[ForkProcess] = []
        context = self

        class Process(ForkProcess):
            def start(self) -> None:
                alive = sum(process.is_alive() for process in context.started)
                if alive >= context.room or len(context.started) >= context.starts:
                    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
                super().start()
                context.started.append(self)

        self.Process = Process  # type: ignore[misc,assignment]


@pytest.mark.parametrize("kind", ["map", "iterable"])
@pytest.mark.parametrize("room", [0, 1, 2])
def test_fork_refused_at_the_start(kind: str, room: int) -> None:
    """The processes there are do the work, and where there are none the training process does."""
    listener = Listener()
    dataset: Any = Numbers(30) if kind == "map" else Stream(30)
    loader = RobustDataLoader(
        dataset, batch_size=4, num_workers=3, multiprocessing_context=Refusing(room), telemetry=listener.policy
    )
    for _ in range(2):
        delivered = flat(loader)
        assert (delivered if kind == "map" else sorted(delivered)) == list(range(30))
    assert [event.workers for event in listener.of(PoolShrunk) if event.epoch == 0][-1:] == [room]


def test_fork_refused_without_recovery() -> None:
    """Is raised as it is."""
    loader = RobustDataLoader(
        Numbers(30), batch_size=4, num_workers=2, multiprocessing_context=Refusing(0), recovery=None
    )
    with pytest.raises(BlockingIOError):
        iter(loader)


def test_fork_refused_and_not_in_process() -> None:
    """Is an error with the refusal as its cause."""
    recovery = RecoveryPolicy(in_process=False)
    loader = RobustDataLoader(
        Numbers(30), batch_size=4, num_workers=2, multiprocessing_context=Refusing(0), recovery=recovery
    )
    with pytest.raises(RestartBudgetError) as caught:
        list(loader)
    assert isinstance(caught.value.__cause__, BlockingIOError)


@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_fork_refused_for_a_restart(kind: str) -> None:
    """The pool shrinks to those that live, and to none."""
    listener = Listener()
    dataset: Any = Numbers(200) if kind == "map" else Stream(200)
    loader = RobustDataLoader(
        dataset,
        batch_size=4,
        num_workers=2,
        multiprocessing_context=Refusing(2, starts=2),
        recovery=BROKE,
        telemetry=listener.policy,
    )
    iterator = iter(loader)
    delivered = []
    for number, batch in enumerate(iterator):
        delivered.append(batch)
        if number in (3, 12):
            for pid in pids(iterator)[:1]:
                kill(pid, signal.SIGKILL)
    samples = flat(delivered)
    assert (samples if kind == "map" else sorted(samples)) == list(range(200))
    assert [event.workers for event in listener.of(PoolShrunk)] == [1, 0]


class Interrupted(Numbers):
    """Ctrl-C, once, while sample 13 is loaded."""

    def __init__(self, size: int, told: list[int]) -> None:
        super().__init__(size)
        self.told = told

    def load(self, index: int) -> Any:
        interrupt_once(index, self.told)
        return index


class InterruptedStream(Stream):
    """Likewise; a generator, which does not survive that."""

    def __init__(self, size: int, told: list[int]) -> None:
        super().__init__(size)
        self.told = told

    def __deepcopy__(self, memo: dict[int, Any]) -> InterruptedStream:
        return InterruptedStream(self.size, self.told)

    def __iter__(self) -> Iterator[Any]:
        for number in list(super().__iter__()):
            interrupt_once(number, self.told)
            yield number


def interrupt_once(index: int, told: list[int]) -> None:
    if index == 13 and not told:
        told.append(index)
        raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["map", "iterable"])
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("seeding", ["worker", "batch"])
def test_an_interruption_costs_nothing_where_the_training_process_loads(
    kind: str, in_order: bool, seeding: Any
) -> None:
    """Who catches it and asks on gets the interrupted batch, and then the others."""
    told: list[int] = []
    dataset: Any = Interrupted(30, told) if kind == "map" else InterruptedStream(30, told)
    iterator = iter(
        RobustDataLoader(
            dataset,
            batch_size=4,
            num_workers=3,
            in_order=in_order,
            seeding=seeding,
            multiprocessing_context=Refusing(0),
        )
    )
    delivered, interrupted = [], 0
    while True:
        try:
            delivered.append(next(iterator))
        except StopIteration:
            break
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted == 1
    samples = flat(delivered)
    assert (samples if kind == "map" else sorted(samples)) == list(range(30))


@pytest.mark.parametrize("dataset", [Numbers(30), Stream(30)], ids=["map", "iterable"])
def test_worker_init_fn_raises_in_the_training_process(dataset: Any) -> None:
    """That is raised; who asks on has it called again, and loses nothing."""
    calls = []

    def init(worker_id: int) -> None:
        calls.append(worker_id)
        if len(calls) == 1:
            raise OSError("the store does not answer")

    loader = RobustDataLoader(
        dataset, batch_size=4, num_workers=3, worker_init_fn=init, multiprocessing_context=Refusing(0)
    )
    iterator = iter(loader)
    with pytest.raises(OSError, match="does not answer"):
        next(iterator)
    assert sorted(flat(iterator)) == list(range(30))


def load_in_a_daemon(kind: str, answers: Any) -> None:
    try:
        dataset: Any = Numbers(30) if kind == "map" else Stream(30)
        listener = Listener()
        delivered = flat(RobustDataLoader(dataset, batch_size=4, num_workers=2, telemetry=listener.policy))
        answers.send((delivered, [event.workers for event in listener.of(PoolShrunk)]))
    except BaseException as error:
        answers.send((repr(error), []))


@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_in_a_daemonic_process(kind: str) -> None:
    """Which may have no children: it loads itself, and says so in an event."""
    ours, theirs = mp.Pipe(duplex=False)
    process = mp.get_context("fork").Process(target=load_in_a_daemon, args=(kind, theirs), daemon=True)
    process.start()
    theirs.close()
    assert ours.poll(30)
    delivered, shrunk = ours.recv()
    process.join()
    process.close()
    ours.close()
    assert (delivered if kind == "map" else sorted(delivered)) == list(range(30))
    assert shrunk[-1] == 0


@pytest.mark.parametrize("dataset", [Numbers(32), Stream(32)], ids=["map", "iterable"])
def test_the_training_process_loads_what_is_pinned_elsewhere(dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the thread that pins, here one that takes its time, and for nothing else."""

    def pin(batch: Any, device: Any = None) -> Any:
        time.sleep(0.01)
        return batch

    monkeypatch.setattr("robustloader.system.torch_private.pin_memory", pin)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    loader: Any = RobustDataLoader(
        dataset, batch_size=4, num_workers=2, pin_memory=True, worker_init_fn=KillEveryWorker(), recovery=BROKE
    )
    batches = iter(loader)
    assert batches.pins
    assert sorted(flat(batches)) == list(range(32))
    assert loader.summary().workers_at_end == 0
