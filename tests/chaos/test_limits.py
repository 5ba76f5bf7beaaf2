"""Limits of the machine: real ones where they can be set, a reading that says so where they cannot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from robustloader import (
    MemoryLow,
    MemoryPolicy,
    PoolShrunk,
    ResourceError,
    RobustDataLoader,
    RobustLoaderWarning,
)
from robustloader.decisions.limits import DESCRIPTORS_PER_WORKER, Memory, SharedMemory
from robustloader.engine import memory as guard
from tests.parity.test_lifetimes import shared_bytes
from tests.support.limited import MIB, Large, Leaky, LeakyStream
from tests.support.listener import Listener, flat

ROOT = Path(__file__).resolve().parents[2]
GROUP_BYTES = 896 * MIB
PLENTY = Memory(limit_bytes=1000 * MIB, free_bytes=900 * MIB)
LOW = Memory(limit_bytes=1000 * MIB, free_bytes=99 * MIB)


def run(*arguments: str, prefix: tuple[str, ...] = ()) -> Any:
    """Run a program of ``tests.support.limited``; what it told, or a failed test."""
    command = [*prefix, sys.executable, "-m", "tests.support.limited", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=80)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- open files -------------------------------------------------------------------------------------------------------


def test_the_soft_limit_of_open_files_is_raised() -> None:
    """Where the hard one allows it, all workers start."""
    told = run("descriptors", "64", "4096", "adapt", "yes")
    assert told["samples"] == list(range(96))
    assert (told["workers"], told["shrunk"], told["error"]) == (8, [], "")
    assert 64 < told["soft"] < 4096


def test_fewer_workers_where_few_files_may_be_open() -> None:
    """64 files do not do for 8 workers: as many as there is room for start, and load everything."""
    told = run("descriptors", "64", "64", "adapt", "yes")
    assert told["samples"] == list(range(96))
    assert told["error"] == ""
    assert 1 <= told["workers"] < 8
    assert told["shrunk"] == list(range(7, told["workers"] - 1, -1))
    assert told["crashes"] == 0


def test_no_worker_where_hardly_any_file_may_be_open() -> None:
    """The training process loads."""
    told = run("descriptors", "24", "24", "adapt", "yes")
    assert told["samples"] == list(range(96))
    assert (told["workers"], told["shrunk"][-1]) == (0, 0)


@pytest.mark.parametrize(("on_low", "recovers"), [("raise", "yes"), ("raise", "no"), ("adapt", "no")])
def test_an_error_that_names_the_limit(on_low: str, recovers: str) -> None:
    """Where the policy says so, or where fewer workers are no choice."""
    told = run("descriptors", "64", "64", on_low, recovers)
    assert "its hard limit is 64" in told["error"]
    assert "8 workers" in told["error"]
    assert "ulimit" in told["remedy"]


@pytest.mark.parametrize("recovers", ["yes", "no"])
def test_a_soft_limit_that_is_not_to_be_raised(recovers: str) -> None:
    """The limits are the user's: with "raise" it is named, and left alone."""
    told = run("descriptors", "64", "4096", "raise", recovers)
    assert "soft limit is 64" in told["error"]
    assert told["soft"] == 64


