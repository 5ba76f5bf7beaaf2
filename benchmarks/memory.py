"""Peak memory of a loader's whole process tree.

Question: how much memory does an epoch take, training process and workers together?
Method: every loader runs in a process of its own, in turn; this process reads ``Pss`` (shared pages are divided among
    those who map them, so the sum over the tree counts each page once) of that process and its descendants from
    ``/proc/PID/smaps_rollup`` every few milliseconds, adds the shared memory that none of them maps, and keeps the
    largest sum.
Trap: shared memory on its way between two processes, as torch's is while its descriptor travels, is in nobody's Pss; so
    shared memory is not taken from there but from the machine's own count (``Shmem`` in ``/proc/meminfo``, as it has
    grown since the start), which is right only while nothing else on the machine uses any. A peak shorter than the
    sampling period may be missed.
Rerun: ``python -m benchmarks --only memory``
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from benchmarks.contenders import peers, release, silence_peers
from benchmarks.workloads import WORKLOADS

__all__ = ["Peak", "peak_of"]

PERIOD_S = 0.005


class Peak(NamedTuple):
    """Megabytes (10⁶ bytes): before the loader was made, and at most."""

    before_mb: float
    peak_mb: float


def peak_of(contender: str, workload: str, *, batches: int, transport: str) -> Peak | str:
    """Run one epoch in a process of its own and watch it; a text where the loader cannot do it."""
    command = [sys.executable, "-m", "benchmarks.memory", contender, workload, str(batches), transport]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        if child.stdout.readline() != "ready\n":
            return f"the process ended with status {child.wait()}"
        root = psutil.Process(child.pid)
        others = shared_memory()
        before = peak = tree_memory(root, others)
        child.stdin.write("go\n")
        child.stdin.flush()
        while child.poll() is None:
            peak = max(peak, tree_memory(root, others))
            time.sleep(PERIOD_S)
        if child.returncode:
            return f"the process ended with status {child.returncode}"
    return Peak(before / 1e6, peak / 1e6)


def shared_memory() -> int:
    """Bytes of shared memory on this machine, mapped or not."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024
    return 0


def tree_memory(root: psutil.Process, others: int) -> int:
    """Bytes of a process and all its descendants, on a machine where others hold ``others`` bytes of shared memory."""
    total = max(0, shared_memory() - others)
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith(("Pss_Anon:", "Pss_File:")):
                        total += int(line.split()[1]) * 1024
    return total


def main() -> None:
    """What runs in the watched process: an epoch, started when told to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("contender")
    parser.add_argument("workload")
    parser.add_argument("batches", type=int)
    parser.add_argument("transport")
    options = parser.parse_args()
    torch.set_num_threads(1)
    silence_peers()
    contender = next(peer for peer in peers(options.transport) if peer.name == options.contender)
    with tempfile.TemporaryDirectory() as folder:
        loader = contender.loader(WORKLOADS[options.workload], options.batches, Path(folder))
        print("ready", flush=True)
        sys.stdin.readline()
        for _ in loader:
            pass
        release(loader)


if __name__ == "__main__":
    main()
