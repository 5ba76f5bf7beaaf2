"""How many workers ``num_workers="auto"`` means."""

from __future__ import annotations

__all__ = ["AutoWorkers"]


class AutoWorkers(int):
    """A number of workers that was chosen here, and is chosen anew where a loader is rebuilt from its attributes."""

    @classmethod
    def resolve(cls, usable_cpus: int, local_world_size: str | None) -> AutoWorkers:
        """One worker per processor that this process may use, shared fairly by the ranks of the machine, at least 1.

        Args:
            usable_cpus: processors by affinity and quota.
            local_world_size: the environment's ``LOCAL_WORLD_SIZE``, as torchrun sets it; anything else means 1 rank.
        """
        ranks = int(local_world_size) if local_world_size is not None and local_world_size.isdecimal() else 1
        return cls(max(1, usable_cpus // max(1, ranks)))
