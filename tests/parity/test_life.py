"""A loader's life beside one plain loop: several iterators, threads, copies, DataPipes, pinning."""

from __future__ import annotations

import copy
import pickle
import random
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterDataPipe, MapDataPipe
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from robustloader import OptionError, RecoveryPolicy, RobustDataLoader, RobustLoaderWarning
from tests.support import parity_data as data
from tests.support.parity_run import MODES, STRICT, Program, assert_same, fingerprint
from tests.support.torches import ORDERS_BY_CAPACITY, WARNS_OF_NO_ACCELERATOR

both_modes = pytest.mark.parametrize("mode", MODES)
workers = pytest.mark.parametrize("num_workers", [0, 2])


def both(mode: str) -> tuple[tuple[type[DataLoader[Any]], dict[str, Any]], ...]:
    """torch's class, and ours with its options."""
    return (DataLoader, {}), (RobustDataLoader, MODES[mode])


def seed_everything() -> None:
    """The three global random streams."""
    random.seed(4)
    np.random.seed(4)
    torch.manual_seed(4)


@both_modes
@workers
def test_several_iterators_at_once(mode: str, num_workers: int) -> None:
    """Each iterator of a loader is an epoch of its own, however their steps are mixed."""
    seen = []
    for kind, options in both(mode):
        seed_everything()
        loader = kind(data.Samples("int", 8), shuffle=True, batch_size=2, num_workers=num_workers, **options)
        first, second = iter(loader), iter(loader)
        assert first is not second
        steps = [next(first), next(second), next(second), next(first)]
        third = iter(loader)
        steps += [*first, next(third), *second, *third]
        seen.append([fingerprint(step) for step in steps])
    assert seen[0] == seen[1]


@both_modes
def test_persistent_workers_have_one_iterator(mode: str) -> None:
    """iter() begins the same iterator anew: whoever held it reads the new epoch."""
    seen = []
    for kind, options in both(mode):
        seed_everything()
        loader = kind(data.Samples("int", 6), shuffle=True, num_workers=2, persistent_workers=True, **options)
        first = iter(loader)
        steps = [next(first)]
        second = iter(loader)
        assert first is second
        steps += [next(first), *second]
        seen.append([fingerprint(step) for step in steps])
    assert seen[0] == seen[1]


@both_modes
@workers
def test_a_loader_within_its_own_loop(mode: str, num_workers: int) -> None:
    """Iterating a loader inside itself gives all pairs."""
    for kind, options in both(mode):
        loader = kind(range(3), batch_size=None, num_workers=num_workers, **options)
        assert [(a, b) for a in loader for b in loader] == [(a, b) for a in range(3) for b in range(3)]


@both_modes
@workers
def test_a_loader_within_another(mode: str, num_workers: int) -> None:
    """Validation in the middle of an epoch does not disturb it."""
    for kind, options in both(mode):
        outer = kind(range(4), batch_size=None, num_workers=num_workers, **options)
        inner = kind(
            range(2), batch_size=None, num_workers=num_workers, persistent_workers=bool(num_workers), **options
        )
        assert [(a, list(inner)) for a in outer] == [(a, [0, 1]) for a in range(4)]


@both_modes
@workers
def test_from_a_thread(mode: str, num_workers: int) -> None:
    """A loader is used from a thread that is not the main one, from beginning to end, or handed over in between."""
    for kind, options in both(mode):
        loader = kind(range(6), batch_size=None, num_workers=num_workers, **options)
        found: list[Any] = []

        def whole(loader: Any = loader, found: list[Any] = found) -> None:
            found.extend(loader)

        run_in_thread(whole)
        assert found == list(range(6))
        iterator = iter(loader)
        found = [next(iterator)]

        def rest(iterator: Any = iterator, found: list[Any] = found) -> None:
            found.extend(iterator)

        run_in_thread(rest)
        assert found == list(range(6))


