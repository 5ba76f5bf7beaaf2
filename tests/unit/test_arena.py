"""Extents are found again, used again, and never while anything looks at them."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import io
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robustloader.decisions.extents import whole_pages
from robustloader.system import host
from robustloader.system.mapping import SharedMapping
from robustloader.transport import arena as arena_module
from robustloader.transport import codec
from robustloader.transport.arena import Arena, ArenaLimits, ArenaReader, ForkToken, own_fork, unseen_memory
from robustloader.transport.codec import Buffer, Parcel, Placed
from tests.support.parity_run import fingerprint
from tests.unit.test_codec import _as_after_a_pickle, nested

LIMITS = ArenaLimits(max_bytes=1 << 26, reserve_bytes=0)
BIG = 100_000


class Ends:
    """A worker's arena and the training process's reader of it, in one process."""

    def __init__(self, limits: ArenaLimits = LIMITS) -> None:
        self.arena = Arena(limits)
        self.reader: ArenaReader | None = None
        self.worker = ForkToken()

    def carry(self, value: Any) -> Any:
        """A batch through the arena, with everything released going back first, as a ``Fetch`` would bring it."""
        if self.reader is not None:
            self.arena.release(self.reader.take_released())
        parcel = self.arena.place(codec.dumps(value))
        fd = self.arena.take_descriptor()
        if fd is not None:
            self.reader = ArenaReader(fd, self.worker)
        blocks = [(buffer.low, self.block(buffer)) for buffer in parcel.buffers]
        pickled = parcel.pickled
        if isinstance(pickled, Placed):
            assert self.reader is not None
            pickled = memoryview(self.reader.lease(pickled))
        return codec.loads(pickled, blocks)

    def block(self, buffer: Buffer | Placed) -> Any:
        if isinstance(buffer, Buffer):
            return torch.tensor(list(buffer.memory), dtype=torch.uint8)
        assert self.reader is not None
        return self.reader.lease(buffer)

    def end(self) -> None:
        """The worker's process has ended, and the training process has taken leave of it."""
        assert self.reader is not None
        self.worker.ended = True
        self.reader.close()
        self.worker.settle()

    @property
    def in_use(self) -> int:
        if self.reader is not None:
            self.arena.release(self.reader.take_released())
        self.arena._drain()
        return self.arena._map.in_use


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.arena.renew()  # an arena that nobody was told of still has its descriptor


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(value=nested, inline=st.sampled_from([0, 100, 4_096]), payload=st.sampled_from([1, 1 << 15]))
def test_a_round_trip_changes_nothing(value: Any, inline: int, payload: int) -> None:
    """Any structure of tensors, arrays and objects comes out as it went in, and releases everything when it goes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "INLINE_BYTES", inline)
        patch.setattr(arena_module, "PAYLOAD_BYTES", payload)
        ends = Ends()
        got = ends.carry(value)
        assert fingerprint(got) == fingerprint(_as_after_a_pickle(value))
        del got
        gc.collect()
        assert ends.in_use == 0


def test_an_extent_is_used_again_once_nothing_looks_at_it(ends: Ends) -> None:
    """The second batch lies where the first one lay."""
    first = ends.carry(torch.zeros(BIG))
    address = first.data_ptr()
    second = ends.carry(torch.ones(BIG))
    assert second.data_ptr() != address
    assert not first.any()
    del first
    third = ends.carry(torch.full((BIG,), 2.0))
    assert third.data_ptr() == address
    assert bool((second == 1).all() and (third == 2).all())


def test_what_was_released_meanwhile_is_used_before_more_memory_is_taken(ends: Ends) -> None:
    """An arena that would have to grow looks first, and lays the batch where a released one lay."""
    looked = []

    def look() -> None:
        assert ends.reader is not None
        looked.append(ends.arena._map.resident)
        ends.arena.release(ends.reader.take_released())

    ends.arena._look = look
    held, first = ends.carry(torch.zeros(BIG)), ends.carry(torch.zeros(BIG))
    before = len(looked)
    del first
    parcel = ends.arena.place(codec.dumps(torch.ones(BIG)))
    assert len(looked) == before + 1
    assert ends.arena._map.resident == looked[-1], "it grew, although an extent had been released"
    assert not held.any()
    (placed,) = parcel.buffers
    ends.block(placed)


@pytest.mark.parametrize("keep", [lambda t: t[3:5], lambda t: t.untyped_storage(), lambda t: t.numpy()[7:], memoryview])
def test_whatever_looks_at_it_keeps_it(ends: Ends, keep: Callable[[Any], Any]) -> None:
    """Views, storages, arrays and memoryviews of a delivered tensor hold its extent."""
    batch = ends.carry(torch.zeros(BIG))
    kept = keep(batch if keep is not memoryview else batch.numpy())
    del batch
    gc.collect()
    assert ends.in_use > 0
    del kept
    gc.collect()
    assert ends.in_use == 0


def test_arrays_are_leased_too(ends: Ends) -> None:
    """NumPy keeps its extent for as long as the array or a view of it lives, and can write to it."""
    array = ends.carry({"a": np.zeros(BIG)})["a"]
    part = array[10:20]
    part += 1
    del array
    gc.collect()
    assert ends.in_use > 0
    assert part.sum() == 10
    del part
    assert ends.in_use == 0


def test_what_the_worker_keeps_is_not_overwritten(ends: Ends) -> None:
    """User code may keep a tensor that was stacked into an extent: the extent is not used again before it lets go."""
    stacked = ends.arena.empty((BIG,), torch.float32)
    assert stacked is not None
    stacked.fill_(7)
    batch = ends.carry(stacked)
    assert batch.data_ptr() != 0 and float(batch[0]) == 7
    del batch
    others = [ends.carry(torch.zeros(BIG)) for _ in range(3)]
    assert bool((stacked == 7).all())
    del stacked, others
    assert ends.in_use == 0


def test_a_stacked_tensor_is_not_copied(ends: Ends) -> None:
    """What lies in the arena already is sent as it is, once or twice, whole or in part."""
    stacked = ends.arena.empty((10, BIG), torch.uint8)
    assert stacked is not None
    stacked.fill_(1)
    before = ends.in_use
    whole, part, again = ends.carry(stacked), ends.carry(stacked[2:4]), ends.carry(stacked)
    assert ends.in_use == before
    assert part.shape == (2, BIG) and part.untyped_storage().nbytes() < 3 * BIG
    part.fill_(9)
    assert int(whole[2, 0]) == int(again[3, 5]) == 9, "all of them are the same memory, as they are with torch"
    del whole, stacked, again
    assert ends.in_use == before
    del part
    assert ends.in_use == 0


def test_small_tensors_stay_in_the_frame(ends: Ends) -> None:
    """A page for a handful of numbers would be a waste."""
    ends.carry([torch.zeros(8), np.arange(3)])
    assert ends.arena._mapping is None or ends.in_use == 0
    assert ends.arena.empty((4,), torch.float32) is None


def test_exact_storage(ends: Ends) -> None:
    """Saving a delivered tensor drags nothing along, and it can be written to."""
    batch = ends.carry({"x": torch.zeros(500, 40), "y": torch.zeros(30_000)[100:200]})
    batch["x"].add_(1)
    file = io.BytesIO()
    torch.save(batch["x"], file)
    assert file.tell() < 500 * 40 * 4 + 2_000
    assert batch["y"].untyped_storage().nbytes() < 100 * 4 + 2 * codec.ALIGNMENT


def test_release_from_another_thread(ends: Ends) -> None:
    """Leases end in whichever thread drops the last reference."""
    held = [ends.carry(torch.full((BIG,), float(k))) for k in range(5)]

    def drop() -> None:
        while held:
            held.pop()

    thread = threading.Thread(target=drop)
    thread.start()
    thread.join()
    assert ends.in_use == 0


# --- forks ------------------------------------------------------------------------------------------------------------


def fork_reader(bytes_seen: np.ndarray) -> Callable[[], int]:
    """Fork a child that waits, then looks at these bytes: the function returned lets it go on and gives their mean."""
    go_read, go_write = os.pipe()
    pid = os.fork()
    if not pid:
        code = 255
        try:
            os.close(go_write)
            os.read(go_read, 1)
            code = int(bytes_seen.mean())
        finally:
            os._exit(code)
    os.close(go_read)

    def finish() -> int:
        os.close(go_write)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    return finish


def test_an_extent_leased_during_a_fork_is_never_used_again(ends: Ends) -> None:
    """A forked child reads the batch of then, whatever the parent has dropped and received since."""
    batch = ends.carry(torch.full((BIG,), 5, dtype=torch.uint8))
    finish = fork_reader(batch.numpy())
    del batch
    for number in range(20):
        ends.carry(torch.full((BIG,), number, dtype=torch.uint8))
    assert finish() == 5
    assert ends.reader is not None and ends.reader.withheld == BIG


def test_what_was_released_before_the_fork_is_used_again(ends: Ends) -> None:
    """Only what a child can see is kept from use."""
    ends.carry(torch.zeros(BIG))
    finish = fork_reader(np.zeros(1, dtype=np.uint8))
    assert ends.in_use == 0
    assert finish() == 0


def test_our_own_worker_holds_extents_back_until_its_end(ends: Ends) -> None:
    """A fork of our own is known to end: what it may look at is used again after that."""
    token = ForkToken()
    batch = ends.carry(torch.full((BIG,), 5, dtype=torch.uint8))
    with own_fork(token):
        finish = fork_reader(batch.numpy())
    del batch
    for number in range(20):
        ends.carry(torch.full((BIG,), number, dtype=torch.uint8))
    assert ends.in_use > 0
    assert finish() == 5
    token.ended = True
    assert ends.in_use == 0
    assert ends.reader is not None and ends.reader.withheld == 0


def test_our_own_worker_does_not_hold_up_what_it_cannot_see(ends: Ends) -> None:
    """Batches that nobody was handed yet are used again while a worker lives that was forked meanwhile; what was sent
    once more, and seen, is not."""
    token = ForkToken()
    again = ends.arena.empty((BIG,), torch.uint8)
    assert again is not None
    waiting = [{"x": ends.carry(torch.ones(BIG)), "y": [ends.carry(np.ones(BIG)), "name", 3]}, ends.carry(again)]
    held, seen = ends.carry(torch.ones(BIG)), ends.carry(again.fill_(5))
    del again
    with own_fork(token, set.union(*map(unseen_memory, waiting))):
        finish = fork_reader(seen.numpy())
    in_use = ends.in_use
    waiting.clear()
    assert in_use - ends.in_use == whole_pages(4 * BIG) + whole_pages(8 * BIG)
    del held, seen
    for number in range(20):
        ends.carry(torch.full((BIG,), number, dtype=torch.uint8))
    assert ends.in_use >= whole_pages(BIG) + whole_pages(4 * BIG)
    assert finish() == 5
    token.ended = True
    assert ends.in_use == 0


@dataclasses.dataclass
class Own:
    tensor: Any


@pytest.mark.parametrize("wrap", [Own, lambda t: [{"a": (Own(t), t)}], lambda t: np.array([t, None], dtype=object)])
def test_a_class_of_the_users_may_have_seen_a_batch(wrap: Callable[[Any], Any]) -> None:
    """Unpickling runs its code: what lies in such a batch counts as seen, all of it."""
    tensor, loop = torch.ones(BIG), [1, None]
    loop[1] = loop
    assert unseen_memory(wrap(tensor)) == set()
    assert unseen_memory([{"a": (tensor, b"x", loop)}, tensor[5:]]) == {tensor.untyped_storage().data_ptr()}


def test_a_fork_in_the_worker_holds_its_tensors_back(ends: Ends) -> None:
    """A child of the worker may look at what user code had stacked."""
    stacked = ends.arena.empty((BIG,), torch.uint8)
    assert stacked is not None
    stacked.fill_(5)
    finish = fork_reader(stacked.numpy())
    del stacked
    for number in range(20):
        ends.carry(torch.full((BIG,), number, dtype=torch.uint8))
    assert finish() == 5
    assert ends.in_use > 0


def test_a_new_arena_when_too_much_is_withheld(monkeypatch: pytest.MonkeyPatch, ends: Ends) -> None:
    """Forks of others add up; then the worker begins afresh, and what is held of the old arena stays good."""
    monkeypatch.setattr(arena_module, "_WITHHELD_BYTES", BIG)
    kept = ends.carry(torch.full((BIG,), 3, dtype=torch.uint8))
    dropped = ends.carry(torch.full((BIG,), 4, dtype=torch.uint8))
    also = ends.carry(torch.full((BIG,), 4, dtype=torch.uint8))
    finish = fork_reader(dropped.numpy())
    del dropped, also
    reader = ends.reader
    assert reader is not None
    reader.take_released()
    assert reader.wasteful
    reader.retired = True
    ends.arena.renew()
    del kept
    assert reader.take_released() == [], "what is released of the old arena is not taken for the new one's"
    fresh = ends.carry(torch.full((BIG,), 6, dtype=torch.uint8))
    assert ends.reader is not reader
    assert finish() == 4
    assert int(fresh[5]) == 6


def test_what_a_worker_of_ours_forks_is_none_of_ours() -> None:
    """A forked worker runs inside its trainer's ``own_fork``: the forks of its own user code are strangers' still."""
    with own_fork(ForkToken()):
        pid = os.fork()
        if not pid:
            code = 255
            try:
                torch.set_num_threads(1)  # the parent's other threads are not here
                ends = Ends()
                stacked = ends.arena.empty((BIG,), torch.uint8)
                assert stacked is not None
                finish = fork_reader(stacked.fill_(5).numpy())
                del stacked
                for number in range(20):
                    ends.carry(torch.full((BIG,), number, dtype=torch.uint8))
                code = finish()
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5


def test_the_arena_is_not_filled_by_what_the_worker_forks(ends: Ends) -> None:
    """A copy of the worker that stacks something gets memory of its own."""
    stacked = ends.arena.empty((BIG,), torch.uint8)
    assert stacked is not None
    del stacked
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = int(ends.arena.empty((BIG,), torch.uint8) is not None)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert ends.arena.empty((BIG,), torch.uint8) is not None


def test_a_worker_renews_what_its_own_forks_have_filled(ends: Ends) -> None:
    """Forks in the worker keep a quarter of the arena from use: the next one begins. What is still released of the
    former is not taken for the new one's."""
    while not ends.arena.wasteful:
        stacked = ends.arena.empty((10 * BIG,), torch.uint8)
        assert stacked is not None
        assert fork_reader(stacked.fill_(4).numpy())() == 4
        del stacked
        ends.carry(torch.zeros(BIG))
    assert ends.arena._map.in_use < LIMITS.max_bytes / 2
    kept = ends.carry(torch.full((BIG,), 3, dtype=torch.uint8))
    former = ends.reader
    ends.arena.renew()
    fresh = [ends.carry(torch.full((BIG,), value, dtype=torch.uint8)) for value in range(3)]
    assert former is not None and ends.reader is not former
    assert int(kept[5]) == 3
    del kept
    released = former.take_released()
    assert released
    before = ends.in_use
    ends.arena.release(released)
    assert ends.in_use == before
    assert [int(batch[5]) for batch in fresh] == [0, 1, 2]
    fresh.clear()
    assert ends.in_use == 0


