"""With ``pin_memory=True``, batches are torch's, are pinned, and can be copied to the device while loading goes on."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from robustloader import RobustDataLoader
from robustloader.testing import Crash, InjectedDataset, Injector, Raise, WorkerKiller
from tests.support.devices import (
    LARGE,
    Numbers,
    Shaped,
    collate_own,
    collate_refuses,
    tensors_in,
    told,
)
from tests.support.parity_run import MODES, STRICT

pytestmark = pytest.mark.filterwarnings("ignore::robustloader.RobustLoaderWarning")  # samples fail on purpose

# Each process that is spawned imports torch anew, and a torch with CUDA is gigabytes.
METHODS = ("fork", pytest.param("spawn", marks=pytest.mark.deadline(240)), "forkserver")

transports = pytest.mark.parametrize("transport", ["arena", "pipe"])
workers = pytest.mark.parametrize("num_workers", [0, 2])


def both(dataset: Any, options: dict[str, Any], **arguments: Any) -> tuple[list[Any], list[Any]]:
    """The batches of torch's loader and of ours, as ``told`` tells them."""
    torchs = [told(batch) for batch in DataLoader(dataset, pin_memory=True, **arguments)]
    ours = [told(batch) for batch in RobustDataLoader(dataset, pin_memory=True, **arguments, **options)]
    return torchs, ours


# --- parity -----------------------------------------------------------------------------------------------------------


@transports
@workers
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["tensor", "pair", "dict", "tiny", "large"])
def test_batches_are_torchs(kind: str, mode: str, num_workers: int, transport: str) -> None:
    """Structure, types, values, and every tensor pinned."""
    options = {**MODES[mode], "transport": transport}
    torchs, ours = both(Shaped(kind), options, batch_size=5, num_workers=num_workers)
    assert ours == torchs
    assert len(ours) == 3
    loader = RobustDataLoader(Shaped(kind), batch_size=5, num_workers=num_workers, pin_memory=True, **options)
    assert all(tensor.is_pinned() for batch in loader for tensor in tensors_in(batch))


@workers
def test_without_batches_of_our_making(num_workers: int) -> None:
    """``batch_size=None``: single samples are pinned too."""
    torchs, ours = both(Shaped("dict"), {}, batch_size=None, num_workers=num_workers)
    assert ours == torchs


@workers
def test_a_stream(num_workers: int) -> None:
    """Iterable datasets as well."""
    torchs, ours = both(Numbers(), {}, batch_size=4, num_workers=num_workers)
    assert ours == torchs


@workers
def test_a_batch_that_pins_itself(num_workers: int) -> None:
    """A ``pin_memory`` method of the batch is called, and what it returns is the batch."""
    torchs, ours = both(Shaped("tensor"), {}, batch_size=3, num_workers=num_workers, collate_fn=collate_own)
    assert ours == torchs
    assert ours[0][0] == "Own"


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_that_cannot_be_pinned(mode: str) -> None:
    """What the method raises is raised by ``next()``, with torch's words for where; the next batch comes."""
    said = []
    for kind, options in ((DataLoader, {}), (RobustDataLoader, MODES[mode])):
        arguments: dict[str, Any] = {"batch_size": 3, "num_workers": 1, "collate_fn": collate_refuses}
        batches = iter(kind(Shaped("tensor"), pin_memory=True, **arguments, **options))
        assert told(next(batches))[1][-1] == [0, 1, 2]
        with pytest.raises(LookupError) as raised:
            next(batches)
        said.append(str(raised.value).splitlines()[0])
        assert told(next(batches))[1][-1] == [6, 7, 8]
        del batches, raised  # the traceback holds this frame, and so the iterator
        gc.collect()
    assert said[1] == said[0]
    assert "in pin memory thread for device" in said[1]


def test_nothing_is_pinned_unasked() -> None:
    """Without ``pin_memory`` no batch is pinned, whatever it came through."""
    for batch in RobustDataLoader(Shaped("large"), batch_size=2, num_workers=2):
        assert not batch.is_pinned()


