"""How many faults and how many restarts are allowed, and how long to wait before the next restart."""

from __future__ import annotations

__all__ = ["BATCHES_PER_CREDIT", "FaultBudget", "RestartBudget"]

BATCHES_PER_CREDIT = 50


class FaultBudget:
    """Faults allowed: ``burst + max_fraction * samples fetched``."""

    def __init__(self, *, burst: int, max_fraction: float) -> None:
        self._burst = burst
        self._max_fraction = max_fraction
        self.faults = 0
        self.samples = 0

    def fetched(self, samples: int) -> None:
        """``samples`` were asked for and came back, good or bad."""
        self.samples += samples

    def faulted(self, faults: int = 1) -> None:
        """``faults`` more samples failed for good."""
        self.faults += faults

    @property
    def allowed(self) -> int:
        """Faults allowed so far."""
        return int(self._burst + self._max_fraction * self.samples)

    @property
    def exceeded(self) -> bool:
        """Whether more samples failed than are allowed."""
        return self.faults > self.allowed


class RestartBudget:
    """Credit for restarts: spent by deaths, earned back by progress.

    One credit a death; one comes back per 50 delivered batches; full again after the pool has shrunk, because fewer
    workers are a new situation.
    """

    def __init__(self, *, max_restarts: int, backoff_s: float, max_backoff_s: float) -> None:
        self._max = max_restarts
        self._backoff_s = backoff_s
        self._max_backoff_s = max_backoff_s
        self._delivered = 0
        self.credit = max_restarts

    @property
    def full(self) -> bool:
        """Whether no death is on the books."""
        return self.credit >= self._max

    def spend(self) -> bool:
        """One death; False when there is no credit left for a restart."""
        if self.credit <= 0:
            return False
        self.credit -= 1
        return True

    def delivered(self) -> None:
        """One batch was delivered."""
        self._delivered += 1
        if self._delivered >= BATCHES_PER_CREDIT:
            self._delivered = 0
            self.refund(1)

    def refund(self, deaths: int) -> None:
        """``deaths`` turned out to have one known cause that is out of the way now."""
        self.credit = min(self._max, self.credit + deaths)

    def refill(self) -> None:
        """Start afresh."""
        self.credit = self._max
        self._delivered = 0

    def delay_s(self, streak: int) -> float:
        """Seconds to wait before a restart, when this is the ``streak``-th death in a row (from 1) without any task
        finished between: nothing before the first, then ``backoff_s``, doubled each time."""
        if streak <= 1:
            return 0.0
        return min(self._max_backoff_s, self._backoff_s * 2.0 ** min(streak - 2, 60))
