"""`RobustDataLoader`: torch's DataLoader for jobs that run for days."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any, Generic, Literal, Self, TypeVar, cast, get_args

from torch.utils.data import Dataset, Sampler

from robustloader.decisions.adaptation import Adaptation
from robustloader.decisions.keys import probe
from robustloader.decisions.workers import AutoWorkers
from robustloader.engine.faults import FaultDesk
from robustloader.engine.inprocess import InProcessIterator
from robustloader.engine.iterator import MultiprocessIterator
from robustloader.engine.options import EngineOptions, EpochCounter, Measured
from robustloader.engine.progress import Journal
from robustloader.engine.resume import (
    begin_next,
    capture,
    check_generators,
    describe,
    load_objects,
    note_beginning,
    open_next,
    reopen,
    stateful_sampler,
)
from robustloader.engine.streams import Continuation, decode_streams
from robustloader.errors import OptionError, StateError, warn_user
from robustloader.events import FaultKind
from robustloader.policies import (
    Action,
    FaultPolicy,
    MemoryPolicy,
    RecoveryPolicy,
    Seeding,
    TelemetryPolicy,
    Transport,
    check_choice,
)
from robustloader.state import LoaderState, check_setting
from robustloader.system import host, limits, torch_private
from robustloader.telemetry import EpochSummary, FaultLog, Recorder, Statistics

__all__ = ["RobustDataLoader"]

T_co = TypeVar("T_co", covariant=True)

_POLICIES = {"recovery": RecoveryPolicy, "memory": MemoryPolicy, "telemetry": TelemetryPolicy}
_CHOICES = {"seeding": get_args(Seeding), "transport": get_args(Transport)}

_BUILT_UPON = {"faults": "_desk", "telemetry": "_recorder"}
"""Options that are read once, and what was made of them."""

_BOOKS = ("_desk", "_recorder", "_epochs", "_journal", "_continuation", "_measured", "_adaptation")
"""What a loader keeps of its run; the rest of it is what it was made of."""


class RobustDataLoader(torch_private.HookedDataLoader, Generic[T_co]):
    """A drop-in for ``torch.utils.data.DataLoader`` that survives bad samples and dying workers.

    All of torch's arguments, in torch's order and with torch's meaning, and these, by keyword only. With nothing
    failing, the batches are those of torch's loader, bit for bit.

    Args:
        faults: what to do with a sample that raises: a :class:`FaultPolicy`, or one of "replace" and "skip" (with that
            policy's other defaults) and "raise" (as torch: no retry, the first exception is the trainer's).
        recovery: what to do when a worker dies or hangs: a :class:`RecoveryPolicy`; None raises, as torch does.
        memory: what to do when memory runs short: a :class:`MemoryPolicy`; None does not look.
        telemetry: what to tell, and whom: a :class:`TelemetryPolicy`; None keeps only plain counters.
        seeding: "worker" gives torch's random streams. "batch" (map-style datasets) seeds Python, NumPy and torch
            before each batch from the base seed, the epoch and the batch number, so that a batch is the same whoever
            loads it, with any number of workers.
        transport: how batches cross between processes: "arena" (shared memory that workers fill and the training
            process reads in place), "pipe" (copied through a socket), or "auto": the arena where the system has memfd.
        num_workers: besides torch's numbers, "auto": to begin with as many as there are processors to use, for all the
            ranks of this machine (``LOCAL_WORLD_SIZE``) together. With a map-style dataset, the loader then adds
            workers while the loop waits and processors are idle, and lets those go that bring nothing; each such step
            is an event (:class:`PoolResized`) and a line of the summary. The attribute stays what it was;
            ``active_workers`` tells how many there are.
        kwargs: passed on to torch's constructor, for parameters that a newer torch may have.

    *Runs in* the training process, in whichever thread calls ``iter`` and ``next``; one thread at a time per iterator.

    Raises:
        OptionError: one of our arguments is wrong; torch's own arguments raise torch's own errors.
    """

    def __init__(
        self,
        dataset: Dataset[T_co],
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Sampler[Any] | Iterable[Any] | None = None,
        batch_sampler: Sampler[list[Any]] | Iterable[list[Any]] | None = None,
        num_workers: int | Literal["auto"] = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: Any = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        faults: FaultPolicy | Action = "replace",
        recovery: RecoveryPolicy | None = RecoveryPolicy(),  # noqa: B008 - frozen
        memory: MemoryPolicy | None = MemoryPolicy(),  # noqa: B008 - frozen
        telemetry: TelemetryPolicy | None = TelemetryPolicy(),  # noqa: B008 - frozen
        seeding: Seeding = "worker",
        transport: Transport = "auto",
        **kwargs: Any,
    ) -> None:
        if isinstance(num_workers, AutoWorkers) or num_workers == "auto":
            num_workers = AutoWorkers.resolve(host.usable_cpus(), limits.local_world_size())
        if isinstance(num_workers, str) and num_workers.strip().lower() == "auto":  # other words are torch's business
            raise OptionError("num_workers", num_workers, 'a number, or "auto"')
        super().__init__(
            dataset,
            batch_size,
            shuffle,
            sampler,
            batch_sampler,
            num_workers,
            collate_fn,
            pin_memory,
            drop_last,
            timeout,
            worker_init_fn,
            multiprocessing_context,
            generator,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            pin_memory_device=pin_memory_device,
            in_order=in_order,
            **kwargs,
        )
        # Frameworks rebuild loaders from their public attributes: each holds what the constructor takes.
        self.faults = faults
        self.recovery = recovery
        self.memory = memory
        self.telemetry = telemetry
        self.seeding = seeding
        self.transport = transport
        self._desk = FaultDesk(fault_policy(faults))
        self._recorder = Recorder(telemetry)
        self._epochs = EpochCounter()
        self._journal = Journal()
        self._continuation = Continuation()
        self._measured = Measured()
        self._adaptation: Adaptation | None = None
        if isinstance(num_workers, AutoWorkers) and not torch_private.is_iterable(self):
            least = recovery.min_workers if recovery is not None else 1
            self._adaptation = Adaptation(workers=num_workers, cores=num_workers, least=least)
        self._iterators: weakref.WeakSet[Any] = weakref.WeakSet()

    def __setattr__(self, name: str, value: Any) -> None:
        """torch's loader refuses to have set what it has been built upon, and so does this one; its other options may
        be set, and count from the next iterator on."""
        if _BUILT_UPON.get(name) in self.__dict__:
            raise ValueError(
                f"{name} attribute should not be set after {type(self).__name__} is initialized; "
                "give it to the constructor"
            )
        if name in _POLICIES:
            check_policy(name, value, _POLICIES[name])
        elif name in _CHOICES:
            check_choice(name, value, _CHOICES[name])
        super().__setattr__(name, value)

    # --- iterating

    def __iter__(self) -> Any:
        """Begin an epoch; after ``load_state_dict``, go on with the one that was saved."""
        loaded = self._journal.loaded
        if loaded is not None and loaded.begun:
            self.drop_iterator()
            self._continuation.heed()
            iterator = super().__iter__()
            self._continuation.mark()
            return iterator
        if loaded is not None and loaded.moves_datasets:  # persistent workers have datasets of a later state
            self.drop_iterator()
        with self._continuation.in_place():
            self._journal.beginning = note_beginning(self)
            iterator = super().__iter__()
            if self._continuation.active and isinstance(iterator, InProcessIterator):
                iterator.prime()
            return iterator

    def make_iterator(self) -> Any:
        """A new iterator over one epoch; ``iter(loader)`` calls it."""
        if torch_private.is_datapipe(self.dataset):
            warn_datapipe()
            return self.make_torch_iterator()
        state = self._journal.loaded
        resume = opened = None
        if state is not None and state.begun:
            resume = reopen(self, state, self._desk)
            self._epochs.jump(state.epoch)
            if resume.onward is not None:
                self._continuation.go_on(resume.onward)
        else:
            if self._journal.beginning is None:
                self._journal.beginning = note_beginning(self)
            opened = open_next(self, self._journal)
        size = probe(self.batch_sampler, "batch_size")  # of a user's batch sampler it may be anything
        options = EngineOptions(
            faults=self._desk.policy,
            recovery=self.recovery,
            memory=self.memory,
            seeding=self.seeding,
            transport=self.transport,
            desk=self._desk,
            recorder=self._recorder,
            epochs=self._epochs,
            journal=self._journal,
            resume=resume,
            opened=opened,
            stateful_sampler=stateful_sampler(self),
            iterable=torch_private.is_iterable(self),
            batched=torch_private.auto_collation(self),
            batch_size=int(size) if isinstance(size, Integral) else 0,
            dataset=self.dataset,
            measured=self._measured,
            adaptation=self._adaptation,
        )
        iterator: InProcessIterator | MultiprocessIterator
        # What an iterable epoch began without workers has no shards to share out: its rest is loaded without them too.
        alone = resume is not None and options.iterable and resume.state.workers == 0
        try:
            if self.num_workers == 0 or alone:
                iterator = InProcessIterator(self, options)
            else:
                self.check_worker_number_rationality()  # type: ignore[no-untyped-call,unused-ignore]
                iterator = MultiprocessIterator(self, options)
        except BaseException:
            if resume is not None:  # nobody got anything of the epoch: whoever tries again goes on with it
                self._journal.loaded = state
            raise
        self._iterators.add(iterator)
        return iterator

    # --- resume

    def state_dict(self) -> dict[str, Any]:
        """Where the iterator created last stands, counted in batches that were delivered.

        A fresh plain dict for ``torch.save``, ``torch.distributed.checkpoint`` or, where the indices and users' own
        states allow it, JSON; 30 to 60 kB, whatever the size of the dataset. Starts no worker and reads no data. Right
        between two batches, from the thread that iterates.

        Raises:
            StateError: the dataset is one of torch's DataPipes, or what the sampler or an iterable dataset says of its
                own state could not be had when it was asked.
        """
        self._refuse_datapipe()
        return capture(
            self, self._journal, self._desk, self._continuation.view(), upcoming=self._epochs.upcoming
        ).to_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next ``iter(loader)`` go on where a loader like this one was when ``state_dict()`` was called.

        It yields what was left of that epoch, which is nothing where only the end had not been seen yet; the epoch
        after that is a full one. Any number of workers will do. The rest of an iterable epoch is loaded by as many
        workers as it began with, or by the training process where either number is 0. What keeps its own state
        (sampler, batch sampler, map-style dataset) and the loader's generator are given it back; the global random
        generators are left alone. Only indices are walked through, when the epoch goes on; an iterable dataset that
        keeps no state of its own is read again from the beginning of the epoch.

        Raises:
            StateError: the state is of another schema, or of a loader with another kind or length of dataset, batch
                size, ``drop_last`` or sampler. Nothing has been changed then.
        """
        self._refuse_datapipe()
        state = LoaderState.from_dict(state_dict)
        check_setting(state, describe(self, state))
        check_generators(self, state)
        load_objects(self, state)
        self._journal.drained = None
        if not state.begun:
            begin_next(self, state, self._journal)
        self._epochs.jump(state.epoch)
        for key, kind in state.quarantine:
            self._desk.quarantine.restore(key, cast(FaultKind, kind))
        self._desk.budget.faults, self._desk.budget.samples = state.faults, state.samples
        self._continuation.begin(decode_streams(state.streams_now))
        self._journal.loaded = state
        self._journal.openings = state.openings[0], state.openings[1]

    def _refuse_datapipe(self) -> None:
        if torch_private.is_datapipe(self.dataset):
            raise StateError("DataPipes are loaded by torch's own iterator, which has no state: use a dataset instead")

    # --- what happened

    def summary(self, epoch: int = -1) -> EpochSummary:
        """The summary of an epoch, counted from 0; by default of the one begun last.

        ``print(loader.summary())`` shows a table. An epoch that still runs is told of as far as it got, with
        ``complete=False``.

        Raises:
            IndexError: there is no such epoch (any more), or telemetry is off.
        """
        return self._recorder.summary(epoch)

    @property
    def summaries(self) -> tuple[EpochSummary, ...]:
        """All kept summaries, oldest first; ``TelemetryPolicy.history`` says how many are kept."""
        return self._recorder.summaries

    def statistics(self) -> Statistics:
        """Where the running epoch stands; cheap, at any time, from any thread."""
        return self._recorder.statistics()

    @property
    def fault_log(self) -> FaultLog:
        """Every sample that failed, oldest first, as far as they are kept."""
        return self._recorder.fault_log

    @property
    def active_workers(self) -> int:
        """Worker processes now alive, over all of this loader's iterators; 0 means that the training process loads."""
        return sum(iterator.active_workers for iterator in list(self._iterators))

    # --- copies

    def __copy__(self) -> Self:
        """A loader around the same dataset and samplers, which counts for itself from here on."""
        twin = type(self).__new__(type(self))
        books = copy.deepcopy({name: self.__dict__[name] for name in _BOOKS})
        twin.__setstate__({**self.__getstate__(), **books})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # Iterators belong to this process and this object.
        return {**super().__getstate__(), "_iterators": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__["_iterators"] = weakref.WeakSet()


def fault_policy(faults: FaultPolicy | Action) -> FaultPolicy:
    """The policy that the ``faults`` argument stands for."""
    if isinstance(faults, FaultPolicy):
        return faults
    if not isinstance(faults, str) or faults not in get_args(Action):
        raise OptionError("faults", faults, "a FaultPolicy, or one of 'raise', 'skip', 'replace'")
    return FaultPolicy(action="raise", retry=None) if faults == "raise" else FaultPolicy(action=faults)


def check_policy(name: str, value: object, kind: type) -> None:
    """Raise unless ``value`` is a ``kind`` or None."""
    if value is not None and not isinstance(value, kind):
        raise OptionError(name, value, f"a {kind.__name__}, or None to turn it off")


def warn_datapipe() -> None:
    """Say that DataPipes get torch's own iterator."""
    warn_user(
        "the dataset is one of torch's (deprecated) DataPipes: torch's own iterator loads it, without fault capture, "
        "recovery or telemetry"
    )