def run_in_thread(function: Any) -> None:
    """Run it and wait; what it raises is raised here."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    if raised:
        raise raised[0]


@both_modes
def test_two_loaders_in_two_threads(mode: str) -> None:
    """Loaders in different threads, each with workers, do not disturb each other."""
    loaders = [RobustDataLoader(range(20), batch_size=None, num_workers=1, **MODES[mode]) for _ in range(2)]
    found: list[list[Any]] = [[], []]
    threads = [threading.Thread(target=lambda n=n: found[n].extend(loaders[n])) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [list(range(20))] * 2


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator to pin for")
@both_modes
@workers
@pytest.mark.parametrize("more", [{}, {"pin_memory_device": "cuda"}], ids=["", "device"])
def test_pin_memory_without_an_accelerator(mode: str, num_workers: int, more: dict[str, Any]) -> None:
    """It warns in torch's words, pins nothing, and loads all the same.

    Older torch does not warn, and its pin thread dies where a device is named that is not there.
    """
    if more and not WARNS_OF_NO_ACCELERATOR:
        pytest.skip("this torch cannot do it either")
    torchs = assert_same(
        Program(
            lambda: {
                "dataset": data.Samples("dict", 5),
                "batch_size": 2,
                "num_workers": num_workers,
                "pin_memory": True,
                **more,
            },
            epochs=(None, None),
        ),
        mode,
    )
    assert bool(torchs.warned) == WARNS_OF_NO_ACCELERATOR


@both_modes
@workers
def test_two_epochs(mode: str, num_workers: int) -> None:
    """Each epoch is shuffled anew, in torch's order, and the loader's length does not change."""
    torchs = assert_same(
        Program(
            lambda: {"dataset": data.Samples("int", 9), "shuffle": True, "batch_size": 2, "num_workers": num_workers},
            epochs=(None, None),
        ),
        mode,
    )
    assert torchs.batches()[:5] != torchs.batches()[5:]


@both_modes
@workers
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))])
def test_copies_of_a_loader(mode: str, num_workers: int, begun: bool, how: Any) -> None:
    """A copy loads what the original would, also when the original is in the middle of an epoch."""
    loader = RobustDataLoader(
        data.Samples("dict", 6, augment=False, place=False),
        batch_size=4,
        num_workers=num_workers,
        generator=None,
        **MODES[mode],
    )
    iterator = iter(loader)
    if begun:
        next(iterator)
    twin = how(loader)
    assert type(twin) is RobustDataLoader
    assert len(twin) == 2
    assert public(twin).keys() == public(loader).keys()
    expected = [fingerprint(batch) for batch in DataLoader(loader.dataset, batch_size=4)]
    assert [fingerprint(batch) for batch in twin] == expected
    assert [fingerprint(batch) for batch in iterator] == expected[begun:]
    assert [fingerprint(batch) for batch in twin] == expected
    if mode == "defaults":
        assert twin.summary().batches == 2
        assert twin.active_workers == 0


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_a_copy_counts_for_itself(num_workers: int, how: Any) -> None:
    """What a copy delivers does not change where the original stands, nor what that has to tell."""
    loader = RobustDataLoader(range(8), batch_size=2, num_workers=num_workers)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    twin = how(loader)
    begun = iter(twin)
    next(begun)
    assert (loader.state_dict()["delivered"], twin.state_dict()["delivered"]) == (3, 1)
    assert (loader.statistics().batches, twin.statistics().batches) == (3, 1)
    assert len(list(begun)) == 3
    assert twin.dataset == loader.dataset
    assert [batch.tolist() for batch in iterator] == [[6, 7]]
    assert len(loader.summaries) == len(twin.summaries) == 1


def public(loader: Any) -> dict[str, Any]:
    """What frameworks look at."""
    return {name: value for name, value in vars(loader).items() if not name.startswith("_")}


@both_modes
def test_a_copy_of_a_loader_with_persistent_workers(mode: str) -> None:
    """The copy starts workers of its own."""
    loader = RobustDataLoader(range(4), batch_size=None, num_workers=1, persistent_workers=True, **MODES[mode])
    assert list(loader) == [0, 1, 2, 3]
    twin = copy.deepcopy(loader)
    assert list(twin) == list(loader) == [0, 1, 2, 3]
    assert twin.active_workers == loader.active_workers == 1


def test_iterators_do_not_pickle() -> None:
    """As with torch."""
    for kind in (DataLoader, RobustDataLoader):
        with pytest.raises(NotImplementedError):
            pickle.dumps(iter(kind(range(3))))


@workers
def test_iterators_have_a_length(num_workers: int) -> None:
    """len(iterator) is the sampler's, and an iterator is its own iterator."""
    for kind in (DataLoader, RobustDataLoader):
        iterator = iter(kind(range(5), batch_size=2, num_workers=num_workers))
        assert len(iterator) == 3
        assert iter(iterator) is iterator
        next(iterator)
        assert len(iterator) == 3


