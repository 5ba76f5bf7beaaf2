"""What a loader's iterators have delivered: enough to say at any time where the loader stands."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from robustloader.decisions.keys import probe
from robustloader.decisions.spares import SpareReservoir
from robustloader.engine.streams import Standing, Streams
from robustloader.state import Delivered, LoaderState
from robustloader.worker.sameness import same_pickles

__all__ = ["Beginning", "Journal", "Mark", "Opened", "Progress", "Resumption", "ShardProgress"]

_MARK_BYTES = 4096
"""A sampler's state of up to this size is kept after each batch that it gives, one ``n`` times as large after every
``n``-th: what that costs a batch stays bounded, also where a sampler keeps a whole permutation in its state."""


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What an epoch began with: random states, the global ones and those of the loader's own generators, and the epoch
    that each sampler with ``set_epoch`` had been told."""

    streams: Streams
    generators: list[Any]
    sampler_epochs: tuple[int, ...] = ()


class Mark(NamedTuple):
    """A sampler's own state after one of its batches, pickled, and what the spares of later batches depend on.

    ``drain``: the state is of the epoch before; the sampler must be read to its end first.
    """

    state: bytes
    spares: tuple[Any, ...]
    drain: bool = False


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An epoch that was begun for an iterator, as the run that goes on here would have begun it.

    Attributes:
        indices: what the sampler yields.
        base_seed: the epoch's.
        opening: see :class:`LoaderState`.
    """

    indices: Iterator[Any]
    base_seed: int
    opening: str


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """An epoch that goes on.

    Attributes:
        state: where it stood.
        beginning: how it had begun.
        indices: what its sampler yields from there on.
        spares: what may replace bad samples, as it was there.
        reads: how often its sampler has been read.
        opened: where the generators stood when it had been opened.
        reading: None, or where they stood when its sampler was read for the first time, if elsewhere.
        mark: None, or the sampler's own state ``skipped`` batches before that.
        onward: where the global generators would be now, had the saved run not stopped before it read its sampler.
    """

    state: LoaderState
    beginning: Beginning
    indices: Iterator[Any]
    spares: SpareReservoir
    reads: int
    opened: Standing
    reading: Standing | None = None
    mark: Mark | None = None
    skipped: int = 0
    onward: Streams | None = None


@dataclass(slots=True)
class ShardProgress:
    """What was delivered of one shard of an iterable dataset; ``final``: after how many batches it has ended.

    ``untold``: what the user's ``state_dict`` raised where the snapshot should have been taken. ``end``: what the next
    epoch begins with in a process that stays; None where it cannot be told.
    """

    calls: int = 0
    batches: int = 0
    final: int | None = None
    rng: Any = None
    snapshot: bytes | None = None
    untold: str = ""
    end: bytes | None = None


@dataclass(slots=True, eq=False)
class Progress:
    """One epoch of one iterator. *Runs in* the thread that calls ``next()``.

    A delivery is entered when the next one comes or when somebody asks, unless the batch is ``held`` (a warning was
    raised in its place): the trainer has not got it then, and never will where the iterator is given up.

    Attributes:
        beginning: random states before the epoch began.
        workers: processes that it began with.
        sampler: the sampler that keeps its own state; ``marks`` are its states after some of the tasks read, from the
            last one below which all were delivered; a string is what its ``state_dict`` raised.
        batch_size: indices of a batch that is not the last.
        reads: how often the sampler was read, its end included.
        opened: where the generators stood when the epoch had been opened, for as long as its sampler is yet to be read.
        reading: None, or where they stood when it was first read, if elsewhere.
        ended: its state when the epoch was over, and the last one before that; ``before``: the same of the last epoch.
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
    marks: dict[int, Mark | str] = field(default_factory=dict)
    batch_size: int = 0
    reads: int = 0
    opened: Standing | None = None
    reading: Standing | None = None
    ended: tuple[bytes, Mark] | None = None
    before: tuple[bytes, Mark] | None = None
    stream: Any = None
    held: bool = False
    _pending: tuple[int, int, int, bool, bytes | str | None] | None = None
    _due: int = -1

    def read(self, task: int, spares: SpareReservoir, indices: Any = None) -> None:
        """The sampler was read for ``task``, and gave ``indices``; -1 before the first."""
        self.reads = max(self.reads, task + 1)
        if self.sampler is None or task < self._due:
            return
        # To know that a batch is the last, and shorter, torch's BatchSampler reads its sampler to the end. Many
        # samplers are at the beginning of the next epoch then, and their state says so: keep the one before.
        if isinstance(indices, list) and len(indices) < self.batch_size and not ends_in_place(self.sampler):
            return
        self._due = task + 1
        try:
            mark = Mark(pickle.dumps(self.sampler.state_dict(), pickle.HIGHEST_PROTOCOL), spares.mark)
        except Exception as error:  # no reason to end a run that may never ask for a state
            self.marks[task] = f"{type(error).__name__}: {error}"
            return
        if task < 0 and self.before is not None and same_pickles(self.before[0], mark.state):
            mark = Mark(self.before[1].state, mark.spares, drain=True)
        self.marks[task] = mark
        self._due = task + 1 + len(mark.state) // _MARK_BYTES

    def first_read(self, now: Standing) -> None:
        """The sampler is about to be read for the first time."""
        self.reading, self.opened = self.where_read(now), None

    def where_read(self, now: Standing) -> Standing | None:
        """What :attr:`reading` is, or would be if the sampler were read now."""
        if self.opened is None:
            return self.reading
        return None if now.is_at(self.opened) else now

    def latest_mark(self) -> tuple[int, Mark | str] | None:
        """The last state of the sampler that no undelivered batch has moved on, and the task it was taken after."""
        number = max((number for number in self.marks if number < self.delivered.count), default=None)
        return None if number is None else (number, self.marks[number])

    def finish(self) -> None:
        """The epoch has ended, and the trainer knows.

        A sampler may say "all read" from here on and mean this epoch (torchdata's does): whoever loads that would have
        an empty epoch next. Unless the sampler was changed since, a state goes back to its last batch and lets it find
        its end again.
        """
        self.finished = True
        self._enter()
        latest = self.latest_mark()
        if latest is None or isinstance(latest[1], str) or latest[1].drain:
            return
        with contextlib.suppress(Exception):  # whoever asks for a state will hear of it
            self.ended = pickle.dumps(self.sampler.state_dict(), pickle.HIGHEST_PROTOCOL), latest[1]

    def deliver(
        self, task: int, *, shard: int = 0, calls: int = 0, loaded: bool = True, snapshot: bytes | str | None = None
    ) -> None:
        """The trainer gets batch ``task``, or the error it came to; of an iterable dataset, that shard's next."""
        if self._pending is not None:
            self._enter()
        self._pending = (task, shard, calls, loaded, snapshot)

    def hold(self, held: bool) -> None:
        """Note that a batch is held from here on, or that the trainer gets it."""
        self.held = held

    def delivers(self, task: int) -> bool:
        """Whether ``task`` is what was delivered last."""
        return self._pending is not None and self._pending[0] == task

    def settle(self) -> None:
        """Enter what was delivered, unless the trainer has not got it yet."""
        if not self.held:
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
        if len(self.marks) > 1 and (latest := self.latest_mark()) is not None:
            for old in [number for number in self.marks if number < latest[0]]:
                del self.marks[old]