def test_of_a_small_arena_a_quarter_is_withheld_at_most() -> None:
    """The trainer asks for a new one before what forked processes may look at has filled it."""
    ends = Ends(ArenaLimits(max_bytes=40 * BIG, reserve_bytes=0))
    reader = None
    for number in range(11):
        batch = ends.carry(torch.full((BIG,), number, dtype=torch.uint8))
        reader = reader or ends.reader
        assert reader is not None and ends.reader is reader
        assert fork_reader(batch.numpy())() == number
        assert not reader.wasteful
        del batch
    reader.take_released()
    assert reader.wasteful
    assert ends.arena.take_trouble() == ""
    ends.arena.renew()


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_full_arena_sends_through_the_socket() -> None:
    """What does not fit goes the other way, and says why; once there is room it is used again."""
    ends = Ends(ArenaLimits(max_bytes=4 * BIG, reserve_bytes=0))
    held = [ends.carry(torch.zeros(BIG, dtype=torch.uint8)) for _ in range(3)]
    assert ends.arena.take_trouble() == ""
    parcel = ends.arena.place(codec.dumps(torch.zeros(2 * BIG, dtype=torch.uint8)))
    assert not isinstance(parcel.buffers[0], Placed)
    assert "limit" in ends.arena.take_trouble()
    assert ends.arena.take_trouble() == ""
    held.clear()
    last = ends.carry(torch.zeros(3 * BIG, dtype=torch.uint8))
    assert last.shape == (3 * BIG,)
    assert ends.arena.take_trouble() == ""