# --- copies that race with loading ------------------------------------------------------------------------------------


def keep_busy(square: torch.Tensor, rounds: int = 20) -> torch.Tensor:
    """Work that the stream does before what is queued after it: copies queued then run much later than they return."""
    for _ in range(rounds):
        square = square @ square
        square = square / square.norm()
    return square


@transports
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("persistent", [False, True], ids=["once", "persistent"])
def test_copies_race_with_slot_reuse(transport: str, pinned: bool, persistent: bool) -> None:
    """Each batch is sent off without waiting, behind much other work, and its memory given up at once: by the time the
    copy runs, workers have written the next batches. What arrives on the device is what was loaded, every time."""
    samples, batch_size = 96, 4
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        square = torch.rand(2048, 2048, device="cuda")
    loader = RobustDataLoader(
        Shaped("large", samples),
        batch_size=batch_size,
        num_workers=2,
        prefetch_factor=4,
        pin_memory=pinned,
        persistent_workers=persistent,
        transport=transport,  # type: ignore[arg-type]
    )
    for _ in range(2):
        arrived = []
        with torch.cuda.stream(stream):
            for batch in loader:
                square = keep_busy(square)
                arrived.append(batch.to("cuda", non_blocking=True))
                del batch  # the extent or the pinned block may be used again from here on
        stream.synchronize()
        assert len(arrived) == samples // batch_size
        for number, batch in enumerate(arrived):
            wanted = torch.arange(number * batch_size, (number + 1) * batch_size, device="cuda", dtype=torch.float32)
            assert torch.equal(batch, wanted[:, None].expand(batch_size, LARGE))
    del loader


def test_several_streams() -> None:
    """Copies on streams that take turns, used on the default stream after an event: torch's usual prefetcher."""
    streams = [torch.cuda.Stream() for _ in range(3)]
    loader = RobustDataLoader(Shaped("large", 48), batch_size=4, num_workers=2, pin_memory=True)
    sums = []
    for number, batch in enumerate(loader):
        stream = streams[number % 3]
        with torch.cuda.stream(stream):
            there = batch.to("cuda", non_blocking=True)
        torch.cuda.current_stream().wait_stream(stream)
        there.record_stream(torch.cuda.current_stream())
        sums.append(there[:, 0].sum())
    assert [int(total) for total in sums] == [sum(range(first, first + 4)) for first in range(0, 48, 4)]


def test_batches_are_kept_on_the_host() -> None:
    """Pinned batches that the loop keeps are not overwritten by later ones."""
    loader = RobustDataLoader(Shaped("large", 48), batch_size=4, num_workers=2, pin_memory=True)
    kept = list(loader)
    assert [batch[:, 0].tolist() for batch in kept] == [
        [float(first + n) for n in range(4)] for first in range(0, 48, 4)
    ]
    assert all(bool((batch == batch[:, :1]).all()) for batch in kept)


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_start_methods_after_cuda_is_initialised(method: str) -> None:
    """Workers start in a process that has a CUDA context, by fork as well, and are none the worse for it."""
    assert torch.cuda.is_initialized()
    torchs, ours = both(Shaped("pair"), {}, batch_size=4, num_workers=2, multiprocessing_context=method)
    assert ours == torchs


@pytest.mark.parametrize("method", METHODS)
def test_a_crash(method: str) -> None:
    """A worker that dies is started again beside CUDA and the pin thread; every batch comes, pinned."""
    dataset = InjectedDataset(Shaped("large", 24), Injector({7: Crash(times=1), 15: Crash(times=1)}))
    loader = RobustDataLoader(
        dataset, batch_size=4, num_workers=2, pin_memory=True, multiprocessing_context=method, seeding="batch"
    )
    batches = list(loader)
    assert all(batch.is_pinned() for batch in batches)
    assert [batch[:, 0].tolist() for batch in batches] == [
        [float(first + n) for n in range(4)] for first in range(0, 24, 4)
    ]
    assert loader.summary().crashes == 2


