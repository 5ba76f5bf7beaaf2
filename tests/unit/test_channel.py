"""Frames over a real socket pair: whole or not at all, whatever the pieces."""

from __future__ import annotations

import errno
import os
import select
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robustloader.transport import channel as channel_module
from robustloader.transport import codec
from robustloader.transport.arena import Arena, ArenaLimits
from robustloader.transport.channel import ArenaLost, Channel, Frame, channel_pair
from robustloader.transport.messages import Fetch, Released
from tests.support.parity_run import fingerprint

PATIENCE_S = 30.0
"""Only ever waited out by a test that fails."""


@contextmanager
def pair() -> Iterator[tuple[Channel, Channel]]:
    """The training process's end, and the worker's."""
    ours, end = channel_pair()
    end.setblocking(True)
    theirs = Channel(end)
    try:
        yield ours, theirs
    finally:
        ours.close()
        theirs.close()


def receive(channel: Channel, wanted: int) -> list[Frame]:
    """Wait for so many frames."""
    frames: list[Frame] = []
    while len(frames) < wanted:
        ready, _, _ = select.select([channel], [], [], PATIENCE_S)
        assert ready, f"{len(frames)} of {wanted} frames came"
        more, gone = channel.receive()
        frames.extend(more)
        assert not gone or len(frames) >= wanted
    return frames


def receive_all(channel: Channel) -> list[Frame]:
    """What comes before the end."""
    frames: list[Frame] = []
    gone = False
    while not gone:
        ready, _, _ = select.select([channel], [], [], PATIENCE_S)
        assert ready, "the end did not come"
        more, gone = channel.receive(wait=False)
        frames.extend(more)
    return frames


def send_all(channel: Channel, messages: list[tuple[Any, Any]]) -> threading.Thread:
    """Send pairs of message and batch from a thread of its own, as a worker would."""

    def work() -> None:
        for message, batch in messages:
            channel.send(message, None if batch is ... else codec.dumps(batch))

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def make_batch(sizes: list[int], how: int) -> Any:
    """Tensors and arrays of these sizes, in one of a few shapes."""
    parts: list[Any] = []
    for number, size in enumerate(sizes):
        if (number + how) % 3 == 0:
            parts.append(np.arange(size, dtype=np.float32))
        elif (number + how) % 3 == 1:
            parts.append(torch.arange(size).t() if how % 2 else torch.arange(2 * size)[::2])
        else:
            parts.append(torch.arange(size, dtype=torch.float64).to(torch.bfloat16))
    return {"parts": parts, "text": "ä" * how, "none": None}


batches = st.builds(
    make_batch,
    st.lists(st.sampled_from([0, 1, 7, 500, 1_024, 4_097, 70_000, 300_000]), max_size=6),
    st.integers(0, 5),
)
messages = st.one_of(st.integers(), st.text(max_size=50), st.tuples(st.integers(), st.none(), st.just(b"x" * 9_000)))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(sent=st.lists(st.tuples(messages, st.just(...) | batches), min_size=1, max_size=5))
def test_frames_arrive_whole_and_in_order(sent: list[tuple[Any, Any]]) -> None:
    """Whatever is sent arrives, once, in order, batches of any size included."""
    with pair() as (ours, theirs):
        thread = send_all(theirs, sent)
        frames = receive(ours, len(sent))
        thread.join(PATIENCE_S)
        assert [frame.message for frame in frames] == [message for message, _ in sent]
        for frame, (_, batch) in zip(frames, sent, strict=True):
            if batch is not ...:
                assert fingerprint(frame.batch()) == fingerprint(batch)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(batch=batches, data=st.data())
def test_a_frame_that_is_cut_off_is_never_handed_out(batch: Any, data: st.DataObject) -> None:
    """A worker killed in the middle of a frame leaves no frame: only the whole one before it is there."""
    tap, end = socket.socketpair()
    source = Channel(tap)
    collected: list[bytes] = []

    def drain() -> None:
        while piece := end.recv(1 << 20):
            collected.append(piece)

    thread = threading.Thread(target=drain)
    thread.start()
    source.send("whole", codec.dumps([1, torch.ones(3)]))
    source.send("cut", codec.dumps(batch))
    source.close()
    thread.join(PATIENCE_S)
    end.close()
    wire = b"".join(collected)
    whole = _length_of_first(wire)
    cut = data.draw(st.integers(whole, len(wire) - 1), label="bytes that got through")
    left, right = socket.socketpair()
    with left:
        right.setblocking(False)
        channel = Channel(right)
        writer = threading.Thread(target=lambda: (left.sendall(wire[:cut]), left.shutdown(socket.SHUT_WR)))
        writer.start()
        frames: list[Frame] = []
        gone = False
        while not gone:
            select.select([channel], [], [], PATIENCE_S)
            more, gone = channel.receive()
            frames.extend(more)
        writer.join(PATIENCE_S)
        assert [frame.message for frame in frames] == ["whole"]
        channel.close()


