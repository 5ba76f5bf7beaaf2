"""A sink that remembers."""

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


def flat(batches: Any) -> list[int]:
    """Every sample of batches of integer tensors, in order."""
    return [int(value) for batch in batches for value in batch]
