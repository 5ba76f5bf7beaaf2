"""What this machine allows this process: processors, memory, ``/dev/shm``, descriptors, processes.

Everything is read afresh at each call: limits change while a job runs. ``root`` is the root of the file system: ``/``,
or a folder with copies of the files of ``/proc``, ``/sys/fs/cgroup`` and ``/dev`` that are read here.
"""

from __future__ import annotations

import contextlib
import errno
import math
import multiprocessing
import os
import re
import resource
from collections.abc import Mapping

import psutil
import torch

from robustloader.decisions.limits import Descriptors, Memory, Processes, SharedMemory
from robustloader.system import cgroups
from robustloader.system.cgroups import read_counter, read_text

__all__ = [
    "container_kind",
    "free_memory_bytes",
    "local_world_size",
    "maps_shared_memory",
    "memory_kills",
    "memory_kills_group",
    "open_descriptors",
    "private_bytes",
    "raise_descriptor_limit",
    "read_memory",
    "read_processes",
    "read_shared_memory",
    "sharing_strategy",
    "start_methods",
    "usable_cpus",
]

_SHARED_NAME = re.compile(r"torch_([0-9]+)_[A-Za-z0-9_-]+|sem\.[A-Za-z0-9_.-]+")
"""As torch and multiprocessing name entries. Nothing that a shell or a terminal would take for more than a name: they
are printed as arguments of ``rm``."""

_FEW_PROCESSES = 8_192
"""A limit above this is not compared with what the user's processes take: counting them costs milliseconds."""


# --- processors -------------------------------------------------------------------------------------------------------


def usable_cpus(root: str = "/") -> int:
    """Processors this process may really use: its affinity, cut by the control groups' quotas, at least 1."""
    cpus = len(os.sched_getaffinity(0))
    quota = cgroups.cpu_quota(root)
    return max(1, cpus if quota == math.inf else min(cpus, math.ceil(quota)))


def local_world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Ranks that share this machine, as torchrun tells them (``LOCAL_WORLD_SIZE``); 1 where nobody does."""
    ranks = environment.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(ranks)) if ranks.isdecimal() else 1


# --- memory -----------------------------------------------------------------------------------------------------------


def read_memory(root: str = "/") -> Memory:
    """Memory of the tightest control group above this process, or of the host: the one with the least free."""
    total, available = _meminfo(root)
    host = Memory(limit_bytes=total, free_bytes=available)
    groups = [group for group in cgroups.memory_limits(root) if group.limit_bytes < total]
    return min([host, *groups], key=lambda memory: memory.free_bytes)


def free_memory_bytes(root: str = "/") -> tuple[int, int]:
    """``(free, limit)`` of :func:`read_memory`, in bytes."""
    memory = read_memory(root)
    return memory.free_bytes, memory.limit_bytes


def memory_kills(root: str = "/") -> int | None:
    """How many processes the kernel's memory killer has taken: in our control groups, or on the host without any; None
    where there is no descriptor left to read it with.

    Only a rise between two readings means something.
    *Source*: ``memory.events`` (cgroup v2), ``memory.oom_control`` (v1), ``oom_kill`` in ``/proc/vmstat``.
    """
    try:
        kills = cgroups.memory_kills(root)
        if kills is None:
            kills = read_counter(os.path.join(root, "proc/vmstat"), "oom_kill", strictly=True)
    except OSError:
        return None
    return kills


def private_bytes(root: str = "/") -> int:
    """Memory that the end of this process would give back, in bytes: pages that it shares with nobody.

    Pages of shared mappings are left out. The kernel counts them as private while no other process has touched them, as
    it is with batches on their way through the arena, but they belong to all who map them. Walks the page tables: about
    a millisecond per gigabyte, and a few for a thousand mappings.

    *Source*: ``/proc/self/smaps``, proc_pid_smaps(5): ``Private_Clean``, ``Private_Dirty`` and ``Private_Hugetlb``.
    """
    held, shared = 0, False
    with open(os.path.join(root, "proc/self/smaps"), "rb") as file:
        for line in file:
            if line.startswith(b"Private_"):
                held += 0 if shared else int(line.split()[1]) * 1024
            elif not line[:1].isupper():  # "7f0c1a000000-7f0c1e000000 rw-s …" begins a mapping
                shared = line.split(None, 2)[1].endswith(b"s")
    return held


def _meminfo(root: str) -> tuple[int, int]:
    """Total and available memory of the host, in bytes."""
    if root == "/":
        memory = psutil.virtual_memory()
        return int(memory.total), int(memory.available)
    path = os.path.join(root, "proc/meminfo")
    return read_counter(path, "MemTotal") * 1024, read_counter(path, "MemAvailable") * 1024


def memory_kills_group(root: str = "/") -> bool:
    """Whether the kernel's memory killer takes all processes of a control group of ours at once."""
    return cgroups.kills_whole_group(root)


# --- /dev/shm ---------------------------------------------------------------------------------------------------------