def test_it_does_not_grow_into_the_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """With less memory free than is to be kept free, nothing new is touched, and warm extents still serve."""
    ends = Ends(ArenaLimits(max_bytes=1 << 30, reserve_bytes=10 * BIG))
    first = ends.carry(torch.zeros(BIG, dtype=torch.uint8))
    ends.arena._credit = 0
    monkeypatch.setattr(host, "free_memory_bytes", lambda: (10 * BIG + 50, 1 << 30))
    parcel = ends.arena.place(codec.dumps(torch.zeros(BIG, dtype=torch.uint8)))
    assert not isinstance(parcel.buffers[0], Placed)
    assert "reserve" in ends.arena.take_trouble()
    address = first.data_ptr()
    del first
    assert ends.carry(torch.zeros(BIG, dtype=torch.uint8)).data_ptr() == address


@pytest.mark.parametrize("warm", [False, True])
def test_it_does_not_grow_where_free_memory_cannot_be_read(monkeypatch: pytest.MonkeyPatch, warm: bool) -> None:
    """A worker whose dataset holds all descriptors it may have cannot look into ``/proc``: what needs more memory goes
    through the socket, or is an ordinary tensor, and the reason is told."""
    ends = Ends()
    size = whole_pages(BIG)
    first = ends.carry(torch.zeros(BIG, dtype=torch.uint8))
    if warm:  # then it looks twice, after giving back what it does not use
        del first
        assert not ends.in_use
    ends.arena._credit = 0
    answers = [(0, 1 << 30)] if warm else []

    def look() -> tuple[int, int]:
        if answers:
            return answers.pop()
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(host, "free_memory_bytes", look)
    parcel = ends.arena.place(codec.dumps(torch.zeros(2 * size, dtype=torch.uint8)))
    assert isinstance(parcel.buffers[0], Buffer)
    assert "Too many open files" in ends.arena.take_trouble()
    assert ends.arena.empty((2 * size,), torch.uint8) is None
    ends.arena._refused_until = 0.0
    monkeypatch.undo()
    assert ends.arena.empty((2 * size,), torch.uint8) is not None