@both_modes
def test_the_processes_are_where_torch_has_them(mode: str) -> None:
    """Tools look at ``_workers`` and call ``_shutdown_workers()``: both are there, and calling it twice is fine."""
    iterator = iter(RobustDataLoader(range(9), num_workers=2, **MODES[mode]))
    next(iterator)
    assert len(iterator._workers) == 2
    assert all(process.is_alive() and process.pid for process in iterator._workers)
    processes = list(iterator._workers)
    iterator._shutdown_workers()
    iterator._shutdown_workers()
    assert not any(process.is_alive() for process in processes)


@both_modes
@pytest.mark.parametrize("persistent", [False, True])
def test_an_abandoned_epoch_leaves_no_processes(mode: str, persistent: bool) -> None:
    """When the last reference goes, so do the workers, without the garbage collector's help."""
    import gc

    import psutil

    loader = RobustDataLoader(range(50), num_workers=2, persistent_workers=persistent, **MODES[mode])
    gc.collect()
    gc.disable()
    try:
        iterator = iter(loader)
        next(iterator)
        processes = [psutil.Process(process.pid) for process in iterator._workers]
        assert len(processes) == 2
        del iterator
        if persistent:
            assert loader.active_workers == 2
            del loader
        assert psutil.wait_procs(processes, timeout=10)[1] == []
    finally:
        gc.enable()


class Numbers(IterDataPipe):
    """A DataPipe of the iterable kind."""

    def __iter__(self) -> Any:
        yield from range(4)


class Table(MapDataPipe):
    """One of the other kind."""

    def __getitem__(self, index: int) -> int:
        return index * 10

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize("num_workers", [0, 1])
def test_datapipes_get_torchs_iterator(num_workers: int) -> None:
    """The deprecated DataPipes are loaded by torch itself, which is said once for each iterator."""
    for pipe in (Numbers, Table):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = list(DataLoader(pipe(), batch_size=None, num_workers=num_workers))
            loader = RobustDataLoader(pipe(), batch_size=None, num_workers=num_workers, **STRICT)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            iterator = iter(loader)
            assert list(iterator) == expected
        ours = [warning for warning in caught if warning.category is RobustLoaderWarning]
        assert len(ours) == 1
        assert "DataPipe" in str(ours[0].message)
        assert ours[0].filename == __file__
        assert isinstance(iterator, _BaseDataLoaderIter)
        assert type(iterator).__module__.startswith("torch.")
        assert isinstance(iterator, _MultiProcessingDataLoaderIter) == bool(num_workers)
        del iterator


@both_modes
def test_out_of_order_the_ready_batch_comes_first(mode: str) -> None:
    """With in_order=False a batch that is ready is not kept waiting by one that is not. Older torch gives tasks to a
    stuck worker all the same, and waits for ever."""
    import multiprocessing as mp

    for kind, options in both(mode)[not ORDERS_BY_CAPACITY :]:
        event = mp.get_context("fork").Event()
        loader = kind(Held(event), batch_size=None, num_workers=2, prefetch_factor=1, in_order=False, **options)
        iterator = iter(loader)
        got = [next(iterator) for _ in range(4)]
        assert 0 not in got
        event.set()
        got += list(iterator)
        assert sorted(got) == list(range(5))


class Held(data.Samples):
    """Sample 0 waits for an event."""

    def __init__(self, event: Any) -> None:
        super().__init__("int", 5)
        self.event = event

    def __getitem__(self, index: int) -> int:
        if index == 0:
            assert self.event.wait(60)
        return index


