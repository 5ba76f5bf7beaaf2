"""What a machine allows, what a loader needs of it, and what to do where the one falls short of the other.

Numbers in, plans out: nothing here reads a file or starts a process.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "DESCRIPTORS_KEPT",
    "DESCRIPTORS_PER_WORKER",
    "Descriptors",
    "Lookahead",
    "Memory",
    "Processes",
    "Relief",
    "Room",
    "SharedMemory",
    "Shortage",
    "Start",
    "batches_held",
    "exhaustion_hint",
    "gib",
    "headroom_bytes",
    "low_memory",
    "plan_arena_bytes",
    "plan_lookahead",
    "plan_recycle",
    "plan_relief",
    "plan_room",
    "plan_start",
    "plural",
    "shm_remedy",
]

DESCRIPTORS_PER_WORKER = 10
"""In the training process, for each worker: socket, pidfd, stacks, beacon, and two ends each of the lifeline and of
multiprocessing's sentinel are eight; two more are open while a worker starts, and later one for the memory that batches
cross in."""

DESCRIPTORS_KEPT = 16
"""Left for the training process's own files, and for those a forked worker opens on top of what it inherits."""

RECYCLE_AFTER_TASKS = 8
"""A worker is replaced only after so many tasks: where a fresh one is over the bound already, a new process for every
batch would cost more than it frees."""

ARENA_SHARE = 0.5
"""Share of the free memory above the headroom that batches may take; the rest is for the workers and the trainer."""

REMEDY_MEMORY = "use fewer workers, a smaller prefetch_factor or batch_size, or give the job more memory"


