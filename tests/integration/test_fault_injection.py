"""``robustloader.testing``: what is injected happens, to the samples named, as often as told, and nothing is left."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import signal
import subprocess
import sys
import threading
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from robustloader import OptionError, RecoveryPolicy, RobustDataLoader
from robustloader.testing import (
    Crash,
    ExhaustMemory,
    Exit,
    Hang,
    InjectedDataset,
    InjectedStream,
    Injector,
    Leaks,
    Misbehaviour,
    Raise,
    Slow,
    WorkerKiller,
    no_leaks,
)
from tests.support.listener import flat
from tests.support.peek import pids
from tests.support.watch import until

QUICK = RecoveryPolicy(backoff_s=0, max_restarts=1_000)


def exit_code_of(misbehaviour: Misbehaviour) -> int | None:
    """How a forked process ends that meets it."""
    injector = Injector({0: misbehaviour})
    process = mp.get_context("fork").Process(target=injector.strike, args=(0,))
    process.start()
    process.join(30)
    assert injector.count(0) == 1
    return process.exitcode


@pytest.mark.parametrize(
    ("misbehaviour", "code"),
    [
        (Crash(), -signal.SIGSEGV),
        (Crash(signal=signal.SIGABRT), -signal.SIGABRT),
        (Crash(signal=signal.SIGBUS), -signal.SIGBUS),
        (Exit(), 0),
        (Exit(code=3), 3),
        (ExhaustMemory(up_to_bytes=64 << 20), -signal.SIGKILL),
        (Slow(seconds=0.01), 0),
    ],
    ids=str,
)
def test_how_a_process_ends(misbehaviour: Misbehaviour, code: int) -> None:
    """Each does what its name says."""
    assert exit_code_of(misbehaviour) == code


def resident_bytes(field: str) -> int:
    """``VmRSS`` (resident now) or ``VmHWM`` (at most so far) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def grow(queue: Any) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident_bytes("VmRSS")
    held = ExhaustMemory(up_to_bytes=128 << 20)
    signal_before, os.kill = os.kill, lambda *_: None  # survives, to tell how much it had
    held.act(0)
    os.kill = signal_before
    queue.put(resident_bytes("VmHWM") - before)


def test_memory_is_really_taken_and_bounded() -> None:
    """Every page of what was asked for, and no more."""
    # Spawned: a forked copy of a large process fills what it has freed before it takes anything.
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=grow, args=(queue,))
    process.start()
    try:
        taken = queue.get()
        process.join()
    finally:
        queue.close()
    assert 100 << 20 <= taken <= 160 << 20


