"""Batches are the trainer's own: they stay good for as long as they are held, whatever becomes of the loader."""

from __future__ import annotations

import gc
import io
import mmap
import os
import signal
import threading
import time
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from robustloader import (
    MemoryPolicy,
    RecoveryPolicy,
    RobustDataLoader,
    TransportDegraded,
    WorkerRestarted,
)
from robustloader.engine.pool import Pool
from robustloader.system.torch_private import worker_processes
from robustloader.transport.messages import Released
from tests.support.listener import Listener
from tests.support.watch import await_death

SHAPE = (3, 64, 64)  # 48 KiB of float32: an extent of its own even where small tensors stay in the frame


class Numbered(Dataset[Any]):
    """Sample ``i`` is full of ``i``."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return torch.full(SHAPE, float(index)), index


def check(batches: list[Any], batch_size: int = 4, start: int = 0) -> None:
    for number, (images, labels) in enumerate(batches, start):
        wanted = torch.arange(number * batch_size, number * batch_size + len(labels))
        assert torch.equal(labels, wanted)
        assert torch.equal(images[:, 0, 0, 0], wanted.float())
        assert torch.equal(images[:, -1, -1, -1], wanted.float())


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_kept_in_a_list_past_the_end_of_everything(method: str) -> None:
    """All batches of an epoch are good after the loader, its iterator and its workers have gone."""
    loader: Any = RobustDataLoader(Numbered(80), batch_size=4, num_workers=2, multiprocessing_context=method)
    batches = list(loader)
    check(batches)
    del loader
    gc.collect()
    check(batches)


def test_kept_past_the_death_of_its_worker() -> None:
    """A SIGKILL takes nothing that was delivered."""
    loader = RobustDataLoader(Numbered(200), batch_size=4, num_workers=2, persistent_workers=True)
    iterator = iter(loader)
    batches = [next(iterator) for _ in range(10)]
    for process in worker_processes(iterator):
        os.kill(process.pid, signal.SIGKILL)
        await_death(process.pid)
    batches += list(iterator)
    assert len(batches) == 50
    check(batches)


def test_writing_to_a_batch_reaches_no_other() -> None:
    """Batches are written to in place, by the trainer and by it alone."""
    loader = RobustDataLoader(Numbered(120), batch_size=4, num_workers=2)
    kept = []
    for number, (images, labels) in enumerate(loader):
        assert torch.equal(images[:, 0, 0, 0], labels.float())
        images.fill_(-1.0)
        labels.add_(1_000)
        if number % 3 == 0:
            kept.append(images)
    assert all(bool((images == -1).all()) for images in kept)


def test_a_process_forked_while_batches_are_held() -> None:
    """What a forked child holds is what it was, while the trainer's loader goes on over the same memory."""
    loader = RobustDataLoader(Numbered(400), batch_size=4, num_workers=2)
    iterator = iter(loader)
    batches = [next(iterator) for _ in range(3)]
    arrays = [images.numpy() for images, _ in batches]
    sums = [float(array.sum()) for array in arrays]
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(write)
            os.read(read, 1)
            code = int([float(array.sum()) for array in arrays] != sums)
        finally:
            os._exit(code)
    os.close(read)
    del batches, arrays
    for images, labels in iterator:
        assert torch.equal(images[:, 1, 1, 1], labels.float())
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_another_loader_forked_while_batches_are_held() -> None:
    """A validation loader's workers, ours or torch's, come and go; the training batches stay what they were."""
    train = RobustDataLoader(Numbered(160), batch_size=4, num_workers=2, persistent_workers=True)
    for kind in (RobustDataLoader, DataLoader, RobustDataLoader):
        kept = []
        for number, batch in enumerate(train):
            kept.append(batch)
            if number == 10:
                valid: Any = kind(Numbered(24), batch_size=4, num_workers=2)
                check(list(valid))
        check(kept)


