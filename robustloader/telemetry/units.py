"""Numbers as people say them, and texts that are safe to print: the words of summaries, tables, pages and screens."""

from __future__ import annotations

import time

__all__ = ["as_bytes", "as_clock", "as_count", "as_line", "as_percent", "as_seconds"]


def as_count(number: float) -> str:
    """A count or a rate: whole ones as they are, others to four digits, very large ones as a power of ten."""
    if not abs(number) < 1e12:
        return f"{number:.3g}"
    if number == int(number):
        return f"{int(number):,}"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def as_percent(fraction: float) -> str:
    """A share, 0 to 1."""
    return f"{100 * fraction:.1f} %"


def as_seconds(seconds: float) -> str:
    """A duration in the unit that people would say it in."""
    if seconds == 0:
        return "0 s"
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds >= 3.6e9 else f"{seconds / 3600:,.1f} h"


def as_bytes(size: float) -> str:
    """A size in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(size) < 1023.5:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.3g} EiB"


def as_clock(at: float) -> str:
    """A Unix time as date and time in UTC: a report is read on other machines than the run was made on."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))


def as_line(text: str) -> str:
    """Text from outside as one line without escape sequences: a sample's name must not move the reader's cursor."""
    return "".join(character if character.isprintable() else " " for character in text)
