"""Workers that cannot start: what they report is raised with its cause, what kills them is survived."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from robustloader import RecoveryPolicy, RobustDataLoader, WorkerCrashed, WorkerRestarted, WorkerStartError
from robustloader.system import host
from tests.support.datasets import CannotBegin, CannotPickle, DeadlyInit, Death, Numbers, UnpicklesBadly
from tests.support.hostile import HOSTILE
from tests.support.listener import Listener, flat
from tests.support.peek import pids
from tests.support.watch import Gate, await_death, kill, wait_at


class InitRaises:
    """A ``worker_init_fn`` that raises in one worker, or in all."""

    def __init__(self, make: Any, worker: int | None = None) -> None:
        self.make = make
        self.worker = worker

    def __call__(self, worker_id: int) -> None:
        if self.worker in (None, worker_id):
            raise self.make(worker_id)


def no_mount(worker_id: int) -> BaseException:
    return ValueError(f"no mount for worker {worker_id}")


@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.parametrize("worker", [None, 1])
def test_worker_init_fn_raises(method: str, worker: int | None) -> None:
    """``iter()`` raises, with the user's error as the cause; nothing is restarted."""
    listener = Listener()
    loader = RobustDataLoader(
        Numbers(16),
        batch_size=4,
        num_workers=2,
        worker_init_fn=InitRaises(no_mount, worker),
        multiprocessing_context=method,
        telemetry=listener.policy,
    )
    with pytest.raises(WorkerStartError, match="no mount for worker") as caught:
        iter(loader)
    assert isinstance(caught.value.__cause__, ValueError)
    assert "no mount for worker" in str(caught.value.__cause__)
    assert caught.value.worker_id in ((0, 1) if worker is None else (1,))
    assert caught.value.pid
    assert "raise self.make(worker_id)" in str(caught.value)
    assert not listener.of(WorkerCrashed)
    assert loader.active_workers == 0


def test_strict_mode_raises_the_users_own_type() -> None:
    """As torch does."""
    loader = RobustDataLoader(
        Numbers(16), batch_size=4, num_workers=2, worker_init_fn=InitRaises(no_mount), recovery=None
    )
    with pytest.raises(ValueError, match="no mount for worker") as caught:
        list(loader)
    assert type(caught.value) is ValueError
    assert "in DataLoader worker process" in str(caught.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_exception_at_the_start(name: str) -> None:
    """Still a ``WorkerStartError`` that names the type."""
    make = HOSTILE[name]
    loader = RobustDataLoader(Numbers(16), batch_size=4, num_workers=1, worker_init_fn=InitRaises(make))
    with pytest.raises(WorkerStartError, match=type(make(0)).__name__) as caught:
        iter(loader)
    assert caught.value.__cause__ is not None
    assert len(str(caught.value)) < 100_000


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, StopIteration])
def test_a_control_exception_at_the_start(kind: Any) -> None:
    """``sys.exit`` in ``worker_init_fn`` ends neither the trainer nor the loop."""
    loader = RobustDataLoader(Numbers(16), batch_size=4, num_workers=1, worker_init_fn=InitRaises(kind))
    with pytest.raises(WorkerStartError, match=kind.__name__):
        iter(loader)


@pytest.mark.filterwarnings("ignore:Got pickle error:UserWarning")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_dataset_that_does_not_pickle(method: str) -> None:
    """Nothing is started; the error names the trouble, in strict mode by torch's own type."""
    options: dict[str, Any] = {"batch_size": 4, "num_workers": 2, "multiprocessing_context": method}
    with pytest.raises(WorkerStartError, match="lambda") as caught:
        list(RobustDataLoader(CannotPickle(16), **options))
    assert caught.value.__cause__ is not None
    with pytest.raises(type(caught.value.__cause__)):
        list(RobustDataLoader(CannotPickle(16), recovery=None, **options))


