"""Numbers on the command line, as argparse's ``type``."""

from __future__ import annotations

import argparse
import math
import re

__all__ = ["count", "count_or_0", "counts", "seconds_above_0", "seconds_at_least_0"]

# Plain digits (``str.isdigit`` takes a superscript as well, which ``int`` does not), and no more than make sense.
_WHOLE = re.compile("0*[0-9]{1,9}")


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not _WHOLE.fullmatch(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def count_or_0(text: str) -> int:
    """A whole number from 0 on."""
    if not _WHOLE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Whole numbers from 0 on, with commas between."""
    parts = text.split(",")
    if not all(_WHOLE.fullmatch(part.strip()) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,2,4")
    return tuple(int(part) for part in parts)


def seconds_at_least_0(text: str) -> float:
    """A time that may be 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds of at least 0")
    return value


def seconds_above_0(text: str) -> float:
    """A time that is not 0."""
    value = seconds_at_least_0(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value
