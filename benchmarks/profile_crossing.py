"""Where does the time of a small batch go?

Question: of the microseconds between two batches, how many go to the fetch, to encoding, to system calls, to waiting,
    to decoding and to the books?
Method: the functions named in :data:`TARGETS` are wrapped from outside before the workers are forked. Each wrapper
    adds its *own* time (what the wrapped functions below it took is subtracted) and its calls to a row of shared
    memory, one row per process. The rows are read after the warm-up and again at the end; what is printed is the
    difference per batch. "rest of next()" is what no other line claims.
Trap: a wrapper costs about a microsecond a call, so the sum is above what the same loop takes unwrapped; both are
    printed. With fewer cores than busy processes, time without a processor counts into whatever line it falls in.
Rerun: ``python -m benchmarks.profile_crossing [--batches N] [--rows ROWS] [--width FLOATS]``
"""

from __future__ import annotations

import argparse
import functools
import importlib
import mmap
import os
import resource
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from robustloader import RobustDataLoader

WORKERS = 2
WARM_UP = 200
KEPT = 64


class Target(NamedTuple):
    """A function to wrap: ``owner`` is a module, or a class in one after a colon."""

    label: str
    owner: str
    name: str


TARGETS = (
    Target("rest of next()", "robustloader.engine.iterator:MultiprocessIterator", "next_batch"),
    Target("wait for a worker (epoll)", "selectors:EpollSelector", "select"),
    Target("read the sampler", "robustloader.system.torch_private:LoaderIterator", "next_indices"),
    Target("give a task", "robustloader.engine.iterator:MultiprocessIterator", "_give"),
    Target("watch for stuck workers", "robustloader.engine.crew:Crew", "watch"),
    Target("settle: ledger, budget, statistics", "robustloader.engine.iterator:MultiprocessIterator", "_on_said"),
    Target("fetch: dataset and collate", "robustloader.worker.fetch:MapFetcher", "fetch"),
    Target("encode: batches, and orders with indices", "robustloader.transport.codec", "dumps"),
    Target("decode the batch", "robustloader.transport.codec", "loads"),
    Target("arena: an extent to stack into", "robustloader.transport.arena:Arena", "empty"),
    Target("arena: place what is not there yet", "robustloader.transport.arena:Arena", "place"),
    Target("arena: take extents back", "robustloader.transport.arena:Arena", "release"),
    Target("arena: lease an extent", "robustloader.transport.arena:ArenaReader", "lease"),
    Target("arena: find what was let go", "robustloader.transport.arena:ArenaReader", "take_released"),
    Target("frame out", "robustloader.transport.channel:Channel", "send"),
    Target("frame in", "robustloader.transport.channel:Channel", "receive"),
    Target("sendmsg", "socket:socket", "sendmsg"),
    Target("send", "socket:socket", "send"),
    Target("recv_into", "socket:socket", "recv_into"),
    Target("recvmsg", "socket:socket", "recvmsg"),
    Target("recvmsg_into", "socket:socket", "recvmsg_into"),
)


