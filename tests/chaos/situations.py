"""The situations that a loader must survive, as one table: what happens, in which modes, and what must hold then.

A row is a function of a mode and an empty folder. It makes the situation happen, waiting for events and never for
time, and asserts what must hold exactly. Several rows may run in one process, one after the other.
``test_situations.py`` runs a selection in which every two values of two columns meet, ``full.py`` the whole product,
again and again.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing as mp
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from robustloader import (
    FaultPolicy,
    PoolShrunk,
    RecoveryPolicy,
    RestartBudgetError,
    RobustDataLoader,
    RobustLoaderWarning,
    ShardEnded,
    WorkerCrashed,
    WorkerHung,
)
from robustloader.policies import Transport
from robustloader.testing import Crash, ExhaustMemory, Exit, Hang, InjectedDataset, InjectedStream, Injector, Slow
from tests.chaos.test_leaving import (
    test_a_killed_trainer_takes_everything_along,
    test_ctrl_c,
    test_sigterm_to_everybody,
)
from tests.chaos.test_user_code import user_code
from tests.support.datasets import Big, BigStream, KillEveryWorker, Made, MadeStream, Numbers, Raising, Stream
from tests.support.hostile import CONTROL, HOSTILE, Control, Hostile, Unpicklable, samples_of
from tests.support.listener import Listener, flat
from tests.support.peek import await_idle, pids
from tests.support.transports import using_transport
from tests.support.watch import kill

METHODS = ("fork", "forkserver", "spawn")
TRANSPORTS = tuple(name for name in get_args(Transport) if name != "auto")
KINDS = ("map", "iterable")

QUICK = RecoveryPolicy(backoff_s=0, max_restarts=100)
HANG_S = 3.0
"""Long enough that a worker for which a busy machine has no time is not taken for a stuck one."""
SIZE, BATCH_SIZE = 32, 4


@dataclass(frozen=True)
class Mode:
    """In which way the loader is used; ``child``: the trainer is itself a ``multiprocessing`` child."""

    method: str
    transport: str
    kind: str
    persistent: bool
    child: bool

    def __str__(self) -> str:
        flags = [name for name in ("persistent", "child") if getattr(self, name)]
        return "-".join([self.method, self.transport, self.kind, *flags])

    @property
    def workers(self) -> int:
        """As many as a row needs that asks for no number: a spawned one takes seconds of a processor to start."""
        return 1 if self.method == "spawn" else 2

    def loader(self, dataset: Any, listener: Listener | None = None, **kwargs: Any) -> Any:
        """A loader used in this way."""
        options = {
            "batch_size": BATCH_SIZE,
            "num_workers": self.workers,
            "recovery": QUICK,
            "multiprocessing_context": self.method,
            "transport": self.transport,
            "persistent_workers": self.persistent,
            "telemetry": listener.policy if listener is not None else None,
            **kwargs,
        }
        return RobustDataLoader(dataset, **options)

    def numbers(self, size: int = SIZE) -> Any:
        """The numbers from 0, as this kind of dataset."""
        return Numbers(size) if self.kind == "map" else Stream(size)

    def injected(self, injector: Injector, size: int = SIZE) -> Any:
        """The same, with misbehaving samples."""
        return (InjectedDataset if self.kind == "map" else InjectedStream)(self.numbers(size), injector)

    def check_exact(self, samples: list[int], size: int = SIZE) -> None:
        """Each sample once, in the sampler's order, or in that of its share of the stream."""
        if self.kind == "map":
            assert samples == list(range(size))
            return
        assert sorted(samples) == list(range(size))
        for share in range(self.workers):
            mine = [sample for sample in samples if sample % self.workers == share]
            assert mine == sorted(mine)


MODES = tuple(itertools.starmap(Mode, itertools.product(METHODS, TRANSPORTS, KINDS, (False, True), (False, True))))


@dataclass(frozen=True)
class Situation:
    """A row of the table.

    Attributes:
        number: of the situation it belongs to.
        run: makes it happen and asserts.
        applies: in which modes it means something.
    """

    number: int
    name: str
    run: Callable[[Mode, Path], None]
    applies: Callable[[Mode], bool]


