"""The arena: shared memory in which a worker lays the tensors of its batches, and the training process finds them.

One memfd per worker incarnation, mapped once by each side (:class:`~robustloader.system.mapping.SharedMapping`). Each
large tensor has an *extent*: whole pages of its own. The worker allocates. It counts for each extent what still looks
at it: tensors in the worker itself (user code may keep what ``collate_fn`` made), and batches in the training process.
There, each extent that a batch uses has a *lease*, a weak reference to the very object that the tensor's storage keeps
alive; when the lease ends, the extent's offset goes back with the next message to the worker, or at once where batches
are large. An extent that nothing looks at is used again: no page fault, no system call. Before a worker takes more
memory, it looks whether an extent has come back.

**Forks.** A child forked while an extent is leased may be reading it for as long as it lives, unseen from here. So that
extent is never used again (:func:`own_fork` excepts our own workers: theirs ends with them). Where such extents add up,
in the training process or in the worker, the worker begins a new arena; the old one's memory goes when the last process
that maps it has gone. What is released late, of the old one, has another name than anything in the new one.

**Memory.** In a control group with a memory limit, writing to a page is answered by the memory killer and not by an
error, so the headroom is looked at before the arena grows, and what has lain idle for a while is given back, or at
once where memory has become low; so is, when the worker has ended, all that nobody looks at.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from robustloader.decisions.extents import PAGE, ExtentMap, whole_pages
from robustloader.system import host
from robustloader.system.mapping import Remnant, SharedMapping
from robustloader.transport.codec import INLINE_BYTES, Buffer, Parcel, Placed

__all__ = ["Arena", "ArenaLimits", "ArenaReader", "ForkToken", "own_fork", "unseen_memory"]

PAYLOAD_BYTES = 32 * 1024
"""Pickles from this size on go through the arena too: a socket takes about 200 KB before its reader must come."""

_STEP_BYTES = 64 * 1024 * 1024  # how far the arena may grow between two looks at the headroom
_LOOK_AGAIN_S = 1.0  # after growth was refused
_IDLE_BATCHES = 128  # what no batch needed for so long is given back
_WITHHELD_BYTES = 256 * 1024 * 1024  # at most; of a small arena, a quarter
_VIRTUAL_FACTOR = 4  # address space costs nothing, and room to spare makes up for fragments
_VIRTUAL_BYTES = 1 << 42
_MARK_BYTES = PAGE  # the last page is no extent's: its first byte says that unknown processes may look at the worker's


@dataclass(frozen=True, slots=True)
class ArenaLimits:
    """How much memory one worker's arena may take.

    Attributes:
        max_bytes: at most so much in memory at a time.
        reserve_bytes: it does not grow when less than this would remain free in the control group or host.
    """

    max_bytes: int
    reserve_bytes: int


def _virtual_bytes(max_bytes: int) -> int:
    """How much address space an arena of at most ``max_bytes`` in memory gets."""
    return min(_VIRTUAL_FACTOR * whole_pages(max_bytes), _VIRTUAL_BYTES)


def _too_much_withheld(withheld: int, virtual_bytes: int) -> bool:
    """Whether forked processes keep so much of an arena from use that it should be replaced."""
    return withheld > min(_WITHHELD_BYTES, virtual_bytes // _VIRTUAL_FACTOR // 4)


class Lease(weakref.ref[Any]):
    """A weak reference to what looks at an extent; ends with it.

    Attributes:
        extent: the extent's name, which is its offset for the worker.
        position: where in the arena what is looked at begins.
        size: bytes that are looked at.
        frozen: a process was forked meanwhile that may look as well, for as long as it likes.
        tokens: our own workers forked meanwhile.
    """

    __slots__ = ("extent", "frozen", "position", "size", "tokens")

    extent: int
    position: int
    size: int
    frozen: bool
    tokens: list[ForkToken] | None


class _Leases:
    """The leases of one process on one arena. Leases end in any thread, at any bytecode: that only fills a deque.

    Args:
        mark: the worker's side: called when a process may come to look that nobody will know of.
        address: the training process's side: where the arena lies in its memory.
    """

    def __init__(self, mark: Callable[[], None] | None = None, address: int = 0) -> None:
        self.mark = mark
        self.address = address
        self.ended: deque[Lease] = deque()
        self.open: dict[int, Lease] = {}  # by id: a weak reference is only as hashable as what it refers to
        _all_leases.add(self)

    def add(self, target: Any, extent: int, position: int, size: int) -> None:
        lease = Lease(target, self.ended.append)
        lease.extent, lease.position, lease.size, lease.frozen, lease.tokens = extent, position, size, False, None
        self.open[id(lease)] = lease

    def looking(self) -> list[Lease]:
        """Those that have not ended."""
        return [lease for lease in list(self.open.values()) if lease() is not None]

    def take_ended(self) -> list[Lease]:
        taken = []
        while self.ended:
            lease = self.ended.popleft()
            del self.open[id(lease)]
            taken.append(lease)
        return taken


_all_leases: weakref.WeakSet[_Leases] = weakref.WeakSet()


class ForkToken:
    """Stands for one of our own workers: while it may look at what it inherited, and at its own arena.

    Attributes:
        ended: its process has ended.
        settled: no more will be heard of it, whether that was learnt or not.
    """

    __slots__ = ("ended", "settled")

    def __init__(self) -> None:
        self.ended = False
        self.settled = False

    def settle(self) -> None:
        """The training process has taken leave of the worker; its arenas are closed."""
        self.settled = True
        _sweep()


_forking = threading.local()
_VALUES = frozenset((type(None), bool, int, float, complex, str, bytes))


@contextlib.contextmanager
def own_fork(token: ForkToken, unseen: Collection[int] = ()) -> Iterator[None]:
    """A process forked in here by this thread is ``token``'s worker, and looks at nothing after ``token.ended``, nor at
    anything at the addresses in ``unseen``."""
    _forking.token, _forking.unseen = token, unseen
    try:
        yield
    finally:
        _forking.token, _forking.unseen = None, ()


def unseen_memory(batch: Any) -> set[int]:
    """Where the memory of a batch that was not handed out yet begins, tensor by tensor: no user code has seen it.

    A class of the user's may have, while the batch was unpickled: none then, of the whole batch.
    """
    addresses: set[int] = set()
    items, known = [batch], {id(batch)}
    while items:
        item = items.pop()
        kind = type(item)
        inner: list[Any] = []
        if kind is torch.Tensor and item.layout is torch.strided and item.is_cpu:
            addresses.add(item.untyped_storage().data_ptr())
        elif kind is np.ndarray and not item.dtype.hasobject:
            addresses.add(item.__array_interface__["data"][0])
        elif kind is dict:
            inner = [*item, *item.values()]
        elif kind is list or kind is tuple:
            inner = [*item]
        elif kind not in _VALUES:
            return set()
        for one in inner:
            if id(one) not in known:
                known.add(id(one))
                items.append(one)
    return addresses


def _mark_leases() -> None:
    token: ForkToken | None = getattr(_forking, "token", None)
    unseen: Collection[int] = getattr(_forking, "unseen", ())
    for leases in list(_all_leases):
        looking = leases.looking()  # not those that ended before the fork, and were not yet taken note of
        times = Counter(lease.position for lease in looking) if unseen and leases.address else {}
        for lease in looking:
            # What was sent twice may have been handed out once.
            if times.get(lease.position) == 1 and leases.address + lease.position in unseen:
                continue
            if token is None or leases.mark is not None:
                lease.frozen = True
                if leases.mark is not None:
                    leases.mark()
            elif lease.tokens is None:
                lease.tokens = [token]
            elif lease.tokens[-1] is not token:
                lease.tokens.append(token)


def _begin_child() -> None:
    """A worker spends its life inside the trainer's ``own_fork``; what it forks itself is no worker of ours. And what
    becomes of the arenas that the trainer has left is the trainer's business."""
    global _sweeping
    _forking.token = None
    _left.clear()
    _sweeping = threading.Lock()


