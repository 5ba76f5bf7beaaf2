"""A sink that remembers, and one that breaks."""

from __future__ import annotations

from typing import Any, TypeVar

from robustloader import Event, TelemetryPolicy

E = TypeVar("E", bound=Event)


class Listener:
    """Keeps every event, in order."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def receive(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[E]) -> list[E]:
        """The events of one type."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def policy(self) -> TelemetryPolicy:
        """A telemetry policy that has this sink."""
        return TelemetryPolicy(sinks=(self,))


class BrokenSink:
    """A sink that cannot write any more; counts how often it was told."""

    def __init__(self) -> None:
        self.calls = 0

    def receive(self, event: Event) -> None:
        self.calls += 1
        raise OSError("disk full")


def flat(batches: Any) -> list[int]:
    """Every sample of batches of integer tensors, in order."""
    return [int(value) for batch in batches for value in batch]
