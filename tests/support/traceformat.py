"""The rules of the Trace Event Format, as a checker.

*Source*: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU: the
array format and its optional end; the fields each phase needs; complete events nest properly on a thread, nestable
asynchronous events pair up by category, id and name.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

ROUNDING_US = 0.002
"""Times are written in microseconds with nanoseconds behind the point."""

METADATA = {
    "process_name": ("name", str),
    "process_labels": ("labels", str),
    "process_sort_index": ("sort_index", int),
    "thread_name": ("name", str),
    "thread_sort_index": ("sort_index", int),
}


def load(path: Path) -> list[dict[str, Any]]:
    """The events of a file in the array format, whose end may be missing."""
    text = path.read_text()
    assert text.startswith("[")
    stripped = text.rstrip()
    if not stripped.endswith("]"):
        # A reader drops an element that is cut off, and closes the list.
        whole = stripped[: stripped.rfind("\n")] if not stripped.endswith("}") else stripped
        text = whole.rstrip(",") + "]"
    events = json.loads(text)
    assert isinstance(events, list)
    return events


def check(events: list[dict[str, Any]]) -> None:
    """Raise AssertionError where the events break a rule."""
    for event in events:
        check_event(event)
    check_nesting(events)
    check_pairs(events)


def check_event(event: dict[str, Any]) -> None:
    """One event has what its phase asks for."""
    phase = event["ph"]
    assert isinstance(event["name"], str) and event["name"]
    assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
    assert isinstance(event.get("args", {}), dict)
    assert isinstance(event.get("cat", ""), str)
    if phase == "M":
        name, kind = METADATA[event["name"]]
        assert isinstance(event["args"][name], kind)
        return
    assert isinstance(event["ts"], (int, float)) and event["ts"] >= 0
    if phase == "X":
        assert isinstance(event["dur"], (int, float)) and event["dur"] >= 0
    elif phase == "i":
        assert event["s"] in ("g", "p", "t")
    elif phase == "C":
        assert event["args"] and all(isinstance(value, (int, float)) for value in event["args"].values())
    else:
        assert phase in ("b", "e") and event["cat"] and event["id"] is not None


def check_nesting(events: list[dict[str, Any]]) -> None:
    """On one thread two slices are apart, or one lies within the other."""
    for slices in tracks(events).values():
        open_ends: list[float] = []
        for begin, end in sorted(((s["ts"], s["ts"] + s["dur"]) for s in slices), key=lambda span: (span[0], -span[1])):
            while open_ends and open_ends[-1] <= begin + ROUNDING_US:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1] + ROUNDING_US, "slices that overlap partly"
            open_ends.append(end)


def check_pairs(events: list[dict[str, Any]]) -> None:
    """Every asynchronous slice begins once and ends once, in this order."""
    pairs = defaultdict(list)
    for event in events:
        if event["ph"] in ("b", "e"):
            pairs[event["cat"], event["id"], event["name"]].append((event["ts"], event["ph"]))
    for found in pairs.values():
        assert [phase for _, phase in sorted(found)] == ["b", "e"]


def tracks(events: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The slices of each thread."""
    found = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            found[event["tid"]].append(event)
    return found


def thread_names(events: list[dict[str, Any]]) -> dict[int, str]:
    """What each track is called; it is named once."""
    named = [(event["tid"], event["args"]["name"]) for event in events if event["name"] == "thread_name"]
    assert len(dict(named)) == len(named)
    return dict(named)