class Lazy:
    """Opened, not yet read: to ask it for anything reads it, which fails."""

    def __getattr__(self, name: str) -> Any:
        raise OSError(f"truncated (asked for {name})")


class Settings(dict[str, Any]):
    """Keys as attributes; one that is not there is a KeyError."""

    __getattr__ = dict.__getitem__


def odd_batch(samples: list[Any]) -> Any:
    """What cannot be asked for its size."""
    kinds: list[Any] = [Lazy(), {"deep": {"deeper": {"still": Settings(x=1)}}}, torch.nn.UninitializedParameter()]
    return [kinds[samples[0]]]


@both_modes
def test_a_batch_is_delivered_untouched(mode: str) -> None:
    """Nothing of the loader's asks what is in a batch that the training process has loaded: that might fail, or have an
    image decoded that was to stay as it is."""
    for kind, options in both(mode):
        loader = kind(range(3), collate_fn=odd_batch, **options)
        found = [type(batch[0]) for batch in loader]
        assert found == [Lazy, dict, torch.nn.UninitializedParameter]


@both_modes
@pytest.mark.parametrize("how", [lambda loader: loader, copy.copy, copy.deepcopy])
def test_what_cannot_be_set_later(mode: str, how: Any) -> None:
    """What a loader was built upon stays as it is, and whoever sets it is told so, in torch's words."""
    words = "attribute should not be set after RobustDataLoader is initialized"
    loader = how(RobustDataLoader(range(4), **MODES[mode]))
    before = public(loader)
    for name, value in [("batch_size", 2), ("faults", "skip"), ("telemetry", None)]:
        with pytest.raises(ValueError, match=f"{name} {words}"):
            setattr(loader, name, value)
    assert public(loader) == before


class BuiltByHand(RobustDataLoader[int]):
    """Sets its own attributes before the loader sets them."""

    def __init__(self, dataset: Any, faults: Any) -> None:
        self.faults = faults
        self.own = "kept"
        super().__init__(dataset, faults=faults)


def test_what_can_be_set_later() -> None:
    """Other options count from the next iterator on, and are checked like arguments; before the constructor, all do."""
    loader = BuiltByHand(range(4), "skip")
    assert (loader.faults, loader.own) == ("skip", "kept")
    loader.num_workers = 2
    loader.recovery = RecoveryPolicy(max_restarts=1)
    loader.memory, loader.seeding, loader.transport = None, "batch", "pipe"
    assert [int(batch) for batch in loader] == [0, 1, 2, 3]
    for name, value in [("recovery", "none"), ("memory", 3), ("seeding", "bogus"), ("transport", None)]:
        with pytest.raises(OptionError, match=f"{name} must be "):
            setattr(loader, name, value)
    assert (loader.seeding, loader.transport) == ("batch", "pipe")


@both_modes
@workers
def test_an_iterator_that_was_deleted(mode: str, num_workers: int) -> None:
    """Training scripts end workers by deleting the loader's private reference to them; the loader goes on."""
    for kind, options in both(mode):
        loader = kind(range(4), num_workers=num_workers, **options)
        del loader._iterator
        assert [int(batch) for batch in loader] == [0, 1, 2, 3]
        if isinstance(loader, RobustDataLoader):
            loader.load_state_dict(loader.state_dict())
        assert [int(batch) for batch in loader] == [0, 1, 2, 3]


def floats(index: int) -> Any:
    """An array that does not ride inside a message."""
    return np.full(4_000, index, dtype=np.float64)


@both_modes
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_default_device_in_the_training_process(mode: str, num_workers: int) -> None:
    """Batches are on the CPU also where the loop makes its own tensors elsewhere, and there may be no room for them."""
    for kind, options in both(mode):
        iterator = iter(
            kind(data.Shared(6, floats), batch_size=2, num_workers=num_workers, collate_fn=data.identity, **options)
        )
        with torch.device("meta"):
            assert [[array[-1] for array in batch] for batch in iterator] == [[0, 1], [2, 3], [4, 5]]