def read_shared_memory(root: str = "/", *, look_for_stale: bool = True) -> SharedMemory | None:
    """``/dev/shm``, with what dead processes left in it; None where there is none.

    An entry is stale when it is this user's, carries a name that torch or multiprocessing gives, and no process of
    this user that can be seen from here (this container, that is) owns or maps it. Looking for them reads the memory
    maps of all processes, and takes milliseconds each.
    """
    folder = os.path.join(root, "dev/shm")
    try:
        state = os.statvfs(folder)
    except OSError:
        return None
    stale = _stale_entries(root, folder) if look_for_stale else {}
    return SharedMemory(
        size_bytes=state.f_blocks * state.f_frsize,
        free_bytes=state.f_bavail * state.f_frsize,
        stale=tuple(sorted(stale)),
        stale_bytes=sum(stale.values()),
    )


def maps_shared_memory(pid: int, root: str = "/") -> bool:
    """Whether a process maps anything in ``/dev/shm``, removed entries included.

    Semaphores, a page each, do not count: tqdm makes one, and every forked worker inherits it.
    """
    lines = read_text(os.path.join(root, f"proc/{pid}/maps")).splitlines()
    return any("/dev/shm/" in line and "/dev/shm/sem." not in line for line in lines)


def _stale_entries(root: str, folder: str) -> dict[str, int]:
    """Name → bytes."""
    candidates: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            named = _SHARED_NAME.fullmatch(entry.name)
            if named is None or (named[1] and os.path.exists(os.path.join(root, "proc", named[1]))):
                continue
            with contextlib.suppress(OSError):
                state = entry.stat(follow_symlinks=False)
                if state.st_uid == os.geteuid():
                    candidates[entry.name] = state.st_blocks * 512
    if candidates:
        with contextlib.suppress(OSError):
            for pid in os.listdir(os.path.join(root, "proc")):
                if pid.isdigit():
                    for name in re.findall(r"/dev/shm/(\S+)", read_text(os.path.join(root, "proc", pid, "maps"))):
                        candidates.pop(name, None)
    return candidates


# --- descriptors and processes ----------------------------------------------------------------------------------------


def open_descriptors() -> Descriptors:
    """Open files of this process, and its limits. Where none is left to count them with, as many as are allowed."""
    soft, hard = (1 << 62 if limit == resource.RLIM_INFINITY else limit for limit in _limits(resource.RLIMIT_NOFILE))
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        used = soft
    return Descriptors(used=used, soft=soft, hard=hard)


def raise_descriptor_limit(soft: int) -> None:
    """Set this process's soft limit of open files, for itself and the processes it starts from now on."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def read_processes(root: str = "/", *, count_all: bool = False) -> Processes:
    """How many more processes may be started: by the control groups' ``pids.max``, and by ``RLIMIT_NPROC``.

    The latter counts the user's threads and does not bind root (setrlimit(2): CAP_SYS_RESOURCE, CAP_SYS_ADMIN).

    Args:
        root: of the file system.
        count_all: count the user's threads even where the limit is too far away to matter.
    """
    bounds = [(free, f"pids.max in {folder}") for folder, free in cgroups.process_limits(root)]
    soft, _ = _limits(resource.RLIMIT_NPROC)
    if os.geteuid() and soft != resource.RLIM_INFINITY and (count_all or soft <= _FEW_PROCESSES):
        bounds.append((max(0, soft - _threads_of_user()), f"RLIMIT_NPROC={soft} (ulimit -u)"))
    if not bounds:
        return Processes(free=None)
    free, limit = min(bounds)
    return Processes(free=free, limit=limit)


def _threads_of_user() -> int:
    """Threads of this user's processes, as far as they can be seen from here."""
    threads = 0
    for process in psutil.process_iter(["uids", "num_threads"]):
        uids = process.info["uids"]
        if uids is not None and uids.real == os.getuid():
            threads += process.info["num_threads"] or 1
    return threads


def _limits(kind: int) -> tuple[int, int]:
    return resource.getrlimit(kind)


# --- how processes are started and share ------------------------------------------------------------------------------


def start_methods() -> tuple[str, ...]:
    """Ways to start a process here; the one that is used comes first."""
    known = multiprocessing.get_all_start_methods()
    chosen = multiprocessing.get_start_method(allow_none=True) or known[0]
    return (chosen, *(method for method in known if method != chosen))


def sharing_strategy() -> str:
    """How torch shares tensors between processes: "file_descriptor" or "file_system"."""
    return str(torch.multiprocessing.get_sharing_strategy())


def container_kind(root: str = "/", environment: Mapping[str, str] = os.environ) -> str:
    """One of "kubernetes", "podman", "docker" and "none"."""
    first = read_text(os.path.join(root, "proc/1/cgroup"))
    secrets = os.path.join(root, "var/run/secrets/kubernetes.io")
    if "KUBERNETES_SERVICE_HOST" in environment or "kubepods" in first or os.path.isdir(secrets):
        return "kubernetes"
    if environment.get("container") == "podman" or os.path.exists(os.path.join(root, "run/.containerenv")):
        return "podman"
    return "docker" if "docker" in first or os.path.exists(os.path.join(root, ".dockerenv")) else "none"
