"""Faults are the same whichever way a batch crosses."""

from __future__ import annotations

from tests.support.transports import transport

__all__ = ["transport"]
