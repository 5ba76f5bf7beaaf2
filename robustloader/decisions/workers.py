"""How many workers ``num_workers="auto"`` means."""

from __future__ import annotations

__all__ = ["AutoWorkers"]


class AutoWorkers(int):
    """A number of workers that was chosen here, and is chosen anew where a loader is rebuilt from its attributes."""

    @classmethod
    def resolve(cls, usable_cpus: int, ranks: int) -> AutoWorkers:
        """One worker per processor that this process may use, shared fairly by the ranks of the machine, at least 1.

        Args:
            usable_cpus: processors by affinity and quota.
            ranks: that share this machine, at least 1.
        """
        return cls(max(1, usable_cpus // ranks))
