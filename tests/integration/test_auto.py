"""``num_workers="auto"`` with real workers: it grows, shrinks, keeps to the limits, and changes no batch."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from robustloader import (
    PoolResized,
    PoolShrunk,
    RecoveryPolicy,
    RobustDataLoader,
    WorkerCrashed,
    WorkerRestarted,
)
from robustloader.decisions.adaptation import Step
from robustloader.decisions.limits import Processes
from robustloader.decisions.workers import AutoWorkers
from robustloader.system import host, limits
from robustloader.testing import WorkerKiller
from tests.support.listener import Listener, flat
from tests.support.peek import pids
from tests.support.watch import kill

ENDLESS = 1 << 20


class Storage(Dataset[int]):
    """Each sample is waited for; no processor is used."""

    def __init__(self, samples: int, wait_s: float = 0.005) -> None:
        self.samples, self.wait_s = samples, wait_s

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> int:
        if self.wait_s:
            time.sleep(self.wait_s)
        return index


class Augmented(Dataset[Any]):
    """A sample, and what the random streams of whoever loads it say."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        return index + torch.rand(3)


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processors for one rank, whatever the machine has: auto begins with two workers and may come to eight."""
    monkeypatch.setattr(limits, "usable_cpus", lambda root="/": 2)
    monkeypatch.setattr(host, "usable_cpus", lambda root="/": 2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def auto_loader(dataset: Any, listener: Listener, **options: Any) -> Any:
    return RobustDataLoader(
        dataset,
        num_workers="auto",  # type: ignore[arg-type]
        telemetry=listener.policy,
        **({"multiprocessing_context": "fork"} | options),
    )


def take_until(batches: Iterator[Any], condition: Callable[[], Any], *, at_most: int = 20_000) -> list[Any]:
    """Take batches until something has come about."""
    taken = []
    for batch in itertools.islice(batches, at_most):
        taken.append(batch)
        if condition():
            return taken
    pytest.fail(f"it did not come about within {at_most} batches")


def resize(batches: Any, workers: int) -> None:
    """Once nobody is dead, on the way or leaving, give the pool another size; and wait until it has it."""
    settle(batches)
    batches._resize(Step(workers=workers, reason="a test"))
    settle(batches)


def settle(batches: Any) -> None:
    while not batches._crew.whole:
        batches._turn(0.05)


def grown(listener: Listener) -> list[PoolResized]:
    return [event for event in listener.of(PoolResized) if event.workers > event.before]


# --- growing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_it_grows_while_the_loop_waits_for_storage(two_cpus: None, method: str) -> None:
    """Two workers that sleep become up to four; the new ones load, the order stays, and what is said of it is right."""
    listener = Listener()
    loader = auto_loader(Storage(ENDLESS), listener, batch_size=2, multiprocessing_context=method)
    batches = iter(loader)
    taken = take_until(batches, lambda: grown(listener))
    event = grown(listener)[0]
    assert event.before == 2
    assert event.workers in (3, 4)
    assert "the loop waited" in event.reason
    taken += take_until(batches, lambda: batches.batch_info.worker_id >= 2)
    assert flat(taken) == list(range(2 * len(taken)))
    assert loader.active_workers >= 3
    assert loader.num_workers == 2, "what frameworks read is what was given"
    assert isinstance(loader.num_workers, AutoWorkers)
    assert not listener.of(WorkerRestarted), "a further worker is not a restarted one"
    batches.close()
    summary = loader.summary()
    assert summary.workers_requested == 2
    assert summary.workers_at_end == listener.of(PoolResized)[-1].workers
    assert f"2 → {event.workers}, as {event.reason}" in summary.resizes[0]
    assert "auto       batch" in str(summary)
    assert summary.to_dict()["resizes"] == list(summary.resizes)


def test_the_next_epoch_begins_with_what_was_found(two_cpus: None) -> None:
    """Without persistent workers the next iterator starts as many as the last one came to."""
    listener = Listener()
    loader = auto_loader(Storage(ENDLESS), listener, batch_size=2)
    batches = iter(loader)
    take_until(batches, lambda: grown(listener))
    batches.close()
    found = listener.of(PoolResized)[-1].workers
    again = iter(loader)
    assert flat([next(again) for _ in range(20)]) == list(range(40))
    assert loader.summary().workers_requested == found
    again.close()


def test_persistent_workers_stay_as_many(two_cpus: None) -> None:
    """The pool found is the pool of the next epoch, the same processes."""
    listener = Listener()
    loader = auto_loader(Storage(40, wait_s=0), listener, batch_size=2, persistent_workers=True)
    batches: Any = iter(loader)
    assert flat([next(batches) for _ in range(5)]) == list(range(10))
    resize(batches, 3)
    assert flat(batches) == list(range(10, 40))
    assert iter(loader) is batches
    before = pids(batches)
    assert len(before) == 3
    owners = set()
    for number, batch in enumerate(batches):
        assert flat([batch]) == [2 * number, 2 * number + 1]
        owners.add(batches.batch_info.worker_id)
    assert owners == {0, 1, 2}
    assert pids(batches) == before
    batches.close()


def describe_worker(index: Any) -> tuple[int, int, int]:
    info = get_worker_info()
    assert info is not None
    return info.id, info.num_workers, info.seed


class Describing(Dataset[Any]):
    """Who loads it."""

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        return describe_worker(index)


def test_what_a_further_worker_is_told(two_cpus: None) -> None:
    """Its id is the next one, below ``num_workers``, and its seed torch's for that id; who comes again has another."""
    loader = auto_loader(Describing(), Listener(), batch_size=None)
    batches: Any = iter(loader)

    def take(workers: int) -> dict[int, tuple[int, int]]:
        resize(batches, workers)
        seen: dict[int, tuple[int, int]] = {}
        for worker_id, told, seed in itertools.islice(batches, 5000):
            seen[worker_id] = (told, seed)
            if len(seen) == workers:
                return seen
        pytest.fail("not all of them loaded")

    first = take(4)
    assert {worker_id: told for worker_id, (told, _) in first.items()} == {0: 2, 1: 2, 2: 3, 3: 4}
    assert [seed - first[0][1] for _, (_, seed) in sorted(first.items())] == [0, 1, 2, 3]
    resize(batches, 2)
    resize(batches, 3)
    ahead = len(batches._books.ledger)  # batches of its predecessor among them
    later = [next(batches) for _ in range(ahead + 6)][ahead:]
    again = {seed for worker_id, _, seed in later if worker_id == 2}
    assert len(again) == 1
    assert again.isdisjoint(seed for _, seed in first.values()), "a stream would be repeated"
    batches.close()


