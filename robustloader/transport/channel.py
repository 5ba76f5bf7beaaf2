"""A socket pair that carries frames, never blocking the training process.

A frame is a head, a table of buffers, a list of released extents, an envelope (the pickled message), a payload (a
pickled batch, may be empty) and the bytes of those buffers that do not lie in the arena:

    head      ``=IIQII``  envelope bytes, number of buffers, payload bytes, number of released extents, flags
    table     ``=qQqq``   per buffer: ``low`` (see :class:`~robustloader.transport.codec.Buffer`), its size in bytes,
                          its position and extent in the arena; position -1: its bytes follow in the frame
    released  ``=q``      offsets of extents that the receiver may use again

Both ends are on one machine, so numbers are in its own order. The receiver allocates each buffer once, at its exact
size, and reads the socket straight into it. A frame cut off by the sender's death is never handed out.

A worker's new arena comes as a descriptor with the frame that is the first to use it (``NEW_ARENA``).
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import io
import os
import pickle
import socket
import struct
import time
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from robustloader.system.host import close_in_forked_children
from robustloader.transport import codec
from robustloader.transport.arena import ArenaReader, ForkToken
from robustloader.transport.codec import Parcel, Placed
from robustloader.transport.messages import as_plain, from_plain

__all__ = ["ArenaLost", "Channel", "Frame", "channel_pair"]

_HEAD = struct.Struct("=IIQII")
_ENTRY = struct.Struct("=qQqq")
_EXTENT_BYTES = 8
_SCRATCH_BYTES = 256 * 1024
_SOCKET_BYTES = 4 * 1024 * 1024  # asked for; the kernel gives what net.core.wmem_max allows
_MAX_VECTORS = 1_000  # IOV_MAX is 1,024 on Linux
_TURN_BYTES = 32 * 1024 * 1024  # read from one worker before the others get a turn
_JOIN_BYTES = 16 * 1024  # a copy of this size costs less than a system call with several parts
_ANCILLARY_BYTES = socket.CMSG_SPACE(4 * 8)
_PASSING = frozenset((errno.EINTR, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS))
"""The kernel is short of memory, or of room for descriptors on their way: the peer lives, and nothing was sent.

*Source*: unix(7), send(2)."""
_PAUSE_S = 0.002  # before another try, in the training process too: its socket counts as writable all the while
_MAX_REFUSALS = 10_000  # in a row, some 20 seconds. Tries are counted, as time also passes for a stopped job

_NEW_ARENA = 1  # a descriptor came along
_RENEW = 2  # the worker should begin a new arena
_PAYLOAD_PLACED = 4  # the payload lies in the arena: the table's last entry


class ArenaLost(Exception):
    """A worker's arena is not here: this process had no descriptor left for it, or cannot map it."""


class Frame(NamedTuple):
    """A received message and, where one came with it, its batch, still pickled.

    The buffers are leased from the start: a frame that is thrown away releases them.
    """

    message: Any
    payload: memoryview
    buffers: list[tuple[int, Any]]
    released: tuple[int, ...] = ()
    renew: bool = False

    @property
    def nbytes(self) -> int:
        """Size of the batch in bytes."""
        return self.payload.nbytes + sum(_size(block) for _, block in self.buffers)

    def batch(self) -> Any:
        """Unpickle the batch; raises whatever its own unpickling raises.

        Its tensors are ordinary ones: a batch that arrives while the loop is in inference mode may be one that it will
        train on.
        """
        if not torch.is_inference_mode_enabled():  # as a rule; the question costs less than the answer
            return codec.loads(self.payload, self.buffers)
        with torch.inference_mode(False):
            return codec.loads(self.payload, self.buffers)


def _size(block: Any) -> int:
    size: int = block.numel() if isinstance(block, torch.Tensor) else len(block)
    return size


