"""What the next epoch of persistent workers begins with, after the pool shrank or was given up in the one before."""

from __future__ import annotations

import itertools
import pickle
import signal
from typing import Any

import pytest
import torch

from robustloader import PoolHealed, PoolShrunk, RecoveryPolicy, RobustDataLoader
from tests.chaos.test_fallback import Refusing
from tests.support.datasets import Numbers, Random, Stream
from tests.support.listener import Listener, flat
from tests.support.peek import pids
from tests.support.watch import kill

NO_RESTARTS = RecoveryPolicy(max_restarts=0)


class Draws(Numbers):
    """Sample ``i`` comes with a random number that no other sample has but by the same random stream."""

    def load(self, index: int) -> Any:
        return index, int(torch.randint(1 << 62, ()))


def persistent(dataset: Any, **kwargs: Any) -> RobustDataLoader[Any]:
    options: dict[str, Any] = {"batch_size": 4, "num_workers": 2, "recovery": NO_RESTARTS, **kwargs}
    return RobustDataLoader(dataset, persistent_workers=True, **options)


def without_workers(loader: RobustDataLoader[Any]) -> list[Any]:
    """An epoch whose workers are all killed after its first batch."""
    iterator = iter(loader)
    batches = [next(iterator)]
    for pid in pids(iterator):
        kill(pid, signal.SIGKILL)
    return [*batches, *iterator]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_there_are_workers_again(kind: str, whole: bool) -> None:
    """The training process loads the rest of one epoch, whether that is read to its end or not; these stay."""
    listener = Listener()
    loader = persistent(Numbers(160) if kind == "map" else Stream(160), telemetry=listener.policy)
    iterator = iter(loader)
    batches = [next(iterator)]
    for pid in pids(iterator):
        kill(pid, signal.SIGKILL)
    while len(listener.of(PoolShrunk)) < 2:
        batches.append(next(iterator))
    assert loader.active_workers == 0
    if whole:
        assert sorted(flat([*batches, *iterator])) == list(range(160))
    again = iter(loader)
    assert again is not iterator
    started = pids(again)
    assert len(started) == 2
    assert sorted(flat(again)) == list(range(160))
    assert (loader.summary().epoch, loader.summary().workers_at_end) == (1, 2)
    assert sorted(worker.worker_id for worker in loader.summary().workers) == [0, 1]
    assert iter(loader) is again
    assert pids(again) == started
    assert [(event.epoch, event.workers) for event in listener.of(PoolShrunk)] == [(0, 1), (0, 0)]
    assert not listener.of(PoolHealed)
    again._shutdown_workers()


@pytest.mark.parametrize("generator", [False, True])
@pytest.mark.parametrize("seeding", ["worker", "batch"])
def test_the_permutations_are_those_of_a_run_without_deaths(seeding: str, generator: bool) -> None:
    """And with ``seeding="batch"`` the random numbers, too: the next epoch draws what persistent workers' epoch would,
    or the ranks of a job would part."""

    def make() -> RobustDataLoader[Any]:
        torch.manual_seed(1)
        own = torch.Generator().manual_seed(6) if generator else None
        return persistent(Random(160), shuffle=True, generator=own, seeding=seeding)

    def seen(batches: Any) -> list[Any]:
        return [batch if seeding == "batch" else batch[0] for batch in pickled(batches)]

    undisturbed = make()
    expected = [seen(undisturbed) for _ in range(5)]
    ours = make()
    told = [seen(ours), seen(without_workers(ours)), seen(without_workers(ours)), seen(ours), seen(ours)]
    assert told == expected


def pickled(batches: Any) -> list[Any]:
    """Batches of tensors as plain lists."""
    return [[part.tolist() for part in batch] for batch in batches]


def test_no_random_numbers_come_twice() -> None:
    """In no epoch, neither in the workers nor in the training process."""
    loader = persistent(Draws(80))
    epochs = [loader, without_workers(loader), without_workers(loader), loader, loader]
    drawn = [int(number) for batches in epochs for _, noise in batches for number in noise]
    assert len(set(drawn)) == len(drawn) == 5 * 80