def test_a_dataset_that_does_not_pickle_is_no_trouble_under_fork() -> None:
    """Nothing is pickled there."""
    assert flat(RobustDataLoader(CannotPickle(16), batch_size=4, num_workers=2)) == list(range(16))


@pytest.mark.parametrize(("method", "strict"), [("spawn", False), ("forkserver", False), ("forkserver", True)])
def test_a_dataset_that_does_not_unpickle(method: str, strict: bool) -> None:
    """The worker reports it: not a crash, not restarted eight times, and the cause is named."""
    listener = Listener()
    loader = RobustDataLoader(
        UnpicklesBadly(16),
        batch_size=4,
        num_workers=1,
        multiprocessing_context=method,
        telemetry=listener.policy,
        **({"recovery": None} if strict else {}),  # type: ignore[arg-type]
    )
    with pytest.raises(FileNotFoundError if strict else WorkerStartError, match="the archive is not mounted") as caught:
        list(loader)
    if not strict:
        assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert not listener.of(WorkerCrashed)


class DiesOnUnpickling(Numbers):
    """Kills the worker before it has said a word."""

    def __init__(self, size: int, death: Death) -> None:
        super().__init__(size)
        self.death = death

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state)
        self.death.strike()


@pytest.mark.parametrize("how", ["SIGKILL", "exit 3"])
def test_a_death_before_the_first_word(how: str, tmp_path: Path) -> None:
    """A silent death at the start spends restart credit, and the next start may go well."""
    listener, death = Listener(), Death(tmp_path, how)
    loader = RobustDataLoader(
        DiesOnUnpickling(16, death),
        batch_size=4,
        num_workers=1,
        multiprocessing_context="forkserver",
        telemetry=listener.policy,
    )
    assert flat(loader) == list(range(16))
    assert death.count == 1
    (crash,) = listener.of(WorkerCrashed)
    assert (crash.phase, crash.index, crash.worker_id) == ("init", None, 0)


@pytest.mark.parametrize("how", ["SIGSEGV", "exit 0"])
def test_deaths_in_worker_init_fn(how: str, tmp_path: Path) -> None:
    """Several in a row, each survived; nobody is blamed."""
    death = Death(tmp_path, how, times=3)
    loader = RobustDataLoader(
        Numbers(16),
        batch_size=4,
        num_workers=2,
        worker_init_fn=DeadlyInit(death),
        recovery=RecoveryPolicy(backoff_s=0),
    )
    assert flat(loader) == list(range(16))
    # The other worker may have done everything before the last restart.
    assert 1 <= death.count <= 3
    assert not loader.fault_log


