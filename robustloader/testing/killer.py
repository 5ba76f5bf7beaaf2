"""Kills workers of one iterator at random moments that a seed decides."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from typing import Any

from robustloader.system import torch_private

__all__ = ["WorkerKiller"]


class WorkerKiller:
    """Hits worker processes of one iterator, and no others.

    As a context manager it strikes from a thread of its own, at intervals drawn from an exponential distribution; the
    intervals and the choice of victims follow from the seed (which sample is in hand then does not: that is the
    machine's timing). Without ``with``, :meth:`strike` kills now.

    Args:
        iterator: what ``iter(loader)`` returned, of a :class:`~robustloader.RobustDataLoader` or of torch's loader.
        seed: of moments and victims.
        every_s: mean time between two strikes, in seconds.
        signal: what is sent.

    Attributes:
        kills: signals sent so far.
    """

    def __init__(self, iterator: Any, *, seed: int, every_s: float = 1.0, signal: int = signal.SIGKILL) -> None:
        self._iterator = iterator
        self._rng = random.Random(seed)
        self._every_s = every_s
        self._signal = signal
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self.kills: int = 0

    def strike(self) -> int | None:
        """Kill one of the workers there are now; returns its process id, or None where there is none."""
        pids = self._pids()
        if not pids:
            return None
        pid = self._rng.choice(pids)
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(pid)
            try:
                # Still on the list: then it was not reaped when the descriptor was opened, and that is no other process
                # under the same number.
                if pid in self._pids():
                    signal.pidfd_send_signal(fd, self._signal)
                    self.kills += 1
                    return pid
            finally:
                os.close(fd)
        return None

    def _pids(self) -> list[int]:
        return [process.pid for process in torch_private.worker_processes(self._iterator) if process.pid is not None]

    def _run(self) -> None:
        while not self._over.wait(self._rng.expovariate(1.0 / self._every_s)):
            self.strike()

    def __enter__(self) -> WorkerKiller:
        self._over.clear()
        self._thread = threading.Thread(target=self._run, name="robustloader-worker-killer", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """No more strikes from the thread; the block may go on."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
