"""Nothing is told within a garbage collection.

An iterator that is part of a cycle ends when the collector comes by, and that may be in the middle of anything, in any
thread: in a sink that holds its lock, in the user's own call of the writer behind a sink, in the thread that serves
metrics. To tell of its end right there would wait for a lock that the same thread holds further down, for ever. So what
a finalizer has to tell then is put off until the next event, a sink's ``close`` or the end of the program.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import os
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["tell", "tell_the_rest"]


class _Collections(list[Any]):
    """Hears of collections: the last item is a dict while one runs, in whatever thread, and none otherwise.

    All of it is C, down to what the two names call. A callback in Python would be where the interpreter handles a
    signal that came during the collection, and the collector drops what a callback raises: Ctrl-C without effect.
    """

    start = property(None, list.append)
    stop = property(None, list.__init__)  # the list is made anew, of the names of what was told


_collections = _Collections()
_hear = functools.partial(setattr, _collections)
"""Called with "start" or "stop", and a dict."""

_waiting: deque[Callable[[], object]] = deque()


def tell(telling: Callable[[], object]) -> None:
    """Call ``telling`` now, or, within a garbage collection, later.

    Runs in: any thread of the training process.
    """
    if _within_collection():
        _waiting.append(telling)
    else:
        tell_the_rest()
        telling()


def tell_the_rest() -> None:
    """Make up for what was put off, oldest first."""
    while _waiting and not _within_collection():
        try:
            telling = _waiting.popleft()
        except IndexError:  # another thread has taken the last one
            return
        telling()


def _within_collection() -> bool:
    return bool(_collections) and type(_collections[-1]) is dict


def _forget() -> None:
    """In a forked process: what waits is the original's to tell."""
    _collections.clear()
    _waiting.clear()


def _end() -> None:
    with contextlib.suppress(ValueError):  # somebody has cleared the list
        gc.callbacks.remove(_hear)
    _collections.clear()
    tell_the_rest()


gc.callbacks.append(_hear)
os.register_at_fork(after_in_child=_forget)
atexit.register(_end)
