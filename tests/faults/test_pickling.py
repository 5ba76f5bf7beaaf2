"""Results that cannot leave the worker, or cannot be rebuilt in the training process."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from robustloader import FaultBudgetError, FaultPolicy, RobustDataLoader
from tests.support.datasets import Made, Numbers, Stream
from tests.support.hostile import ReduceExits, Undecodable, UndecodableHere, Unpicklable, samples_of
from tests.support.peek import pids
from tests.support.watch import kill

pytestmark = pytest.mark.filterwarnings("ignore::robustloader.RobustLoaderWarning")


def a_thread_lock(index: Any) -> Any:
    import threading

    return threading.Lock()


def grown(index: Any) -> Any:
    return (torch.ones(2, requires_grad=True) * 2).sum()


MAKERS: dict[str, Any] = {
    "a lambda": Unpicklable,
    "__reduce__ exits": ReduceExits,
    "a lock": a_thread_lock,
    "autograd": grown,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize("action", ["replace", "skip"])
def test_a_result_that_cannot_be_pickled(make: Any, action: Any) -> None:
    """It is found among its neighbours, named, and done without."""
    loader = RobustDataLoader(
        Made(16, {5: make, 6: make}), batch_size=4, num_workers=2, collate_fn=list, faults=FaultPolicy(action=action)
    )
    batches = [samples_of(batch) for batch in loader]
    assert [len(batch) for batch in batches] == ([4, 4, 4, 4] if action == "replace" else [4, 2, 4, 4])
    assert not {5, 6} & {sample for batch in batches for sample in batch}
    assert sorted((record.index, record.kind) for record in loader.fault_log) == [
        (5, "unpicklable"),
        (6, "unpicklable"),
    ]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize("faults", ["raise", FaultPolicy(action="raise")])
def test_raised_it_names_the_index(make: Any, faults: Any) -> None:
    """At once, where torch's loader hangs."""
    iterator = iter(RobustDataLoader(Made(16, {5: make}), batch_size=4, num_workers=2, collate_fn=list, faults=faults))
    next(iterator)
    with pytest.raises(Exception, match=r".+") as caught:
        next(iterator)
    assert "5" in " ".join(caught.value.__notes__)
    assert samples_of(next(iterator)) == [8, 9, 10, 11]
    iterator._shutdown_workers()


class CollateUnpicklable:
    """Makes something that cannot be pickled of samples that can."""

    def __call__(self, samples: list[Any]) -> Any:
        return Unpicklable(samples)


@pytest.mark.parametrize("faults", ["replace", "skip", "raise"])
def test_a_collate_whose_results_cannot_be_pickled(faults: Any) -> None:
    """No sample is to blame: it is an error, whatever the policy."""
    loader = RobustDataLoader(Numbers(16), batch_size=4, num_workers=2, collate_fn=CollateUnpicklable(), faults=faults)
    with pytest.raises((TypeError, AttributeError, Exception), match=r"pickle|Unpicklable"):
        list(loader)


