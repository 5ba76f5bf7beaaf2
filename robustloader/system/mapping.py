"""Memory that two processes see: a memfd, mapped once by each, with no descriptor kept and nothing in ``/dev/shm``.

Python's own ``mmap`` keeps a descriptor per mapping (up to 3.12), and refuses to unmap while anything looks at it. Here
the mapping goes when the last object that looks at it has gone, in whichever process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Any

__all__ = ["Remnant", "SharedMapping"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MAP_FAILED = ctypes.c_void_p(-1).value
_MADV_REMOVE = 9  # <asm-generic/mman-common.h>


class SharedMapping:
    """``size`` bytes of shared memory. Only pages that were written to take up memory.

    Args:
        fd: a memfd's descriptor, which the caller closes.
        size: its size in bytes.

    Raises:
        OSError: the system has no address space for it (``ulimit -v``).
    """

    def __init__(self, fd: int, size: int) -> None:
        self.size = size
        address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        if address == _MAP_FAILED:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot map {size:,} bytes of shared memory: {os.strerror(number)}")
        self.address: int = address
        self._memory: Any = (ctypes.c_ubyte * size).from_address(address)
        self._bytes = memoryview(self._memory).cast("B")
        finalizer = weakref.finalize(self._memory, _libc.munmap, address, size)
        finalizer.atexit = False  # the process's end does it

    @classmethod
    def create(cls, size: int) -> tuple[SharedMapping, int]:
        """A new memfd of ``size`` bytes, mapped, and its descriptor, which the caller sends on and closes."""
        fd = os.memfd_create("robustloader-arena", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            return cls(fd, size), fd
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def receive(cls, fd: int) -> SharedMapping:
        """Map what another process created; closes ``fd``."""
        try:
            return cls(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)

    def view(self, offset: int, size: int) -> Any:
        """``size`` bytes from ``offset`` as a ctypes array, which keeps the mapping and can be referred to weakly."""
        return (ctypes.c_ubyte * size).from_buffer(self._memory, offset)

    def slice(self, offset: int, size: int) -> memoryview:
        """The same as a memoryview: quicker to make, where the one who uses it keeps the memoryview itself."""
        return self._bytes[offset : offset + size]

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Copy ``data``, which must be contiguous, to ``offset``."""
        self._bytes[offset : offset + len(data)] = data

    def give_back(self, offset: int, size: int) -> None:
        """Free the memory of the whole pages in there; they read as zero from now on, in every process."""
        _remove(self.address, offset, size)


class Remnant:
    """A mapping seen from aside: it goes, as ever, with the last object that looks at it."""

    def __init__(self, mapping: SharedMapping) -> None:
        self._address = mapping.address
        self._memory = weakref.ref(mapping._memory)

    @property
    def gone(self) -> bool:
        """Whether nothing looks at it any more."""
        return self._memory() is None

    def byte(self, offset: int) -> int:
        """What stands there; 0 where the mapping has gone."""
        memory = self._memory()
        return int(memory[offset]) if memory is not None else 0

    def give_back(self, offset: int, size: int) -> None:
        """As :meth:`SharedMapping.give_back`, while the mapping is there."""
        memory = self._memory()  # held meanwhile: something else might be mapped at this address
        if memory is not None:
            _remove(self._address, offset, size)


def _remove(address: int, offset: int, size: int) -> None:
    """The kernel rounds a length up to its own pages, which may be larger than an extent's: what lies next must stay.

    *Source*: madvise(2), MADV_REMOVE; mm/madvise.c.
    """
    low = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
    high = (offset + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if high > low:
        _libc.madvise(address + low, high - low, _MADV_REMOVE)