@transports
def test_kills_while_copies_run(transport: str) -> None:
    """Workers killed from outside, in the middle of copies: nothing is lost, doubled or torn on the device."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        square = torch.rand(1024, 1024, device="cuda")
    loader = RobustDataLoader(
        Shaped("large", 80),
        batch_size=4,
        num_workers=2,
        pin_memory=True,
        transport=transport,  # type: ignore[arg-type]
    )
    batches = iter(loader)
    killer = WorkerKiller(batches, seed=5)
    arrived = []
    with torch.cuda.stream(stream):
        for number, batch in enumerate(batches):
            square = keep_busy(square, 5)
            arrived.append(batch.to("cuda", non_blocking=True))
            del batch
            if number in (2, 6, 11):
                killer.strike()
    stream.synchronize()
    assert killer.kills == 3
    firsts = torch.cat([batch[:, 0] for batch in arrived])
    assert firsts.tolist() == [float(index) for index in range(80)]
    assert all(bool((batch == batch[:, :1]).all()) for batch in arrived)
    del batches, loader, killer


def test_a_sample_that_raises() -> None:
    """The batch with the replacement is pinned like the others."""
    dataset = InjectedDataset(Shaped("tensor"), Injector({5: Raise()}))
    loader = RobustDataLoader(dataset, batch_size=4, num_workers=2, pin_memory=True)
    batches = list(loader)
    assert all(batch.is_pinned() and len(batch) == 4 for batch in batches)
    assert [record.index for record in loader.fault_log] == [5]
    assert 5 not in torch.cat(batches).tolist()


def test_going_on_in_the_middle() -> None:
    """A state taken between two pinned batches goes on with the next one."""
    arguments: dict[str, Any] = {"batch_size": 3, "num_workers": 2, "pin_memory": True}
    first = RobustDataLoader(Shaped("tensor"), **arguments)
    batches = iter(first)
    seen = [next(batches).tolist() for _ in range(2)]
    second = RobustDataLoader(Shaped("tensor"), **arguments)
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert all(batch.is_pinned() for batch in rest)
    assert seen + [batch.tolist() for batch in rest] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


# --- the end ----------------------------------------------------------------------------------------------------------


def pin_threads() -> list[threading.Thread]:
    """Threads that pin, of any loader."""
    return [thread for thread in threading.enumerate() if thread.name == "pt_data_pin"]


@pytest.mark.parametrize("persistent", [False, True], ids=["once", "persistent"])
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_leaving_early(taken: int, persistent: bool) -> None:
    """An iterator that is dropped with batches still to be pinned ends its thread and its workers."""
    loader = RobustDataLoader(
        Shaped("large", 64), batch_size=4, num_workers=2, pin_memory=True, persistent_workers=persistent
    )
    batches = iter(loader)
    assert len(pin_threads()) == 1
    for _ in range(taken):
        assert next(batches).is_pinned()
    del batches, loader
    gc.collect()
    assert pin_threads() == []


def test_an_epoch_after_a_broken_off_one() -> None:
    """With persistent workers and their pin thread."""
    loader = RobustDataLoader(
        Shaped("tensor", 40), batch_size=4, num_workers=2, pin_memory=True, persistent_workers=True
    )
    for batch in loader:
        assert batch.tolist() == [0, 1, 2, 3]
        break
    for _ in range(2):
        assert [batch.tolist()[0] for batch in loader] == list(range(0, 40, 4))
    assert len(pin_threads()) == 1
    del loader, batch
    gc.collect()
    assert pin_threads() == []


def test_an_error_ends_the_thread() -> None:
    """A loader that raises for good leaves no thread behind."""
    dataset = InjectedDataset(Shaped("tensor"), Injector({5: Raise()}))
    loader = RobustDataLoader(dataset, batch_size=4, num_workers=2, pin_memory=True, **STRICT)
    with pytest.raises(ValueError, match="injected at sample 5"):
        list(loader)
    del loader
    gc.collect()
    assert pin_threads() == []
