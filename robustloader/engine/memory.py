"""A look at free memory before an epoch."""

from __future__ import annotations

from robustloader.errors import ResourceError, warn_user
from robustloader.events import MemoryLow
from robustloader.policies import MemoryPolicy
from robustloader.system import host
from robustloader.telemetry import EpochRecording

__all__ = ["check_memory"]


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