SITUATIONS: list[Situation] = []

Row = Callable[[Mode, Path], None]


def situation(number: int, applies: Callable[[Mode], bool] = lambda mode: True) -> Callable[[Row], Row]:
    """Enter a function in the table."""

    def enter(run: Row) -> Row:
        SITUATIONS.append(Situation(number, run.__name__, run, applies))
        return run

    return enter


def map_style(mode: Mode) -> bool:
    return mode.kind == "map"


def own_process(mode: Mode) -> bool:
    """The trainer is a program of its own: how the loader is used is the program's choice but for the start method and
    the transport."""
    return map_style(mode) and not mode.persistent and not mode.child


# --- 1 to 3: deaths at any moment -------------------------------------------------------------------------------------


KILLS_WHILE_ASLEEP = {"fork": 10, "forkserver": 10, "spawn": 2}
"""How many times a row kills: with twenty rounds of each row, 200 times where a start is cheap."""


def kill_while_asleep(mode: Mode, nbytes: int) -> None:
    """A worker has sent, or is sending, all it could while the trainer slept, and dies there; so do its successors."""
    kills = KILLS_WHILE_ASLEEP[mode.method]
    size = 2 * kills + 4  # a kill costs no more than two batches: one that lay ready, and one from who comes next
    dataset = (Big if mode.kind == "map" else BigStream)(size, nbytes)
    iterator = iter(mode.loader(dataset, batch_size=1, prefetch_factor=1, num_workers=1))
    batches: list[torch.Tensor] = []
    killed: set[int] = set()
    while len(killed) < kills:
        for pid in set(pids(iterator)) - killed:
            await_idle(iterator, 0, done=1)
            kill(pid, signal.SIGKILL)
            killed.add(pid)
        batches.append(next(iterator))
    batches += iterator
    assert [int(batch[0, 0]) for batch in batches] == list(range(size))
    assert all(torch.equal(batch, torch.full((1, nbytes), int(batch[0, 0]), dtype=torch.uint8)) for batch in batches)
    iterator._shutdown_workers()


@situation(1)
def killed_with_a_tiny_frame_unread(mode: Mode, folder: Path) -> None:
    """SIGKILL while the trainer sleeps: exact."""
    kill_while_asleep(mode, 64)


@situation(1)
def killed_with_a_large_frame_half_written(mode: Mode, folder: Path) -> None:
    """The same with 8 MiB."""
    kill_while_asleep(mode, 8 << 20)


@situation(2)
def deaths_during_user_code(mode: Mode, folder: Path) -> None:
    """Nothing is raised there: a stock loader, the user's own SIGCHLD handler and subprocesses go on."""
    calls: list[int] = []
    before = signal.signal(signal.SIGCHLD, lambda number, frame: calls.append(number))
    try:
        iterator = iter(mode.loader(mode.numbers()))
        delivered = [next(iterator)]
        for pid in pids(iterator):
            kill(pid, signal.SIGKILL)
        user_code()
        stock = DataLoader(Numbers(8), batch_size=2, num_workers=1, multiprocessing_context="fork")
        assert flat(stock) == list(range(8))
        delivered += list(iterator)
    finally:
        signal.signal(signal.SIGCHLD, before)
        signal_handling._SIGCHLD_handler_set = False  # the next stock loader of this process shall set its own again
    assert calls
    mode.check_exact(flat(delivered))
    iterator._shutdown_workers()


@situation(3)
def finished_batches_and_then_a_death(mode: Mode, folder: Path) -> None:
    """What had not arrived is loaded once more, and nothing comes twice."""
    loader = mode.loader(mode.numbers())
    for _ in range(2 if mode.persistent else 1):
        iterator = iter(loader)
        delivered = [next(iterator)]
        for pid in pids(iterator):
            kill(pid, signal.SIGKILL)
        delivered += list(iterator)
        mode.check_exact(flat(delivered))
    assert iterator.batch_info.attempts >= 1
    iterator._shutdown_workers()