def _length_of_first(wire: bytes) -> int:
    """Where the first frame ends: the shortest beginning that hands one out."""
    low, high = 1, len(wire)
    while low < high:
        middle = (low + high) // 2
        left, right = socket.socketpair()
        with left:
            right.setblocking(False)
            channel = Channel(right)
            # Only as much as a socket buffer surely holds: the first frame is small.
            left.sendall(wire[: min(middle, 60_000)])
            frames, _ = channel.receive()
            channel.close()
        low, high = (low, middle) if frames else (middle + 1, high)
    return low


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_size_of_the_pieces_does_not_matter(data: st.DataObject) -> None:
    """A stream cut anywhere into pieces gives the same frames."""
    values = [torch.arange(700), np.arange(900), "text", torch.arange(3)]
    tap, end = socket.socketpair()
    source = Channel(tap)
    for number, value in enumerate(values):
        source.send(number, codec.dumps(value))
    source.close()
    wire = b""
    while piece := end.recv(1 << 20):
        wire += piece
    end.close()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=12)))
    left, right = socket.socketpair()
    right.setblocking(False)
    channel = Channel(right)
    frames: list[Frame] = []
    for begin, stop in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        left.sendall(wire[begin:stop])
        frames.extend(channel.receive()[0])
    left.close()
    assert [frame.message for frame in frames] == [0, 1, 2, 3]
    assert [fingerprint(frame.batch()) for frame in frames] == [fingerprint(value) for value in values]
    assert channel.receive() == ([], True)
    channel.close()


def test_sending_never_blocks_the_training_process() -> None:
    """Our end takes any number of messages while the worker reads nothing, and they arrive once it does."""
    with pair() as (ours, theirs):
        count, bulk = 200, "x" * 100_000
        for number in range(count):
            ours.send((number, bulk))
        assert ours.backlog
        got: list[Any] = []

        def read() -> None:
            while len(got) < count:
                frames, gone = theirs.receive()
                got.extend(frame.message[0] for frame in frames)
                if gone:
                    return

        thread = threading.Thread(target=read)
        thread.start()
        while ours.backlog:
            _, writable, _ = select.select([], [ours], [], PATIENCE_S)
            assert writable
            ours.flush()
        thread.join(PATIENCE_S)
        assert got == list(range(count))


def test_reading_never_blocks_the_training_process() -> None:
    """With nothing there, ``receive`` comes back at once and says that the peer still lives."""
    with pair() as (ours, _):
        assert ours.receive() == ([], False)


def test_a_peer_that_is_gone_is_no_error() -> None:
    """Sending to a dead worker is silent; reading says that it is gone, after what it managed to send."""
    with pair() as (ours, theirs):
        theirs.send("last words")
        theirs.close()
        frames, gone = ours.receive()
        while not gone:
            more, gone = ours.receive()
            frames.extend(more)
        assert [frame.message for frame in frames] == ["last words"]
        for _ in range(3):
            ours.send("x" * 1_000_000)
        assert not ours.backlog


def test_a_message_that_does_not_pickle_sends_nothing() -> None:
    """The error is the sender's, and the stream stays usable."""
    with pair() as (ours, theirs):
        with pytest.raises(Exception, match=r"pickle|lambda"):
            theirs.send(lambda: None)
        theirs.send("fine")
        assert [frame.message for frame in receive(ours, 1)] == ["fine"]


def carry(arena: Arena, theirs: Channel, ours: Channel) -> Any:
    """A batch from the worker through its arena."""
    parcel = arena.place(codec.dumps(torch.ones(100_000)))
    fd = arena.take_descriptor()
    theirs.send("batch", parcel, arena_fd=fd)
    if fd is not None:
        os.close(fd)
    return receive(ours, 1)[0].batch()