def test_in_process_nothing_is_pickled() -> None:
    """What cannot be pickled is as good as anything."""
    loader = RobustDataLoader(Made(8, {5: Unpicklable, 6: Undecodable}), batch_size=4, collate_fn=list)
    assert [samples_of(batch) for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("action", ["replace", "skip"])
def test_a_result_that_cannot_be_rebuilt(action: Any) -> None:
    """Where its own unpickling raises anywhere, the sample is found, named, and done without."""
    loader = RobustDataLoader(
        Made(16, {5: Undecodable}), batch_size=4, num_workers=2, collate_fn=list, faults=FaultPolicy(action=action)
    )
    batches = [samples_of(batch) for batch in loader]
    assert [len(batch) for batch in batches] == ([4] * 4 if action == "replace" else [4, 3, 4, 4])
    assert 5 not in {sample for batch in batches for sample in batch}
    assert {4, 6, 7} <= set(batches[1])
    (record,) = loader.fault_log
    assert (record.kind, record.index, record.error_type) == ("undecodable", 5, "FileNotFoundError")


def many_floats(index: int) -> Any:
    """An array that does not ride inside the pickle."""
    return np.full(4_000, index, dtype=np.float64)


def no_memory_here(worker_id: int) -> None:
    """A default device on which nothing can be kept."""
    torch.set_default_device("meta")


def test_a_neighbour_is_rebuilt_whatever_the_default_device() -> None:
    """The worker that looks for the sample at fault rebuilds its neighbours in the CPU's memory."""
    makers = {place: Undecodable if place == 5 else many_floats for place in range(16)}
    loader = RobustDataLoader(
        Made(16, makers), batch_size=4, num_workers=1, collate_fn=list, worker_init_fn=no_memory_here
    )
    assert [len(batch) for batch in loader] == [4] * 4
    assert [record.index for record in loader.fault_log] == [5]


@pytest.mark.parametrize("action", ["replace", "skip"])
def test_a_result_that_cannot_be_rebuilt_here(action: Any) -> None:
    """Where only the training process fails to rebuild it, the batch as a whole is done without."""
    loader = RobustDataLoader(
        Made(16, {5: UndecodableHere()}),
        batch_size=4,
        num_workers=2,
        collate_fn=list,
        faults=FaultPolicy(action=action),
    )
    batches = [samples_of(batch) for batch in loader]
    assert [len(batch) for batch in batches] == ([4] * 4 if action == "replace" else [4, 1, 4, 4])
    assert 5 not in {sample for batch in batches for sample in batch}
    assert {record.kind for record in loader.fault_log} == {"undecodable"}


@pytest.mark.parametrize("faults", ["raise", FaultPolicy(action="raise")])
@pytest.mark.parametrize("make", [Undecodable, UndecodableHere()])
def test_raised_it_is_the_users_error(make: Any, faults: Any) -> None:
    """With its own type, from ``next()``; the batches after it come."""
    iterator = iter(RobustDataLoader(Made(16, {5: make}), batch_size=4, num_workers=2, collate_fn=list, faults=faults))
    next(iterator)
    with pytest.raises(FileNotFoundError, match="the table for 5"):
        next(iterator)
    assert [samples_of(batch) for batch in iterator] == [[8, 9, 10, 11], [12, 13, 14, 15]]


class Odd(Stream):
    """Some numbers come as what does not pickle."""

    def __init__(self, size: int, odd: tuple[int, ...]) -> None:
        super().__init__(size)
        self.odd = odd

    def __iter__(self) -> Iterator[Any]:
        for number in super().__iter__():
            yield Unpicklable(number) if number in self.odd else number


@pytest.mark.parametrize(("odd", "sizes"), [((5,), [4, 3, 4, 4]), ((4, 5, 6, 7), [4, 4, 4]), ((0, 15), [3, 4, 4, 3])])
def test_a_streams_neighbours_are_not_lost(odd: tuple[int, ...], sizes: list[int]) -> None:
    """Of a batch that cannot be pickled, only the samples at fault are done without; each is recorded."""
    loader = RobustDataLoader(Odd(16, odd), batch_size=4, num_workers=1, collate_fn=list)
    batches = [samples_of(batch) for batch in loader]
    assert [sample for batch in batches for sample in batch] == [index for index in range(16) if index not in odd]
    assert [len(batch) for batch in batches] == sizes
    assert [record.kind for record in loader.fault_log] == ["unpicklable"] * len(odd)


def test_a_stream_that_is_read_again_goes_on_behind_a_smaller_batch() -> None:
    """A successor encodes nothing of what it skips, and still is where its predecessor was."""
    loader = RobustDataLoader(
        Odd(40, (5, 12, 13, 14, 15)), batch_size=4, num_workers=1, prefetch_factor=1, collate_fn=list
    )
    iterator = iter(loader)
    delivered = []
    for number, batch in enumerate(iterator):
        delivered += samples_of(batch)
        if number in (2, 4, 6):
            for pid in pids(iterator):
                kill(pid, signal.SIGKILL)
    assert delivered == [index for index in range(40) if index not in (5, 12, 13, 14, 15)]


@pytest.mark.parametrize(
    ("odd", "batch_size", "drop_last", "missing"),
    [
        ((3, 4), 1, False, (3, 4)),
        ((3, 4), None, False, (3, 4)),
        (tuple(range(1, 12)), 1, False, tuple(range(1, 12))),
        (tuple(range(4, 16)), 4, False, tuple(range(4, 16))),
        ((5, 9, 13), 4, True, tuple(range(4, 16))),
    ],
)
def test_batches_of_a_stream_in_a_row(
    odd: tuple[int, ...], batch_size: int | None, drop_last: bool, missing: tuple[int, ...]
) -> None:
    """None of which can be pickled: whatever follows them comes."""
    loader = RobustDataLoader(
        Odd(24, odd),
        batch_size,
        num_workers=1,
        drop_last=drop_last,
        collate_fn=list if batch_size else same,
        faults=FaultPolicy(action="skip", burst=100),
    )
    batches = [samples_of(batch) if batch_size else [batch] for batch in loader]
    assert [sample for batch in batches for sample in batch] == [index for index in range(24) if index not in missing]
    assert [record.kind for record in loader.fault_log] == ["unpicklable"] * len(loader.fault_log)
    assert len(loader.fault_log) == (3 if drop_last else len(odd))


def same(sample: Any) -> Any:
    return sample


class AllOdd(Stream):
    """Never ends, and nothing of it pickles."""

    def __iter__(self) -> Iterator[Any]:
        return map(Unpicklable, itertools.count())


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_stream_of_nothing_that_can_be_pickled_ends(batch_size: int | None) -> None:
    """The budget stops it."""
    loader = RobustDataLoader(AllOdd(1), batch_size, num_workers=1, collate_fn=list if batch_size else same)
    with pytest.raises(FaultBudgetError) as caught:
        list(loader)
    assert 16 < caught.value.faults < 1_000