# --- 4 to 7: samples --------------------------------------------------------------------------------------------------


def check_poison(mode: Mode, misbehaviour: Any) -> None:
    listener, injector = Listener(), Injector({13: misbehaviour})
    recovery = replace(QUICK, poison_after=1) if mode.method == "spawn" else QUICK
    loader = mode.loader(mode.injected(injector), listener, recovery=recovery)
    iterator = iter(loader)
    samples = flat(iterator)
    iterator._shutdown_workers()
    assert not injector.seen_in_trainer
    assert injector.count(13) <= 8, "a bounded number of deaths"
    assert len(listener.of(WorkerCrashed)) == injector.count(13)
    if mode.kind == "map":
        assert len(samples) == SIZE
        assert [sample for place, sample in enumerate(samples) if place != 13] == [*range(13), *range(14, SIZE)]
        assert samples[13] != 13
        assert {record.index for record in loader.fault_log if record.kind == "poison"} == {13}
        return
    (ended,) = listener.of(ShardEnded)
    lost = set(range(SIZE)) - set(samples)
    assert len(samples) == len(set(samples))
    share = 13 % mode.workers
    batches = 13 // mode.workers // BATCH_SIZE  # of that share, before the one that kills
    first = share + batches * BATCH_SIZE * mode.workers
    assert ended.worker_id == share
    assert lost == set(range(first, SIZE, mode.workers))


@situation(4)
def a_sample_that_segfaults(mode: Mode, folder: Path) -> None:
    """Quarantined, its neighbours delivered, never run in the training process."""
    check_poison(mode, Crash())


@situation(4)
def a_sample_that_aborts(mode: Mode, folder: Path) -> None:
    """The same."""
    check_poison(mode, Crash(signal=signal.SIGABRT))


@situation(4)
def a_sample_that_exits(mode: Mode, folder: Path) -> None:
    """The same, with an exit status that looks like success."""
    check_poison(mode, Exit(code=0))


@situation(4)
def a_sample_that_takes_all_memory(mode: Mode, folder: Path) -> None:
    """The same."""
    check_poison(mode, ExhaustMemory(up_to_bytes=32 << 20))


@situation(5)
def a_result_that_cannot_be_pickled(mode: Mode, folder: Path) -> None:
    """A fault, no hang: everything else is delivered, by the same workers."""
    listener = Listener()
    dataset = (Made if mode.kind == "map" else MadeStream)(SIZE, {13: Unpicklable})
    loader = mode.loader(dataset, listener, collate_fn=list)
    iterator = iter(loader)
    samples = [sample for batch in iterator for sample in samples_of(batch)]
    iterator._shutdown_workers()
    assert set(samples) == set(range(SIZE)) - {13}
    (record,) = loader.fault_log
    assert record.kind == "unpicklable"
    assert record.index == (13 if mode.kind == "map" else None)
    assert not listener.of(WorkerCrashed)


def check_faults(mode: Mode, errors: dict[int, Callable[[Any], BaseException]]) -> None:
    listener = Listener()
    dataset = Raising(2 * SIZE, errors) if mode.kind == "map" else Stream(2 * SIZE, errors=errors)
    loader = mode.loader(dataset, listener, faults=FaultPolicy(burst=1_000, retry=None))
    iterator = iter(loader)
    samples = flat(iterator)
    iterator._shutdown_workers()
    assert set(samples) == set(range(2 * SIZE)) - set(errors)
    assert len(samples) == (2 * SIZE if mode.kind == "map" else 2 * SIZE - len(errors))
    if mode.kind == "iterable":
        assert len(loader.fault_log) == len(errors)
    else:
        told = {record.index: record.error_type.rpartition(".")[2] for record in loader.fault_log}
        assert told == {index: type(make(index)).__name__ for index, make in errors.items()}
    assert not listener.of(WorkerCrashed)


