"""A socket pair that carries frames, never blocking the training process.

A frame is a head, a table of buffers, an envelope (the pickled message), a payload (a pickled batch, may be empty) and
the buffers' bytes:

    head      ``!IIQ``  envelope bytes, number of buffers, payload bytes
    table     ``!qQ``   per buffer: ``low`` (see :class:`~robustloader.transport.codec.Buffer`) and its size in bytes

The receiver allocates each buffer once, at its exact size, and reads the socket straight into it. A frame cut off by
the sender's death is never handed out.
"""

from __future__ import annotations

import pickle
import socket
import struct
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from robustloader.system.host import close_in_forked_children
from robustloader.transport import codec
from robustloader.transport.codec import Parcel

__all__ = ["Channel", "Frame", "channel_pair"]

_HEAD = struct.Struct("!IIQ")
_ENTRY = struct.Struct("!qQ")
_SCRATCH_BYTES = 256 * 1024
_SOCKET_BYTES = 4 * 1024 * 1024  # asked for; the kernel gives what net.core.wmem_max allows
_MAX_VECTORS = 1_000  # IOV_MAX is 1,024 on Linux
_TURN_BYTES = 32 * 1024 * 1024  # read from one worker before the others get a turn


class Frame(NamedTuple):
    """A received message and, where one came with it, its batch, still pickled."""

    message: Any
    payload: memoryview
    buffers: list[tuple[int, torch.Tensor]]

    @property
    def nbytes(self) -> int:
        """Size of the batch in bytes."""
        return self.payload.nbytes + sum(block.numel() for _, block in self.buffers)

    def batch(self) -> Any:
        """Unpickle the batch; raises whatever its own unpickling raises."""
        return codec.loads(self.payload, self.buffers)


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
    """One end. Blocking or not is the socket's setting: the training process's is not, the worker's is."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._outgoing: deque[memoryview] = deque()
        self._parser = _Parser()
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

    # --- sending

    @property
    def backlog(self) -> bool:
        """Whether something waits until the socket is writable."""
        return bool(self._outgoing)

    def send(self, message: Any, parcel: Parcel | None = None) -> None:
        """Queue a frame and send what the socket takes at once.

        Raises what pickling ``message`` raises, before anything is sent. A peer that is gone is no error here: its
        death is noticed elsewhere.
        """
        self._outgoing.extend(_pack(message, parcel))
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes (everything, on a blocking socket)."""
        while self._outgoing:
            try:
                sent = self._socket.sendmsg([*_first(self._outgoing)])
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError, OSError):
                self._outgoing.clear()
                return
            while sent:
                head = self._outgoing[0]
                if head.nbytes <= sent:
                    sent -= head.nbytes
                    self._outgoing.popleft()
                else:
                    self._outgoing[0] = head[sent:]
                    sent = 0

    # --- receiving

    def receive(self) -> tuple[list[Frame], bool]:
        """Whole frames that have come in, and whether the other end is closed.

        On a blocking socket it waits for some bytes first, and may return no frame.
        """
        frames: list[Frame] = []
        blocking = self._socket.getblocking()
        left = _TURN_BYTES
        while left > 0:
            target = self._parser.target(at_least=_SCRATCH_BYTES)
            try:
                count = self._socket.recv_into(target if target is not None else self._scratch)
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
            if blocking and (frames or target is None):
                break
        return frames, False


def _pack(message: Any, parcel: Parcel | None) -> Iterator[memoryview]:
    envelope = pickle.dumps(message, 5) if parcel is not None else _envelope(message)
    pickled = parcel.pickled if parcel is not None else b""
    buffers = parcel.buffers if parcel is not None else ()
    head = _HEAD.pack(len(envelope), len(buffers), len(pickled))
    table = b"".join(_ENTRY.pack(buffer.low, buffer.memory.nbytes) for buffer in buffers)
    parts = [memoryview(head + table + envelope), memoryview(pickled), *(buffer.memory for buffer in buffers)]
    return (part for part in parts if part.nbytes)


def _envelope(message: Any) -> bytes:
    """Messages hold the user's indices, which may be anything: pickled like a batch, with all buffers inside."""
    parcel = codec.dumps(message)
    if not parcel.buffers:
        return bytes(parcel.pickled)
    return pickle.dumps(message, 5)


def _first(parts: deque[memoryview]) -> Iterator[memoryview]:
    return (part for part, _ in zip(parts, range(_MAX_VECTORS), strict=False))


class _Parser:
    """Puts frames together from whatever pieces the socket delivers."""

    def __init__(self) -> None:
        self._wanted = memoryview(bytearray(_HEAD.size))
        self._have = 0
        self._begin()

    def _begin(self) -> None:
        self._stage = "head"
        self._pending: list[memoryview] = []
        self._buffers: list[tuple[int, torch.Tensor]] = []
        self._sizes = (0, 0, 0)
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
            take = min(self._wanted.nbytes - self._have, data.nbytes)
            self._wanted[self._have : self._have + take] = data[:take]
            self._have += take
            data = data[take:]
            if self._have == self._wanted.nbytes:
                frame = self._advance()
                if frame is not None:
                    frames.append(frame)
        return frames

    def _advance(self) -> Frame | None:
        """The current piece is complete: go on to the next one that is not empty, or hand out the frame."""
        done = self._wanted
        if self._stage == "head":
            envelope, count, payload = _HEAD.unpack(done)
            self._sizes = (envelope, count, payload)
            self._stage = "body"
            self._expect(memoryview(bytearray(count * _ENTRY.size + envelope + payload)))
            return None
        if self._stage == "body":
            self._stage = "buffers"
            self._body = done
            for entry in range(self._sizes[1]):
                low, size = _ENTRY.unpack_from(done, entry * _ENTRY.size)
                block = torch.empty(size, dtype=torch.uint8)
                self._buffers.append((low, block))
                if size:
                    self._pending.append(block.numpy().data)
            self._pending.reverse()
        if self._pending:
            self._expect(self._pending.pop())
            return None
        start = self._sizes[1] * _ENTRY.size
        middle = start + self._sizes[0]
        message = pickle.loads(self._body[start:middle])
        frame = Frame(message, self._body[middle:], self._buffers)
        self._begin()
        return frame