# --- what there is ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of the tightest control group above this process, or of the host, in bytes.

    Attributes:
        limit_bytes: all there is.
        free_bytes: what can be had; page cache that the kernel can drop at once counts as free.
        source: the control group's folder, or "host".
    """

    limit_bytes: int
    free_bytes: int
    source: str = "host"


@dataclass(frozen=True, kw_only=True)
class SharedMemory:
    """``/dev/shm``.

    Attributes:
        size_bytes, free_bytes: of the file system.
        stale: names of entries that a dead process left behind.
        stale_bytes: what they take.
    """

    size_bytes: int
    free_bytes: int
    stale: tuple[str, ...] = ()
    stale_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Descriptors:
    """Open files of this process: how many there are, and how many there may be (soft and hard limit)."""

    used: int
    soft: int
    hard: int


@dataclass(frozen=True, kw_only=True)
class Processes:
    """How many more processes and threads may be started; None where nothing bounds them. ``limit`` names the bound."""

    free: int | None
    limit: str = ""


# --- what there is too little of --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """Too little of something.

    Attributes:
        resource: what it is.
        wanted, free: how much is needed, and how much there is: bytes for memory, else a number.
        text: one sentence with the numbers.
        remedy: what to change.
    """

    resource: Literal["memory", "descriptors", "processes", "shared memory"]
    wanted: int
    free: int
    text: str
    remedy: str


def plural(number: int, noun: str) -> str:
    """So many of it: "1 worker", "2 workers"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def gib(size_bytes: float) -> str:
    """A size for people: "3.2 GiB", "64 MiB", "12 KiB"."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if abs(size_bytes) >= unit:
            return (
                f"{size_bytes / unit:,.3g} {name}"
                if abs(size_bytes) < 1000 * unit
                else f"{size_bytes / unit:,.0f} {name}"
            )
    return f"{size_bytes / 1024:,.0f} KiB"


def shm_remedy(container: str) -> str:
    """How ``/dev/shm`` is made larger, for each kind of container."""
    if container == "kubernetes":
        return "mount an emptyDir volume with medium: Memory (and a sizeLimit) at /dev/shm"
    if container in ("docker", "podman"):
        return f"start the container with {container} run --shm-size=8g (or --ipc=host)"
    return "remount it larger: mount -o remount,size=8g /dev/shm"


# --- before workers are started ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Start:
    """How many workers can be started.

    Attributes:
        workers: as many as the limits allow.
        soft: the soft descriptor limit to set first; None leaves it.
        shortages: why it is fewer than asked.
    """

    workers: int
    soft: int | None = None
    shortages: tuple[Shortage, ...] = ()


def plan_start(workers: int, descriptors: Descriptors, processes: Processes) -> Start:
    """How many of ``workers`` processes can be started, and the soft descriptor limit that takes."""
    shortages = []
    fit, soft = workers, None
    wanted = descriptors.used + DESCRIPTORS_KEPT + workers * DESCRIPTORS_PER_WORKER
    if wanted > descriptors.soft:
        soft = min(wanted, descriptors.hard) if descriptors.hard > descriptors.soft else None
        if wanted > descriptors.hard:
            fit = max(0, (descriptors.hard - descriptors.used - DESCRIPTORS_KEPT) // DESCRIPTORS_PER_WORKER)
            text = (
                f"{workers} workers need about {wanted} open files in the training process "
                f"({descriptors.used} are open now), and its hard limit is {descriptors.hard}"
            )
            remedy = (
                f"raise the limit to {wanted} or more: ulimit -Hn, nofile in /etc/security/limits.conf, "
                f"docker run --ulimit nofile={_round_up(wanted)}; or use fewer workers"
            )
            shortages.append(
                Shortage(resource="descriptors", wanted=wanted, free=descriptors.hard, text=text, remedy=remedy)
            )
    if processes.free is not None and workers > processes.free:
        fit = min(fit, max(0, processes.free))
        text = f"{workers} workers are asked for, and {processes.limit} allows {processes.free} more processes"
        remedy = (
            "raise it (ulimit -u; docker run --pids-limit; the pod's pid limit in Kubernetes), or use fewer workers"
        )
        shortages.append(Shortage(resource="processes", wanted=workers, free=processes.free, text=text, remedy=remedy))
    return Start(workers=fit, soft=soft, shortages=tuple(shortages))


def _round_up(number: int) -> int:
    """The next power of two, from 1,024 on."""
    return max(1024, 1 << (number - 1).bit_length())


@dataclass(frozen=True, kw_only=True)
class Room:
    """How many more workers a running pool may have.

    Attributes:
        workers: so many.
        reason: why not as many as were asked for; empty where there is room for them.
        soft: the soft descriptor limit to set first; None leaves it.
    """

    workers: int
    reason: str = ""
    soft: int | None = None


def plan_room(
    extra: int,
    *,
    descriptors: Descriptors,
    processes: Processes,
    memory: Memory,
    fraction: float,
    batch_bytes: int,
    worker_bytes: int,
    prefetch_factor: int,
    ranks: int = 1,
) -> Room:
    """How many of ``extra`` further workers fit beside those that run.

    Args:
        extra: workers to add.
        descriptors, processes, memory: as they are now.
        fraction: share of the memory to keep free.
        batch_bytes: size of a batch; each worker brings its lookahead and one batch more.
        worker_bytes: what a worker holds for itself.
        prefetch_factor: batches ahead per worker.
        ranks: processes of this job on this machine, which may all want more at the same time.
    """
    start = plan_start(extra, descriptors, processes)
    fit, reason = start.workers, start.shortages[-1].text if start.shortages else ""
    each = worker_bytes + (prefetch_factor + 1) * batch_bytes
    free = max(0, memory.free_bytes - headroom_bytes(memory, fraction)) // max(1, ranks)
    if fit * each > free:
        fit = free // each
        reason = (
            f"{gib(free)} of memory are free for this rank above the headroom, and a worker takes about {gib(each)}"
        )
    return Room(workers=fit, reason=reason, soft=start.soft if fit else None)


# --- memory -----------------------------------------------------------------------------------------------------------


def batches_held(workers: int, prefetch_factor: int) -> int:
    """How many batches exist at once: the lookahead, one more per worker while it crosses, and the trainer's own."""
    return workers * (prefetch_factor + 1) + 1


def headroom_bytes(memory: Memory, fraction: float) -> int:
    """How much of the memory should stay free."""
    return int(fraction * memory.limit_bytes)


def plan_arena_bytes(bound: int | None, memory: Memory, fraction: float, *, least: int = 0) -> int:
    """How much memory batches may take on their way from the workers: ``bound``, or by default half of what is free
    above the headroom at the start, and not less than ``least`` (before each growth the headroom is looked at)."""
    if bound is not None:
        return bound
    return max(least, int(ARENA_SHARE * (memory.free_bytes - headroom_bytes(memory, fraction))))


@dataclass(frozen=True, kw_only=True)
class Lookahead:
    """How far to load ahead, and with how many workers."""

    prefetch_factor: int
    workers: int
    shortage: Shortage | None = None