def every_third(makers: list[Callable[[Any], BaseException]]) -> dict[int, Callable[[Any], BaseException]]:
    return {3 * number + 1: make for number, make in enumerate(makers)}


@situation(6)
def hostile_exceptions(mode: Mode, folder: Path) -> None:
    """All of them in one epoch: each recorded by its type, and everything else delivered."""
    check_faults(mode, every_third([Hostile(name) for name in HOSTILE]))


@situation(7)
def exceptions_that_mean_the_end(mode: Mode, folder: Path) -> None:
    """StopIteration, SystemExit, KeyboardInterrupt and their like never shorten an epoch, nor end the program."""
    names = [
        name for name in CONTROL if mode.kind == "map" or name != "StopIteration"
    ]  # the end of a stream is its own
    check_faults(mode, every_third([Control(name) for name in names]))


# --- 8 to 10: hangs, and workers that cannot be kept ------------------------------------------------------------------


@situation(8)
def stuck_against_slow(mode: Mode, folder: Path) -> None:
    """Of one blocked in C and one that takes half of the deadline, only the first is killed, with its stack."""
    listener = Listener()
    injector = Injector({9: Hang(in_c=True, times=1), 4: Slow(seconds=HANG_S / 2, times=1)})
    recovery = RecoveryPolicy(hang_after_s=HANG_S, backoff_s=0)
    iterator = iter(mode.loader(mode.injected(injector), listener, recovery=recovery))
    samples = flat(iterator)
    iterator._shutdown_workers()
    mode.check_exact(samples)
    (hung,) = listener.of(WorkerHung)
    assert hung.index == (9 if mode.kind == "map" else None)
    assert "act" in hung.stack
    assert [crash.cause for crash in listener.of(WorkerCrashed)] == ["hang"]


@situation(9)
def restarts_that_die_at_once(mode: Mode, folder: Path) -> None:
    """Fewer and fewer workers, a bounded number of processes, and the history in the error."""
    recovery = RecoveryPolicy(max_restarts=1, backoff_s=0.01, in_process=False)
    listener = Listener()
    loader = mode.loader(mode.numbers(), listener, recovery=recovery, worker_init_fn=KillEveryWorker(), num_workers=2)
    try:
        for _ in loader:
            raise AssertionError("nobody could have loaded this")
    except RestartBudgetError as error:
        assert "WorkerCrashed" in str(error)
        assert error.history
    else:
        raise AssertionError("an epoch without batches")
    assert [event.workers for event in listener.of(PoolShrunk)] == [1]
    assert 3 <= len(listener.of(WorkerCrashed)) <= 8


@situation(10)
def nobody_left_but_the_training_process(mode: Mode, folder: Path) -> None:
    """It loads the rest, with everything set that ``num_workers=0`` would refuse."""
    listener = Listener()
    loader = mode.loader(
        mode.numbers(),
        listener,
        recovery=RecoveryPolicy(max_restarts=0, backoff_s=0),
        timeout=60,
        prefetch_factor=3,
        worker_init_fn=do_nothing,
        generator=torch.Generator().manual_seed(3),
    )
    iterator = iter(loader)
    delivered = []
    for batch in iterator:
        delivered.append(batch)
        for pid in pids(iterator):
            kill(pid, signal.SIGKILL)
    iterator._shutdown_workers()
    mode.check_exact(flat(delivered))
    assert listener.of(PoolShrunk)[-1].workers == 0
    assert not loader.fault_log


def do_nothing(worker_id: int) -> None:
    """A ``worker_init_fn``."""


# --- 11 to 13: signals, the end, and a parent with threads ------------------------------------------------------------


@situation(11, own_process)
def sigterm_to_the_whole_group(mode: Mode, folder: Path) -> None:
    """Twenty more batches, saved, and everybody gone."""
    with using_transport(mode.transport):
        test_sigterm_to_everybody(mode.method)


@situation(11, own_process)
def ctrl_c(mode: Mode, folder: Path) -> None:
    """One traceback, and everybody gone."""
    with using_transport(mode.transport):
        test_ctrl_c(mode.method)