# --- shrinking --------------------------------------------------------------------------------------------------------


def test_it_shrinks_where_the_trainer_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four workers and next to nothing to do for them: some go, the batches stay what they are."""
    monkeypatch.setattr(host, "usable_cpus", lambda root="/": 4)
    listener = Listener()
    loader = auto_loader(Storage(ENDLESS, wait_s=0), listener, batch_size=2)
    batches = iter(loader)

    def shrunk() -> bool:
        time.sleep(0.02)  # the trainer's step
        return any(event.workers < 4 for event in listener.of(PoolResized))

    taken = take_until(batches, shrunk)
    event = listener.of(PoolResized)[-1]
    assert event.before == 4
    assert "busy" in event.reason
    taken += take_until(batches, lambda: loader.active_workers <= event.workers)
    taken += itertools.islice(batches, 20)
    assert flat(taken) == list(range(2 * len(taken)))
    assert not listener.of(PoolShrunk), "nothing was wrong"
    batches.close()


# --- limits, and what goes wrong --------------------------------------------------------------------------------------


def test_it_keeps_to_the_limits(two_cpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No further process may be started: it would like to, looks, and leaves it."""
    listener = Listener()
    loader = auto_loader(Storage(ENDLESS), listener, batch_size=2)
    batches = iter(loader)
    looked = []

    def none_left(root: str = "/", *, count_all: bool = False) -> Processes:
        looked.append(root)
        return Processes(free=0, limit="pids.max")

    monkeypatch.setattr(limits, "read_processes", none_left)
    take_until(batches, lambda: looked)
    for _ in range(50):
        next(batches)
    assert not listener.of(PoolResized)
    assert loader.active_workers == 2
    batches.close()