@pytest.mark.parametrize("in_c", [False, True])
def test_hanging(in_c: bool) -> None:
    """In Python a signal handler still runs, in C with the interpreter lock held none does."""
    code = (
        "import signal, sys\n"
        "from robustloader.testing import Hang\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(5))\n"
        "print('here', flush=True)\n"
        f"Hang(in_c={in_c}).act(0)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"

    def state() -> str:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    until(lambda: state() == "S", what="sleep")
    process.send_signal(signal.SIGUSR1)
    if in_c:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.kill()
    assert process.wait(30) == (-signal.SIGKILL if in_c else 5)
    process.stdout.close()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_times_are_counted_over_all_processes(method: str) -> None:
    """Twice means twice, although those who do it die of it."""
    injector = Injector({5: Crash(times=2), 11: Raise(error=ConnectionError, times=1)})
    loader = RobustDataLoader(
        InjectedDataset(list(range(24)), injector),
        batch_size=4,
        num_workers=2,
        multiprocessing_context=method,
        recovery=QUICK,
    )
    assert flat(loader) == list(range(24))
    assert (injector.count(5), injector.count(11), injector.count()) == (2, 1, 3)
    assert not injector.seen_in_trainer


def test_a_stream() -> None:
    """The same for what an iterable dataset yields."""
    injector = Injector({5: Exit(code=3, times=1)})
    loader = RobustDataLoader(InjectedStream(range(24), injector), batch_size=4, num_workers=1, recovery=QUICK)
    assert flat(loader) == list(range(24))
    assert injector.count() == 1


def test_the_training_process_is_spared() -> None:
    """What would kill or hang it is only noted; exceptions are raised there as anywhere."""
    injector = Injector({1: Crash(), 2: Hang(), 3: Exit(), 4: ExhaustMemory(), 5: Raise(error=KeyError)})
    data = InjectedDataset(range(6), injector)
    assert [data[index] for index in range(5)] == [0, 1, 2, 3, 4]
    assert injector.seen_in_trainer == 4
    with pytest.raises(KeyError, match="sample 5"):
        data[5]


def test_which_samples_follows_from_the_seed() -> None:
    """The same seed, the same samples; the shares are exact."""
    rates = {Raise(): 0.05, Crash(times=1): 0.01}
    plans = [Injector.seeded(1_000, rates, seed=seed).plan for seed in (7, 7, 8)]
    assert plans[0] == plans[1] != plans[2]
    assert sum(isinstance(misbehaviour, Raise) for misbehaviour in plans[0].values()) == 50
    assert sum(isinstance(misbehaviour, Crash) for misbehaviour in plans[0].values()) == 10
    with pytest.raises(OptionError, match="rates"):
        Injector.seeded(10, {Raise(): 0.9, Crash(): 0.2}, seed=0)
    with pytest.raises(OptionError, match="plan"):
        Injector({3: "crash"})  # type: ignore[dict-item]


def test_the_folder_goes_with_the_injector(tmp_path: Path) -> None:
    """A temporary one; one that was named stays. A copy in another process removes nothing."""
    injector = Injector({0: Slow(seconds=0)})
    copy = pickle.loads(pickle.dumps(injector))
    copy.strike(0)
    del copy
    assert injector.count(0) == 1
    folder = injector.folder
    assert os.path.isdir(folder)
    del injector
    assert not os.path.exists(folder)
    Injector({0: Slow(seconds=0)}, folder=tmp_path).strike(0)
    assert list(tmp_path.iterdir())


def test_the_killer_hits_this_iterators_workers_only() -> None:
    """Seeded victims; the neighbour's workers live."""
    recovered = iter(RobustDataLoader(range(400), batch_size=4, num_workers=3, recovery=QUICK))  # type: ignore[arg-type]
    other = iter(DataLoader(range(80), batch_size=4, num_workers=2))  # type: ignore[arg-type]
    theirs = pids(other)
    killer = WorkerKiller(recovered, seed=3)
    delivered = [next(recovered)]
    while killer.kills < 5:
        assert killer.strike() not in theirs
        delivered.append(next(recovered))
    delivered += list(recovered)
    assert flat(delivered) == list(range(400))
    assert flat(other) == list(range(80))
    assert killer.strike() is None, "nobody is left"


def test_the_killer_as_a_context() -> None:
    """It strikes by itself until the block ends."""
    iterator: Any = iter(RobustDataLoader(range(100_000), batch_size=1, num_workers=2, recovery=QUICK))  # type: ignore[arg-type]
    taken = 0
    with WorkerKiller(iterator, seed=1, every_s=0.02) as killer:
        while killer.kills < 5:
            assert next(iterator) == taken
            taken += 1
    kills = killer.kills
    for _ in range(50):
        next(iterator)
    assert killer.kills == kills
    iterator._shutdown_workers()


def leave_a_process() -> Any:
    return subprocess.Popen(["sleep", "600"])


def leave_a_thread() -> Any:
    event = threading.Event()
    threading.Thread(target=event.wait, name="forgotten").start()
    return event


@pytest.mark.parametrize("what", ["sleep", "descriptors", "forgotten", "/dev/shm"])
def test_a_leak_is_named(what: str) -> None:
    """A process, a descriptor, a thread, a piece of shared memory."""
    kept: Any = None
    with pytest.raises(AssertionError, match=what), no_leaks(settle_s=0.1):
        if what == "sleep":
            kept = leave_a_process()
        elif what == "descriptors":
            kept = os.memfd_create("forgotten")
        elif what == "forgotten":
            kept = leave_a_thread()
        else:
            kept = shared_memory.SharedMemory(create=True, size=4096)
    if what == "sleep":
        assert kept.wait() == -signal.SIGKILL, "what is left behind is killed"
    elif what == "descriptors":
        os.close(kept)
    elif what == "forgotten":
        kept.set()
    else:
        kept.close()
        kept.unlink()


def test_nothing_is_no_leak() -> None:
    """And what settles in time is none either."""
    with no_leaks():
        assert flat(RobustDataLoader(range(8), num_workers=2)) == list(range(8))  # type: ignore[arg-type]
        thread = threading.Timer(0.05, int)
        thread.start()
    assert not Leaks.now().since(Leaks.now())
    assert str(Leaks.now().since(Leaks.now())) == "nothing"


def test_the_pytest_fixture(tmp_path: Path) -> None:
    """In somebody else's test suite."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["robustloader.testing.pytest_plugin"]\n')
    (tmp_path / "test_it.py").write_text(
        "import os\ndef test_clean(no_leaks): pass\ndef test_leaks(no_leaks): os.memfd_create('forgotten')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "2 passed, 1 error" in done.stdout
    assert "memfd:forgotten" in done.stdout
