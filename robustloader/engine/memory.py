"""The machine's limits, looked at before they bite: measures, lets the pure rules decide, and does what they say.

Runs in the training process, in the thread that calls ``iter`` and ``next``.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import time
from dataclasses import replace

from robustloader.decisions.limits import (
    Lookahead,
    Memory,
    Relief,
    Room,
    Shortage,
    exhaustion_hint,
    gib,
    headroom_bytes,
    low_memory,
    plan_arena_bytes,
    plan_lookahead,
    plan_relief,
    plan_room,
    plan_start,
    shm_remedy,
)
from robustloader.decisions.tuning import OVERSUBSCRIPTION
from robustloader.engine.options import Measured
from robustloader.errors import ResourceError, warn_user
from robustloader.events import MemoryLow
from robustloader.policies import MemoryPolicy, Transport
from robustloader.system import limits
from robustloader.system.mapping import SharedMapping
from robustloader.telemetry import EpochRecording
from robustloader.transport.arena import ArenaLimits

__all__ = ["UNSIZED_PREFETCH", "MemoryGuard", "arena_limits"]

logger = logging.getLogger("robustloader")

LOOK_EVERY_NS = 1_000_000_000
"""Reading the control group's files takes some 50 µs: once a second is nothing, and soon enough where batches are."""

UNSIZED_PREFETCH = 2
"""Tasks each worker is given while no batch of this loader has been seen: torch's default ``prefetch_factor``. How much
more may be under way is known when the first one tells its size; by then quick workers would have loaded them all."""

_LEAST_ARENA_BYTES = 64 * 1024 * 1024


