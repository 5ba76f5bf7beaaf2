"""Workers that are stuck are killed, with their stacks; slow ones are left alone."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from robustloader import FaultPolicy, RecoveryPolicy, RobustDataLoader, WorkerCrashed, WorkerHangError, WorkerHung
from robustloader.engine import pool
from robustloader.engine.pool import Worker
from tests.support.datasets import Blocking, Numbers, Stream
from tests.support.listener import Listener, flat
from tests.support.peek import await_idle, pids
from tests.support.watch import Gate, Mailbox

HANG_S = 1.0
IMPATIENT = RecoveryPolicy(hang_after_s=HANG_S, backoff_s=0)


class Stuck:
    """A mailbox, a gate that never opens, and a dataset that waits there."""

    def __init__(self, folder: Path, *, size: int = 24, at: int = 9, once: bool = True) -> None:
        self.mailbox = Mailbox(folder / "mailbox")
        self.gate = Gate(folder / "gate")
        self.dataset = Blocking(
            size,
            at=at,
            mailbox=self.mailbox.path,
            gate=self.gate.path,
            once=str(folder / "once") if once else None,
        )

    def __enter__(self) -> Stuck:
        return self

    def __exit__(self, *_: object) -> None:
        self.mailbox.close()
        self.gate.close()


@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.parametrize("options", [{"recovery": IMPATIENT}, {"timeout": HANG_S}])
def test_a_stuck_worker_is_killed(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Blocked in C: after ``hang_after_s``, or torch's ``timeout``. The event shows where, the tasks are replayed."""
    if method == "forkserver" and "timeout" in options:
        pytest.skip("one start method is enough for the second way to set it")
    listener = Listener()
    with Stuck(tmp_path) as stuck:
        loader = RobustDataLoader(
            stuck.dataset,
            batch_size=4,
            num_workers=2,
            telemetry=listener.policy,
            multiprocessing_context=method,
            **options,
        )
        assert flat(loader) == list(range(24))
        pid = int(stuck.mailbox.take())
    (hung,) = listener.of(WorkerHung)
    assert (hung.pid, hung.index, hung.phase) == (pid, 9, "item")
    assert hung.silent_s >= HANG_S
    assert "get_stuck_in_here" in hung.stack
    assert "wait_at" in hung.stack
    (crash,) = listener.of(WorkerCrashed)
    assert (crash.cause, crash.pid, crash.index) == ("hang", pid, 9)
    summary = loader.summary()
    assert (summary.hangs, summary.crashes) == (1, 0)
    assert summary.restarts == 1 or method != "fork"
    assert not loader.fault_log


def test_a_worker_that_cannot_be_killed_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """As one that hangs in the kernel: SIGKILL has been sent and it goes on living. Its tasks are loaded without it."""

    def send_nothing(worker: Worker, reason: str = "") -> None:
        worker.killed_for = worker.killed_for or reason
        worker.killed_ns = worker.killed_ns or time.monotonic_ns()

    monkeypatch.setattr(Worker, "kill", send_nothing)
    monkeypatch.setattr(pool, "ABANDON_AFTER_S", 0.5)
    listener = Listener()
    with Stuck(tmp_path) as stuck:
        loader = RobustDataLoader(
            stuck.dataset, batch_size=4, num_workers=2, telemetry=listener.policy, recovery=IMPATIENT
        )
        iterator = iter(loader)
        processes = iterator.processes()
        assert flat(iterator) == list(range(24))
        pid = int(stuck.mailbox.take())
        (left,) = [process for process in processes if process.pid == pid]
        left.join()  # its lifeline is cut
    (crash,) = listener.of(WorkerCrashed)
    assert (crash.cause, crash.pid, crash.index, crash.exitcode) == ("hang", pid, 9, None)
    assert not loader.fault_log
    assert f"pid {pid}) does not end" in caplog.text


@pytest.mark.filterwarnings("ignore::robustloader.RobustLoaderWarning")
@pytest.mark.parametrize("faults", ["replace", "raise"])
def test_a_sample_that_always_hangs(faults: Any, tmp_path: Path) -> None:
    """Is convicted as any poison is, and never tried in the training process, which would hang as well."""
    with Stuck(tmp_path, once=False) as stuck:
        loader = RobustDataLoader(
            stuck.dataset,
            batch_size=4,
            num_workers=1,
            faults=FaultPolicy(action=faults, quarantine=tmp_path / "bad.jsonl"),
            recovery=RecoveryPolicy(hang_after_s=HANG_S, backoff_s=0, poison_after=1),
        )
        iterator = iter(loader)
        delivered = [next(iterator), next(iterator)]
        if faults == "raise":
            with pytest.raises(WorkerHangError) as caught:
                next(iterator)
            assert caught.value.index == 9
            assert "get_stuck_in_here" in caught.value.stack
            assert caught.value.silent_s >= HANG_S
        else:
            delivered.append(next(iterator))
        delivered += list(iterator)
        victims = {int(stuck.mailbox.take()) for _ in range(2)}
    assert os.getpid() not in victims
    samples = flat(delivered)
    assert 9 not in samples
    assert len(samples) == (20 if faults == "raise" else 24)
    (record,) = loader.fault_log
    assert (record.kind, record.index) == ("hang", 9)
    assert "silent" in record.message
    assert "get_stuck_in_here" in record.traceback
    if faults == "replace":
        assert json.loads((tmp_path / "bad.jsonl").read_text())["key"] == 9


class Slow(Numbers):
    """Each sample takes a good part of the deadline, a batch of them several deadlines."""

    def load(self, index: int) -> int:
        time.sleep(0.4 * HANG_S)
        return index


