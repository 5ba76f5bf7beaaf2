"""What a loader's iterators have delivered: enough to say at any time where the loader stands."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from robustloader.decisions.spares import SpareReservoir
from robustloader.engine.streams import Streams
from robustloader.state import Delivered, LoaderState

__all__ = ["Beginning", "Journal", "Progress", "Resumption", "ShardProgress"]


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """The random states before an epoch began: the global ones, and those of the loader's own generators."""

    streams: Streams
    generators: list[Any]


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """An epoch that goes on.

    Attributes:
        state: where it stood.
        beginning: how it had begun.
        indices: what its sampler yields from there on.
        spares: what may replace bad samples, as it was there.
        onward: where the global generators would be now, had the saved run not stopped before it read its sampler.
    """

    state: LoaderState
    beginning: Beginning
    indices: Iterator[Any]
    spares: SpareReservoir
    onward: Streams | None = None


@dataclass(slots=True)
class ShardProgress:
    """What was delivered of one shard of an iterable dataset; ``final``: after how many batches it has ended.

    ``untold``: what the user's ``state_dict`` raised where the snapshot should have been taken.
    """

    calls: int = 0
    batches: int = 0
    final: int | None = None
    rng: Any = None
    snapshot: bytes | None = None
    untold: str = ""


@dataclass(slots=True, eq=False)
class Progress:
    """One epoch of one iterator. *Runs in* the thread that calls ``next()``.

    A delivery is entered when the next one comes or when somebody asks, unless the iterator still ``holds`` the batch
    (a warning was raised in its place): the trainer has not got it then.

    Attributes:
        beginning: random states before the epoch began.
        workers: processes that it began with.
        sampler: the sampler that keeps its own state; ``marks`` are that state and the spares after each task read,
            from the last one below which all were delivered; a string is what its ``state_dict`` raised.
        stream: takes the snapshot of a stream in this process.
    """

    epoch: int
    base_seed: int
    opening: str
    beginning: Beginning
    workers: int
    iterable: bool
    sampler: Any = None
    finished: bool = False
    delivered: Delivered = field(default_factory=Delivered)
    shards: list[ShardProgress] = field(default_factory=list)
    next_shard: int = 0
    marks: dict[int, tuple[Any, Any] | str] = field(default_factory=dict)
    stream: Any = None
    holds: Callable[[], bool] = bool
    _pending: tuple[int, int, int, bool, bytes | str | None] | None = None

    def read(self, task: int, spares: SpareReservoir) -> None:
        """The sampler was read for ``task``; -1 before the first."""
        if self.sampler is None:
            return
        try:
            self.marks[task] = copy.deepcopy(self.sampler.state_dict()), spares.mark
        except Exception as error:  # no reason to end a run that may never ask for a state
            self.marks[task] = f"{type(error).__name__}: {error}"

    def deliver(
        self, task: int, *, shard: int = 0, calls: int = 0, loaded: bool = True, snapshot: bytes | str | None = None
    ) -> None:
        """The trainer gets batch ``task``, or the error it came to; of an iterable dataset, that shard's next."""
        if self._pending is not None:
            self._enter()
        self._pending = (task, shard, calls, loaded, snapshot)

    def settle(self) -> None:
        """Enter what was delivered, unless the trainer has not got it yet."""
        if not self.holds():
            self._enter()

    def _enter(self) -> None:
        if self._pending is None:
            return
        task, number, calls, loaded, snapshot = self._pending
        self._pending = None
        if self.iterable:
            self.delivered.count += 1
            if number < 0:  # an error that no shard was read for
                return
            shard = self.shards[number]
            shard.calls = max(shard.calls, calls)
            shard.batches += loaded
            if isinstance(snapshot, bytes):
                shard.snapshot, shard.untold = snapshot, ""
            elif snapshot is not None:
                shard.untold = snapshot
            self.next_shard = (number + 1) % len(self.shards)
            return
        self.delivered.add(task)
        if self.marks:
            for old in [number for number in self.marks if number < self.delivered.count - 1]:
                del self.marks[old]


class Journal:
    """One per loader. An object of its own, so that no iterator need hold its loader.

    Attributes:
        progress: the epoch of the iterator created last; None before the first.
        loaded: a state that was loaded and of which no epoch has begun yet.
        beginning: the random states before the epoch that begins now.
    """

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.loaded: LoaderState | None = None
        self.beginning: Beginning | None = None

    def begin(
        self,
        iterator: Any,
        *,
        epoch: int,
        opening: str,
        iterable: bool,
        sampler: Any,
        resume: Resumption | None,
    ) -> Progress:
        """An iterator begins an epoch."""
        state = resume.state if resume is not None else None
        beginning = resume.beginning if resume is not None else self.beginning
        assert beginning is not None
        progress = Progress(
            epoch=epoch,
            base_seed=iterator.base_seed,
            opening=opening if state is None else state.opening,
            beginning=beginning,
            workers=iterator.num_workers if state is None else state.workers,
            iterable=iterable,
            sampler=sampler,
        )
        owner = weakref.ref(iterator)
        progress.holds = lambda: (held := owner()) is not None and held.holds_batch
        if iterable:
            progress.shards = [ShardProgress() for _ in range(max(1, progress.workers))]
        if state is not None:
            progress.delivered = Delivered(state.delivered, set(state.ahead))
            progress.next_shard = state.next_shard
        self.progress, self.loaded = progress, None
        return progress

    def __getstate__(self) -> dict[str, Any]:
        return {"progress": None, "loaded": self.loaded, "beginning": None}