def test_no_shared_memory_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system refuses, everything goes through the socket, and the reason is told once."""

    def refuse(size: int) -> Any:
        raise OSError(12, "no address space")

    monkeypatch.setattr(SharedMapping, "create", refuse)
    arena = Arena(LIMITS)
    parcel = arena.place(codec.dumps(torch.zeros(BIG)))
    assert isinstance(parcel.buffers[0], Buffer)
    assert "no address space" in arena.take_trouble()
    arena.place(codec.dumps(torch.zeros(BIG)))
    assert arena.take_trouble() == ""


def resident(mapping: SharedMapping) -> int:
    """Bytes of the mapping that take up memory."""
    with open("/proc/self/smaps") as file:
        inside = False
        for line in file:
            if "-" in line.split(" ")[0]:
                inside = line.startswith(f"{mapping.address:x}-")
            elif inside and line.startswith("Rss:"):
                return int(line.split()[1]) * 1024
    return 0


def test_idle_memory_is_given_back_at_once_where_memory_is_low(ends: Ends) -> None:
    """Five batches were under way and one is now: the next one finds its memory, the rest goes, what is held stays."""
    size = whole_pages(4 * BIG)
    held = [ends.carry(torch.full((BIG,), float(number))) for number in range(5)]
    last = held.pop()
    held.clear()
    assert ends.in_use == size
    assert ends.arena._map.resident == 5 * size
    ends.arena.trim()
    assert ends.arena._map.resident == 2 * size
    again = ends.carry(torch.zeros(BIG))
    assert ends.arena._map.resident == 2 * size
    assert torch.equal(last, torch.full((BIG,), 4.0))
    assert torch.equal(again, torch.zeros(BIG))


def test_idle_memory_is_given_back(ends: Ends) -> None:
    """After a burst of large batches, small ones do not keep the memory of the large ones."""
    burst = [ends.carry(torch.ones(10 * BIG)) for _ in range(6)]
    mapping = ends.arena._mapping
    assert mapping is not None
    assert resident(mapping) >= 6 * 40 * BIG
    del burst
    kept = ends.carry(torch.ones(BIG))
    for _ in range(2 * 128 + 1):
        ends.carry(torch.ones(BIG))
    assert resident(mapping) <= 3 * 4 * BIG + 40 * BIG
    assert bool((kept == 1).all())


def test_labels_alone_do_not_hold_the_arena_of_a_worker_that_has_ended(ends: Ends) -> None:
    """Of a worker's arena, what is still looked at stays; the rest is given back, some of it when it is let go of."""
    batches = [ends.carry({"image": torch.ones(10 * BIG), "label": torch.full((2_000,), k)}) for k in range(6)]
    mapping = ends.arena._mapping
    assert mapping is not None
    labels = [batch["label"] for batch in batches]
    del batches[1:]
    assert resident(mapping) >= 6 * 40 * BIG
    ends.end()
    assert resident(mapping) <= 40 * BIG + 7 * 16_000 + 8 * 4_096
    assert bool((batches[0]["image"] == 1).all())
    batches.clear()
    Ends().carry(torch.ones(BIG))  # whichever worker begins or ends next
    assert resident(mapping) <= 6 * (16_000 + 2 * 4_096)
    assert [int(label[5]) for label in labels] == list(range(6))
    assert [int(label.sum()) for label in labels] == [2_000 * k for k in range(6)]


