"""A timeline for Perfetto (https://ui.perfetto.dev) and chrome://tracing: who loaded what when, and who waited."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

from robustloader.errors import OptionError
from robustloader.events import (
    BatchDelivered,
    EpochFinished,
    EpochProgressed,
    Event,
    SampleFaulted,
    SampleReplaced,
    TaskLoaded,
)
from robustloader.telemetry.deferral import tell_the_rest
from robustloader.telemetry.labels import ConfiguredSink, fill_in, resolve_labels
from robustloader.telemetry.plain import as_json

__all__ = ["ChromeTraceSink"]

# Written in pieces of this size, or this old: a kill loses at most a second.
_PIECE_BYTES = 64 << 10
_PIECE_NS = 1_000_000_000
# Room for the last words: the note that the trace is full, and the end of the list.
_RESERVE_BYTES = 1 << 10


class ChromeTraceSink(ConfiguredSink):
    """Writes a trace in the Trace Event Format, as a JSON array
    (https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU).

    One process, the training process, with a track per thread that iterates and one per worker process: a slice for
    each task a worker loaded and for each wait of the loop (the gaps between waits are the training steps), marks for
    deaths, restarts and faults, a slice per epoch, and the number of batches that lay ready. A worker that is restarted
    gets a track of its own. Times are microseconds of the monotonic clock, which all processes of a machine share; the
    mark "trace began" holds the Unix time.

    The closing bracket is optional in this format, so the file can be read at any time, and after a kill. It is a
    recording of a stretch of a run: it grows by about 400 bytes per batch, and ends at ``max_bytes``.

    Runs in: the training process.

    Args:
        path: the file, overwritten at the first event, with fields as in :class:`~robustloader.JsonlSink`.
        labels: shown beside the process's name; ``rank`` comes by itself where torchrun's RANK is set.
        max_bytes: size in bytes at which the trace ends. The default of 128 MiB is about what Perfetto's page takes
            without complaint, and holds some 300,000 batches.

    Raises:
        OptionError: the folder does not exist, or an option is out of range.
        OSError: from :meth:`receive`, the file cannot be written; the sink is then dropped with a warning.
    """

    wants_tasks = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        labels: Mapping[str, str] | None = None,
        max_bytes: int = 128 << 20,
    ) -> None:
        super().__init__(path=path, labels=labels, max_bytes=max_bytes)
        self.labels: dict[str, str] = resolve_labels(labels)
        self.path: str = os.path.abspath(fill_in("path", path, self.labels))
        if not isinstance(max_bytes, int) or max_bytes < 16 * _RESERVE_BYTES:
            raise OptionError("max_bytes", max_bytes, f"a whole number of at least {16 * _RESERVE_BYTES}")
        if not os.path.isdir(os.path.dirname(self.path)):
            raise OptionError("path", self.path, "a file in a folder that exists; make the folder first")
        self._max_bytes = max_bytes
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a signal handler may close what it interrupts
        self._writer: _Writer | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._closed = False
        self._named: set[int] = set()
        self._tids: dict[int, int] = {}

    def receive(self, event: Event) -> None:
        """Draw one event."""
        if os.getpid() != self._pid:
            if self._writer is not None or self._closed:  # a forked copy: the trace is the original's
                return
            self.renew()
        with self._lock:
            if not self._closed:
                self._receive(event)

    def flush(self) -> None:
        """Write what is held back."""
        if os.getpid() == self._pid:
            with self._lock:
                if self._writer is not None:
                    self._writer.flush()

    def close(self) -> None:
        """End the list and close the file. Idempotent; done at the end of the program too."""
        if os.getpid() == self._pid:
            tell_the_rest()
            with self._lock:
                self._end()

    def __enter__(self) -> ChromeTraceSink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self, event: Event) -> None:
        here = threading.get_native_id()
        if self._writer is None:
            self._begin(here)
        match event:
            case TaskLoaded():
                self._task(event, here)
            case BatchDelivered():
                self._batch(event, here)
            case EpochFinished():
                self._epoch(event)
            case EpochProgressed():
                pass
            case _:
                self._mark(event, here)
        if self._writer is not None and self._writer.size > self._max_bytes - _RESERVE_BYTES:
            self._instant("trace is full", here, {"max_bytes": self._max_bytes})
            self._end()

    def _task(self, event: TaskLoaded, here: int) -> None:
        tid = here
        if event.pid is not None and event.worker_id is not None:
            tid = self._track(event.worker_id, event.pid)
        self._slice(
            f"task {event.task}",
            "task",
            tid,
            event.begin_ns,
            event.end_ns,
            f'"task":{event.task},"epoch":{event.epoch},"samples":{event.samples}',
        )

    def _batch(self, event: BatchDelivered, here: int) -> None:
        self._name(here, "loop", -1)
        facts = f'"batch":{event.batch},"epoch":{event.epoch},"ready":{event.ready}'
        self._slice("wait", "loop", here, event.begin_ns, event.end_ns, facts)
        assert self._writer is not None
        self._writer.add(
            f'{{"pid":{self._pid},"tid":{self._pid},"ph":"C","name":"ready batches","ts":{event.end_ns / 1e3},'
            f'"args":{{"ready":{event.ready}}}}}'
        )

    def _epoch(self, event: EpochFinished) -> None:
        # Asynchronous slices have tracks of their own, and may overlap as epochs may.
        end_ns = time.monotonic_ns()
        begin_ns = end_ns - int(event.summary.duration_s * 1e9)
        name, same = f"epoch {event.epoch}", {"cat": "epoch", "id": f"{event.loader}.{event.epoch}", "tid": self._pid}
        self._add({"ph": "b", "name": name, "ts": begin_ns / 1e3, **same})
        facts = {"verdict": event.summary.verdict, "advice": event.summary.advice, "samples": event.summary.samples}
        self._add({"ph": "e", "name": name, "ts": end_ns / 1e3, "args": facts, **same})
        assert self._writer is not None
        self._writer.flush()

    def _mark(self, event: Event, here: int) -> None:
        """Whatever else happens, at the worker it happened to, or at the loop."""
        worker_id = getattr(event, "worker_id", None)
        fields = event.to_dict()
        if isinstance(event, SampleFaulted):
            worker_id = event.fault.worker_id
            fault = event.fault
            fields = {"kind": fault.kind, "index": fault.index, "error": fault.error_type, "action": fault.action}
        elif isinstance(event, SampleReplaced):
            worker_id = None
        fields.pop("event", None)
        fields.pop("stack", None)
        pid = getattr(event, "pid", None)
        if worker_id is not None and pid is not None:
            tid = self._track(worker_id, pid)
        else:
            tid = here if worker_id is None else self._tids.get(worker_id, here)
        self._name(tid, "loop", -1)
        self._instant(type(event).__name__, tid, as_json(fields))

    def _begin(self, here: int) -> None:
        self._writer = _Writer(self.path)
        # Not a method of this object, which the finalizer would keep alive.
        self._finalizer = weakref.finalize(self, _Writer.close, self._writer)
        labels = ", ".join(f"{name}={value}" for name, value in self.labels.items())
        self._add({"ph": "M", "name": "process_name", "args": {"name": "robustloader"}})
        self._add({"ph": "M", "name": "process_labels", "args": {"labels": labels}})
        self._name(here, "loop", -1)
        self._instant("trace began", here, {"unix_time_s": time.time()})

    def _end(self) -> None:
        self._closed = True
        if self._finalizer is not None:
            self._finalizer()
        self._writer = None

    def _name(self, tid: int, name: str, place: int) -> None:
        """Name a track, the first time it is used; ``place`` sorts the tracks."""
        if tid not in self._named:
            self._named.add(tid)
            self._add({"ph": "M", "name": "thread_name", "tid": tid, "args": {"name": name}})
            self._add({"ph": "M", "name": "thread_sort_index", "tid": tid, "args": {"sort_index": place}})

    def _track(self, worker_id: int, pid: int) -> int:
        """The track of a worker process."""
        again = worker_id in self._tids
        if pid not in self._named:
            self._name(pid, f"worker {worker_id}" + (", restarted" if again else ""), worker_id)
        self._tids[worker_id] = pid
        return pid

    def _slice(self, name: str, category: str, tid: int, begin_ns: int, end_ns: int, facts: str) -> None:
        """A slice, put together by hand since there are two per batch: its parts are ours, numbers and letters only."""
        duration_us = max(0, end_ns - begin_ns) / 1e3
        assert self._writer is not None
        self._writer.add(
            f'{{"pid":{self._pid},"tid":{tid},"ph":"X","name":"{name}","cat":"{category}","ts":{begin_ns / 1e3},'
            f'"dur":{duration_us},"args":{{{facts}}}}}'
        )

    def _instant(self, name: str, tid: int, facts: Any) -> None:
        now_us = time.monotonic_ns() / 1e3
        self._add({"ph": "i", "name": name, "cat": "event", "s": "t", "ts": now_us, "tid": tid, "args": facts})

    def _add(self, piece: dict[str, Any]) -> None:
        assert self._writer is not None
        self._writer.add(json.dumps({"pid": self._pid, "tid": self._pid, **piece}, separators=(",", ":")))


class _Writer:
    """A JSON array, element by element. With a buffer of its own: a file object's would be written twice where the
    process forks.
    """

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._pid = os.getpid()
        self._pieces: list[str] = []
        self._held = 0
        self._flushed_ns = time.monotonic_ns()
        self.size = 0

    def add(self, piece: str) -> None:
        """Append an element, in ASCII."""
        if self._fd < 0:  # what ends with the program may do so after the trace
            return
        self._pieces.append((",\n" if self.size else "[\n") + piece)
        self.size += len(piece) + 2
        self._held += len(piece) + 2
        if self._held >= _PIECE_BYTES or time.monotonic_ns() - self._flushed_ns > _PIECE_NS:
            self.flush()

    def flush(self) -> None:
        content = "".join(self._pieces).encode("ascii")
        self._pieces.clear()
        self._held = 0
        self._flushed_ns = time.monotonic_ns()
        while content:
            content = content[os.write(self._fd, content) :]

    def close(self) -> None:
        """Write the rest and the end of the list. Never raises: it runs at the end of the program."""
        if self._fd < 0 or os.getpid() != self._pid:
            return
        with contextlib.suppress(OSError):
            self._pieces.append("\n]\n")
            self.flush()
        with contextlib.suppress(OSError):
            os.close(self._fd)
        self._fd = -1