@pytest.mark.parametrize("taken", [20, 40])
def test_a_state_goes_on_like_the_run(taken: int) -> None:
    """Saved after the fall back, in the middle of that epoch or at its end."""

    def make() -> RobustDataLoader[Any]:
        return persistent(Numbers(160), shuffle=True, generator=torch.Generator().manual_seed(6))

    undisturbed = make()
    expected = [flat(undisturbed) for _ in range(3)]
    ours = make()
    iterator = iter(ours)
    head = [next(iterator)]
    for pid in pids(iterator):
        kill(pid, signal.SIGKILL)
    head += itertools.islice(iterator, taken - 1)
    assert ours.active_workers == 0
    state = ours.state_dict()
    other = make()
    other.load_state_dict(state)
    assert [flat([*head, *other]), flat(other), flat(other)] == expected
    iterator.close()


def test_a_copy_goes_on_like_the_original() -> None:
    """The base seed of the epoch before goes with it."""
    loader = persistent(Random(80), shuffle=True, generator=torch.Generator().manual_seed(6), seeding="batch")
    without_workers(loader)
    copy = pickle.loads(pickle.dumps(loader))
    assert pickled(copy) == pickled(loader)


def test_where_no_process_can_be_had() -> None:
    """Each epoch tries, and falls back again, with the permutations of a run that has workers."""

    def make(**kwargs: Any) -> RobustDataLoader[Any]:
        return persistent(Numbers(40), shuffle=True, generator=torch.Generator().manual_seed(6), **kwargs)

    listener = Listener()
    undisturbed = make()
    loader = make(multiprocessing_context=Refusing(0), telemetry=listener.policy)
    for epoch in range(3):
        assert flat(loader) == flat(undisturbed)
        assert [event.workers for event in listener.of(PoolShrunk) if event.epoch == epoch][-1] == 0
        assert loader.summary().workers_at_end == 0


# --- an iterable pool that shrank -------------------------------------------------------------------------------------


def shrink(iterator: Any, listener: Listener) -> list[Any]:
    """Lose the first worker for good; the batches until then."""
    before = len(listener.of(PoolShrunk))
    batches = [next(iterator)]
    kill(pids(iterator)[0], signal.SIGKILL)
    while len(listener.of(PoolShrunk)) == before:
        batches.append(next(iterator))
    return batches


@pytest.mark.parametrize("whole", [True, False])
def test_an_iterable_pool_is_whole_again_in_the_next_epoch(whole: bool) -> None:
    """Once for each that was lost, epoch after epoch, and nothing is missing from any."""
    listener = Listener()
    loader = persistent(Stream(240), num_workers=3, telemetry=listener.policy)
    for _ in range(3):
        iterator = iter(loader)
        batches = shrink(iterator, listener)
        if whole:
            assert sorted(flat([*batches, *iterator])) == list(range(240))
            assert loader.summary().workers_at_end == 2
    assert sorted(flat(loader)) == list(range(240))
    assert (loader.summary().epoch, loader.summary().workers_at_end) == (3, 3)
    assert [(event.epoch, event.workers) for event in listener.of(PoolHealed)] == [(1, 3), (2, 3), (3, 3)]
    assert [event.workers for event in listener.of(PoolShrunk)] == [2, 2, 2]
    iterator._shutdown_workers()


def test_the_other_workers_of_an_iterable_pool_stay() -> None:
    """What a dataset keeps in them from epoch to epoch is not lost with one that died."""
    listener = Listener()
    loader = persistent(Stream(240), num_workers=3, telemetry=listener.policy)
    iterator = iter(loader)
    others = pids(iterator)[1:]
    shrink(iterator, listener)
    again = iter(loader)
    assert again is iterator
    assert sorted(flat(again)) == list(range(240))
    assert pids(again)[1:] == others
    again._shutdown_workers()
