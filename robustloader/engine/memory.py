"""Memory before an epoch: whether enough is free, and how much of it the workers' arenas may take."""

from __future__ import annotations

import mmap
import os

from robustloader.errors import ResourceError, warn_user
from robustloader.events import MemoryLow
from robustloader.policies import MemoryPolicy, Transport
from robustloader.system import host
from robustloader.system.mapping import SharedMapping
from robustloader.telemetry import EpochRecording
from robustloader.transport.arena import ArenaLimits

__all__ = ["arena_limits", "check_memory"]

_LEAST_ARENA_BYTES = 64 * 1024 * 1024


def check_memory(policy: MemoryPolicy | None, prefetch_factor: int, recording: EpochRecording) -> int:
    """The ``prefetch_factor`` to begin an epoch with, given how much memory is free.

    Raises:
        ResourceError: less is free than the policy wants, and it says to raise.
    """
    if policy is None:
        return prefetch_factor
    free, limit = host.free_memory_bytes()
    wanted = int(policy.headroom_fraction * limit)
    if free >= wanted:
        return prefetch_factor
    remedy = "use fewer workers, a smaller prefetch_factor or batch_size, or give the job more memory"
    text = (
        f"only {free / 2**20:,.0f} MiB of {limit / 2**20:,.0f} MiB memory are free, and MemoryPolicy wants "
        f"{wanted / 2**20:,.0f} MiB (headroom_fraction={policy.headroom_fraction}); {remedy}"
    )
    recording.emit(
        MemoryLow(epoch=recording.epoch, wanted_bytes=wanted, free_bytes=free, action=policy.on_low, remedy=remedy)
    )
    if policy.on_low == "raise":
        raise ResourceError(text, wanted_bytes=wanted, free_bytes=free, remedy=remedy)
    if policy.on_low == "adapt" and prefetch_factor > 1:
        text += ". This epoch prefetches one batch per worker"
        prefetch_factor = 1
    warn_user(text)
    return prefetch_factor


def arena_limits(transport: Transport, policy: MemoryPolicy | None, num_workers: int) -> tuple[ArenaLimits | None, str]:
    """How large each worker's arena may get; None, and why, where batches have to go through the sockets.

    By default all arenas together get half of what is free beyond the policy's headroom.

    Raises:
        ResourceError: ``transport="arena"`` was asked for, and the system has no shared memory of this kind.
    """
    if transport == "pipe":
        return None, ""
    try:
        os.close(SharedMapping.create(mmap.PAGESIZE)[1])
    except (OSError, AttributeError) as error:
        reason = f"the system refuses shared memory through memfd: {error}"
        if transport == "arena":
            remedy = 'use transport="auto" or "pipe"'
            raise ResourceError(
                f"{reason}; {remedy}", wanted_bytes=mmap.PAGESIZE, free_bytes=0, remedy=remedy
            ) from error
        return None, reason
    free, limit = host.free_memory_bytes()
    reserve = int((policy or MemoryPolicy()).headroom_fraction * limit)
    together = max(_LEAST_ARENA_BYTES * num_workers, (free - reserve) // 2)
    return ArenaLimits(together // num_workers, reserve), ""