class Helped:
    """A ``collate_fn`` that forks a helper for each batch. When the trainer is eight batches further, the helper looks
    whether its batch is what it was (1: it is), and stacks others."""

    def __init__(self, batches: int) -> None:
        self.number = 0
        self.shared: Any = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")
        self.said = self.shared[1 : 1 + batches]

    def __call__(self, samples: list[Any]) -> Any:
        number, self.number = self.number, self.number + 1
        images, labels = default_collate(samples)
        wanted = images.clone()
        if os.fork():
            return images, labels
        try:
            while self.shared[0] < number + 8:
                time.sleep(0.001)
            self.said[number] = 1 if torch.equal(images, wanted) else 2
            default_collate([torch.full_like(sample[0], -1.0) for sample in samples])
        finally:
            os._exit(0)


def test_a_process_that_a_worker_forked_looks_at_its_batch(transport: str) -> None:
    """``collate_fn`` hands the batch to a process of its own: nobody overwrites it there, nor does that process
    overwrite a later batch."""
    helped = Helped(40)
    loader = RobustDataLoader(
        Numbered(160),
        batch_size=4,
        num_workers=1,
        collate_fn=helped,
        multiprocessing_context="fork",
        persistent_workers=True,
    )
    kept = []
    for number, batch in enumerate(loader):
        helped.shared[0] = number
        if number % 3 == 0:
            kept.append((number, batch))
        for begun, held in kept[-4:]:
            check([held], start=begun)
    helped.shared[0] = 1_000
    while not all(helped.said):
        time.sleep(0.001)
    assert set(helped.said) == {1}


def _fork_and_collate(samples: list[Any]) -> Any:
    batch = default_collate(samples)
    _fork_and_wait()
    return batch


def _fork_and_wait() -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)


@pytest.mark.parametrize(("where", "method"), [("worker", "fork"), ("worker", "spawn"), ("trainer", "fork")])
def test_forks_do_not_fill_an_arena_for_good(where: str, method: str) -> None:
    """Each batch is held while somebody forks, in an arena for twenty: no batch has to go through the socket."""
    listener = Listener()
    one = 4 * 4 * 3 * 64 * 64
    loader = RobustDataLoader(
        Numbered(320),
        batch_size=4,
        num_workers=1,
        collate_fn=_fork_and_collate if where == "worker" else None,
        multiprocessing_context=method,
        memory=MemoryPolicy(max_arena_bytes=20 * one),
        telemetry=listener.policy,
    )
    for number, batch in enumerate(loader):
        if where == "trainer":
            _fork_and_wait()
        check([batch], start=number)
    assert listener.of(TransportDegraded) == []


def test_saving_a_batch_saves_only_the_batch() -> None:
    """``torch.save`` of a tensor writes its bytes and no more."""
    images, labels = next(iter(RobustDataLoader(Numbered(16), batch_size=4, num_workers=1)))
    for tensor in (images, labels, images[1]):
        file = io.BytesIO()
        torch.save(tensor.clone() if tensor is not images and tensor is not labels else tensor, file)
        assert file.tell() < tensor.numel() * tensor.element_size() + 2_500


def test_labels_alone_are_cheap_to_keep(transport: str) -> None:
    """Keeping the labels of many batches keeps no images."""
    listener = Listener()
    loader = RobustDataLoader(Numbered(1_200), batch_size=4, num_workers=2, telemetry=listener.policy)
    before = shared_bytes()
    labels = [labels for _, labels in loader]
    assert torch.equal(torch.cat(labels), torch.arange(1_200))
    assert not listener.of(TransportDegraded)
    held = shared_bytes() - before
    assert held < 60 * 4 * 4 * 12_288, f"{held:,} bytes are held by 300 batches' labels"