class MemoryGuard:
    """One per iterator.

    Args:
        policy: None looks at nothing.
        measured: what earlier epochs of the loader have shown.
        min_workers: the pool does not shrink below this.
        can_shrink: whether workers may be taken away; a stream would have to be read again.
    """

    def __init__(self, policy: MemoryPolicy | None, measured: Measured, *, min_workers: int, can_shrink: bool) -> None:
        self.policy = policy
        self.measured = measured
        self._min_workers = min_workers
        self._can_shrink = can_shrink
        self._sized = False
        self._told = False
        self._trimmed = False
        self._due_ns = 0

    # --- before workers are started

    def before_start(self, workers: int, *, recovers: bool) -> tuple[int, ResourceError | None]:
        """How many of ``workers`` processes to start, and why not all. Raises the soft descriptor limit if need be.

        Args:
            workers: as the loader was told.
            recovers: whether fewer will do.

        Raises:
            ResourceError: they cannot all be started, and the policy says to raise, or fewer will not do.
        """
        policy = self.policy
        if policy is None:
            return workers, None
        descriptors = limits.open_descriptors()
        plan = plan_start(workers, descriptors, limits.read_processes())
        if plan.soft is not None and policy.on_low == "adapt":
            limits.raise_descriptor_limit(plan.soft)
            logger.info("raised the soft limit of open files from %d to %d", descriptors.soft, plan.soft)
        shortages = list(plan.shortages)
        if plan.soft is not None and policy.on_low != "adapt" and not shortages:
            shortages = [_soft_limit(workers, descriptors.used, descriptors.soft, plan.soft)]
        if not shortages:
            return workers, None
        error = _resource_error(shortages)
        if policy.on_low == "raise" or (policy.on_low == "adapt" and not recovers):
            raise error
        self._warn(shortages[0], f". {plan.workers} are started" if policy.on_low == "adapt" else "")
        return (plan.workers, error) if policy.on_low == "adapt" else (workers, None)

    def explain(self, error: BaseException) -> ResourceError | None:
        """What running out of descriptors or memory while setting up means, for the trainer."""
        if self.policy is None or not isinstance(error, OSError):
            return None
        hint = exhaustion_hint(error)
        if not hint:
            return None
        counts = limits.open_descriptors() if error.errno == errno.EMFILE else None
        numbers = f" ({counts.used} of {counts.soft} descriptors are open)" if counts else ""
        return ResourceError(
            f"the workers cannot be set up: {error}{numbers}. Remedy: {hint}", wanted_bytes=0, free_bytes=0, remedy=hint
        )

    # --- before an epoch, and with its first batch

    @property
    def awaits_size(self) -> bool:
        """Whether nothing is known yet of how large this loader's batches are, and it matters."""
        return self.policy is not None and not self.measured.batch_bytes

    def begin_epoch(self, prefetch_factor: int, workers: int, recording: EpochRecording) -> int:
        """The ``prefetch_factor`` to begin an epoch with, given how much memory is free.

        Raises:
            ResourceError: too little is, and the policy says to raise.
        """
        self._sized = self._told = self._trimmed = False
        self._due_ns = time.monotonic_ns() + LOOK_EVERY_NS
        if self.policy is None:
            return prefetch_factor
        memory = _read_memory()
        if memory is None:
            return prefetch_factor
        return self._plan(prefetch_factor, workers, 0, memory, recording).prefetch_factor

    def batch_arrived(
        self, nbytes: int, *, prefetch_factor: int, workers: int, batches_here: int, recording: EpochRecording
    ) -> Lookahead | None:
        """Take note of a batch's size. With the first of an epoch, or the first with which memory can be read,
        the lookahead to go on with; else None.

        Raises:
            ResourceError: the batches to come do not fit, and the policy says to raise.
        """
        if nbytes > self.measured.batch_bytes:
            self.measured.batch_bytes = nbytes
        if self._sized or self.policy is None:
            return None
        memory = _read_memory()
        if memory is None:
            return None
        self._sized = True
        return self._plan(prefetch_factor, workers, batches_here, memory, recording)

    def check_shared_memory(self, pids: list[int], recording: EpochRecording) -> None:
        """Warn where ``/dev/shm`` is nearly full and the dataset's own code uses it. Batches here never do.

        Raises:
            ResourceError: that is so, and the policy says to raise.
        """
        policy = self.policy
        if policy is None:
            return
        shared = limits.read_shared_memory(look_for_stale=False)
        if shared is None or shared.free_bytes >= policy.headroom_fraction * shared.size_bytes:
            return
        if any(map(limits.maps_shared_memory, pids)):
            self._report(_full_shared_memory(shared.free_bytes, shared.size_bytes, policy), recording, "")

    def _plan(
        self, prefetch_factor: int, workers: int, batches_here: int, memory: Memory, recording: EpochRecording
    ) -> Lookahead:
        policy = self.policy
        assert policy is not None
        plan = plan_lookahead(
            prefetch_factor=prefetch_factor,
            workers=workers,
            min_workers=self._min_workers if self._can_shrink else workers,
            batch_bytes=self.measured.batch_bytes,
            batches_here=batches_here,
            memory=memory,
            fraction=policy.headroom_fraction,
        )
        asked = Lookahead(prefetch_factor=prefetch_factor, workers=workers)
        if plan.shortage is None:
            return asked
        action = ""
        if policy.on_low == "adapt":
            if plan.prefetch_factor < prefetch_factor:
                action = f". This epoch prefetches {_batches(plan.prefetch_factor)} per worker"
            if plan.workers < workers:
                action += f"{' and' if action else '. This epoch'} goes on with {plan.workers} of {workers} workers"
        self._report(plan.shortage, recording, action)
        return plan if policy.on_low == "adapt" else asked

    # --- before further workers are started

    def room(self, extra: int, *, prefetch_factor: int, worker_bytes: int, ranks: int) -> Room:
        """How many of ``extra`` further workers fit now. Raises the soft descriptor limit if need be and allowed.

        Looks also where the policy is None: whoever chooses the number of workers answers for what they take.
        """
        policy = self.policy
        try:
            descriptors, processes = limits.open_descriptors(), limits.read_processes()
            memory = limits.read_memory()
        except OSError as error:  # a batch is on its way to the loop: this must not be in its way
            return Room(workers=0, reason=f"what is free cannot be read: {error}")
        if policy is None or policy.on_low != "adapt":  # the soft limit stays what it is
            descriptors = replace(descriptors, hard=min(descriptors.hard, descriptors.soft))
        room = plan_room(
            extra,
            descriptors=descriptors,
            processes=processes,
            memory=memory,
            fraction=(policy or MemoryPolicy()).headroom_fraction,
            batch_bytes=self.measured.batch_bytes,
            worker_bytes=worker_bytes,
            prefetch_factor=prefetch_factor,
            ranks=ranks,
        )
        if room.soft is not None:
            limits.raise_descriptor_limit(room.soft)
            logger.info("raised the soft limit of open files from %d to %d", descriptors.soft, room.soft)
        return room

    # --- while it runs

    def due(self, now_ns: int) -> bool:
        """Whether it is time to look again."""
        return self.policy is not None and now_ns >= self._due_ns

    def look(
        self, now_ns: int, *, prefetch_factor: int, workers: int, settled: bool, recording: EpochRecording
    ) -> tuple[Relief, str]:
        """What to give up now, because memory has become low, and why.

        Args:
            now_ns: time, by the monotonic clock.
            prefetch_factor, workers: as they are.
            settled: whether the last relief has had its effect.
            recording: of the epoch.

        Raises:
            ResourceError: memory is low, and the policy says to raise.
        """
        policy = self.policy
        self._due_ns = now_ns + LOOK_EVERY_NS
        if policy is None or not settled:
            return "none", ""
        memory = _read_memory()
        shortage = low_memory(memory, policy.headroom_fraction) if memory is not None else None
        if shortage is None:
            self._trimmed = self._trimmed and memory is None  # by the next shortage something may lie idle again
            return "none", ""
        relief: Relief = "none"
        if policy.on_low == "adapt":
            relief = plan_relief(
                prefetch_factor=prefetch_factor,
                workers=workers,
                min_workers=self._min_workers,
                can_shrink=self._can_shrink,
                trimmed=self._trimmed,
            )
        self._trimmed = relief != "prefetch" and (self._trimmed or relief == "idle")
        if relief == "idle":  # costs nothing: nothing to tell
            return relief, shortage.text
        if relief == "none" and self._told:
            return "none", ""
        self._told = self._told or relief == "none"
        action = {
            "prefetch": ". From now on one batch per worker is prefetched",
            "workers": f". One of {workers} workers leaves",
            "none": "",
        }[relief]
        self._report(shortage, recording, action)
        return relief, shortage.text

    def recycling_is_vain(self, held_bytes: int) -> None:
        """Say that ``max_worker_bytes`` is below what a fresh worker needs."""
        policy = self.policy
        assert policy is not None
        if "max_worker_bytes" not in self.measured.warned:
            self.measured.warned.add("max_worker_bytes")
            warn_user(
                f"a worker holds {held_bytes:,} bytes after its first few tasks, more than "
                f"MemoryPolicy(max_worker_bytes={policy.max_worker_bytes:,}) allows: each will be replaced again and "
                "again. Raise it"
            )

    def _report(self, shortage: Shortage, recording: EpochRecording, action: str) -> None:
        policy = self.policy
        assert policy is not None
        recording.emit(
            MemoryLow(
                epoch=recording.epoch,
                wanted_bytes=shortage.wanted,
                free_bytes=shortage.free,
                action=policy.on_low,
                remedy=shortage.remedy,
            )
        )
        if policy.on_low == "raise":
            raise _resource_error([shortage])
        self._warn(shortage, action)

    def _warn(self, shortage: Shortage, action: str) -> None:
        """Warn once per kind of shortage; afterwards the log tells."""
        text = f"{shortage.text}; {shortage.remedy}{action}"
        if shortage.resource in self.measured.warned:
            logger.warning("%s", text)
            return
        self.measured.warned.add(shortage.resource)
        warn_user(text)