def plan_lookahead(
    *,
    prefetch_factor: int,
    workers: int,
    min_workers: int,
    batch_bytes: int,
    batches_here: int,
    memory: Memory,
    fraction: float,
) -> Lookahead:
    """The lookahead that leaves the headroom free: a lower prefetch first, then fewer workers.

    Args:
        prefetch_factor, workers: as planned.
        min_workers: fewer are no choice.
        batch_bytes: size of one batch, measured; 0 while unknown.
        batches_here: how many batches are there already, and are no longer free memory.
        memory: as it is now.
        fraction: share of it to keep free.
    """
    headroom = headroom_bytes(memory, fraction)

    def need(prefetch: int, number: int) -> int:
        return max(0, batches_held(number, prefetch) - batches_here) * batch_bytes

    wanted = headroom + need(prefetch_factor, workers)
    if wanted <= memory.free_bytes:
        return Lookahead(prefetch_factor=prefetch_factor, workers=workers)
    prefetch, number = prefetch_factor, workers
    while prefetch > 1 and headroom + need(prefetch, number) > memory.free_bytes:
        prefetch -= 1
    # Fewer workers help only where batches are what takes the memory; that it is low by itself is no reason.
    while batch_bytes and number > min_workers and headroom + need(prefetch, number) > memory.free_bytes > headroom:
        number -= 1
    return Lookahead(
        prefetch_factor=prefetch,
        workers=number,
        shortage=_memory_shortage(
            wanted, headroom, memory, fraction, batch_bytes, batches_held(workers, prefetch_factor)
        ),
    )


def _memory_shortage(
    wanted: int, headroom: int, memory: Memory, fraction: float, batch_bytes: int, batches: int
) -> Shortage:
    text = (
        f"only {gib(memory.free_bytes)} of {gib(memory.limit_bytes)} memory are free, and MemoryPolicy wants "
        f"{gib(headroom)} (headroom_fraction={fraction})"
    )
    if wanted > headroom:
        text += f" beside {gib(wanted - headroom)} for the rest of {batches} batches of {gib(batch_bytes)}"
    return Shortage(resource="memory", wanted=wanted, free=memory.free_bytes, text=text, remedy=REMEDY_MEMORY)


Relief = Literal["prefetch", "idle", "workers", "none"]


def plan_relief(*, prefetch_factor: int, workers: int, min_workers: int, can_shrink: bool, trimmed: bool) -> Relief:
    """What to give up next while memory is low in the middle of an epoch: lookahead first, then the memory that it took
    and that lies idle now, then a worker.

    Args:
        prefetch_factor, workers: as they are.
        min_workers: fewer are no choice.
        can_shrink: whether workers may be taken away.
        trimmed: whether idle memory was given back since the lookahead was lowered.
    """
    if prefetch_factor > 1:
        return "prefetch"
    if not trimmed:
        return "idle"
    return "workers" if can_shrink and workers > min_workers else "none"


def low_memory(memory: Memory, fraction: float) -> Shortage | None:
    """The shortage, when less than the headroom is free."""
    headroom = headroom_bytes(memory, fraction)
    return _memory_shortage(headroom, headroom, memory, fraction, 0, 0) if memory.free_bytes < headroom else None


# --- one worker -------------------------------------------------------------------------------------------------------


def plan_recycle(*, held_bytes: int, limit_bytes: int | None, finished: int) -> Literal["keep", "recycle", "too low"]:
    """Whether to replace a worker that holds ``held_bytes`` after ``finished`` tasks.

    Returns:
        "too low": it is over the bound, but so young that its successor would be, too.
    """
    if limit_bytes is None or held_bytes <= limit_bytes:
        return "keep"
    return "recycle" if finished >= RECYCLE_AFTER_TASKS else "too low"


# --- errors of the user's code that are the machine's -----------------------------------------------------------------

_HINTS = {
    errno.EMFILE: "this process has run out of file descriptors: raise the limit (ulimit -n; docker run --ulimit "
    "nofile=65536), or close files that a sample opens",
    errno.ENFILE: "the machine has run out of file descriptors: raise the sysctl fs.file-max, or use fewer workers",
    errno.ENOSPC: "a file system is full: free space on it; if it is /dev/shm, make it larger (docker run --shm-size; "
    "in Kubernetes an emptyDir volume with medium: Memory)",
    errno.EDQUOT: "a disk quota is used up: free space, or have it raised",
    errno.ENOMEM: "there is no memory left (or vm.max_map_count is reached): use fewer workers or a smaller "
    "prefetch_factor, or give the job more memory",
}


def exhaustion_hint(error: BaseException) -> str:
    """What has run out and what to do about it, where an error says that the machine has run out of something; else "".

    Such an error says nothing about the sample: it is worth a retry, and no reason to leave the sample out for good.
    """
    return _HINTS.get(error.errno or 0, "") if isinstance(error, OSError) else ""
