"""Control groups, version 1 and 2: the limits that a container or a scheduler puts on this process.

``root`` is the root of the file system everywhere: ``/``, or a folder that holds copies of the files read here.

*Source*: https://docs.kernel.org/admin-guide/cgroup-v2.html and the pages on each controller of version 1 beside it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import NamedTuple

from robustloader.decisions.limits import Memory, exhaustion_hint

__all__ = [
    "cpu_quota",
    "kills_whole_group",
    "memory_kills",
    "memory_limits",
    "process_limits",
    "read_counter",
    "read_counters",
    "read_text",
]


class _Group(NamedTuple):
    """One control group above this process; ``version`` is 1 or 2."""

    folder: str
    version: int


def cpu_quota(root: str = "/") -> float:
    """Processors that the quotas allow, ``inf`` where there is none: ``cpu.max``, or ``cpu.cfs_quota_us``."""
    quota = math.inf
    for folder, version in _groups("cpu", root):
        if version == 2:
            words = read_text(f"{folder}/cpu.max").split()
        else:
            words = [read_text(f"{folder}/cpu.cfs_{name}_us") for name in ("quota", "period")]
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            quota = min(quota, int(words[0]) / int(words[1]))
    return quota


_RECLAIMABLE = {
    1: ("total_inactive_file", "total_active_file"),
    2: ("inactive_file", "active_file", "slab_reclaimable"),
}
"""Counters of ``memory.stat`` that make up what the kernel takes back before it kills, for each version."""


def memory_limits(root: str = "/") -> Iterator[Memory]:
    """Every group above this process that bounds memory. What the kernel takes back before it kills counts as free, as
    it does in the host's ``MemAvailable``.

    That is all page cache, also what was used more than once: a dataset's files are, from the second epoch on. Pages
    not written to disk yet are among them: the kernel waits for the disk before it kills. Files in memory
    (``/dev/shm``, tmpfs, arenas) are not: the kernel keeps them in its lists of anonymous pages. Of the caches of names
    and inodes, version 1 tells nothing.

    *Source*: ``si_mem_available`` in ``mm/show_mem.c``. The low watermark that it takes off is the host's: groups have
    none.
    """
    for folder, version in _groups("memory", root):
        top = read_text(f"{folder}/memory.{'max' if version == 2 else 'limit_in_bytes'}")
        used = read_text(f"{folder}/memory.{'current' if version == 2 else 'usage_in_bytes'}")
        # Version 1 writes "no limit" as the largest whole number of pages.
        if top.isdigit() and used.isdigit() and int(top) < 1 << 62:
            counters = read_counters(f"{folder}/memory.stat")
            cache = sum(counters.get(name, 0) for name in _RECLAIMABLE[version])
            free = max(0, int(top) - max(0, int(used) - cache))
            yield Memory(limit_bytes=int(top), free_bytes=free, source=folder)


def memory_kills(root: str = "/") -> int | None:
    """How many processes of our groups the kernel's memory killer has taken; None where no group counts them.

    Raises:
        OSError: this process or the machine has run out of what it takes to read them.
    """
    counts = [
        read_counter(f"{folder}/memory.{'events' if version == 2 else 'oom_control'}", "oom_kill", -1, strictly=True)
        for folder, version in _groups("memory", root, strictly=True)
    ]
    known = [count for count in counts if count >= 0]
    return sum(known) if known else None


def kills_whole_group(root: str = "/") -> bool:
    """Whether the memory killer takes all processes of a group of ours at once (``memory.oom.group``)."""
    return any(read_text(f"{folder}/memory.oom.group") == "1" for folder, _ in _groups("memory", root))


def process_limits(root: str = "/") -> Iterator[tuple[str, int]]:
    """For each group above this process that bounds the number of processes: its folder, and how many it has left."""
    for folder, _ in _groups("pids", root):
        top, used = read_text(f"{folder}/pids.max"), read_text(f"{folder}/pids.current")
        if top.isdigit() and used.isdigit():
            yield folder, max(0, int(top) - int(used))


def _groups(controller: str, root: str, *, strictly: bool = False) -> Iterator[_Group]:
    """This process's groups for a controller, innermost first, with all those above them."""
    mounted = os.path.join(root, "sys/fs/cgroup")
    for line in read_text(os.path.join(root, "proc/self/cgroup"), strictly=strictly).splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if not names:  # version 2; where both are mounted, it is beside the others
            unified = f"{mounted}/unified"
            top, version = (unified if os.path.isdir(unified) else mounted), 2
        elif controller in names.split(","):
            # Controllers that share a hierarchy are mounted under all their names, with links for single ones.
            top = next(
                (place for name in (controller, names) if os.path.isdir(place := f"{mounted}/{name}")),
                f"{mounted}/{controller}",
            )
            version = 1
        else:
            continue
        # In a container the path may be the host's, and only part of it, or nothing but the top, is to be seen.
        while True:
            folder = top + path.rstrip("/")
            if os.path.isdir(folder):
                yield _Group(folder, version)
            if path in ("", "/"):
                break
            path = os.path.dirname(path)


def read_text(path: str, *, strictly: bool = False) -> str:
    """What a small file holds, without white space around it; "" where it cannot be read. Names of files in it need not
    be text.

    Args:
        path: of the file.
        strictly: raise where descriptors or memory to read it with have run out: that says nothing about the file.
    """
    try:
        with open(path, errors="surrogateescape") as file:
            return file.read().strip()
    except OSError as error:
        if strictly and exhaustion_hint(error):
            raise
        return ""


def read_counter(path: str, name: str, default: int = 0, *, strictly: bool = False) -> int:
    """The number beside ``name`` in a file of lines like ``name 12``."""
    return read_counters(path, strictly=strictly).get(name, default)


def read_counters(path: str, *, strictly: bool = False) -> dict[str, int]:
    """Name → number, of a file of lines like ``name 12`` or ``name: 12 kB``."""
    lines = (line.replace(":", " ").split() for line in read_text(path, strictly=strictly).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) >= 2 and words[1].isdigit()}