@situation(12, own_process)
def the_trainer_is_killed(mode: Mode, folder: Path) -> None:
    """With a worker stuck in C that owns a child, and one in the middle of a frame: all gone."""
    with using_transport(mode.transport):
        test_a_killed_trainer_takes_everything_along(mode.method, folder)


@situation(12, lambda mode: mode.method == "fork")
def thirty_deaths_leave_no_descriptor(mode: Mode, folder: Path) -> None:
    """The trainer has as many descriptors after the last as after the first few."""
    size = 160
    iterator = iter(mode.loader(mode.numbers(size)))
    delivered, counts = [], []
    for batch in iterator:
        delivered.append(batch)
        counts.append(len(os.listdir("/proc/self/fd")))
        for pid in pids(iterator)[:1]:
            kill(pid, signal.SIGKILL)
    iterator._shutdown_workers()
    mode.check_exact(flat(delivered), size)
    assert len(counts) == size // BATCH_SIZE
    assert max(counts[-8:]) <= max(counts[:8])


@situation(13)
def restarts_in_a_threaded_trainer(mode: Mode, folder: Path) -> None:
    """OpenMP, a logging lock that is always held by somebody, and a second loader that starts meanwhile."""
    stop, log = threading.Event(), logging.getLogger("chatter")
    log.addHandler(logging.NullHandler())
    log.propagate = False

    def chatter() -> None:
        while not stop.is_set():
            log.warning("x")
            if mode.method == "spawn":  # what is spawned inherits no lock, and needs a processor to start
                time.sleep(0.001)

    others: list[list[int]] = []
    loaders = [threading.Thread(target=lambda: others.append(flat(mode.loader(Numbers(8), persistent_workers=False))))]
    threads = [threading.Thread(target=chatter), *loaders]
    iterator = iter(mode.loader(mode.numbers()))
    for thread in threads:
        thread.start()
    try:
        delivered = []
        for number, batch in enumerate(iterator):
            delivered.append(batch)
            (torch.ones(128, 128) @ torch.ones(128, 128)).sum()
            if number in (1, 4):
                for pid in pids(iterator)[:1]:
                    kill(pid, signal.SIGKILL)
        loaders[0].join()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    iterator._shutdown_workers()
    mode.check_exact(flat(delivered))
    assert others == [list(range(8))]


# --- running a row ----------------------------------------------------------------------------------------------------

PRODUCT = tuple((row, mode) for row in SITUATIONS for mode in MODES if row.applies(mode))


def run(row: Situation, mode: Mode, folder: Path) -> None:
    """Run a row in this process, or with ``mode.child`` in a ``multiprocessing`` child of it."""
    if not mode.child:
        run_here(row, mode, folder)
        return
    told = folder / "failure"
    process = child_context(mode.method).Process(target=_in_a_child, args=(row.name, mode, folder, told))
    process.start()
    process.join()
    assert process.exitcode == 0, told.read_text() if told.exists() else f"exit code {process.exitcode}"


def run_here(row: Situation, mode: Mode, folder: Path) -> None:
    """Run a row in this process, whatever it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustLoaderWarning)
        warnings.filterwarnings("ignore", "This DataLoader will create")
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        row.run(mode, folder)


def child_context(method: str) -> Any:
    """How to start a trainer that is a ``multiprocessing`` child and itself starts workers by ``method``.

    A forked child would inherit its parent's fork server and resource tracker, of which it is not the parent:
    multiprocessing starts no worker there, with any loader.
    """
    return mp.get_context("fork" if method == "fork" else "spawn")


def _in_a_child(name: str, mode: Mode, folder: Path, told: Path) -> None:
    signal.alarm(0)
    try:
        run_here(next(row for row in SITUATIONS if row.name == name), mode, folder)
    except BaseException:
        told.write_text(traceback.format_exc())
        raise SystemExit(1) from None


def columns(row: Situation, mode: Mode) -> dict[str, Any]:
    """A row and its mode as plain values."""
    return {"number": row.number, "situation": row.name, **asdict(mode)}