# Before: what is open may end, and be used again, as soon as the child exists. After: another thread may have received
# a batch between the first look and the fork.
os.register_at_fork(before=_mark_leases, after_in_parent=_mark_leases, after_in_child=_begin_child)


# --- the worker's side ------------------------------------------------------------------------------------------------


class _Extent:
    """``sent`` counts the buffers in frames that the training process has not released; ``local`` whether a tensor in
    this process looks at it."""

    __slots__ = ("local", "offset", "sent", "size")

    def __init__(self, offset: int, size: int, *, local: bool) -> None:
        self.offset = offset
        self.size = size
        self.local = local
        self.sent = 0


class Arena:
    """The worker's side: allocates, fills, and reuses. Used by the worker's main thread only.

    Args:
        limits: how much memory it may take.
        look: called before more memory is taken; may call :meth:`release` with what has been released meanwhile.

    Attributes:
        trouble: why something went through the socket instead, since the last :meth:`take_trouble`; or "".
    """

    def __init__(self, limits: ArenaLimits, look: Callable[[], None] | None = None) -> None:
        self._limits = limits
        self._look = look
        self._refused_until = 0.0
        self._credit = 0
        self._unusable = False
        self.trouble = ""
        self._fd = -1
        self._base = 0
        self._leases = _Leases()
        self._forget()
        host.close_in_forked_children(self)

    def _forget(self) -> None:
        fd = self.take_descriptor()
        if fd is not None:
            os.close(fd)
        if self._leases.mark is not None and self._leases.looking():  # later forks will not be taken note of
            self._leases.mark()
        self._mapping: SharedMapping | None = None
        self._map = ExtentMap(0)
        self._leases = _Leases()
        self._withheld = 0
        self._extents: dict[int, _Extent] = {}
        self._batches = 0
        self._idle = 1 << 62
        self._taken = self._last_taken = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """An uninitialised tensor in an extent of its own; None where it is too small for one or there is no memory."""
        nbytes = dtype.itemsize
        for length in shape:
            nbytes *= length
        if nbytes <= INLINE_BYTES:
            return None
        extent = self._allocate(nbytes, local=True)
        if extent is None or self._mapping is None:
            return None
        view = self._mapping.slice(extent.offset, nbytes)
        self._leases.add(view, extent.offset, extent.offset, nbytes)
        return torch.frombuffer(view, dtype=dtype).resize_(shape)  # view() would make it one in autograd's eyes

    def place(self, parcel: Parcel) -> Parcel:
        """The parcel with its buffers in the arena: found there, or copied to it; as they were where there is no
        memory for that."""
        self._drain()
        found: set[int] = set()
        buffers = [self._place(buffer, found) if isinstance(buffer, Buffer) else buffer for buffer in parcel.buffers]
        pickled = parcel.pickled
        if not isinstance(pickled, Placed) and len(pickled) >= PAYLOAD_BYTES:
            placed = self._place(Buffer(-1, memoryview(pickled)), found)
            if isinstance(placed, Placed):
                pickled = placed
        self._last_taken, self._taken = self._taken, 0
        self._give_back_idle()
        return Parcel(pickled, buffers, parcel.keep)

    def release(self, extents: Iterable[int]) -> None:
        """The training process has done with these extents, once each. Those of an arena that was renewed meanwhile
        are of no use any more."""
        for name in extents:
            if name >= self._base:
                extent = self._extents[name - self._base]
                extent.sent -= 1
                self._free_unused(extent)

    @property
    def wasteful(self) -> bool:
        """Whether so much was held back from use by processes forked here that a new arena should begin."""
        return self._mapping is not None and _too_much_withheld(self._withheld, self._mapping.size)

    def renew(self) -> None:
        """Begin a new arena with the next batch: too much of this one will never be released. Between two tasks only:
        a frame finds all of its buffers in one arena."""
        if self._mapping is not None:
            self._drain()
            self._cool(self._map.warm)
            self._base += self._mapping.size
        self._forget()

    def trim(self) -> None:
        """Memory is low: give back now what lies idle, but for what a batch like the last one will take."""
        self._drain()
        self._cool(max(0, self._map.warm - self._last_taken))
        self._batches, self._idle, self._credit = 0, 1 << 62, 0

    def close(self) -> None:
        """In a process forked from the worker: the arena is the worker's to fill."""
        self._forget()
        self._unusable = True

    def take_descriptor(self) -> int | None:
        """The descriptor of an arena that the training process has not been sent yet."""
        fd, self._fd = self._fd, -1
        return fd if fd >= 0 else None

    def __del__(self) -> None:
        self._forget()

    def take_trouble(self) -> str:
        """What has gone wrong since the last call."""
        trouble, self.trouble = self.trouble, ""
        return trouble

    def _place(self, buffer: Buffer, found: set[int]) -> Buffer | Placed:
        """``found``: the extents in which storages of this parcel lie; another storage over one of them is copied."""
        size = buffer.memory.nbytes
        if not size:
            return buffer
        if buffer.low >= 0 and self._mapping is not None:
            position = buffer.address - self._mapping.address
            start = position - buffer.low
            extent = self._extents.get(start) if start not in found else None
            # Only what a living tensor of this process looks at: another mapping may lie at a forgotten one's address.
            if extent is not None and extent.local and buffer.low + size <= extent.size:
                found.add(start)
                extent.sent += 1
                return Placed(buffer.low, position, size, self._base + extent.offset)
        extent = self._allocate(size, local=False)
        if extent is None or self._mapping is None:
            return buffer
        self._mapping.write(extent.offset, buffer.memory)
        extent.sent += 1
        return Placed(buffer.low, extent.offset, size, self._base + extent.offset)

    # --- memory

    def _allocate(self, nbytes: int, *, local: bool) -> _Extent | None:
        if self._mapping is None and not self._open():
            return None
        self._drain()
        offset = self._map.allocate_warm(nbytes)
        if offset is None and self._look is not None and self._extents:
            self._look()
            offset = self._map.allocate_warm(nbytes)
        if offset is None:
            if not self._may_grow(whole_pages(nbytes)):
                return None
            offset = self._map.allocate_cold(nbytes)
            if offset is None:
                self.trouble = f"no room for an extent of {nbytes:,} bytes in the arena"
                return None
        extent = self._extents[offset] = _Extent(offset, whole_pages(nbytes), local=local)
        self._taken += extent.size
        return extent

    def _open(self) -> bool:
        if self._unusable:
            return False
        size = _virtual_bytes(self._limits.max_bytes)
        try:
            self._mapping, self._fd = SharedMapping.create(size + _MARK_BYTES)
        except OSError as error:
            self._unusable = True
            self.trouble = str(error)
            return False
        self._map = ExtentMap(size)
        self._leases = _Leases(functools.partial(self._mapping.write, size, b"\1"))
        return True

    def _may_grow(self, size: int) -> bool:
        limit = self._limits.max_bytes
        if self._map.in_use + size > limit:
            self.trouble = (
                f"the arena holds {self._map.in_use:,} bytes that are still looked at, and {size:,} more would exceed "
                f"its limit of {limit:,}"
            )
            return False
        over = self._map.resident + size - limit
        if over > 0:
            self._cool(over)
        if size > self._credit:
            now = time.monotonic()
            if now < self._refused_until:
                self.trouble = self.trouble or f"too little memory is free for {size:,} bytes more"
                return False
            try:
                room = host.free_memory_bytes()[0] - self._limits.reserve_bytes
                if size > room and self._map.warm:
                    self._cool(self._map.warm)
                    room = host.free_memory_bytes()[0] - self._limits.reserve_bytes
            except OSError as error:  # no descriptor is left to look with
                self._refused_until = now + _LOOK_AGAIN_S
                self.trouble = f"how much memory is free cannot be read: {error}"
                return False
            if size > room:
                self._refused_until = now + _LOOK_AGAIN_S
                self.trouble = (
                    f"{max(0, room):,} bytes are free beyond the reserve of {self._limits.reserve_bytes:,}, "
                    f"{size:,} are wanted"
                )
                return False
            self._credit = max(size, min(room // 4, _STEP_BYTES))
        self._credit -= size
        return True

    def _give_back_idle(self) -> None:
        self._batches += 1
        self._idle = min(self._idle, self._map.warm)
        if self._batches >= _IDLE_BATCHES:
            if self._idle:
                self._cool(self._idle)
            self._batches, self._idle = 0, 1 << 62

    def _cool(self, nbytes: int) -> None:
        if self._mapping is not None:
            for span in self._map.cool(nbytes):
                self._mapping.give_back(*span)

    def _drain(self) -> None:
        if self._leases.ended:
            for lease in self._leases.take_ended():
                if lease.frozen:
                    self._withheld += lease.size
                    continue
                extent = self._extents[lease.extent]
                extent.local = False
                self._free_unused(extent)

    def _free_unused(self, extent: _Extent) -> None:
        if not extent.sent and not extent.local:
            del self._extents[extent.offset]
            self._map.free(extent.offset)


# --- the training process's side --------------------------------------------------------------------------------------


class ArenaReader:
    """The training process's side: leases, and what has been released.

    ``lease`` and ``take_released`` run in the iterating thread; leases end in any thread.

    Args:
        fd: the arena's descriptor, which is closed.
        worker: whose arena it is; None where nobody will tell of its end.

    Attributes:
        withheld: bytes that are free here and will never be released, because a forked process may be looking at them.
        retired: the worker was asked for a new arena, and would take what is released for that one's.
    """

    def __init__(self, fd: int, worker: ForkToken | None = None) -> None:
        self._mapping: SharedMapping | None = SharedMapping.receive(fd)
        self._remnant = Remnant(self._mapping)
        self._end = self._mapping.size - _MARK_BYTES
        self._worker = worker
        self._owner = os.getpid()
        self._leases = _Leases(address=self._mapping.address)
        self._waiting: list[Lease] = []
        self._frozen: list[Lease] = []
        self._given_back = False
        self.withheld = 0
        self.retired = False
        host.close_in_forked_children(self)
        _sweep()

    def lease(self, placed: Placed) -> memoryview:
        """The memory of a buffer in the arena: a writable memoryview of bytes, released when nothing keeps it any more.

        Torch keeps the very object it is given. NumPy, and what users write, may take a view of their own of it
        instead: there the lease lies on a ctypes array below, which all of these keep.
        """
        assert self._mapping is not None
        mapping, (low, position, size, extent) = self._mapping, placed
        if low >= 0:
            view = owner = mapping.slice(position, size)
        else:
            owner = mapping.view(position, size)
            view = memoryview(owner).cast("B")  # as it is, its elements are ctypes', and cannot be read one by one
        self._leases.add(owner, extent, position, size)
        return view

    def take_released(self) -> list[int]:
        """Offsets of extents that nothing looks at any more, once for each time they were sent."""
        if self.retired:
            return []
        if not self._leases.ended and not self._waiting:
            return []
        return [lease.extent for lease in self._take_free()]

    def _take_free(self) -> list[Lease]:
        """Leases that have ended and that no other process holds up, once each."""
        free = []
        for lease in self._leases.take_ended():
            if lease.frozen:
                self._frozen.append(lease)
                self.withheld += lease.size
            elif lease.tokens is None:
                free.append(lease)
            else:
                self._waiting.append(lease)
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for lease in waiting:
                if all(token.ended for token in lease.tokens or ()):
                    free.append(lease)
                else:
                    self._waiting.append(lease)
        return free

    @property
    def has_released(self) -> bool:
        """Whether a lease has ended since :meth:`take_released`."""
        return bool(self._leases.ended) and not self.retired

    @property
    def wasteful(self) -> bool:
        """Whether so much is withheld that the worker should begin a new arena."""
        return self._mapping is not None and _too_much_withheld(self.withheld, self._mapping.size)

    def close(self, *, replaced: bool = False) -> None:
        """Let go of the arena. Leased memory stays as long as it is leased; of the rest, what is in memory is given
        back when the worker has ended, since one label that is kept would hold all of it.

        Args:
            replaced: the worker has begun another one, and may live for long.
        """
        ours = self._worker is not None and self._owner == os.getpid()
        if ours and self not in _left:
            _left.append(self)
        if replaced or not ours:
            self._mapping = None

    def give_back(self) -> bool:
        """After :meth:`close`: give back what nobody looks at, once the worker has ended; whether to come again."""
        worker = self._worker
        assert worker is not None
        if self._remnant.gone or not worker.settled:
            return not self._remnant.gone
        mapping, self._mapping = self._mapping, None
        if not worker.ended or self._remnant.byte(self._end):
            return False
        free = self._take_free()
        if free or not self._given_back:
            self._given_back = True
            held = [*self._leases.open.values(), *self._waiting, *self._frozen]
            begin = 0
            for low, high in sorted((lease.position, lease.position + lease.size) for lease in held):
                self._remnant.give_back(begin, low - begin)
                begin = max(begin, high)
            self._remnant.give_back(begin, self._end - begin)
        del mapping  # until here: what other processes have mapped would stay in memory without this one
        return True


_left: list[ArenaReader] = []  # closed ones of which something may be given back
_sweeping = threading.Lock()
_sweeps_wanted: deque[None] = deque()


def _sweep() -> None:
    """Give back what nobody looks at of arenas whose workers have ended.

    Runs in any thread, and where the garbage collector ends a loader, at any bytecode: so nobody waits here. Who finds
    somebody at it leaves it to that one.
    """
    _sweeps_wanted.append(None)
    while _sweeps_wanted and _sweeping.acquire(blocking=False):
        try:
            _sweeps_wanted.clear()
            for reader in list(_left):
                if not reader.give_back():
                    _left.remove(reader)
        finally:
            _sweeping.release()