def fail_to_pickle(ours: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler yields what no pickle holds."""
    with pytest.raises(Exception, match=r"pickle|lambda"):
        ours.send(Fetch(0, 1, [lambda: None]))


def interrupt(ours: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler raises while the frame is made."""

    def raise_from_handler(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(channel_module, "_pack", raise_from_handler)
        with pytest.raises(KeyboardInterrupt):
            ours.send(Released())


@pytest.mark.parametrize("fail", [fail_to_pickle, interrupt])
def test_what_was_released_goes_with_the_next_frame(fail: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a message comes to nothing, the worker hears once of what was released and of the arena it should begin."""
    arena = Arena(ArenaLimits(1 << 26, 0))
    with pair() as (ours, theirs):
        for wasteful in (False, True):
            carry(arena, theirs, ours)
            assert ours.arena is not None
            ours.arena.withheld = 1 << 40 if wasteful else 0
            fail(ours, monkeypatch)
            assert ours.has_released
            ours.send(Released())
            ours.send(Released())
            first, second = receive(theirs, 2)
            assert (len(first.released), first.renew) == (1, wasteful)
            assert (second.released, second.renew) == ((), False)
            arena.release(first.released)
        assert not ours.has_released


def test_what_is_received_is_the_receivers_own() -> None:
    """A received batch is writable, has storages of exact size and does not change when the sender's does."""
    with pair() as (ours, theirs):
        tensor, array = torch.arange(50_000), np.arange(50_000)
        thread = send_all(theirs, [("a", [tensor, array])])
        frame = receive(ours, 1)[0]
        thread.join(PATIENCE_S)
        tensor.zero_()
        array[:] = 0
        found_tensor, found_array = frame.batch()
        assert found_tensor[-1] == found_array[-1] == 49_999
        assert found_tensor.untyped_storage().nbytes() == 400_000
        found_tensor[0] = found_array[0] = 5
        assert frame.nbytes >= 800_000


def test_tensors_may_be_indices() -> None:
    """Messages carry what the sampler yields, tensors and arrays of any size included."""
    with pair() as (ours, theirs):
        indices = [torch.arange(10_000), np.arange(10_000), torch.tensor(3)]
        thread = send_all(theirs, [(indices, ...)])
        found = receive(ours, 1)[0].message
        thread.join(PATIENCE_S)
        assert fingerprint(found) == fingerprint(indices)


LARGE = torch.arange(500_000, dtype=torch.int64).reshape(-1, 2)


@pytest.mark.parametrize(
    "indices",
    [
        [*LARGE[:64, 0]],
        LARGE.flatten()[100:164],
        LARGE[:64, 1],
        [*LARGE.flatten()[:1_000].reshape(-1, 2)],
        [(LARGE[5], {"at": LARGE[7, 0]})],
        [LARGE[5, 1], LARGE[5, 1].bfloat16(), LARGE[5:5], LARGE.flatten()[8_000:9_000]],
    ],
    ids=["samples", "slice", "column", "rows", "nested", "odd"],
)
def test_an_index_does_not_bring_what_it_is_a_view_of(indices: Any) -> None:
    """Samplers yield views of a permutation of the whole dataset: their elements cross, and no others."""
    ours, end = channel_pair()
    with end:
        ours.send(Fetch(0, 1, indices, (LARGE[3, 0],)))
        ours.flush()
        crossed = end.recv(1 << 20)
    ours.close()
    assert len(crossed) < 20_000  # 1,000 elements of eight bytes at most, and what describes 500 tensors
    left, right = socket.socketpair()
    with left:
        right.setblocking(False)
        channel = Channel(right)
        left.sendall(crossed)
        message = channel.receive()[0][0].message
        channel.close()
    assert fingerprint(compacted(message.indices)) == fingerprint(compacted(indices))
    assert message.spares[0] == 6


def compacted(value: Any) -> Any:
    """The same with contiguous tensors."""
    if isinstance(value, torch.Tensor):
        return value.contiguous()
    if isinstance(value, dict):
        return {key: compacted(part) for key, part in value.items()}
    return type(value)(map(compacted, value)) if isinstance(value, (list, tuple)) else value


class Refusing:
    """A socket that raises these errors at its next sends, one after the other."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.errors: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.end, name)

    def send(self, *arguments: Any) -> int:
        return self._try(self.end.send, arguments)

    def sendmsg(self, *arguments: Any) -> int:
        return self._try(self.end.sendmsg, arguments)

    def _try(self, send: Any, arguments: tuple[Any, ...]) -> int:
        if self.errors and (number := self.errors.pop(0)):
            raise OSError(number, os.strerror(number))
        count: int = send(*arguments)
        return count


def refusing(channel: Channel) -> Refusing:
    """Let a channel's socket refuse what it is told to."""
    channel._socket = end = Refusing(channel._socket)  # type: ignore[assignment]
    return end


PASSING = pytest.mark.parametrize(
    "number", [errno.EINTR, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS], ids=os.strerror
)


@PASSING
@pytest.mark.parametrize("how", ["small", "large", "arena"])
def test_a_worker_sends_again_what_the_kernel_refused(number: int, how: str) -> None:
    """Out of kernel memory, or with too many descriptors on their way, at the beginning of a frame or within it: the
    frame arrives, and those after it."""
    arena = Arena(ArenaLimits(1 << 26, 0))
    batch = torch.arange(10 if how == "small" else 1_000_000)
    with pair() as (ours, theirs):
        socket_of_theirs = refusing(theirs)

        def work() -> None:
            for task in range(3):
                parcel, fd = codec.dumps(batch), None
                if how == "arena":
                    parcel = arena.place(parcel)
                    fd = arena.take_descriptor()
                socket_of_theirs.errors = [[number, number], [0, number], [number, 0, number]][task]
                theirs.send(task, parcel, arena_fd=fd)
                if fd is not None:
                    os.close(fd)

        thread = threading.Thread(target=work)
        thread.start()
        frames = receive(ours, 3)
        thread.join(PATIENCE_S)
        assert [frame.message for frame in frames] == [0, 1, 2]
        assert all(torch.equal(frame.batch(), batch) for frame in frames)


@PASSING
def test_the_training_process_keeps_what_the_kernel_refused(number: int) -> None:
    """It does not wait: what it had to say stays in the backlog, in order, and goes when it can."""
    with pair() as (ours, theirs):
        socket_of_ours = refusing(ours)
        socket_of_ours.errors = [number] * 7
        for task in range(3):
            ours.send(task)
            assert ours.backlog
        while ours.backlog:
            ours.flush()
        assert not socket_of_ours.errors
        assert [frame.message for frame in receive(theirs, 3)] == [0, 1, 2]


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.EPERM], ids=os.strerror)
@pytest.mark.parametrize("sender", ["worker", "training process"])
@pytest.mark.parametrize("how", ["small", "large", "arena"])
def test_what_can_never_be_sent_ends_the_stream(
    monkeypatch: pytest.MonkeyPatch, number: int, sender: str, how: str
) -> None:
    """Both sides see the end, after what got through before; nobody waits for a frame that does not come."""
    monkeypatch.setattr(channel_module, "_MAX_REFUSALS", 20)
    with pair() as (ours, theirs):
        here, there = (theirs, ours) if sender == "worker" else (ours, theirs)
        here.send("before")
        refusing(here).errors = [number] * 1_000
        with tempfile.TemporaryFile() as file:
            fd = file.fileno() if (sender, how) == ("worker", "arena") else None
            here.send("lost", None if how == "small" else codec.dumps(torch.ones(100_000)), arena_fd=fd)
        for _ in range(20):
            here.flush()
        assert not here.backlog
        here.send("too late")
        assert not here.backlog
        for channel, expected in ((there, ["before"]), (here, [])):
            assert [frame.message for frame in receive_all(channel)] == expected


def test_a_frame_whose_arena_did_not_come() -> None:
    """It cannot be read, and neither can what follows: the reader is told so, as where no descriptor was left."""
    arena = Arena(ArenaLimits(1 << 26, 0))
    with pair() as (ours, theirs):
        theirs.send("batch", arena.place(codec.dumps(torch.ones(100_000))))
        with pytest.raises(ArenaLost, match="did not come"):
            receive(ours, 1)


def test_closing_twice_is_once() -> None:
    """``close`` may come from several sides."""
    with pair() as (ours, _):
        ours.close()
        ours.close()
        assert ours.closed
        assert ours.fileno() == -1
