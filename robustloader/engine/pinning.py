"""The thread that copies batches to page-locked memory, so that copies to an accelerator can overlap with computing."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Pinner"]


class Pinner:
    """Pins batches in the order they are given.

    ``submit`` and ``take`` run in the iterating thread, the pinning in a thread of its own, which calls ``wake`` after
    each batch. A batch whose ``pin_memory`` raises comes back with the exception.

    Args:
        pin: the function that pins a batch.
        device_index: the accelerator the thread works for; None leaves the thread's device alone.
        wake: told when something can be taken; must be callable from any thread.
    """

    def __init__(self, pin: Callable[[Any], Any], device_index: int | None, wake: Callable[[], None]) -> None:
        self._pin = pin
        self._device_index = device_index
        self._wake = wake
        self._jobs: queue.SimpleQueue[tuple[Any, Any] | None] = queue.SimpleQueue()
        self._done: deque[tuple[Any, Any, Exception | None]] = deque()
        self._thread = threading.Thread(target=self._work, name="pt_data_pin", daemon=True)
        self._thread.start()

    def submit(self, token: Any, batch: Any) -> None:
        """Pin ``batch``; ``token`` comes back with it."""
        self._jobs.put((token, batch))

    def take(self) -> list[tuple[Any, Any, Exception | None]]:
        """What is pinned by now: token, batch, and the exception where pinning failed."""
        taken = []
        while self._done:
            taken.append(self._done.popleft())
        return taken

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End the thread after the batch in hand; safe to call more than once."""
        self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    def _work(self) -> None:
        torch.set_num_threads(1)  # per thread: the copy must not take every core
        if self._device_index is not None:
            torch.accelerator.set_device_index(self._device_index)
        while (job := self._jobs.get()) is not None:
            token, batch = job
            error = None
            try:
                batch = self._pin(batch)
            except Exception as raised:  # a user's pin_memory method
                error = raised
            self._done.append((token, batch, error))
            del job, batch, token
            self._wake()
