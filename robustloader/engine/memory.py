"""A look at free memory before an epoch."""

from __future__ import annotations

from robustloader.errors import ResourceError, warn_user
from robustloader.policies import MemoryPolicy
from robustloader.system import host
from robustloader.telemetry import Recorder

__all__ = ["check_memory"]


def check_memory(policy: MemoryPolicy | None, prefetch_factor: int | None, recorder: Recorder) -> int:
    """The ``prefetch_factor`` to work with, given how much memory is free.

    Raises:
        ResourceError: less is free than the policy wants, and it says to raise.
    """
    prefetch = 2 if prefetch_factor is None else prefetch_factor
    if policy is None:
        return prefetch
    free, limit = host.free_memory_bytes()
    wanted = int(policy.headroom_fraction * limit)
    if free >= wanted:
        return prefetch
    remedy = "use fewer workers, a smaller prefetch_factor or batch_size, or give the job more memory"
    text = (
        f"only {free / 2**20:,.0f} MiB of {limit / 2**20:,.0f} MiB memory are free, and MemoryPolicy wants "
        f"{wanted / 2**20:,.0f} MiB (headroom_fraction={policy.headroom_fraction}); {remedy}"
    )
    if policy.on_low == "raise":
        raise ResourceError(text, wanted_bytes=wanted, free_bytes=free, remedy=remedy)
    if policy.on_low == "adapt" and prefetch > 1:
        text += ". This epoch prefetches one batch per worker"
        prefetch = 1
    warn_user(text)
    return prefetch
