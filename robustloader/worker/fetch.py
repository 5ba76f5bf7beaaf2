"""Loading one task: torch's fetch order while all goes well, and repair, sample by sample, when something raises.

Runs in a worker process, or in the training process with ``num_workers=0`` or when no worker can be had. Nothing here
knows about processes: the result is an outcome, and the caller sends it or acts on it.
"""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from tenacity import RetryCallState, Retrying, retry_if_exception

from robustloader.decisions.isolation import find_misfits
from robustloader.decisions.keys import Key, as_list, count_indices, index_key
from robustloader.decisions.limits import exhaustion_hint
from robustloader.events import FaultAction, FaultKind
from robustloader.policies import RECORDED_AS, TRANSIENT, FaultPolicy
from robustloader.transport.messages import Fault, Fetch, Raised, Report, Trial
from robustloader.worker.beacon import COLLATE, ENCODE, ITEM, ITEMS, POSITION, Beacon
from robustloader.worker.seeding import preserve_rng

__all__ = ["Broken", "Ended", "IterableFetcher", "Loaded", "MapFetcher", "Outcome", "Plan", "Short", "make_fetcher"]

MAX_FAULTS_PER_FETCH = 64
"""A stream that raises at every step is reported after this many, so that the budget can end it."""


class Loaded(NamedTuple):
    """A collated batch of ``samples`` samples."""

    batch: Any
    samples: int
    report: Report | None


class Short(NamedTuple):
    """Not enough spares: ``avoid`` are the positions that still need one."""

    avoid: tuple[int, ...]
    report: Report


class Ended(NamedTuple):
    """The stream of an iterable dataset has ended."""

    report: Report | None


class Broken(NamedTuple):
    """An exception for the trainer. ``report.faults`` ends with the sample that raised it, where one is known."""

    error: BaseException
    report: Report


Outcome = Loaded | Short | Ended | Broken


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to load, for one loader and one process.

    Attributes:
        catches: what counts as a fault. In a worker that is ``BaseException``, because the signals that could raise
            one there are silenced, so only user code did; in the training process ``Exception``, so that Ctrl-C and a
            signal handler's ``sys.exit`` pass.
        where: torch's words for this process, for error messages.
        encode: what a batch must survive to get to the trainer; None in the training process.
    """

    dataset: Any
    iterable: bool
    batched: bool
    collate_fn: Callable[[Any], Any]
    drop_last: bool
    faults: FaultPolicy
    catches: type[BaseException] = Exception
    where: str = ""
    beacon: Beacon | None = None
    encode: Callable[[Any], Any] | None = None
    decode: Callable[[Any], Any] | None = None

    @property
    def strict(self) -> bool:
        """Whether the first exception of any kind is the trainer's, as with torch."""
        return self.faults.action == "raise" and self.faults.retry is None


def make_fetcher(plan: Plan) -> MapFetcher | IterableFetcher:
    """The fetcher for the plan's kind of dataset. For an iterable one this calls ``iter(dataset)``."""
    return IterableFetcher(plan) if plan.iterable else MapFetcher(plan)