def channel_pair() -> tuple[Channel, socket.socket]:
    """The training process's channel, and the worker's end, to be sent to the worker and wrapped there."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
    ours.setblocking(False)
    channel = Channel(ours)
    close_in_forked_children(channel)
    return channel, theirs


class Channel:
    """One end. Blocking or not is the socket's setting: the training process's is not, the worker's is.

    Attributes:
        arena: the other side's arena, in the training process, once there is one.
        worker: whose arenas they are, in the training process.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._outgoing: deque[memoryview] = deque()
        self._received_fds: deque[int] = deque()
        self._refusals = 0
        self._released: list[int] = []  # taken from the arena, and in no frame yet
        self._parser = _Parser(self)
        self.arena: ArenaReader | None = None
        self.worker: ForkToken | None = None
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self.closed = False

    def fileno(self) -> int:
        """The socket's descriptor; -1 once closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close this end; safe to call more than once."""
        self.closed = True
        self._outgoing.clear()
        self._socket.close()
        while self._received_fds:
            os.close(self._received_fds.popleft())
        if self.arena is not None:
            self.arena.close()
            self.arena = None

    # --- sending

    @property
    def backlog(self) -> bool:
        """Whether something waits until the socket is writable."""
        return bool(self._outgoing)

    def send(self, message: Any, parcel: Parcel | None = None, *, arena_fd: int | None = None) -> None:
        """Queue a frame and send what the socket takes at once; what has been released goes along.

        Raises what pickling ``message`` raises, before anything is sent. A peer that is gone is no error here: its
        death is noticed elsewhere. What the kernel refuses for a while is sent later; where it refuses for good, the
        stream ends, for both sides.

        Args:
            arena_fd: the descriptor of a new arena, which this frame is the first to use. Blocking ends only.
        """
        envelope = _envelope(message)
        flags, released, arena = 0, b"", self.arena
        if arena_fd is not None:
            flags |= _NEW_ARENA
        if arena is not None:
            self._released += arena.take_released()
            if self._released:
                released = array.array("q", self._released).tobytes()
            if arena.wasteful and not arena.retired:
                flags |= _RENEW
        first, rest = _pack(envelope, parcel, released, flags)
        # Until here an exception, a signal handler's included, costs nothing. Better never released than twice.
        if released:
            self._released = []
        if arena is not None and flags & _RENEW:
            arena.retired = True
        if arena_fd is not None:
            self._send_descriptor(first, arena_fd)
        elif rest or self._outgoing or not self._send_whole(first):
            self._outgoing.append(memoryview(first))
        if rest or self._outgoing:
            self._outgoing.extend(rest)
            self.flush()

    def _send_whole(self, first: bytes) -> bool:
        """Send a frame that is one piece; whether nothing of it is left to send. Most are, and the socket has room."""
        try:
            sent = self._socket.send(first)
        except BlockingIOError:
            return False
        except OSError as error:
            return not self._may_try_again(error)
        if sent < len(first):
            self._outgoing.append(memoryview(first)[sent:])
        return True

    def _send_descriptor(self, first: bytes, fd: int) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        while True:
            try:
                sent = self._socket.sendmsg([first], ancillary)
                break
            except OSError as error:
                if not self._may_try_again(error):
                    return
                time.sleep(_PAUSE_S)
        self._refusals = 0
        if sent < len(first):
            self._outgoing.append(memoryview(first)[sent:])

    def flush(self) -> None:
        """Send what the socket takes (everything, on a blocking socket)."""
        while self._outgoing:
            try:
                if len(self._outgoing) == 1:
                    sent = self._socket.send(self._outgoing[0])
                else:
                    sent = self._socket.sendmsg([*_first(self._outgoing)])
            except BlockingIOError:
                return
            except OSError as error:
                if not self._may_try_again(error):
                    return
                time.sleep(_PAUSE_S)
                if not self._socket.getblocking():
                    return  # it stays in the backlog
                continue
            self._refusals = 0
            while sent:
                head = self._outgoing[0]
                if head.nbytes <= sent:
                    sent -= head.nbytes
                    self._outgoing.popleft()
                else:
                    self._outgoing[0] = head[sent:]
                    sent = 0

    def _may_try_again(self, error: OSError) -> bool:
        """Whether what the socket has not taken may go later. If not, nothing does any more: the peer is gone or, where
        it lives, finds the stream ended, so that nobody waits for a frame that does not come."""
        if error.errno in _PASSING and self._refusals < _MAX_REFUSALS:
            self._refusals += 1
            return True
        self._outgoing.clear()
        if not isinstance(error, (BrokenPipeError, ConnectionResetError)):
            with contextlib.suppress(OSError):  # closed already
                self._socket.shutdown(socket.SHUT_RDWR)
        return False

    # --- receiving

    @property
    def has_released(self) -> bool:
        """Whether there is something in the other side's arena to give back, with the next message."""
        return self.arena is not None and (self.arena.has_released or bool(self._released))

    def receive(self, *, wait: bool = True) -> tuple[list[Frame], bool]:
        """Whole frames that have come in, and whether the other end is closed.

        On a blocking socket it waits for some bytes first, unless told not to, and may return no frame.

        Raises:
            ArenaLost: a frame cannot be read because its arena did not arrive.
        """
        frames: list[Frame] = []
        blocking = self._socket.getblocking()
        left = _TURN_BYTES
        while left > 0:
            target = self._parser.target(at_least=_SCRATCH_BYTES)
            wanted = target if target is not None else self._scratch
            try:
                if blocking:
                    count = self._socket.recv_into(wanted, 0, 0 if wait else socket.MSG_DONTWAIT)
                else:
                    count, ancillary, _, _ = self._socket.recvmsg_into([wanted], _ANCILLARY_BYTES)
                    if ancillary:
                        self._keep_descriptors(ancillary)
            except BlockingIOError:
                return frames, False
            except ConnectionResetError:
                return frames, True
            if not count:
                return frames, True
            left -= count
            if target is not None:
                frames.extend(self._parser.filled(count))
            else:
                frames.extend(self._parser.feed(self._scratch[:count]))
            # A short read has emptied the socket; if more has come since, the next look at it will tell.
            if count < wanted.nbytes or (blocking and frames):
                break
        return frames, False

    def _keep_descriptors(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors = array.array("i")
                descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
                self._received_fds.extend(descriptors)

    def install_arena(self) -> None:
        """The frame at hand is the first to use a new arena.

        Raises:
            ArenaLost: its descriptor was cut off (MSG_CTRUNC: no descriptor was left), or it cannot be mapped.
        """
        if not self._received_fds:
            raise ArenaLost("no file descriptor was left to receive a worker's shared memory")
        if self.arena is not None:
            self.arena.close(replaced=True)
            self.arena = None
        try:
            self.arena = ArenaReader(self._received_fds.popleft(), self.worker)
        except OSError as error:
            raise ArenaLost(str(error)) from error


def _pack(envelope: bytes, parcel: Parcel | None, released: bytes, flags: int) -> tuple[bytes, list[memoryview]]:
    """A frame: all of it, or its beginning and the other parts."""
    if parcel is None:
        return _HEAD.pack(len(envelope), 0, 0, len(released) // _EXTENT_BYTES, flags) + released + envelope, []
    entries = [*parcel.buffers]
    pickled = parcel.pickled
    if isinstance(pickled, Placed):
        entries.append(pickled)
        flags |= _PAYLOAD_PLACED
        pickled = b""
    table = b"".join(
        _ENTRY.pack(entry.low, entry.size, entry.position, entry.extent)
        if isinstance(entry, Placed)
        else _ENTRY.pack(entry.low, entry.memory.nbytes, -1, -1)
        for entry in entries
    )
    head = _HEAD.pack(len(envelope), len(entries), len(pickled), len(released) // _EXTENT_BYTES, flags)
    if len(pickled) <= _JOIN_BYTES and all(isinstance(entry, Placed) for entry in entries):
        return b"".join((head, table, released, envelope, pickled)), []
    parts = [memoryview(pickled), *(entry.memory for entry in entries if not isinstance(entry, Placed))]
    return b"".join((head, table, released, envelope)), [part for part in parts if part.nbytes]


def _envelope(message: Any) -> bytes:
    file = io.BytesIO()
    _EnvelopePickler(file, protocol=5).dump(as_plain(message))
    return file.getvalue()


class _EnvelopePickler(pickle.Pickler):
    """Pickles messages, which hold the user's indices, and these may be anything: as multiprocessing would, but for
    plain tensors. An index is often a view of a whole permutation (``torch.randperm(n)[i]``), of which torch's own
    pickle brings all along; here a tensor's elements go, and nothing else."""

    dispatch_table = codec.REDUCERS  # type: ignore[assignment]  # asked for single items only

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not torch.Tensor or not _is_plain(obj):
            return NotImplemented
        whole = obj.contiguous()
        return _rebuild_tensor, (ctypes.string_at(whole.data_ptr(), whole.nbytes), obj.dtype, tuple(obj.shape))


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.requires_grad
        and not tensor.is_quantized
        and not tensor.is_nested
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _rebuild_tensor(elements: bytes, dtype: torch.dtype, size: tuple[int, ...]) -> torch.Tensor:
    tensor = torch.empty(size, dtype=dtype, device="cpu")
    ctypes.memmove(tensor.data_ptr(), elements, len(elements))
    return tensor


def _first(parts: deque[memoryview]) -> Iterator[memoryview]:
    return (part for part, _ in zip(parts, range(_MAX_VECTORS), strict=False))


class _Parser:
    """Puts frames together from whatever pieces the socket delivers."""

    def __init__(self, channel: Channel) -> None:
        self._channel: Channel = weakref.proxy(channel)
        self._frame: Frame | None = None
        self._begin()

    def _begin(self) -> None:
        self._stage = "head"
        self._frame = None
        self._pending: list[memoryview] = []
        self._expect(memoryview(bytearray(_HEAD.size)))

    def _expect(self, wanted: memoryview) -> None:
        self._wanted = wanted
        self._have = 0

    def target(self, at_least: int) -> memoryview | None:
        """Where the next bytes belong, if that is a stretch long enough to read into directly."""
        rest = self._wanted.nbytes - self._have
        return self._wanted[self._have :] if rest >= at_least else None

    def filled(self, count: int) -> list[Frame]:
        """``count`` bytes were read straight into the target."""
        self._have += count
        return [frame] if self._have == self._wanted.nbytes and (frame := self._advance()) else []

    def feed(self, data: memoryview) -> list[Frame]:
        """``data`` was read; frames that are complete now."""
        frames = []
        while data.nbytes:
            if self._stage == "head" and not self._have and data.nbytes >= _HEAD.size:
                end = _HEAD.size + self._body_size(data)
                if data.nbytes >= end:  # all of it is here: nothing to wait for, and nothing to piece together
                    whole = self._open_body(memoryview(bytes(data[_HEAD.size : end])))
                    data = data[end:]
                    if self._pending:
                        self._stage, self._frame = "buffers", whole
                        self._expect(self._pending.pop())
                    else:
                        frames.append(whole)
                    continue
            take = min(self._wanted.nbytes - self._have, data.nbytes)
            self._wanted[self._have : self._have + take] = data[:take]
            self._have += take
            data = data[take:]
            if self._have == self._wanted.nbytes:
                frame = self._advance()
                if frame is not None:
                    frames.append(frame)
        return frames

    def _body_size(self, head: memoryview) -> int:
        self._sizes: tuple[int, int, int, int, int] = _HEAD.unpack_from(head)
        envelope, buffers, payload, released, _ = self._sizes
        return envelope + buffers * _ENTRY.size + payload + released * _EXTENT_BYTES

    def _advance(self) -> Frame | None:
        """The current piece is complete: go on to the next one that is not empty, or hand out the frame."""
        if self._stage == "head":
            self._stage = "body"
            body = self._body_size(self._wanted)
            self._expect(memoryview(bytearray(body)))
            return None
        if self._stage == "body":
            self._stage = "buffers"
            self._frame = self._open_body(self._wanted)
        if self._pending:
            self._expect(self._pending.pop())
            return None
        frame = self._frame
        self._begin()
        return frame

    def _open_body(self, body: memoryview) -> Frame:
        """Read the table, take leases and make room for what follows in the frame."""
        envelope, count, _, released, flags = self._sizes
        channel = self._channel
        if flags & _NEW_ARENA:
            channel.install_arena()
        place = 0
        blocks: list[tuple[int, Any]] = []
        self._pending = []
        for _ in range(count):
            low, size, position, extent = _ENTRY.unpack_from(body, place)
            place += _ENTRY.size
            if position >= 0:
                if channel.arena is None:
                    raise ArenaLost("a batch refers to a worker's shared memory, which did not come")
                blocks.append((low, channel.arena.lease(Placed(low, position, size, extent))))
                continue
            block = torch.empty(size, dtype=torch.uint8, device="cpu")
            blocks.append((low, block))
            if size:
                self._pending.append(block.numpy().data)
        self._pending.reverse()
        extents: tuple[int, ...] = ()
        if released:
            extents = struct.unpack_from(f"={released}q", body, place)
            place += released * _EXTENT_BYTES
        message = from_plain(pickle.loads(body[place : place + envelope]))
        payload = memoryview(blocks.pop()[1]) if flags & _PAYLOAD_PLACED else body[place + envelope :]
        return Frame(message, payload, blocks, extents, bool(flags & _RENEW))
