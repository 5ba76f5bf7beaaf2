"""What counts as a worker's own memory."""

from __future__ import annotations

import mmap
import os

from robustloader.system.limits import private_bytes
from robustloader.system.mapping import SharedMapping
from robustloader.worker.meter import MemoryMeter

MIB = 1 << 20
SIZE = 64 * MIB


def test_memory_of_its_own_counts() -> None:
    """Every page that was written to, and none that was given back."""
    before = private_bytes()
    with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(b"x" * SIZE)
        assert SIZE - MIB < private_bytes() - before < SIZE + MIB
        assert MemoryMeter(before + SIZE // 2).excess_bytes(before + SIZE) > before + SIZE // 2
    assert private_bytes() - before < SIZE // 2


def test_the_arena_does_not_count_though_nobody_else_has_touched_it() -> None:
    """The kernel calls pages of shared memory private while one process alone has them in its page tables; they are
    the batches under way, and the end of the worker would not give them back.
    """
    before = private_bytes()
    arena, fd = SharedMapping.create(SIZE)
    os.close(fd)
    arena.view(0, SIZE)[:] = b"x" * SIZE
    assert private_bytes() - before < SIZE // 2
    assert MemoryMeter(before + SIZE // 2).excess_bytes(before + SIZE) == 0