def test_a_worker_that_lives_keeps_its_memory(ends: Ends) -> None:
    """A worker that was asked to leave may still look at what it made."""
    stacked = ends.arena.empty((BIG,), torch.uint8)
    assert stacked is not None
    kept = ends.carry(torch.ones(BIG))
    stacked.fill_(7)
    assert ends.reader is not None
    ends.reader.close()
    Ends().carry(torch.ones(BIG))
    assert bool((stacked == 7).all() and (kept == 1).all())
    ends.end()
    assert not stacked.any() and bool((kept == 1).all())


@pytest.mark.parametrize("own", [True, False])
def test_what_a_forked_process_may_look_at_outlives_its_worker(ends: Ends, own: bool) -> None:
    """A process that was forked while a batch was held sees that batch, although its worker has ended since."""
    token = ForkToken()
    label = ends.carry(torch.full((BIG,), 3, dtype=torch.uint8))
    batch, other = (ends.carry(torch.full((10 * BIG,), 5, dtype=torch.uint8)) for _ in range(2))
    with own_fork(token) if own else contextlib.nullcontext():
        finish = fork_reader(batch.numpy())
    mapping = ends.arena._mapping
    assert mapping is not None
    fresh = ends.carry(torch.full((10 * BIG,), 6, dtype=torch.uint8))
    assert resident(mapping) >= 31 * BIG
    del batch, other, fresh
    ends.end()
    assert 21 * BIG <= resident(mapping) <= 21 * BIG + 4 * 4_096
    assert finish() == 5
    token.ended = True
    ForkToken().settle()
    assert (resident(mapping) < 2 * BIG) == own
    assert bool((label == 3).all())


