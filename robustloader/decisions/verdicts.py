"""What the facts of a machine mean for a loader: one verdict per line, and what to do about it.

Pure rules over plain numbers; :func:`robustloader.doctor` collects the facts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from robustloader.decisions.limits import (
    Descriptors,
    Memory,
    Processes,
    SharedMemory,
    batches_held,
    gib,
    headroom_bytes,
    plan_lookahead,
    plan_start,
    shm_remedy,
)

__all__ = ["Check", "HostFacts", "SampleFacts", "Verdict", "judge_host", "torch_batches_in_shm"]

Verdict = Literal["ok", "warning", "problem"]

SMALL_SHM_BYTES = 64 << 20
"""What Docker and Kubernetes give a container unless told otherwise."""

MANY_DESCRIPTORS = 4_096
"""A soft limit from here on leaves room for torch's one descriptor per tensor in ordinary use."""

SCARCE_FRACTION = 0.02
"""With less memory than this free the kernel's memory killer is about to strike."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of a report.

    Attributes:
        name: what was looked at.
        verdict: "ok"; "warning": it costs speed, or stops torch's loader, or may bite one day; "problem": a loader as
            planned would fail.
        finding: what was found, with the numbers.
        remedy: what to change; "" where nothing need be.
        facts: the numbers, in bytes and counts.
    """

    name: str
    verdict: Verdict
    finding: str
    remedy: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SampleFacts:
    """What one batch of the user's dataset was like.

    Attributes:
        batch_bytes: its size.
        tensors: how many tensors and arrays it holds.
        load_s: how long a worker took to load it.
        worker_bytes: the most resident memory of that worker.
    """

    batch_bytes: int
    tensors: int
    load_s: float
    worker_bytes: int


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """The facts of a machine and of a plan.

    Attributes:
        cpus, ranks: usable processors, and how many trainers of this machine share them.
        memory, shared, descriptors, processes: as their classes say; ``shared`` is None without ``/dev/shm``.
        kills_group: the memory killer takes the whole control group.
        start_methods, sharing, container: as in ``system/limits.py``.
        pidfd: whether the kernel lets a process be watched by descriptor.
        workers, prefetch_factor, batch_size: the plan.
        headroom_fraction: share of the memory to keep free.
        sample: one batch of the user's dataset; None where none was given.
    """

    cpus: int
    ranks: int
    memory: Memory
    shared: SharedMemory | None
    descriptors: Descriptors
    processes: Processes
    kills_group: bool
    start_methods: tuple[str, ...]
    sharing: str
    container: str
    pidfd: bool
    workers: int
    prefetch_factor: int
    batch_size: int | None
    headroom_fraction: float = 0.1
    sample: SampleFacts | None = None


def judge_host(facts: HostFacts) -> tuple[Check, ...]:
    """One check per limit; with a batch measured, more of them on what is planned."""
    checks = [
        _processors(facts),
        _memory(facts),
        _group_kill(facts),
        _shared_memory(facts),
        _stale(facts),
        *_starting(facts),
        _how_started(facts),
        _watching(facts),
    ]
    if facts.sample is not None:
        checks += _planned(facts, facts.sample)
    return tuple(check for check in checks if check is not None)


def torch_batches_in_shm(workers: int, prefetch_factor: int) -> int:
    """How many batches torch's loader has in ``/dev/shm`` at once: its lookahead, and the one the trainer holds.

    *Source*: ``_MultiProcessingDataLoaderIter``, torch 2.13: ``prefetch_factor × num_workers`` tasks are out, a new one
    is given out before a batch is returned, and each worker moves its batches' storages to shared memory.
    """
    return workers * prefetch_factor + 1


# --- the machine ------------------------------------------------------------------------------------------------------