def test_no_file_left_to_look_at_memory_with() -> None:
    """No batch is lost or held up; memory is looked at when it can be read again, and so is the room for workers."""
    told = run("no_descriptor")
    assert told["seen"] == list(range(64))
    assert told["sized"] == [False, True]
    workers, reason = told["room"]
    assert workers == 0
    assert "Too many open files" in reason
    assert "64 of 64 descriptors are open" in told["explained"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_a_worker_takes_is_counted_right(method: str) -> None:
    """No worker takes more open files of the training process than the rule allows for."""
    # The first spawned process starts multiprocessing's resource tracker.
    list(RobustDataLoader(Leaky(2, 0), num_workers=1, multiprocessing_context=method))
    loader: Any = RobustDataLoader(Leaky(64, 0), num_workers=2, multiprocessing_context=method)
    before = len(os.listdir("/proc/self/fd"))
    batches = iter(loader)
    next(batches)
    assert 0 < len(os.listdir("/proc/self/fd")) - before <= 2 * DESCRIPTORS_PER_WORKER
    del batches


# --- /dev/shm ---------------------------------------------------------------------------------------------------------


def test_a_small_dev_shm() -> None:
    """64 MiB and batches of 38 MB: torch's loader dies of it as doctor had said, and this one does not notice."""
    prefix = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh")
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("needs root, and unshare(1) to mount a small /dev/shm")
    told = run("small_shm", prefix=prefix)
    verdict, finding, remedy = told["checks"]["torch's loader"]
    assert verdict == "warning"
    assert "190 MiB" in finding
    assert "64 MiB are free" in finding
    assert remedy
    assert told["torch"], "torch's loader was to fail"
    assert told["checks"]["/dev/shm"][0] == "warning"
    assert told["ok"]
    assert told["seen"] == [float(number) for number in range(8)]


def test_a_full_dev_shm_that_the_dataset_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, once, with the remedy; where no worker maps anything there it does not matter."""
    shared = SharedMemory(size_bytes=64 * MIB, free_bytes=MIB)
    monkeypatch.setattr(guard.limits, "read_shared_memory", lambda **_: shared)
    loader: Any = RobustDataLoader(Leaky(8, 0), num_workers=2)
    assert flat(loader) == list(range(8))
    monkeypatch.setattr(guard.limits, "maps_shared_memory", lambda pid: True)
    with pytest.warns(RobustLoaderWarning, match="1 MiB of 64 MiB in /dev/shm are free"):
        assert flat(loader) == list(range(8))
    assert flat(loader) == list(range(8))


# --- memory, before and with the first batch --------------------------------------------------------------------------


@pytest.fixture
def memory_group() -> Iterator[str]:
    """A control group of its own of 896 MiB."""
    path = Path(f"/sys/fs/cgroup/memory/robustloader-test-{os.getpid()}")
    try:
        path.mkdir()
        (path / "memory.limit_in_bytes").write_text(str(GROUP_BYTES))
    except OSError as error:
        if path.is_dir():
            path.rmdir()
        pytest.skip(f"no control group with a memory limit can be made here: {error}")
    yield str(path)
    path.rmdir()


def test_a_control_group_with_little_memory(memory_group: str) -> None:
    """4 workers ahead by 8 would hold 37 batches of 32 MiB in 896 MiB: they hold fewer, and nobody is killed."""
    told = run("small_memory", memory_group)
    assert told["seen"] == [float(number) for number in range(40)]
    assert told["crashes"] == 0
    assert told["low"]
    action, wanted, free = told["low"][0]
    assert action == "adapt"
    assert wanted > free
    assert free < GROUP_BYTES
    assert any("prefetches" in text for text in told["warned"])
    counts = dict(line.split() for line in Path(memory_group, "memory.oom_control").read_text().splitlines())
    assert counts.get("oom_kill", "0") == "0"
    verdict, remedy, _ = told["checks"]["lookahead"]
    assert verdict in ("warning", "problem")
    assert "prefetch_factor=" in remedy
    assert told["checks"]["memory"][2]["limit_bytes"] == GROUP_BYTES


class Reading:
    """What the machine says of its memory, as a test wants it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.memory = PLENTY
        monkeypatch.setattr(guard.limits, "read_memory", lambda: self.memory)
        monkeypatch.setattr(guard, "LOOK_EVERY_NS", 0)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Reading:
    return Reading(monkeypatch)


@pytest.mark.parametrize("seeding", ["worker", "batch"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_little_is_under_way_before_the_first_batch_has_told_its_size(workers: int, seeding: str) -> None:
    """Two tasks a worker, though the sampler is read as torch reads it; then as many as the loader was told."""
    read: list[int] = []

    def sampler() -> Iterator[list[int]]:
        for number in range(100):
            read.append(number)
            yield [number]

    class Batches:
        def __iter__(self) -> Iterator[list[int]]:
            return sampler()

    loader: Any = RobustDataLoader(
        Leaky(100, 0), batch_sampler=Batches(), num_workers=workers, prefetch_factor=8, seeding=seeding
    )
    batches = iter(loader)
    given = batches._books.ledger.waiting_for
    assert len(read) == 8 * workers
    assert [given(worker) for worker in range(workers)] == [2] * workers
    first = next(batches)
    assert len(read) == 8 * workers + 1
    assert not batches._held
    assert [int(batch) for batch in [first, *batches]] == list(range(100))
    read.clear()
    assert [int(batch) for batch in loader] == list(range(100))


def test_the_first_batch_tells_what_the_rest_will_take(reading: Reading) -> None:
    """Fewer ahead, then fewer workers, and every sample in order."""
    reading.memory = Memory(limit_bytes=1 << 20, free_bytes=(1 << 20) // 10 + 20_000)
    listener = Listener()
    loader: Any = RobustDataLoader(
        Leaky(4_000, 0), batch_size=100, num_workers=3, prefetch_factor=4, telemetry=listener.policy
    )
    with pytest.warns(RobustLoaderWarning, match="prefetches .* per worker and goes on with . of 3 workers"):
        # 800 bytes and some a batch: 20,000 bytes are room for all of them ...
        assert flat(loader) == list(range(4_000))
        assert not listener.events[:-1]
        # ... and 4,000 for 4 or so.
        reading.memory = Memory(limit_bytes=1 << 20, free_bytes=(1 << 20) // 10 + 4_000)
        assert flat(loader) == list(range(4_000))
    assert [event.workers for event in listener.of(PoolShrunk)] in ([2], [2, 1])
    assert loader.summary().workers_at_end < 3


def test_raise_before_an_epoch(reading: Reading) -> None:
    """With the numbers; no worker is left behind."""
    reading.memory = LOW
    loader: Any = RobustDataLoader(Leaky(8, 0), num_workers=2, memory=MemoryPolicy(on_low="raise"))
    with pytest.raises(ResourceError, match=r"99 MiB of .* memory are free") as caught:
        iter(loader)
    assert (caught.value.wanted_bytes, caught.value.free_bytes) == (100 * MIB, 99 * MIB)
    assert caught.value.remedy
    assert loader.active_workers == 0


def test_none_does_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even once; only the arena must know how large it may get."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("looked")

    for name in ("read_memory", "open_descriptors", "read_processes", "read_shared_memory"):
        monkeypatch.setattr(guard.limits, name, fail)
    assert flat(RobustDataLoader(Leaky(8, 0), num_workers=2, memory=None, transport="pipe")) == list(range(8))


@pytest.mark.parametrize(("bound", "each"), [(400 * MIB, 100 * MIB), (None, 100 * MIB), (0, None)])
def test_the_arenas_share_their_bound(reading: Reading, bound: int | None, each: int | None) -> None:
    """Given, or half of what is free above the headroom: 400 of 800 MiB; with none every batch goes by the socket."""
    arena, _ = guard.arena_limits("auto", MemoryPolicy(max_arena_bytes=bound), 4)
    assert (arena.max_bytes if arena is not None else None) == each
    assert arena is None or arena.reserve_bytes == 100 * MIB


@pytest.mark.parametrize(
    ("workers", "bound", "each"),
    [
        (4, None, 100 * MIB),
        (2, None, 100 * MIB),
        (5, None, 80 * MIB),
        (4, 1600 * MIB, 100 * MIB),
        (20, 2000 * MIB, 100 * MIB),
    ],
)
def test_a_pool_that_grows_shares_arenas_by_processors(
    reading: Reading, monkeypatch: pytest.MonkeyPatch, workers: int, bound: int | None, each: int
) -> None:
    """Four processors, as with four workers that stay; a bound holds for the most workers there may be."""
    monkeypatch.setattr(guard.limits, "usable_cpus", lambda: 4)
    arena, _ = guard.arena_limits("auto", MemoryPolicy(max_arena_bytes=bound), workers, resizes=True)
    assert arena is not None
    assert arena.max_bytes == each


# --- memory, while an epoch runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_order", [True, False])
def test_memory_that_becomes_low(reading: Reading, in_order: bool) -> None:
    """Lookahead goes first, then one worker after another; nothing is lost, and the order stays."""
    listener = Listener()
    loader: Any = RobustDataLoader(
        Leaky(200, 0),
        num_workers=3,
        prefetch_factor=4,
        in_order=in_order,
        telemetry=listener.policy,
    )
    seen = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RobustLoaderWarning)
        for batch in loader:
            seen += flat([batch])
            if len(seen) == 20:
                reading.memory = LOW
    assert (seen if in_order else sorted(seen)) == list(range(200))
    assert [event.workers for event in listener.of(PoolShrunk)] == [2, 1]
    assert "99 MiB" in listener.of(PoolShrunk)[0].reason
    # Prefetch, two workers, and once to say that there is nothing left to give.
    assert [event.action for event in listener.of(MemoryLow)] == ["adapt"] * 4
    assert len(caught) == 1, "one warning, the rest is in the log and the events"
    assert loader.summary().workers_at_end == 1
    assert loader.summary().crashes == loader.summary().restarts == 0


def test_the_lookahead_that_was_given_up_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that much suffices no worker goes: what the batches took is free by the next look."""
    monkeypatch.setattr(guard, "LOOK_EVERY_NS", 0)
    monkeypatch.setattr(guard.limits, "read_memory", lambda root="/": PLENTY)
    listener = Listener()
    loader: Any = RobustDataLoader(Large(100, 4 * MIB), num_workers=2, prefetch_factor=8, telemetry=listener.policy)
    batches = iter(loader)
    seen = [float(next(batches)[0, 0])]
    while batches._books.ledger.ready < 16:
        batches._turn()

    def read() -> Memory:
        held = sum(shared_bytes(process.pid) for process in batches.processes())
        return Memory(limit_bytes=1000 * MIB, free_bytes=148 * MIB - held)

    assert read().free_bytes < 100 * MIB, "all of the lookahead is in memory"
    monkeypatch.setattr(guard.limits, "read_memory", read)
    with pytest.warns(RobustLoaderWarning, match="one batch per worker is prefetched"):
        seen += [float(batch[0, 0]) for batch in batches]
    assert seen == [float(number) for number in range(100)]
    assert not listener.of(PoolShrunk)
    assert len(listener.of(MemoryLow)) == 1
    assert loader.summary().workers_at_end == 2


def test_memory_that_was_low_for_a_moment(reading: Reading) -> None:
    """Only the lookahead has gone."""
    listener = Listener()
    loader: Any = RobustDataLoader(Leaky(100, 0), num_workers=2, prefetch_factor=3, telemetry=listener.policy)
    seen = []
    with pytest.warns(RobustLoaderWarning, match="one batch per worker is prefetched"):
        for batch in loader:
            seen += flat([batch])
            reading.memory = LOW if len(seen) >= 10 and not listener.of(MemoryLow) else PLENTY
    assert seen == list(range(100))
    assert not listener.of(PoolShrunk)
    assert len(listener.of(MemoryLow)) == 1


def test_streams_give_up_lookahead_only(reading: Reading) -> None:
    """A shard that lost its worker would have to be read again."""
    listener = Listener()
    loader: Any = RobustDataLoader(LeakyStream(120, 0), num_workers=3, prefetch_factor=4, telemetry=listener.policy)
    seen = []
    with pytest.warns(RobustLoaderWarning):
        for batch in loader:
            seen += flat([batch])
            if len(seen) == 20:
                reading.memory = LOW
    assert sorted(seen) == list(range(120))
    assert not listener.of(PoolShrunk)
    assert len(listener.of(MemoryLow)) == 2


def test_warn_while_it_runs(reading: Reading) -> None:
    """Said once, nothing done."""
    listener = Listener()
    policy = MemoryPolicy(on_low="warn")
    loader: Any = RobustDataLoader(Leaky(60, 0), num_workers=2, memory=policy, telemetry=listener.policy)
    with pytest.warns(RobustLoaderWarning, match="99 MiB"):
        for number, _ in enumerate(loader):
            if number == 10:
                reading.memory = LOW
    assert [event.action for event in listener.of(MemoryLow)] == ["warn"]
    assert loader.summary().batches == 60
    assert loader.summary().workers_at_end == 2


def test_raise_while_it_runs(reading: Reading) -> None:
    """In ``next()``, and the workers are gone."""
    loader: Any = RobustDataLoader(Leaky(60, 0), num_workers=2, memory=MemoryPolicy(on_low="raise"))
    with pytest.raises(ResourceError, match="99 MiB"):
        for number, _ in enumerate(loader):
            if number == 10:
                reading.memory = LOW
    assert loader.active_workers == 0