def ends_in_place(sampler: Any) -> bool:
    """Whether a sampler's state, when it has given its last index, says that and not where the next epoch begins."""
    return bool(probe(sampler, "ends_in_place"))


class Journal:
    """One per loader. An object of its own, so that no iterator need hold its loader.

    Attributes:
        progress: the epoch of the iterator created last; None before the first.
        loaded: a state that was loaded and of which no epoch has begun yet.
        beginning: the random states before the epoch that begins now.
        openings: how the loaded run would begin its next epoch, and how all later ones (see :class:`LoaderState`), or
            the run in which persistent workers could not be kept; None where neither was, so that the loader does as
            torch does.
        drained: the end of the epoch before the loaded state, as :attr:`Progress.ended` has it.
    """

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.loaded: LoaderState | None = None
        self.beginning: Beginning | None = None
        self.openings: tuple[str, str] | None = None
        self.drained: tuple[bytes, Mark] | None = None
        self._base_seed = 0

    @property
    def base_seed(self) -> int:
        """Of the epoch begun last, or of the state that was loaded since."""
        return self.loaded.base_seed if self.loaded is not None else self._base_seed

    def keep_opening(self) -> None:
        """The next epoch gets other workers than persistent ones of this epoch, and begins as it would with these: that
        workers died must not change its permutation."""
        if self.openings is None:
            self.openings = "i", "i"

    def begin(
        self,
        iterator: Any,
        *,
        epoch: int,
        opening: str,
        iterable: bool,
        sampler: Any,
        batch_size: int,
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
            batch_size=batch_size,
            before=self.drained if self.loaded is not None or self.progress is None else self.progress.ended,
        )
        iterator.note_held = progress.hold
        if iterable:
            progress.shards = [ShardProgress() for _ in range(max(1, progress.workers))]
        if resume is not None and state is not None:
            progress.delivered = Delivered(state.delivered, set(state.ahead))
            progress.next_shard = state.next_shard
            progress.reads, progress.reading = resume.reads, resume.reading
            if resume.mark is not None:
                progress.marks[state.delivered - 1 - resume.skipped] = resume.mark
                progress._due = state.delivered
        elif self.openings is not None:
            self.openings = (self.openings[1], self.openings[1])
        self.progress, self.loaded, self.drained = progress, None, None
        self._base_seed = progress.base_seed
        return progress

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "progress": None, "beginning": None}