def _processors(facts: HostFacts) -> Check:
    share = max(1, facts.cpus // facts.ranks)
    shared = f", shared by {facts.ranks} ranks" if facts.ranks > 1 else ""
    finding = f"{facts.cpus} usable (affinity and quota){shared}; {facts.workers} workers are planned"
    numbers = {"usable": facts.cpus, "ranks": facts.ranks, "workers": facts.workers}
    if facts.workers > share:
        remedy = f'num_workers={share} or "auto": more than there are processors only pays where loading waits for I/O'
        return Check(name="processors", verdict="warning", finding=finding, remedy=remedy, facts=numbers)
    return Check(name="processors", verdict="ok", finding=finding, facts=numbers)


def _memory(facts: HostFacts) -> Check:
    memory = facts.memory
    where = "the host" if memory.source == "host" else "the control group"
    finding = f"{gib(memory.free_bytes)} free of the {gib(memory.limit_bytes)} of {where}"
    numbers = {"free_bytes": memory.free_bytes, "limit_bytes": memory.limit_bytes, "source": memory.source}
    verdict: Verdict = "ok"
    if memory.free_bytes < headroom_bytes(memory, facts.headroom_fraction):
        finding += f", less than the headroom of {facts.headroom_fraction:.0%}"
        verdict = "problem" if memory.free_bytes < SCARCE_FRACTION * memory.limit_bytes else "warning"
    remedy = "" if verdict == "ok" else "end what else runs here, or give the job more memory"
    return Check(name="memory", verdict=verdict, finding=finding, remedy=remedy, facts=numbers)


def _group_kill(facts: HostFacts) -> Check | None:
    if not facts.kills_group:
        return None
    remedy = "set memory.oom.group to 0"
    if facts.container == "kubernetes":
        remedy += "; in Kubernetes the kubelet's singleProcessOOMKill: true"
    finding = "memory.oom.group is set: a worker that runs out of memory takes the training process along"
    return Check(name="memory killer", verdict="warning", finding=finding, remedy=remedy)


def _shared_memory(facts: HostFacts) -> Check:
    shared = facts.shared
    remedy = shm_remedy(facts.container)
    if shared is None:
        finding = "there is none: torch's loader cannot pass tensors; batches of this one do not need it"
        return Check(name="/dev/shm", verdict="warning", finding=finding, remedy=remedy)
    finding = f"{gib(shared.free_bytes)} free of {gib(shared.size_bytes)}"
    numbers = {"free_bytes": shared.free_bytes, "size_bytes": shared.size_bytes}
    small = shared.size_bytes <= SMALL_SHM_BYTES
    if small or shared.free_bytes < facts.headroom_fraction * shared.size_bytes:
        finding += ": little for torch's loader, or for a dataset that shares memory itself; batches here do not use it"
        return Check(name="/dev/shm", verdict="warning", finding=finding, remedy=remedy, facts=numbers)
    return Check(name="/dev/shm", verdict="ok", finding=finding, facts=numbers)


def _stale(facts: HostFacts) -> Check | None:
    shared = facts.shared
    if shared is None or not shared.stale:
        return None
    names = " ".join(f"/dev/shm/{name}" for name in shared.stale[:3])
    more = f" (and {len(shared.stale) - 3} more)" if len(shared.stale) > 3 else ""
    finding = f"{len(shared.stale)} entries of dead processes take {gib(shared.stale_bytes)} of /dev/shm"
    numbers = {"entries": list(shared.stale), "bytes": shared.stale_bytes}
    return Check(name="left behind", verdict="warning", finding=finding, remedy=f"rm {names}{more}", facts=numbers)


def _starting(facts: HostFacts) -> Iterator[Check]:
    """Open files and processes."""
    descriptors, processes = facts.descriptors, facts.processes
    plan = plan_start(facts.workers, descriptors, processes)
    short = {shortage.resource: shortage for shortage in plan.shortages}
    finding = f"{descriptors.used} open, soft limit {descriptors.soft}, hard limit {descriptors.hard}"
    numbers = {"used": descriptors.used, "soft": descriptors.soft, "hard": descriptors.hard}
    verdict: Verdict = "ok"
    remedy = ""
    if shortage := short.get("descriptors"):
        verdict, remedy = "problem", shortage.remedy
        finding += f": room for {plan.workers} of {facts.workers} workers"
    elif plan.soft is not None:
        verdict, remedy = "warning", f"ulimit -n {plan.soft}; MemoryPolicy raises it by itself, torch's loader does not"
        finding += f": {facts.workers} workers need {plan.soft}"
    elif descriptors.soft < MANY_DESCRIPTORS:
        finding += ": torch's loader may need more, it keeps one open per tensor; this one does not"
        remedy = f"for torch: ulimit -n {min(descriptors.hard, 65_536)}"
    yield Check(name="open files", verdict=verdict, finding=finding, remedy=remedy, facts=numbers)
    finding = f"{processes.limit} allows {processes.free} more" if processes.free is not None else "no limit"
    shortage = short.get("processes")
    yield Check(
        name="processes",
        verdict="problem" if shortage else "ok",
        finding=finding + (f", {facts.workers} workers are planned" if shortage else ""),
        remedy=shortage.remedy if shortage else "",
        facts={"free": processes.free},
    )


def _how_started(facts: HostFacts) -> Check:
    first, *others = facts.start_methods
    kind = "no container" if facts.container == "none" else f"in {facts.container}"
    finding = f"{first} (also {', '.join(others)}); torch's sharing strategy is {facts.sharing}; {kind}"
    numbers = {"start_methods": list(facts.start_methods), "sharing": facts.sharing, "container": facts.container}
    return Check(name="start method", verdict="ok", finding=finding, facts=numbers)


def _watching(facts: HostFacts) -> Check | None:
    if facts.pidfd:
        return None
    finding = "pidfd_open is refused: a worker's death is noticed late while a process it started lives"
    remedy = "Linux 5.3 or later, and a seccomp profile that allows pidfd_open (Docker's does since 20.10)"
    return Check(name="pidfd", verdict="warning", finding=finding, remedy=remedy)


# --- the plan ---------------------------------------------------------------------------------------------------------


def _planned(facts: HostFacts, sample: SampleFacts) -> Iterator[Check]:
    tensors = f"{sample.tensors} tensor{'' if sample.tensors == 1 else 's'}"
    yield Check(
        name="batch",
        verdict="ok",
        finding=f"{gib(sample.batch_bytes)} in {tensors}, loaded in {sample.load_s:.3g} s by one worker",
        facts={"bytes": sample.batch_bytes, "tensors": sample.tensors, "load_s": sample.load_s},
    )
    yield _batches(facts, sample)
    yield _torch_shm(facts, sample)
    yield _torch_descriptors(facts, sample)


def _batches(facts: HostFacts, sample: SampleFacts) -> Check:
    workers, prefetch = facts.workers, facts.prefetch_factor
    number = batches_held(workers, prefetch)
    finding = (
        f"{workers} workers × prefetch_factor={prefetch} hold up to {number} batches, "
        f"{gib(number * sample.batch_bytes)}"
    )
    plan = plan_lookahead(
        prefetch_factor=prefetch,
        workers=workers,
        min_workers=1,
        batch_bytes=sample.batch_bytes,
        batches_here=0,
        memory=facts.memory,
        fraction=facts.headroom_fraction,
    )
    numbers = {"batches": number, "bytes": number * sample.batch_bytes, "worker_bytes": sample.worker_bytes}
    if plan.shortage is None:
        return Check(name="lookahead", verdict="ok", finding=finding, facts=numbers)
    fits = (batches_held(plan.workers, plan.prefetch_factor) * sample.batch_bytes) <= facts.memory.free_bytes
    remedy = f"num_workers={plan.workers}, prefetch_factor={plan.prefetch_factor}" + (
        "" if fits else ", and smaller batches: not even that fits"
    )
    finding += f": more than is free above the headroom of {facts.headroom_fraction:.0%}"
    return Check(
        name="lookahead", verdict="warning" if fits else "problem", finding=finding, remedy=remedy, facts=numbers
    )


def _torch_shm(facts: HostFacts, sample: SampleFacts) -> Check:
    number = torch_batches_in_shm(facts.workers, facts.prefetch_factor)
    wanted = number * sample.batch_bytes
    free = facts.shared.free_bytes if facts.shared is not None else 0
    numbers = {"wanted_bytes": wanted, "free_bytes": free}
    need = f"would put {number} batches, {gib(wanted)}, into /dev/shm"
    if facts.workers and wanted > free:
        finding = (
            f"{need}, where {gib(free)} are free: it would die with 'No space left on device' or a bus error "
            "(SIGBUS). This loader does not use /dev/shm"
        )
        remedy = shm_remedy(facts.container) + ", or use RobustDataLoader"
        return Check(name="torch's loader", verdict="warning", finding=finding, remedy=remedy, facts=numbers)
    return Check(name="torch's loader", verdict="ok", finding=f"{need}, and fits", facts=numbers)


def _torch_descriptors(facts: HostFacts, sample: SampleFacts) -> Check:
    number = torch_batches_in_shm(facts.workers, facts.prefetch_factor) * sample.tensors
    free = facts.descriptors.soft - facts.descriptors.used
    numbers = {"wanted": number, "free": free}
    finding = f"would keep about {number} descriptors open, one per tensor (sharing strategy {facts.sharing})"
    if facts.sharing == "file_descriptor" and number > free:
        finding += f", and {free} are free: 'received 0 items of ancdata' or 'Too many open files'"
        remedy = f"for torch: ulimit -n {facts.descriptors.used + number + 64}"
        return Check(name="torch's files", verdict="warning", finding=finding, remedy=remedy, facts=numbers)
    return Check(name="torch's files", verdict="ok", finding=finding, facts=numbers)