class Paced(Numbered):
    """A worker loads batch ``t`` of four once the trainer has been handed batch ``t - 2``."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.handed: Any = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")  # shared with forked workers

    def __getitem__(self, index: int) -> Any:
        while self.handed[0] < index // 4 - 2:
            time.sleep(0.001)
        return super().__getitem__(index)


def test_a_worker_needs_no_more_memory_than_is_held_or_under_way(transport: str) -> None:
    """What the trainer let go of is used again before the arena grows, although it came with a task further behind."""
    dataset = Paced(160)
    iterator = iter(RobustDataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context="fork"))
    arenas: list[int] = []
    for number, batch in enumerate(iterator):
        check([batch], start=number)
        dataset.handed[0] = number
        if number == 30:
            arenas = [shared_bytes(process.pid) for process in worker_processes(iterator)]
    one = 4 * 4 * 3 * 64 * 64
    assert len(arenas) == 2
    if transport == "arena":
        assert all(one <= held <= 2.5 * one for held in arenas), arenas


@pytest.mark.parametrize(("batch_size", "told"), [(32, True), (4, False)])
def test_large_batches_are_given_back_at_once(
    monkeypatch: pytest.MonkeyPatch, transport: str, batch_size: int, told: bool
) -> None:
    """That a large batch was let go is told before the next one is waited for; of small ones the next task tells."""
    messages: list[Any] = []
    send = Pool.send

    def listen(pool: Pool, worker: Any, message: Any, *rest: Any) -> None:
        messages.append(message)
        send(pool, worker, message, *rest)

    monkeypatch.setattr(Pool, "send", listen)
    for number, batch in enumerate(RobustDataLoader(Numbered(16 * batch_size), batch_size=batch_size, num_workers=2)):
        check([batch], batch_size, start=number)
    assert any(isinstance(message, Released) for message in messages) == (told and transport != "pipe")


def shared_bytes(pid: int | str = "self") -> int:
    """Memory of all arenas that a process maps."""
    total, inside = 0, False
    with open(f"/proc/{pid}/smaps") as file:
        for line in file:
            if "-" in line.split(" ", 1)[0]:
                inside = "robustloader-arena" in line
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


_kept: list[tuple[torch.Tensor, float]] = []


class Remembering(Numbered):
    """The trainer may have kept an image and its number; each sample says whether that is still what it was."""

    def __getitem__(self, index: int) -> Any:
        state = "none"
        for image, value in _kept:
            state = "intact" if bool((image == value).all()) else "damaged"
        return torch.full(SHAPE, float(index)), index, state


def test_workers_that_come_and_go_do_not_fill_the_arenas(transport: str) -> None:
    """What the trainer has been handed and user code keeps is what it was for workers that are started in the middle of
    an epoch, too, while their memory, and that of the batches still to come, goes round; none is sent another way."""
    listener = Listener()
    one = 4 * 4 * 3 * 64 * 64
    loader = RobustDataLoader(
        Remembering(4 * 240),
        batch_size=4,
        num_workers=2,
        prefetch_factor=6,
        multiprocessing_context="fork",
        recovery=RecoveryPolicy(max_restarts=100),
        memory=MemoryPolicy(max_arena_bytes=2 * 18 * one),
        telemetry=listener.policy,
    )
    iterator = iter(loader)
    number = 0
    states: set[str] = set()
    for images, labels, seen in iterator:
        check([(images, labels)], start=number)
        states.update(seen)
        number += 1
        if number % 20 == 10 and number < 200:
            time.sleep(0.1)  # the lookahead is there, as a rule
            _kept.append((images[0], float(labels[0])))
            os.kill(worker_processes(iterator)[number // 20 % 2].pid, signal.SIGKILL)
        elif len(listener.of(WorkerRestarted)) == (number + 10) // 20:
            _kept.clear()
    assert number == 240
    assert states == {"none", "intact"}
    assert len(listener.of(WorkerRestarted)) == 10
    assert listener.of(TransportDegraded) == []


class Labelled(Numbered):
    """With labels large enough for memory of their own."""

    def __getitem__(self, index: int) -> Any:
        return torch.full(SHAPE, float(index)), torch.full((512,), index)


@pytest.mark.parametrize("kills", [False, True])
def test_labels_of_each_epoch_hold_no_images(transport: str, kills: bool) -> None:
    """With workers of its own in each epoch, or one that dies, a loader takes no more memory for each label kept."""
    loader = RobustDataLoader(Labelled(96), batch_size=4, num_workers=2)
    labels: list[Any] = []
    for _ in range(6):
        iterator = iter(loader)
        for number, batch in enumerate(iterator):
            if number < 4:
                labels.append(batch[1])
            if kills and number == 6:
                os.kill(worker_processes(iterator)[0].pid, signal.SIGKILL)
        del batch, iterator
    list(RobustDataLoader(Labelled(8), batch_size=4, num_workers=1))  # whatever was let go of last
    one, label = 4 * 4 * 3 * 64 * 64, 4 * 8 * 512
    assert shared_bytes() <= len(labels) * (label + 4_096) + 8 * one
    for number, held in enumerate(labels):
        first = number % 4 * 4
        assert torch.equal(held, torch.arange(first, first + 4).reshape(4, 1).expand(4, 512))


def test_released_in_another_thread() -> None:
    """Whichever thread drops a batch, its memory comes back into use, and no batch changes meanwhile."""
    loader = RobustDataLoader(Numbered(400), batch_size=4, num_workers=2)
    waiting: list[Any] = []
    there, done = threading.Semaphore(0), threading.Event()
    wrong: list[int] = []

    def consume() -> None:
        while True:
            there.acquire()
            if not waiting:
                if done.is_set():
                    return
                continue
            images, labels = waiting.pop(0)
            if not torch.equal(images[:, 2, 3, 4], labels.float()):
                wrong.append(int(labels[0]))
            del images, labels

    thread = threading.Thread(target=consume)
    thread.start()
    for batch in loader:
        waiting.append(batch)
        there.release()
    del batch
    done.set()
    there.release()
    thread.join()
    assert not wrong and not waiting


class Keeper:
    """A ``collate_fn`` that keeps what it made of the first batches, and says whether it has changed."""

    def __init__(self) -> None:
        self.kept: list[tuple[Any, float]] = []

    def __call__(self, samples: list[Any]) -> Any:
        images, labels = default_collate(samples)
        if len(self.kept) < 5:
            self.kept.append((images, float(labels[0])))
        intact = all(bool((kept[0] == value).all()) for kept, value in self.kept)
        return images, labels, intact


def test_a_worker_keeps_what_it_collated() -> None:
    """User code in the worker may hold on to a collated tensor: it is not overwritten by later batches."""
    loader = RobustDataLoader(Numbered(240), batch_size=4, num_workers=2, collate_fn=Keeper())
    for images, labels, intact in loader:
        assert intact
        assert torch.equal(images[:, 0, 0, 0], labels.float())


class Nested(Numbered):
    """Calls ``default_collate`` itself, in the worker's main thread and in one of its own, and keeps the results."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.kept: list[torch.Tensor] = []

    def __getitem__(self, index: int) -> Any:
        pair = default_collate([torch.full(SHAPE, float(index)), torch.full(SHAPE, float(index))])
        made: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: made.append(default_collate([pair[0], pair[1]])))
        thread.start()
        thread.join()
        self.kept.append(pair)
        assert all(bool((kept == kept.flatten()[0]).all()) for kept in self.kept)
        return made[0][1], index


def test_default_collate_called_by_user_code() -> None:
    """Inside ``__getitem__`` or in a user's thread it makes ordinary tensors, which are the user's to keep."""
    check(list(RobustDataLoader(Nested(48), batch_size=4, num_workers=2)))


def test_descriptors_do_not_grow_with_held_batches(transport: str) -> None:
    """10,000 held batches cost no descriptor more than ten."""
    loader = RobustDataLoader(Numbered(10_000), batch_size=1, num_workers=2, collate_fn=_first_row)
    held: list[Any] = []
    counts: set[int] = set()
    for number, batch in enumerate(loader):
        held.append(batch)
        if number >= 10 and number % 500 == 0:
            counts.add(len(os.listdir("/proc/self/fd")))
    assert len(held) == 10_000
    assert len(counts) == 1
    assert all(float(row[0]) == number for number, row in enumerate(held))


def _first_row(samples: list[Any]) -> torch.Tensor:
    return samples[0][0][0, :32].flatten()  # 8 KiB: above what stays in the frame