def only_two(worker_id: int) -> None:
    """As where a list has one entry per worker that was asked for."""
    ["first", "second"][worker_id]


@pytest.mark.parametrize("recovery", [RecoveryPolicy(max_restarts=0), None])
def test_a_further_worker_that_cannot_start_is_done_without(two_cpus: None, recovery: Any) -> None:
    """Whatever its ``worker_init_fn`` raises: the run goes on without it, no credit is spent, nobody tries again."""
    listener = Listener()
    loader = auto_loader(Storage(ENDLESS), listener, batch_size=2, worker_init_fn=only_two, recovery=recovery)
    batches = iter(loader)
    taken = take_until(batches, lambda: listener.of(PoolResized) and listener.of(PoolResized)[-1].workers == 2)
    grew, *gave_up = listener.of(PoolResized)
    assert grew.before == 2
    assert [(event.before, event.workers) for event in gave_up] == [(n, n - 1) for n in range(grew.workers, 2, -1)]
    assert all("IndexError" in event.reason for event in gave_up)
    taken += itertools.islice(batches, 150)
    assert flat(taken) == list(range(2 * len(taken)))
    assert listener.of(PoolResized) == [grew, *gave_up]
    assert not [*listener.of(WorkerCrashed), *listener.of(PoolShrunk)]
    assert loader._adaptation.limit == 2
    batches.close()