class _Abort(Exception):
    """Leaves the repair with an exception that is the trainer's."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Bad(Exception):
    """A sample that failed for good."""

    def __init__(self, fault: Fault, error: BaseException) -> None:
        self.fault = fault
        self.error = error


# --- map-style --------------------------------------------------------------------------------------------------------


class MapFetcher:
    """Loads tasks of a map-style dataset.

    *Source*: ``_MapDatasetFetcher`` in ``torch/utils/data/_utils/fetch.py``, torch 2.13, for what is called when.
    """

    calls = 0

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def fetch(self, order: Fetch) -> Outcome:
        """Load one task."""
        if order.avoid or order.careful or order.verify:
            return _Repair(self.plan, order, []).run()
        values: list[Any] = []
        stage = ITEM
        plan, beacon = self.plan, self.plan.beacon
        dataset, indices = plan.dataset, order.indices
        try:
            if not plan.batched:
                if beacon:
                    beacon.enter(ITEM, run=order.run, task=order.task, position=0)
                data = dataset[indices]
                values.append(data)
            elif hasattr(dataset, "__getitems__") and dataset.__getitems__:
                stage = ITEMS
                if beacon:
                    beacon.enter(ITEMS, run=order.run, task=order.task, count=count_indices(indices))
                data = dataset.__getitems__(indices)
            else:
                data = values
                if beacon:
                    beacon.enter(ITEM, run=order.run, task=order.task, position=0)
                    cells = beacon.cells
                    for position, index in enumerate(indices):
                        cells[POSITION] = position
                        values.append(dataset[index])
                else:
                    for index in indices:
                        values.append(dataset[index])
            stage = COLLATE
            if beacon:
                beacon.enter(COLLATE, run=order.run, task=order.task, count=count_indices(indices))
            return Loaded(plan.collate_fn(data), count_indices(indices) if plan.batched else 1, None)
        except plan.catches as raised:
            error = raised
        # Outside the except, or every further exception of this task would carry this one as its context.
        try:
            if plan.strict:
                return self._broken(order, error, len(values) if stage == ITEM else -1)
            return _Repair(plan, order, values if stage == ITEM else [], error, stage).run()
        finally:
            del error  # its traceback holds this frame, and those of the callers

    def repair_unpicklable(self, order: Fetch, error: BaseException) -> Outcome:
        """The batch could not be encoded: find the samples at fault, and do without them."""
        return _Repair(self.plan, order, [], error, ENCODE).run()

    def trial(self, order: Trial) -> None:
        """Do everything to one sample that a batch would do to it. An exception means that it did not kill."""
        plan = self.plan
        self._enter(ITEM, order)
        try:
            value = _get_one(plan, order.index)
            self._enter(COLLATE, order)
            batch = plan.collate_fn([value] if plan.batched else value)
            self._enter(ENCODE, order)
            if plan.encode:
                plan.encode(batch)
        except plan.catches:
            return

    def _enter(self, phase: int, order: Trial) -> None:
        if self.plan.beacon:
            self.plan.beacon.enter(phase, run=order.run, task=order.task, position=order.position)

    def _broken(self, order: Fetch, error: BaseException, position: int) -> Broken:
        samples = as_list(order.indices, batched=self.plan.batched)
        index = samples[position] if 0 <= position < len(samples) else None
        kind: FaultKind = "exception"
        return Broken(error, Report((_fault(kind, index, position, error, 1, "raised", self.plan),)))


class _Repair:
    """Loads a task sample by sample, with retries, spares and isolation, as its fault policy says."""

    def __init__(
        self,
        plan: Plan,
        order: Fetch,
        loaded: list[Any],
        error: BaseException | None = None,
        stage: int = ITEM,
    ) -> None:
        self.plan = plan
        self.policy = plan.faults
        self.order = order
        self.error = error
        self.stage = stage
        self.samples = as_list(order.indices, batched=plan.batched)
        self.values: dict[int, Any] = dict(enumerate(loaded))
        self.first_error = {len(loaded): error} if error is not None and stage == ITEM else {}
        self.bad: list[int] = list(order.avoid)
        self.failed: set[int] = set(order.avoid)
        self.spares = iter(enumerate(order.spares))
        self.faults: list[Fault] = []
        self.replaced: dict[int, tuple[Any, Any]] = {}
        self.used: dict[int, Any] = dict(enumerate(self.samples))

    def run(self) -> Outcome:
        try:
            if not self.samples:
                raise _Abort(self.error if self.error is not None else IndexError("the batch sampler yielded no index"))
            self._load_all()
            return self._assemble()
        except _Abort as abort:
            return Broken(abort.error, self._report(()))
        finally:
            self.error, self.first_error = None, {}

    # --- samples

    def _load_all(self) -> None:
        beacon = self.plan.beacon
        if beacon:
            beacon.enter(ITEM, run=self.order.run, task=self.order.task, position=0)
        for position, index in enumerate(self.samples):
            if position in self.bad or position in self.values:
                continue
            try:
                self.values[position] = self._load(index, position, self.first_error.pop(position, None))
            except _Bad as bad:
                self._drop(position, bad)

    def _load(self, index: Any, position: int, error: BaseException | None = None) -> Any:
        """One sample, retried as the policy says; raises ``_Bad`` or ``_Abort``."""
        plan, retry = self.plan, self.policy.retry
        if plan.beacon:
            plan.beacon.sample(position)
        if error is None:
            try:
                value = _get_one(plan, index)
            except plan.catches as raised:
                error = raised
            else:
                return self._prove(value, index, position)
        attempts = 1
        if retry is not None and self._is_transient(error):
            pending: list[BaseException] = [error]

            def attempt() -> Any:
                if pending:
                    raise pending.pop()
                if plan.beacon:
                    plan.beacon.sample(position)
                return _get_one(plan, index)

            retrying = Retrying(
                stop=retry.stop, wait=_apart(retry.wait), retry=retry_if_exception(self._is_transient), reraise=True
            )
            try:
                value = retrying(attempt)
            except plan.catches as raised:
                first, error = error, raised
                attempts = int(retrying.statistics.get("attempt_number", 1))
                del first
            else:
                attempts = int(retrying.statistics.get("attempt_number", 1))
                self.faults.append(_fault("exception", index, position, error, attempts, "retried", plan, True))
                _let_go(error)
                return self._prove(value, index, position)
        if isinstance(error, self.policy.fatal):
            self.faults.append(_fault("exception", index, position, error, attempts, "raised", plan))
            raise _Abort(error)
        fault = _fault("exception", index, position, error, attempts, "raised", plan, self._is_transient(error))
        raise _Bad(fault, error)

    def _prove(self, value: Any, index: Any, position: int) -> Any:
        """See that a sample alone survives what its batch did not: collate and encode (deaths), encode, or decode."""
        plan, order = self.plan, self.order
        if order.careful and plan.beacon and plan.encode:
            try:
                with preserve_rng():  # the batch must come out as if nothing had been tried
                    plan.beacon.enter(COLLATE, run=order.run, task=order.task, position=position)
                    alone = plan.collate_fn([value] if plan.batched else value)
                    plan.beacon.enter(ENCODE, run=order.run, task=order.task, position=position)
                    plan.encode(alone)
            except plan.catches:
                pass  # exceptions are dealt with when the whole batch meets them
            plan.beacon.sample(position)
        if self.stage == ENCODE and plan.encode:
            try:
                plan.encode(value)
            except plan.catches as error:
                raise _Bad(_fault("unpicklable", index, position, error, 1, "raised", plan), error) from error
        if order.verify and plan.encode and plan.decode:
            try:
                plan.decode(plan.encode(value))
            except plan.catches as error:
                raise _Bad(_fault("undecodable", index, position, error, 1, "raised", plan), error) from error
        return value

    def _is_transient(self, error: BaseException) -> bool:
        retry = self.policy.retry
        passing = TRANSIENT if retry is None else retry.on
        if isinstance(error, self.policy.fatal):
            return False
        return isinstance(error, passing) or bool(exhaustion_hint(error))

    def _drop(self, position: int, bad: _Bad) -> None:
        """The sample at ``position`` is out."""
        self.values.pop(position, None)
        self.faults.append(bad.fault._replace(action=RECORDED_AS[self.policy.action]))
        if self.policy.action == "raise":
            raise _Abort(bad.error)
        _let_go(bad.error)
        self.bad.append(position)
        self.failed.add(position)

    # --- the batch

    def _assemble(self) -> Outcome:
        # Each round makes the batch or drops at least one sample, and spares are finite, so this ends.
        while True:
            if not self._fill():
                return Short(tuple(sorted(self.failed)), self._report(()))
            kept = sorted(self.values)
            skipped = tuple(p for p in range(len(self.samples)) if p not in self.values)
            values = [self.values[p] for p in kept]
            try:
                batch = self._collate(values)
            except self.plan.catches as error:
                misfits, batch = self._isolate(kept, error)
                if misfits:
                    continue
            if self.stage == ENCODE and self.plan.encode:
                # Every sample can be pickled and the batch still cannot: what collate_fn made of them is at fault.
                try:
                    self.plan.encode(batch)
                except self.plan.catches as error:
                    self._raise(kept, "unpicklable", error)
            return Loaded(batch, len(values), self._report(skipped) if self._remarkable(skipped) else None)

    def _collate(self, values: list[Any]) -> Any:
        plan, order = self.plan, self.order
        if plan.beacon:
            plan.beacon.enter(COLLATE, run=order.run, task=order.task, count=len(values))
        return plan.collate_fn(values if plan.batched else values[0])

    def _fill(self) -> bool:
        """Put spares where samples are missing, as far as the policy wants them; False when they ran out."""
        if self.policy.action == "skip":
            if self.values:
                self.bad = []
                return True
            self.bad = self.bad[:1]
        for position in sorted(self.bad):
            for number, spare in self.spares:
                if index_key(spare) in self._failed_keys():
                    continue
                try:
                    self.values[position] = self._load(spare, -1 - number)
                except _Bad as bad:
                    self.faults.append(bad.fault._replace(action="replaced", position=-1))
                    _let_go(bad.error)
                    continue
                self._replace(position, spare)
                break
            else:
                return False
        return True

    def _failed_keys(self) -> set[Key]:
        return {index_key(self.samples[position]) for position in self.failed}

    def _replace(self, position: int, spare: Any) -> None:
        self.bad.remove(position)
        self.replaced[position] = (self.samples[position], spare)
        self.used[position] = spare
        for place, fault in enumerate(self.faults):
            if fault.position == position and fault.action == "replaced":
                self.faults[place] = fault._replace(replacement=spare)

    def _isolate(self, kept: list[int], error: BaseException) -> tuple[list[int], Any]:
        """Find the samples that make ``collate_fn`` raise, and drop them; where there are none, the batch."""
        if isinstance(error, self.policy.fatal):
            self._raise(kept, "collate", error)
        misfits, batch = _misfits(self.plan, [self.values[position] for position in kept], self._collate)
        for place in misfits:
            position = kept[place]
            index = self.used[position]
            fault = _fault("collate", index, position, error, 1, "raised", self.plan)
            self.replaced.pop(position, None)
            self._drop(position, _Bad(fault, error))
        return misfits, batch

    def _raise(self, kept: list[int], kind: FaultKind, error: BaseException) -> NoReturn:
        index = self.used[kept[0]] if len(kept) == 1 else None
        self.faults.append(_fault(kind, index, -1, error, 1, "raised", self.plan))
        raise _Abort(error)

    def _remarkable(self, skipped: tuple[int, ...]) -> bool:
        return bool(self.faults or self.replaced or skipped)

    def _report(self, skipped: tuple[int, ...]) -> Report:
        return Report(tuple(self.faults), dict(self.replaced), skipped)


def _apart(wait: Callable[[RetryCallState], float]) -> Callable[[RetryCallState], float]:
    """The same pauses, but their jitter is nothing that a batch or the trainer draws next, nor that of other ranks."""

    def pause(state: RetryCallState) -> float:
        with preserve_rng():
            random.seed()  # from the system: ranks with a common seed must not try again all at once
            return wait(state)

    return pause


def _get_one(plan: Plan, index: Any) -> Any:
    """One sample by itself."""
    dataset = plan.dataset
    if plan.batched and hasattr(dataset, "__getitems__") and dataset.__getitems__:
        values = dataset.__getitems__([index])
        if isinstance(values, Sequence) and len(values) == 1:
            return values[0]
        # __getitems__ may return whatever its collate_fn understands; then only __getitem__ gives a sample.
    return dataset[index]


def _let_go(error: BaseException) -> None:
    """Forget which frames an error has passed, once its fault has their text: some of them hold the error in turn, and
    such a cycle keeps the samples, and in the training process the iterator, until a garbage collection.
    """
    link: BaseException | None = error
    while link is not None and link.__traceback__ is not None:
        link.__traceback__ = None
        link = link.__context__ if link.__cause__ is None else link.__cause__


def _misfits(plan: Plan, values: list[Any], collate: Callable[[list[Any]], Any]) -> tuple[list[int], Any]:
    """The samples, by their place, that make ``collate`` raise. It may work for all of them by now, whatever it was
    having passed: then the list is empty, and the batch that it made comes along. To ask for it once more might go on
    for ever, with one that fails every few calls.
    """
    if not plan.batched:
        return [0], None
    batch: Any = None

    def works(chosen: Sequence[int]) -> bool:
        nonlocal batch
        try:
            made = collate([values[place] for place in chosen])
        except plan.catches:
            return False
        if len(chosen) == len(values):
            batch = made
        return True

    misfits = find_misfits(len(values), works)
    return misfits, None if misfits else batch


def _fault(
    kind: FaultKind,
    index: Any,
    position: int,
    error: BaseException,
    attempts: int,
    action: FaultAction,
    plan: Plan,
    transient: bool = False,
) -> Fault:
    hint = "" if plan.strict else exhaustion_hint(error)
    if hint and hint not in getattr(error, "__notes__", ()):
        error.add_note(hint)
    raised = Raised.of(error, plan.where)
    return Fault(
        kind,
        index,
        position,
        raised.error_type,
        raised.message,
        raised.traceback,
        attempts,
        action,
        transient=transient or bool(hint),
        hint=hint,
    )


# --- iterable ---------------------------------------------------------------------------------------------------------


@dataclass
class IterableFetcher:
    """Loads tasks of an iterable dataset: the next samples of this process's stream, whatever the indices say.

    A sample that raises is lost (a stream cannot go back), and the stream goes on with the next.

    Attributes:
        calls: how often ``fetch`` has read a batch from the stream. As many calls put a successor where this one is.
        values: samples that were read for a batch that is not finished. Where a signal handler raised, the next call
            goes on with them.
        keeps: whether a batch may have to be put back, because an exception kept the trainer from getting it.
        loaded: None, or how many calls there were before the batch that was loaded last, and its samples.
        stream: what ``iter(dataset)`` returned.

    *Source*: ``_IterableDatasetFetcher`` in ``torch/utils/data/_utils/fetch.py``, torch 2.13.
    """

    plan: Plan
    ended: bool = False
    calls: int = 0
    stream: Iterator[Any] = field(init=False)
    values: list[Any] = field(default_factory=list)
    keeps: bool = False
    loaded: tuple[int, list[Any]] | None = None
    _collated: list[Any] = field(default_factory=list)
    _reason: str = ""

    def __post_init__(self) -> None:
        self.stream = iter(self.plan.dataset)

    def fetch(self, order: Fetch) -> Outcome:
        """Load one task."""
        outcome = self._fetch(order)
        self.calls += 1
        return outcome

    def _fetch(self, order: Fetch) -> Outcome:
        self._collated = []
        plan, beacon = self.plan, self.plan.beacon
        wanted = len(order.indices) if plan.batched else 1
        faults: list[Fault] = []
        if beacon:
            beacon.enter(ITEM, run=order.run, task=order.task, position=0)
        while True:
            broken = self._fill(wanted, faults)
            if broken is not None:
                self.values = []
                return broken
            if len(faults) >= MAX_FAULTS_PER_FETCH:
                return Short((), self._report(faults))
            values = self.values
            if not values or (plan.drop_last and plan.batched and len(values) < wanted):
                self.values = []
                return Ended(self._report(faults) if faults or self._reason else None)
            if beacon:
                beacon.enter(COLLATE, run=order.run, task=order.task, count=len(values))
            try:
                batch = plan.collate_fn(values if plan.batched else values[0])
            except plan.catches as error:
                if plan.strict or plan.faults.action == "raise" or isinstance(error, plan.faults.fatal):
                    faults.append(_fault("collate", None, -1, error, 1, "raised", plan))
                    self.values = []
                    return Broken(error, self._report(faults))
                misfits, batch = _misfits(plan, values, plan.collate_fn)
                if misfits:
                    faults.extend(_fault("collate", None, -1, error, 1, "skipped", plan) for _ in misfits)
                    out = set(misfits)
                    self.values = [value for place, value in enumerate(values) if place not in out]
                    continue
            if self.keeps:
                self.loaded = self.calls, values
            self.values = []
            self._collated = values if plan.batched and not plan.drop_last else []  # in case it cannot be encoded
            return Loaded(batch, len(values), self._report(faults) if faults or self._reason else None)

    def put_back(self) -> bool:
        """The batch that was loaded last got nowhere: the next call makes it again, of the same samples. False where
        there is none."""
        if self.loaded is None:
            return False
        (self.calls, self.values), self.loaded = self.loaded, None
        return True

    def let_go(self) -> None:
        """The batch that was loaded last will not be put back."""
        self.loaded = None

    def repair_unpicklable(self, order: Fetch, error: BaseException) -> Outcome:
        """The batch could not be encoded: a smaller one without the samples at fault, or the next where none is left.

        It is not filled up from the stream: a successor that reads the stream again encodes nothing, and would not read
        what this one had read in their place. With ``drop_last`` a smaller batch is none, so all of it is lost.
        """
        plan = self.plan
        values, self._collated = self._collated, []
        if plan.faults.action == "raise":
            return Broken(error, Report((_fault("unpicklable", None, -1, error, 1, "raised", plan),)))
        kept, faults = self._encodable(order, values)
        lost = tuple(faults) or (_fault("unpicklable", None, -1, error, 1, "skipped", plan),)
        if kept and faults:
            with contextlib.suppress(plan.catches):
                return Loaded(plan.collate_fn(kept), len(kept), Report(lost))
        again = self.fetch(order)
        return again._replace(report=_joined(lost, again.report))

    def _encodable(self, order: Fetch, values: list[Any]) -> tuple[list[Any], list[Fault]]:
        """The samples that can be encoded, each by itself, and a fault for each of the others."""
        plan, kept, faults = self.plan, [], []
        for position, value in enumerate(values):
            if plan.beacon:
                plan.beacon.enter(ENCODE, run=order.run, task=order.task, position=position)
            try:
                if plan.encode:
                    plan.encode(plan.collate_fn([value]))
                kept.append(value)
            except plan.catches as error:
                faults.append(_fault("unpicklable", None, -1, error, 1, "skipped", plan))
        return kept, faults

    def trial(self, order: Trial) -> None:
        """A stream has no sample to try."""

    def _fill(self, wanted: int, faults: list[Fault]) -> Broken | None:
        plan, beacon, policy = self.plan, self.plan.beacon, self.plan.faults
        while len(self.values) < wanted and not self.ended and len(faults) < MAX_FAULTS_PER_FETCH:
            if beacon:
                beacon.sample(len(self.values))
            try:
                self.values.append(next(self.stream))
            except StopIteration:
                self.ended = True
            except plan.catches as error:
                raises = policy.action == "raise" or isinstance(error, policy.fatal)
                faults.append(_fault("exception", None, -1, error, 1, "raised" if raises else "skipped", plan))
                if raises:
                    return Broken(error, Report(tuple(faults)))
                if inspect.isgenerator(self.stream) and self.stream.gi_frame is None:
                    # Python closes a generator that has raised: its next() would look like an ordinary end.
                    self.ended = True
                    self._reason = f"its generator raised {type(error).__name__} and cannot go on"
        return None

    def _report(self, faults: list[Fault]) -> Report:
        reason, self._reason = self._reason, ""
        return Report(tuple(faults), ended=reason)


def _joined(faults: tuple[Fault, ...], report: Report | None) -> Report:
    report = report or Report()
    return report._replace(faults=(*faults, *report.faults))