def _read_memory() -> Memory | None:
    """Memory as it is now; None where there is no descriptor left to read it with: another time."""
    try:
        return limits.read_memory()
    except OSError:
        return None


def _batches(number: int) -> str:
    return "one batch" if number == 1 else f"{number} batches"


def _soft_limit(workers: int, used: int, soft: int, wanted: int) -> Shortage:
    text = (
        f"{workers} workers need about {wanted} open files in the training process ({used} are open now), and its soft "
        f"limit is {soft}"
    )
    return Shortage(
        resource="descriptors",
        wanted=wanted,
        free=soft,
        text=text,
        remedy=f'ulimit -n {wanted} or more, or MemoryPolicy(on_low="adapt"), which raises it',
    )


def _full_shared_memory(free: int, size: int, policy: MemoryPolicy) -> Shortage:
    wanted = int(policy.headroom_fraction * size)
    return Shortage(
        resource="shared memory",
        wanted=wanted,
        free=free,
        text=f"only {gib(free)} of {gib(size)} in /dev/shm are free, and the dataset's own code keeps memory there",
        remedy=shm_remedy(limits.container_kind()),
    )


def _resource_error(shortages: list[Shortage]) -> ResourceError:
    first = shortages[0]
    in_bytes = first.resource in ("memory", "shared memory")
    return ResourceError(
        "; ".join(f"{shortage.text}. Remedy: {shortage.remedy}" for shortage in shortages),
        wanted_bytes=first.wanted if in_bytes else 0,
        free_bytes=first.free if in_bytes else 0,
        remedy="; ".join(shortage.remedy for shortage in shortages),
    )


def _processors() -> int:
    """This rank's share of the machine's."""
    return max(1, limits.usable_cpus() // limits.local_world_size())


def arena_limits(
    transport: Transport, policy: MemoryPolicy | None, num_workers: int, *, resizes: bool = False
) -> tuple[ArenaLimits | None, str]:
    """How large each worker's arena may get; None, and why, where batches have to go through the sockets.

    All arenas together get ``MemoryPolicy.max_arena_bytes``, or half of what is free beyond the policy's headroom.

    Args:
        transport, policy: as the loader was told.
        num_workers: that are started.
        resizes: ``num_workers="auto"``. There may come to be several times as many workers as processors. A bound of
            the user's holds then, too; the default is shared out as if there were one for each processor: pools that
            are larger have batches that take long and little memory, and the headroom is looked at before each growth.

    Raises:
        ResourceError: ``transport="arena"`` was asked for, and the system has no shared memory of this kind.
    """
    allowed = policy or MemoryPolicy()
    if transport == "pipe" or allowed.max_arena_bytes == 0:
        return None, ""
    try:
        os.close(SharedMapping.create(mmap.PAGESIZE)[1])
    except (OSError, AttributeError) as error:
        reason = f"the system refuses shared memory through memfd: {error}"
        if transport == "arena":
            remedy = 'use transport="auto" or "pipe"'
            raise ResourceError(
                f"{reason}; {remedy}", wanted_bytes=mmap.PAGESIZE, free_bytes=0, remedy=remedy
            ) from error
        return None, reason
    memory = limits.read_memory()
    shares = num_workers
    if resizes:
        shares = max(shares, _processors() * (1 if allowed.max_arena_bytes is None else OVERSUBSCRIPTION))
    together = plan_arena_bytes(
        allowed.max_arena_bytes, memory, allowed.headroom_fraction, least=_LEAST_ARENA_BYTES * shares
    )
    return ArenaLimits(together // shares, headroom_bytes(memory, allowed.headroom_fraction)), ""
