"""The lines of a summary on a screen: a label, and what there is to say of it."""

from __future__ import annotations

__all__ = ["LABEL", "WIDTH", "labelled"]

WIDTH = 100
"""Columns of a line at most."""

LABEL = 11
"""Columns of a label."""


def labelled(label: str, *parts: str) -> str:
    """A label and its parts, side by side."""
    return f"{label:<{LABEL}}" + "   ".join(parts)