def test_a_slow_worker_is_left_alone() -> None:
    """The deadline is per sample."""
    listener = Listener()
    loader = RobustDataLoader(Slow(8), batch_size=4, num_workers=2, recovery=IMPATIENT, telemetry=listener.policy)
    assert flat(loader) == list(range(8))
    assert not listener.of(WorkerHung)
    assert not listener.of(WorkerCrashed)


def test_the_trainers_own_pause_does_not_count(tmp_path: Path) -> None:
    """While nobody waits for it, a worker may take its time."""
    listener = Listener()
    with Stuck(tmp_path, at=5) as stuck:
        loader = RobustDataLoader(
            stuck.dataset, batch_size=4, num_workers=1, recovery=IMPATIENT, telemetry=listener.policy
        )
        iterator = iter(loader)
        delivered = [next(iterator)]
        stuck.mailbox.take()
        time.sleep(1.5 * HANG_S)  # the pause itself
        stuck.gate.open()
        delivered += list(iterator)
    assert flat(delivered) == list(range(24))
    assert not listener.of(WorkerHung)


def test_without_a_deadline_a_stall_is_only_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the log, once, with what is known; the worker is not touched."""

    class Opens(logging.Handler):
        """Opens the gate when the report comes."""

        def emit(self, record: logging.LogRecord) -> None:
            if "index 9" in record.getMessage():
                stuck.gate.open()

    listener, handler = Listener(), Opens()
    logger = logging.getLogger("robustloader")
    logger.addHandler(handler)
    try:
        with Stuck(tmp_path) as stuck, caplog.at_level(logging.WARNING):
            loader = RobustDataLoader(
                stuck.dataset,
                batch_size=4,
                num_workers=1,
                recovery=RecoveryPolicy(stall_report_s=0.5),
                telemetry=listener.policy,
            )
            assert flat(loader) == list(range(24))
    finally:
        logger.removeHandler(handler)
    reports = [record.getMessage() for record in caplog.records if "index 9" in record.getMessage()]
    assert len(reports) == 1
    assert "'item'" in reports[0]
    assert not listener.of(WorkerHung)
    assert not listener.of(WorkerCrashed)


class StuckStream(Stream):
    """Waits at a gate before number ``at``, the first time."""

    def __init__(self, size: int, stuck: Stuck) -> None:
        super().__init__(size)
        self.blocking = stuck.dataset

    def __iter__(self) -> Any:
        for number in super().__iter__():
            self.blocking.load(number)
            yield number


def test_a_stuck_stream(tmp_path: Path) -> None:
    """Its share starts again behind what was delivered."""
    listener = Listener()
    with Stuck(tmp_path, at=13) as stuck:
        loader = RobustDataLoader(
            StuckStream(40, stuck), batch_size=4, num_workers=2, recovery=IMPATIENT, telemetry=listener.policy
        )
        assert sorted(flat(loader)) == list(range(40))
    assert len(listener.of(WorkerHung)) == 1


class StuckCollate:
    """Waits at a gate in collate, the first time."""

    def __init__(self, stuck: Stuck) -> None:
        self.blocking = stuck.dataset

    def __call__(self, samples: list[int]) -> list[int]:
        for sample in samples:
            self.blocking.load(sample)
        return samples


def test_a_stuck_collate(tmp_path: Path) -> None:
    """Has as long as all of its samples together."""
    listener = Listener()
    with Stuck(tmp_path) as stuck:
        loader = RobustDataLoader(
            Numbers(24),
            batch_size=2,
            num_workers=1,
            collate_fn=StuckCollate(stuck),
            recovery=IMPATIENT,
            telemetry=listener.policy,
        )
        assert flat(loader) == list(range(24))
    (hung,) = listener.of(WorkerHung)
    assert hung.phase == "collate"
    assert hung.silent_s >= 2 * HANG_S


def test_a_worker_frozen_between_two_tasks() -> None:
    """One that has a task, and neither begins nor dies, is silent as well: ``timeout`` is a deadline per task."""
    iterator = iter(RobustDataLoader(Numbers(16), batch_size=4, num_workers=1, prefetch_factor=1, timeout=HANG_S))
    signal.alarm(20)
    delivered = [next(iterator)]
    await_idle(iterator, 0, done=2)
    os.kill(pids(iterator)[0], signal.SIGSTOP)
    delivered += list(iterator)
    assert flat(delivered) == list(range(16))


def test_strict_mode_times_out_as_torch_does(tmp_path: Path) -> None:
    """A ``RuntimeError`` in torch's words, and the stuck worker is gone with the iterator."""
    with Stuck(tmp_path, at=1) as stuck:
        loader = RobustDataLoader(stuck.dataset, batch_size=4, num_workers=1, timeout=HANG_S, recovery=None)
        iterator = iter(loader)
        with pytest.raises(RuntimeError, match=r"DataLoader timed out after 1\.0 seconds"):
            next(iterator)
        iterator._shutdown_workers()
        assert loader.active_workers == 0


def test_leaving_a_stuck_worker_behind(tmp_path: Path) -> None:
    """The end of the iterator is bounded in time: who does not leave is killed."""
    with Stuck(tmp_path, at=5) as stuck:
        iterator = iter(RobustDataLoader(stuck.dataset, batch_size=4, num_workers=2))
        next(iterator)
        stuck.mailbox.take()
        began = time.monotonic()
        iterator._shutdown_workers()
        assert time.monotonic() - began < 15  # five seconds, on a machine that is busy with other things