@pytest.mark.parametrize("kept", [False, True])
def test_what_the_worker_has_forked_outlives_it(ends: Ends, kept: bool) -> None:
    """A process that user code forked in the worker sees what it saw, although the worker has ended. So does one that
    was forked after the worker had begun another arena."""
    stacked = ends.arena.empty((BIG,), torch.uint8)
    assert stacked is not None
    label = ends.carry(torch.ones(BIG))
    if kept:
        ends.arena.renew()
    finish = fork_reader(stacked.fill_(5).numpy())
    del stacked
    ends.end()
    assert finish() == 5
    assert bool((label == 1).all())


def test_pages_of_the_system_that_are_larger_than_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only whole pages are given back, and what shares one with something else stays."""
    mapping, fd = SharedMapping.create(1 << 20)
    os.close(fd)
    monkeypatch.setattr(mmap, "PAGESIZE", 65_536)
    mapping.write(0, b"x" * (1 << 20))
    mapping.give_back(65_536, 4_096)
    mapping.give_back(5 * 65_536 - 4_096, 2 * 65_536)
    data = bytes(mapping.slice(0, 1 << 20))
    assert data.count(0) == 65_536 and data.index(0) == 5 * 65_536


def test_labels_alone_do_not_hold_images(ends: Ends) -> None:
    """Memory follows what is kept of a batch, not the batch."""
    labels = []
    for number in range(200):
        batch = ends.carry({"image": torch.zeros(10 * BIG), "label": torch.full((2_000,), number)})
        labels.append(batch["label"])
        del batch
    assert ends.in_use <= 200 * 4 * 4_096 + 10 * 4 * BIG
    assert [int(label[0]) for label in labels] == list(range(200))


def test_the_mapping_goes_with_the_last_view() -> None:
    """No descriptor and no memory is kept once nothing looks."""

    def mapped() -> bool:
        with open("/proc/self/maps") as file:
            return any("robustloader-arena" in line for line in file)

    before = len(os.listdir("/proc/self/fd"))
    mapping, fd = SharedMapping.create(1 << 20)
    os.close(fd)
    view = mapping.slice(4_096, 10)
    array = np.frombuffer(mapping.view(8_192, 16), dtype=np.int64)
    del mapping
    gc.collect()
    assert mapped()
    view[0] = 1
    del view
    assert array.sum() == 0
    del array
    gc.collect()
    assert not mapped()
    assert len(os.listdir("/proc/self/fd")) == before


# --- poison -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overwrite every extent as soon as it is free: whoever still looks at it sees."""
    free = Arena._free_unused

    def free_and_poison(self: Arena, extent: Any) -> None:
        if not extent.sent and not extent.local and self._mapping is not None:
            self._mapping.write(extent.offset, b"\xa5" * extent.size)
        free(self, extent)

    monkeypatch.setattr(Arena, "_free_unused", free_and_poison)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.tuples(st.sampled_from("scdk"), st.integers(0, 5), st.integers(1, 6)), max_size=60))