@both_modes
def test_batches_that_arrive_in_inference_mode(mode: str) -> None:
    """While one batch is taken in inference mode, others arrive, which will be trained on: none is marked for ever."""
    weight = torch.ones(3, requires_grad=True)
    loader = RobustDataLoader(data.Shared(8, three_kinds), batch_size=2, num_workers=1, **MODES[mode])
    iterator = iter(loader)
    with torch.inference_mode():
        batches = [next(iterator)]
        assert torch.is_inference_mode_enabled()
    for batch in [*batches, *iterator]:
        assert not any(tensor.is_inference() for tensor in batch)
        sum((tensor[:, :3] * weight).sum() for tensor in batch).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [3.0 * sum(range(8))] * 3


def three_kinds(index: int) -> Any:
    """A small tensor, a large one, and an array."""
    return torch.full((3,), float(index)), torch.full((4_000,), float(index)), np.full(3, index, dtype=np.float32)


class Unforthcoming:
    """A sampler or batch sampler that raises where it is asked for what it has not."""

    def __init__(self, entries: list[Any]) -> None:
        self.__dict__["entries"] = entries

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["settings"][name]

    def __iter__(self) -> Any:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class NotYetSeeded(Unforthcoming):
    """Its generator is there later."""

    @property
    def generator(self) -> Any:
        raise RuntimeError("call set_epoch first")


class Entry:
    """Indices that can be walked through, and have no length."""

    def __init__(self, *indices: int) -> None:
        self.indices = indices

    def __iter__(self) -> Any:
        return iter(self.indices)

    def __len__(self) -> int:
        raise NotImplementedError


class Sized:
    """A batch sampler with a ``batch_size`` of its own kind."""

    def __init__(self, batch_size: Any) -> None:
        self.batch_size = batch_size

    def __iter__(self) -> Any:
        return iter([[0, 1], [2, 3]])

    def __len__(self) -> int:
        return 2


PAIRS: list[Any] = [[0, 1], [2, 3]]
BATCH_SIZES: list[Any] = [
    [8, 16],
    (1, 4),
    {0: 4},
    "auto",
    float("inf"),
    torch.tensor([4, 8]),
    len,
    None,
    2,
    np.int64(2),
]
SAMPLERS: dict[str, dict[str, Any]] = {
    "__getattr__": {"sampler": Unforthcoming([0, 1, 2, 3]), "batch_size": 2},
    "generator": {"sampler": NotYetSeeded([0, 1, 2, 3]), "batch_size": 2},
    "batches": {"batch_sampler": Unforthcoming(PAIRS)},
    "entries": {"batch_sampler": [Entry(0, 1), Entry(2, 3)]},
    **{f"batch_size {size!r:.20}": {"batch_sampler": Sized(size)} for size in BATCH_SIZES},
}


@both_modes
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_a_sampler_need_not_answer(mode: str, num_workers: int, options: dict[str, Any]) -> None:
    """What torch does not ask of a sampler is not needed from it: it may be anything, or an error."""
    for kind, ours in both(mode):
        loader = kind(range(4), num_workers=num_workers, **options, **ours)
        iterator = iter(loader)
        batches = [next(iterator).tolist()]
        if isinstance(loader, RobustDataLoader):
            assert loader.state_dict()["delivered"] == 1
        assert batches + [batch.tolist() for batch in iterator] == PAIRS


@both_modes
def test_the_trainer_may_draw_between_batches(mode: str) -> None:
    """A lazy sampler reads the global stream at the same moments as under torch, draws of the trainer in between."""
    for num_workers in (0, 2):
        seen = []
        for kind, options in both(mode):
            torch.manual_seed(9)
            sampler = data.LazySampler(10, 12)
            loader = kind(range(10), sampler=sampler, batch_size=None, num_workers=num_workers, **options)
            seen.append([(batch, torch.rand(()).item()) for batch in loader])
        assert seen[0] == seen[1]


@both_modes
def test_len_is_asked_of_the_sampler(mode: str) -> None:
    """len(loader) is the batch sampler's own, and fails as its own where it has none."""
    for kind, options in both(mode):
        loader = kind(range(3), batch_sampler=(batch for batch in [[0], [1, 2]]), **options)
        with pytest.raises(TypeError, match="has no len"):
            len(loader)
        assert [batch.tolist() for batch in loader] == [[0], [1, 2]]
        assert list(loader) == []