def test_a_death_by_memory_wins(two_cpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes one of four workers for its memory: the pool shrinks, and auto does not grow it again."""
    kills = [0]
    monkeypatch.setattr(host, "memory_kills", lambda root="/": kills[0])
    listener = Listener()
    loader = auto_loader(Storage(ENDLESS), listener, batch_size=2)
    batches = iter(loader)
    taken = take_until(batches, lambda: grown(listener))
    taken += take_until(batches, lambda: loader.active_workers == batches._crew.size)
    kills[0] += 1
    kill(pids(batches)[0], signal.SIGKILL)
    taken += take_until(batches, lambda: listener.of(PoolShrunk))
    left = listener.of(PoolShrunk)[0].workers
    taken += take_until(batches, lambda: loader._adaptation.limit is not None)
    taken += itertools.islice(batches, 200)
    assert loader._adaptation.limit <= left
    later = listener.events[listener.events.index(listener.of(PoolShrunk)[0]) :]
    assert all(event.workers <= left for event in later if isinstance(event, PoolResized))
    assert flat(taken) == list(range(2 * len(taken)))
    batches.close()


# --- the batches are the same -----------------------------------------------------------------------------------------


def resizing(batches: Any, killer: WorkerKiller) -> Iterator[Any]:
    """Take all batches; every thirty give the pool another size, and between two changes kill a worker."""
    sizes = list(SIZES)
    for number, batch in enumerate(batches):
        yield batch
        if number % 30 == 10 and sizes:
            settle(batches)
            batches._resize(Step(workers=sizes.pop(0), reason="a test"))
        elif number % 60 == 25:
            killer.strike()
    assert not sizes


SIZES = [4, 1, 3, 2, 5, 1, 2]


@pytest.mark.parametrize(("prefetch", "in_order"), [(1, True), (3, True), (2, False)])
def test_bit_for_bit_as_torch_while_it_is_resized_and_workers_die(
    two_cpus: None, prefetch: int, in_order: bool
) -> None:
    """Each batch once, in torch's order where that is asked for, with workers that come, go and are killed."""
    dataset, listener = Storage(500, wait_s=0), Listener()
    options: Any = {"batch_size": 2, "shuffle": True}
    wanted = list(DataLoader(dataset, generator=torch.Generator().manual_seed(3), num_workers=2, **options))
    loader = auto_loader(
        dataset,
        listener,
        generator=torch.Generator().manual_seed(3),
        prefetch_factor=prefetch,
        in_order=in_order,
        recovery=RecoveryPolicy(max_restarts=1000),
        **options,
    )
    batches: Any = iter(loader)
    killer = WorkerKiller(batches, seed=5)
    found = list(resizing(batches, killer))
    if not in_order:
        found.sort(key=lambda batch: int(batch[0]))
        wanted.sort(key=lambda batch: int(batch[0]))
    assert len(found) == len(wanted)
    assert all(map(torch.equal, found, wanted))
    assert len(listener.of(PoolResized)) >= len(SIZES) - 2  # a death undoes the change that its slot was leaving for
    assert killer.kills
    assert listener.of(WorkerCrashed)


def test_with_batch_seeds_augmentations_do_not_depend_on_the_pool(two_cpus: None) -> None:
    """``seeding="batch"``: the random numbers are those of any fixed number of workers, whatever the pool does."""
    dataset, listener = Augmented(500), Listener()

    def seeds() -> Any:
        return {"batch_size": 2, "seeding": "batch", "generator": torch.Generator().manual_seed(7)}

    wanted = list(RobustDataLoader(dataset, num_workers=1, **seeds()))
    loader = auto_loader(dataset, listener, recovery=RecoveryPolicy(max_restarts=1000), **seeds())
    batches: Any = iter(loader)
    found = list(resizing(batches, WorkerKiller(batches, seed=1)))
    assert len(found) == len(wanted)
    assert all(map(torch.equal, found, wanted))
    assert len(listener.of(PoolResized)) >= len(SIZES) - 2  # a death undoes the change that its slot was leaving for


def test_a_state_taken_while_it_is_resized(two_cpus: None) -> None:
    """The rest of the epoch, with any number of workers, is what was left."""
    dataset = Augmented(400)
    options: Any = {"batch_size": 2, "seeding": "batch", "shuffle": True}
    wanted = list(RobustDataLoader(dataset, generator=torch.Generator().manual_seed(9), **options))
    loader = auto_loader(dataset, Listener(), generator=torch.Generator().manual_seed(9), **options)
    batches: Any = iter(loader)
    taken = [next(batches) for _ in range(10)]
    batches._resize(Step(workers=4, reason="a test"))
    taken += [next(batches) for _ in range(3)]
    state = loader.state_dict()
    batches.close()
    other: Any = RobustDataLoader(dataset, generator=torch.Generator(), num_workers=1, **options)
    other.load_state_dict(state)
    rest = list(other)
    assert all(map(torch.equal, taken + rest, wanted))
    assert len(taken + rest) == len(wanted)


# --- what is left alone -----------------------------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset[int]):
    """Its share of 200 numbers, slowly."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        assert info is not None
        for number in range(info.id, 200, info.num_workers):
            time.sleep(0.005)
            yield number


def test_a_stream_keeps_its_shards(two_cpus: None) -> None:
    """An iterable dataset is shared out by the number of workers: nothing changes it within an epoch."""
    listener = Listener()
    loader = auto_loader(Stream(), listener, batch_size=2)
    assert sorted(flat(loader)) == list(range(200))
    assert not listener.of(PoolResized)
    assert loader._adaptation is None


def test_a_fixed_number_stays_fixed() -> None:
    """An int is an int: nobody measures, nobody changes it."""
    loader: Any = RobustDataLoader(Storage(100), batch_size=2, num_workers=1, multiprocessing_context="fork")
    batches = iter(loader)
    assert loader._adaptation is None
    assert batches._adapter is None
    assert flat(batches) == list(range(100))