def test_nothing_is_free_while_it_is_looked_at(poisoned: None, steps: list[tuple[str, int, int]]) -> None:
    """Random stacking, sending, keeping and dropping on both sides: every tensor that is held keeps its value."""
    ends = Ends()
    worker: list[tuple[torch.Tensor, int]] = []
    trainer: list[tuple[torch.Tensor, int]] = []
    for number, (step, which, size) in enumerate(steps):
        if step == "s":  # stack, and keep it in the worker
            tensor = ends.arena.empty((size, 5_000), torch.uint8)
            assert tensor is not None
            worker.append((tensor.fill_(number), number))
        elif step == "c":  # something new
            trainer.append((ends.carry(torch.full((size, 5_000), number, dtype=torch.uint8)), number))
        elif step == "k" and worker:  # what the worker keeps, again
            tensor, value = worker[which % len(worker)]
            trainer.append((ends.carry(tensor), value))
        elif step == "d":
            side = worker if which % 2 else trainer
            if side:
                del side[which % len(side)]
        assert all(bool((held == value).all()) for held, value in worker + trainer)
    tensor = None
    worker.clear()
    trainer.clear()
    assert ends.in_use == 0


def test_a_parcel_is_counted_wherever_it_lies(ends: Ends) -> None:
    """``nbytes`` counts buffers in the arena as well."""
    parcel = ends.arena.place(codec.dumps([torch.zeros(BIG), "x" * 40_000]))
    assert isinstance(parcel, Parcel) and isinstance(parcel.pickled, Placed)
    assert 4 * BIG + 40_000 <= parcel.nbytes <= 4 * BIG + 41_000