class Stopwatch:
    """Own time and calls of each target, in memory that all processes share: rows by process, 0 the training one."""

    def __init__(self) -> None:
        shape = (1 + WORKERS, len(TARGETS), 2)
        self._parent = os.getpid()
        self._below: list[int] = []
        self.cells = np.frombuffer(mmap.mmap(-1, int(np.prod(shape)) * 8), dtype=np.int64).reshape(shape)

    def wrap(self, column: int, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, with a column of its own."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._below.append(0)
            begun = time.perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter_ns() - begun
                own = took - self._below.pop()
                if self._below:
                    self._below[-1] += took
                cell = self.cells[self._row(), column]
                cell[0] += own
                cell[1] += 1

        return timed

    def _row(self) -> int:
        if os.getpid() == self._parent:
            return 0
        info = get_worker_info()
        return 1 + (info.id if info is not None else 0)

    def install(self) -> list[str]:
        """Wrap what there is to wrap; the labels of targets that this version does not have."""
        missing = []
        for column, target in enumerate(TARGETS):
            module, _, owner_name = target.owner.partition(":")
            owner: Any = importlib.import_module(module)
            owner = getattr(owner, owner_name, None) if owner_name else owner
            function = getattr(owner, target.name, None)
            if function is None:
                missing.append(target.label)
            else:
                setattr(owner, target.name, self.wrap(column, function))
        return missing


class Rows(Dataset[Any]):
    """Views of one tensor, and a label."""

    def __init__(self, batches: int, rows: int, width: int) -> None:
        self.rows = torch.arange(float(KEPT * width)).reshape(KEPT, width)
        self.labels = torch.arange(KEPT)
        self.length = batches * rows

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rows[index % KEPT], self.labels[index % KEPT]


class Run(NamedTuple):
    """One pass over the loader, after the warm-up: microseconds and switches of the training process, per batch."""

    wall_us: float
    cpu_us: float
    sleeps: float
    preempted: float


def run(loader: RobustDataLoader[Any], at_warm: Callable[[], None], batches: int) -> Run:
    """Take all batches."""
    before, begun = resource.getrusage(resource.RUSAGE_SELF), 0
    for count, _ in enumerate(loader, 1):
        if count == WARM_UP:
            at_warm()
            before, begun = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter_ns()
        if count == WARM_UP + batches:
            wall_ns = time.perf_counter_ns() - begun
            after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    sleeps, preempted = after.ru_nvcsw - before.ru_nvcsw, after.ru_nivcsw - before.ru_nivcsw
    return Run(wall_ns / 1e3 / batches, cpu_s * 1e6 / batches, sleeps / batches, preempted / batches)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batches", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--width", type=int, default=10)
    parser.add_argument("--transport", default="auto")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # A few batches more than are counted: the last ones are loaded while nothing is left to give out.
    dataset = Rows(WARM_UP + options.batches + 8, options.rows, options.width)

    def loader() -> RobustDataLoader[Any]:
        return RobustDataLoader(
            dataset,
            batch_size=options.rows,
            num_workers=WORKERS,
            multiprocessing_context="fork",
            transport=options.transport,
        )

    fetch = [[dataset[i] for i in range(options.rows)] for _ in range(50)]
    begun = time.perf_counter_ns()
    for samples in fetch:
        torch.utils.data.default_collate(samples)
    collate_us = (time.perf_counter_ns() - begun) / 1e3 / len(fetch)

    plain = run(loader(), lambda: None, options.batches)
    watch = Stopwatch()
    missing = watch.install()
    cells: list[Any] = []
    wrapped = run(loader(), lambda: cells.append(watch.cells.copy()), options.batches)
    spent = (watch.cells - cells[0]) / options.batches

    print(f"{options.rows} x {options.width} float32 and a label, {WORKERS} workers, {options.batches} batches")
    for label, result in (("as it is", plain), ("wrapped", wrapped)):
        print(
            f"  {label:8}  {result.wall_us:7.1f} us a batch; training process: {result.cpu_us:.1f} us of processor, "
            f"{result.sleeps:.2f} sleeps and {result.preempted:.2f} preemptions a batch"
        )
    print(f"  collate alone, in this process: {collate_us:.1f} us")
    for title, own in (("training process", spent[:1].sum(0)), ("workers (sum of both)", spent[1:].sum(0))):
        print(f"\n  {title:40} {'us/batch':>9} {'calls/batch':>12}")
        for target, (ns, calls) in sorted(zip(TARGETS, own, strict=True), key=lambda line: -line[1][0]):
            if calls:
                print(f"  {target.label:40} {ns / 1e3:9.1f} {calls:12.2f}")
        print(f"  {'sum':40} {own[:, 0].sum() / 1e3:9.1f}")
    print("\n  In a worker, recv_into is mostly waiting for a task." + (f" Not here: {missing}" if missing else ""))


if __name__ == "__main__":
    main()