class InitOnlyOnceWell:
    """Raises in every process but the first one of each worker."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __call__(self, worker_id: int) -> None:
        try:
            os.close(os.open(f"{self.folder}/init-{worker_id}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            raise ConnectionError("the licence server is gone") from None


def test_a_failure_in_a_later_incarnation_spends_credit(tmp_path: Path) -> None:
    """A restart that fails to start is like a death, not the end: the training process takes over."""
    listener = Listener()
    loader = RobustDataLoader(
        Numbers(40),
        batch_size=4,
        num_workers=1,
        worker_init_fn=InitOnlyOnceWell(tmp_path),
        recovery=RecoveryPolicy(max_restarts=2, backoff_s=0),
        telemetry=listener.policy,
    )
    iterator = iter(loader)
    delivered = [next(iterator)]
    for process in iterator._workers:
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(Exception, match=r"licence server|restart"):
        for batch in iterator:
            delivered.append(batch)
    assert flat(delivered) == list(range(len(flat(delivered))))


class StuckOnce:
    """A ``worker_init_fn`` that does not return the first time."""

    def __init__(self, folder: Path, gate: str) -> None:
        self.folder = str(folder)
        self.gate = gate

    def __call__(self, worker_id: int) -> None:
        try:
            os.close(os.open(f"{self.folder}/stuck-{worker_id}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        wait_at(self.gate)


def test_a_worker_that_is_never_ready_is_replaced(tmp_path: Path) -> None:
    """After ``start_timeout_s``."""
    listener = Listener()
    with Gate(tmp_path / "gate") as gate:
        loader = RobustDataLoader(
            Numbers(16),
            batch_size=4,
            num_workers=1,
            worker_init_fn=StuckOnce(tmp_path, gate.path),
            recovery=RecoveryPolicy(start_timeout_s=1.0, max_restarts=100),
            telemetry=listener.policy,
        )
        assert flat(loader) == list(range(16))
    assert {event.cause for event in listener.of(WorkerCrashed)} == {"start"}


def test_a_reported_failure_is_not_a_crash() -> None:
    """Also where the trainer hears of the report and of the process's end at the same time."""
    listener = Listener()
    iterator = iter(RobustDataLoader(CannotBegin(16), batch_size=4, num_workers=2, telemetry=listener.policy))
    for pid in pids(iterator):
        await_death(pid)
    with pytest.raises(WorkerStartError, match="the archive is not mounted"):
        next(iterator)
    assert not listener.of(WorkerCrashed)
    assert not listener.of(WorkerRestarted)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_no_descriptor_for_a_restart(method: str, num_workers: int) -> None:
    """The trainer's other code has them all: what cannot be restarted is done without, and nothing is lost."""
    listener = Listener()
    loader: Any = RobustDataLoader(
        Numbers(1 << 20),
        batch_size=4,
        num_workers=num_workers,
        multiprocessing_context=method,
        recovery=RecoveryPolicy(max_restarts=2, backoff_s=0),
        telemetry=listener.policy,
    )
    batches = iter(loader)
    samples = flat([next(batches)])
    kill(pids(batches)[0], signal.SIGKILL)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for batch in batches:
            samples += flat([batch])
            if loader.active_workers < num_workers:
                break
        samples += flat([next(batches)])
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert samples == list(range(len(samples)))
    assert [event.cause for event in listener.of(WorkerCrashed)] == ["killed"]
    assert not listener.of(WorkerRestarted)


class Stopped(BaseException):
    """What a handler of the trainer's raises."""


@pytest.mark.parametrize("place", ["while it is held back", "in the middle"])
def test_a_signal_while_a_worker_is_restarted(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its handler raises reaches the loop; whoever goes on gets every sample, and it costs no restart.

    In the middle it may run where another thread was told of the signal.
    """
    listener, number, sent = Listener(), signal.SIGTERM, []
    loader: Any = RobustDataLoader(
        Numbers(32),
        batch_size=4,
        num_workers=2,
        multiprocessing_context="fork",
        recovery=RecoveryPolicy(max_restarts=1, backoff_s=0),
        telemetry=listener.policy,
    )
    fork, open_pidfd = os.fork, host.open_pidfd

    def told(pid: int) -> bool:
        if pid and not sent:
            sent.append(pid)
            return True
        return False

    def slow_fork() -> int:
        pid = fork()
        if told(pid):
            signal.pthread_kill(threading.get_ident(), number)
        return pid

    def interrupted(pid: int) -> int | None:
        if told(pid):
            raise Stopped(place)
        return open_pidfd(pid)

    def stop(number: int, frame: Any) -> None:
        raise Stopped(place)

    before = signal.signal(number, stop)
    try:
        batches = iter(loader)
        samples = flat([next(batches)])
        if place == "in the middle":
            monkeypatch.setattr(host, "open_pidfd", interrupted)
        else:
            monkeypatch.setattr(os, "fork", slow_fork)
        kill(pids(batches)[0], signal.SIGKILL)
        with pytest.raises(Stopped, match=place):
            while True:
                samples += flat([next(batches)])
        samples += flat(batches)
    finally:
        signal.signal(number, before)
    assert samples == list(range(32))
    assert len(listener.of(WorkerCrashed)) == len(listener.of(WorkerRestarted)) == 1
    assert loader.summary().workers_at_end == 2
