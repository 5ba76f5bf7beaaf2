"""Where in an arena the next extent lies: a pure allocator over page numbers it never touches.

Free space is *warm* (its pages are in memory, because something lay there before) or *cold* (never used, or given back
to the system). Warm space is taken first: it costs no page fault and no memory. The caller decides whether more cold
space may become warm, and gives back what the allocator says has been lying idle.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

__all__ = ["PAGE", "ExtentMap", "Span", "whole_pages"]

PAGE = 4_096
"""Extents begin and end at multiples of this many bytes, so that each can be given back by itself."""


class Span(NamedTuple):
    """``size`` bytes from byte ``offset`` of the arena."""

    offset: int
    size: int


class _FreeList:
    """Free spans that do not touch one another. Best fit; among equals the lowest, so that high ends fall idle."""

    def __init__(self) -> None:
        self.bytes = 0
        self._by_size: list[tuple[int, int]] = []
        self._by_start: dict[int, int] = {}
        self._by_end: dict[int, int] = {}

    def add(self, offset: int, size: int) -> None:
        before = self._by_end.get(offset)
        if before is not None:
            size += offset - before
            self._drop(before, offset - before)
            offset = before
        after = self._by_start.get(offset + size)
        if after is not None:
            self._drop(offset + size, after)
            size += after
        insort(self._by_size, (size, offset))
        self._by_start[offset] = size
        self._by_end[offset + size] = offset
        self.bytes += size

    def take(self, size: int) -> int | None:
        """The offset of ``size`` bytes cut from the tightest span, or None."""
        place = bisect_left(self._by_size, (size, 0))
        if place == len(self._by_size):
            return None
        found, offset = self._by_size[place]
        self._drop(offset, found)
        if found > size:
            self.add(offset + size, found - size)
        return offset

    def take_largest(self, most: int) -> Span | None:
        """The upper end of the largest span, at most ``most`` bytes of it, or None."""
        if not self._by_size:
            return None
        found, offset = self._by_size[-1]
        size = min(found, most)
        self._drop(offset, found)
        if found > size:
            self.add(offset, found - size)
        return Span(offset + found - size, size)

    def _drop(self, offset: int, size: int) -> None:
        del self._by_size[bisect_left(self._by_size, (size, offset))]
        del self._by_start[offset]
        del self._by_end[offset + size]
        self.bytes -= size


class ExtentMap:
    """Extents of an arena of ``size`` bytes, all of it cold and free at first.

    Attributes:
        in_use: bytes of all extents that are allocated, in whole pages.
    """

    def __init__(self, size: int) -> None:
        self._size = size - size % PAGE
        self._warm = _FreeList()
        self._cold = _FreeList()
        self._top = 0  # above it, all is cold
        self._extents: dict[int, int] = {}
        self.in_use = 0

    @property
    def warm(self) -> int:
        """Bytes that are free and in memory."""
        return self._warm.bytes

    @property
    def resident(self) -> int:
        """Bytes in memory: allocated, or free and warm."""
        return self.in_use + self._warm.bytes

    def allocate_warm(self, nbytes: int) -> int | None:
        """The offset of an extent for ``nbytes`` bytes that needs no more memory, or None."""
        return self._enter(self._warm.take(size := whole_pages(nbytes)), size)

    def allocate_cold(self, nbytes: int) -> int | None:
        """The offset of an extent for ``nbytes`` bytes that will need as much more memory; None where there is no
        room for it."""
        size = whole_pages(nbytes)
        offset = self._cold.take(size)
        if offset is None and self._top + size <= self._size:
            offset, self._top = self._top, self._top + size
        return self._enter(offset, size)

    def free(self, offset: int) -> None:
        """The extent at ``offset`` is not needed any more; its pages stay warm."""
        size = self._extents.pop(offset)
        self.in_use -= size
        self._warm.add(offset, size)

    def cool(self, nbytes: int) -> list[Span]:
        """Choose about ``nbytes`` bytes of warm space, the largest spans first, and count them as cold from now on.
        The caller gives their pages back."""
        spans = []
        while nbytes >= PAGE and (span := self._warm.take_largest(nbytes - nbytes % PAGE)) is not None:
            self._cold.add(*span)
            spans.append(span)
            nbytes -= span.size
        return spans

    def _enter(self, offset: int | None, size: int) -> int | None:
        if offset is not None:
            self._extents[offset] = size
            self.in_use += size
        return offset


def whole_pages(nbytes: int) -> int:
    """``nbytes`` rounded up to whole pages, at least one."""
    return max(PAGE, -(-nbytes // PAGE) * PAGE)
