"""Saving where a loader stands, and going on from there. Walks through indices only; never reads data."""

from __future__ import annotations

import collections
import contextlib
import copy
import itertools
import pickle
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler, SequentialSampler

from robustloader.decisions.keys import as_list, once_only, probe
from robustloader.decisions.spares import SpareReservoir
from robustloader.engine.faults import FaultDesk
from robustloader.engine.progress import Beginning, Journal, Mark, Opened, Progress, Resumption, ShardProgress
from robustloader.engine.streams import (
    Standing,
    Streams,
    all_samplers,
    decode_generator,
    decode_streams,
    encode_generator,
    encode_streams,
    own_generators,
)
from robustloader.errors import StateError, warn_user
from robustloader.state import LoaderState, Setting, ShardState
from robustloader.system import torch_private
from robustloader.worker.sameness import same_pickles
from robustloader.worker.seeding import preserve_rng, restore_rng, rng_states
from robustloader.worker.stateful import StreamSnapshot, is_stateful, put_at_end, state_of, take_snapshot

__all__ = [
    "begin_next",
    "capture",
    "check_generators",
    "describe",
    "load_objects",
    "note_beginning",
    "open_next",
    "reopen",
    "shard_progress",
    "stateful_sampler",
]

_WALK = 1 << 16
"""Indices read at a time: large enough for array arithmetic, small against any dataset worth walking through."""


def describe(loader: Any, state: LoaderState | None = None) -> Setting:
    """What a loader's states depend on.

    Args:
        state: one to be compared. Samplers may have another length in each epoch that they are told, so theirs is that
            of the state's epoch; None between two epochs, where nobody knows which one is next.
    """
    iterable = torch_private.is_iterable(loader)
    reads = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    # torch's batch sampler means the same whether it was given or made of the loader's arguments.
    plain = reads if type(reads) is BatchSampler else loader
    chooser = reads if type(reads) is not BatchSampler else reads.sampler
    return Setting(
        kind="iterable" if iterable else "map",
        dataset_length=_length(loader.dataset) if not iterable else None,
        batch_size=plain.batch_size,
        drop_last=bool(plain.drop_last),
        sampler="" if iterable else type(chooser).__qualname__,
        sampler_length=None if iterable or stateful_sampler(loader) is not None else _steps(loader, reads, state),
    )


def _length(thing: Any) -> int | None:
    try:
        return len(thing)
    except Exception:  # a user's __len__
        return None


def _steps(loader: Any, reads: Any, state: LoaderState | None) -> int | None:
    """The length of what a loader reads its tasks from."""
    samplers = _with_epochs(loader)
    told = tuple(sampler.epoch for sampler in samplers)
    varies = any(sampler is reads or _may_vary(sampler) for sampler in samplers)
    if varies and state is not None and not state.begun:
        return None
    _tell_epochs(loader, state.sampler_epochs if state is not None else ())
    try:
        return len(reads)
    except Exception:  # there may be none before its first epoch
        return None
    finally:
        _tell_epochs(loader, told)


def _may_vary(sampler: Any) -> bool:
    """Whether a sampler may have another length in each epoch, as none of torch's has."""
    module = probe(probe(type(sampler), "__len__"), "__module__")
    return not (isinstance(module, str) and module.startswith("torch."))


def stateful_sampler(loader: Any) -> Any:
    """The sampler that keeps its own state: the batch sampler, what it draws from, or neither (None)."""
    batch_sampler = loader.batch_sampler
    for sampler in (batch_sampler, probe(batch_sampler, "sampler"), loader.sampler):
        if sampler is not None and is_stateful(sampler):
            return sampler
    return None


def note_beginning(loader: Any) -> Beginning:
    """What an epoch is about to begin with."""
    return Beginning(
        streams=rng_states(),
        generators=[generator.get_state() for generator in own_generators(loader)],
        sampler_epochs=tuple(int(sampler.epoch) for sampler in _with_epochs(loader)),
    )


def _with_epochs(loader: Any) -> list[Any]:
    """The samplers that are told which epoch begins, as torch's ``DistributedSampler`` is."""
    return [
        sampler
        for sampler in all_samplers(loader)
        if callable(probe(sampler, "set_epoch")) and isinstance(probe(sampler, "epoch"), int)
    ]


def _tell_epochs(loader: Any, epochs: tuple[int, ...]) -> None:
    """Frameworks that resume tell the samplers too late which epoch it is, or begin at 0 again."""
    for sampler, epoch in zip(_with_epochs(loader), epochs, strict=False):
        if sampler.epoch != epoch:
            sampler.set_epoch(epoch)


# --- saving


def capture(loader: Any, journal: Journal, desk: FaultDesk, streams: Streams, *, upcoming: int) -> LoaderState:
    """Where a loader stands now. Reads no data and starts nothing.

    Args:
        streams: the global generators' states, as the next epoch would see them.
        upcoming: the number of the next epoch.
    """
    if journal.loaded is not None:
        return copy.deepcopy(journal.loaded)
    setting, progress = describe(loader), journal.progress
    if progress is not None:
        progress.settle()
    common: dict[str, Any] = {
        **{name: getattr(setting, name) for name in setting.__dataclass_fields__},
        "streams_now": encode_streams(streams),
        "generators_now": tuple(encode_generator(generator.get_state()) for generator in own_generators(loader)),
        "quarantine": tuple(desk.quarantine.added.items()),
        "faults": desk.budget.faults,
        "samples": desk.budget.samples,
        "base_seed": journal.base_seed,
        "openings": loader.natural_openings() if journal.openings is None else journal.openings,
    }
    iterable = setting.kind == "iterable"
    if progress is None or progress.finished:
        sampler = stateful_sampler(loader)
        told, ended = state_of(sampler), None if progress is None else progress.ended
        drain = ended is not None and same_pickles(pickle.dumps(told[0], pickle.HIGHEST_PROTOCOL), ended[0])
        if drain and ended is not None:
            told = (pickle.loads(ended[1].state),)
        ends = _ends(loader, progress) if iterable and progress is not None else ()
        return LoaderState(
            epoch=upcoming if progress is None else progress.epoch + 1,
            begun=False,
            workers=progress.workers if progress is not None and ends else 0,
            shards=ends,
            sampler_state=told,
            sampler_drain=drain,
            dataset_state=state_of(loader.dataset),
            **common,
        )
    reading = progress.where_read(Standing.of(own_generators(loader)))
    read, mark = progress.latest_mark() or (0, None)
    if isinstance(mark, str):
        raise StateError(f"the sampler's own state_dict() failed, so nobody knows where it stood: {mark}", found=mark)
    return LoaderState(
        epoch=progress.epoch,
        begun=True,
        delivered=progress.delivered.count,
        ahead=tuple(sorted(progress.delivered.ahead)),
        opening=progress.opening,
        streams=encode_streams(progress.beginning.streams),
        generators=tuple(map(encode_generator, progress.beginning.generators)),
        reading=() if reading is None else reading.encode(),
        sampler_reads=progress.reads,
        sampler_epochs=progress.beginning.sampler_epochs,
        workers=progress.workers,
        shards=tuple(_shard_state(shard, progress.stream) for shard in progress.shards),
        next_shard=progress.next_shard,
        sampler_state=() if mark is None else (pickle.loads(mark.state),),
        sampler_skip=0 if mark is None else progress.delivered.count - 1 - read,
        sampler_drain=mark is not None and mark.drain,
        dataset_state=() if iterable else state_of(loader.dataset),
        spares=() if mark is None else (*mark.spares[:3], [list(map(_plain_index, row)) for row in mark.spares[3]]),
        **common,
    )


def _ends(loader: Any, progress: Progress) -> tuple[ShardState, ...]:
    """What the shards of an epoch that is over leave to the next one: the one shard of this process, or those of
    workers that stay."""
    if not progress.workers:
        return (ShardState(ended=True),)
    if loader.natural_openings()[0] != "i" or not any(shard.end for shard in progress.shards):
        return ()
    return tuple(ShardState(ended=True, snapshot=_plain(shard.end)) for shard in progress.shards)


def _shard_state(shard: ShardProgress, stream: Any) -> ShardState:
    if shard.final is not None and shard.batches >= shard.final:
        return ShardState(calls=shard.calls, batches=shard.batches, ended=True, snapshot=_plain(shard.end))
    taken: StreamSnapshot | None = None
    if stream is not None:  # of this process: it stands where the trainer is, or one batch ahead
        taken = take_snapshot(stream, with_rng=False, delivered=shard.calls)
    elif shard.untold:
        raise StateError(
            f"state_dict() of the dataset, or of its iterator, failed in a worker: {shard.untold}", found=shard.untold
        )
    elif shard.snapshot is not None:
        taken = pickle.loads(shard.snapshot)
    needed = shard.rng is not None and (taken is None or taken.rng is None)
    return ShardState(
        calls=shard.calls,
        batches=shard.batches,
        streams=encode_streams(shard.rng) if needed else (),
        snapshot=_plain(taken),
    )


def _plain_index(index: Any) -> Any:
    """NumPy's indices as Python's: ``torch.load`` takes plain values alone by default, and so does JSON."""
    if isinstance(index, (np.integer, np.str_)):
        return index.item()
    return tuple(map(_plain_index, index)) if type(index) is tuple else index


def _plain(snapshot: StreamSnapshot | bytes | None) -> tuple[Any, ...]:
    """A snapshot as a state has it."""
    taken: StreamSnapshot | None = pickle.loads(snapshot) if isinstance(snapshot, bytes) else snapshot
    if taken is None:
        return ()
    streams = () if taken.rng is None else encode_streams(taken.rng)
    return (taken._replace(rng=None)._asdict() | {"rng": streams},)


# --- loading


def shard_progress(shard: ShardState) -> ShardProgress:
    """The same shard again."""
    snapshot = None
    if shard.snapshot:
        plain = dict(shard.snapshot[0])
        streams = tuple(plain.pop("rng"))
        for name in ("dataset", "stream", "values"):
            plain[name] = tuple(plain.get(name, ()))
        taken = StreamSnapshot(**plain, rng=decode_streams(streams) if streams else None)
        snapshot = pickle.dumps(taken, pickle.HIGHEST_PROTOCOL)
        if shard.ended:  # one that was not taken at the very end is of no more use
            return ShardProgress(shard.calls, shard.batches, shard.batches, end=snapshot if taken.over else None)
    return ShardProgress(
        calls=shard.calls,
        batches=shard.batches,
        final=shard.batches if shard.ended else None,
        rng=decode_streams(shard.streams) if shard.streams else None,
        snapshot=snapshot,
    )


def load_objects(loader: Any, state: LoaderState) -> None:
    """Give the user's own objects their states back."""
    if state.sampler_state and stateful_sampler(loader) is None:
        raise StateError(
            "the state holds a sampler's own state, but this loader's sampler has no load_state_dict: construct the "
            "loader with the sampler of the saved run",
            expected="a sampler with load_state_dict",
            found=type(loader.sampler).__qualname__,
        )
    _load_sampler(loader, state)
    if state.dataset_state and is_stateful(loader.dataset):
        if not state.begun and state.shards and not state.workers:
            put_at_end(loader.dataset, state.dataset_state[0])
        else:
            loader.dataset.load_state_dict(copy.deepcopy(state.dataset_state[0]))


def _load_sampler(loader: Any, state: LoaderState) -> None:
    if state.sampler_state:
        stateful_sampler(loader).load_state_dict(copy.deepcopy(state.sampler_state[0]))


def begin_next(loader: Any, state: LoaderState, journal: Journal) -> None:
    """Put the loader's own generators, and its sampler, where they were when a state between two epochs was saved."""
    _set_generators(loader, state.generators_now)
    if state.sampler_drain:
        _drain(loader)
        with contextlib.suppress(Exception):  # the sampler's state_dict: whoever asks for a state will hear of it
            ended = pickle.dumps(stateful_sampler(loader).state_dict(), pickle.HIGHEST_PROTOCOL)
            journal.drained = ended, Mark(pickle.dumps(state.sampler_state[0], pickle.HIGHEST_PROTOCOL), ())
    _tell_epochs(loader, state.sampler_epochs)


def open_next(loader: Any, journal: Journal) -> Opened | None:
    """Begin a whole epoch as the run that goes on here would; None where there is no such run, or torch's way will do.

    What is drawn from the generators, and how often ``iter()`` is called on the sampler, decides the permutation. An
    iterable dataset has none.
    """
    if journal.openings is None or torch_private.is_iterable(loader):
        return None
    opening, base_seed = journal.openings[0], journal.base_seed
    indices: Iterator[Any] = iter(())
    for step in opening:
        if step == "i":
            indices = iter(_reads(loader))
        else:
            base_seed = torch_private.draw_base_seed(loader)
    return Opened(indices=indices, base_seed=base_seed, opening=opening)


def _drain(loader: Any) -> None:
    """Read a sampler to the end of the epoch that its state is of."""
    with preserve_rng():
        collections.deque(map(once_only, _reads(loader)), maxlen=0)


def _reads(loader: Any) -> Any:
    """What a loader reads its tasks from."""
    return loader.batch_sampler if torch_private.auto_collation(loader) else loader.sampler


def check_generators(loader: Any, state: LoaderState) -> None:
    """See that a loader has the generators that the saved run had. Raises :class:`StateError`."""
    generators, texts = own_generators(loader), state.generators_now
    if len(generators) != len(texts):
        raise StateError(
            f"this loader and its samplers have {len(generators)} generators of their own, the saved run had "
            f"{len(texts)}: construct the loader with generator= as in the saved run",
            expected=len(generators),
            found=len(texts),
        )


def _set_generators(loader: Any, texts: tuple[str, ...]) -> list[Any]:
    states = [decode_generator(text) for text in texts]
    for generator, state in zip(own_generators(loader), states, strict=True):
        generator.set_state(state)
    return states


def reopen(loader: Any, state: LoaderState, desk: FaultDesk) -> Resumption:
    """Begin an epoch as it was begun, and walk to where it stood.

    The global random generators are what they were then meanwhile, and the user's again afterwards.
    """
    generators = _set_generators(loader, state.generators)
    reading = Standing.decode(state.reading) if state.reading else None
    _tell_epochs(loader, state.sampler_epochs)
    with preserve_rng():
        _load_sampler(loader, state)  # again: whoever told it another epoch meanwhile may have reset it
    streams = decode_streams(state.streams)
    unsaved = _unsaved_generators(loader) if state.delivered else {}
    batched, iterable = torch_private.auto_collation(loader), torch_private.is_iterable(loader)
    spares = SpareReservoir(seed=state.base_seed, epoch=state.epoch)
    reads = _reads(loader)
    observing = spares if desk.repairs else None
    if state.sampler_drain:
        _drain(loader)
    mark = None
    with preserve_rng():
        restore_rng(streams)
        indices: Iterator[Any] = iter(())
        for step in state.opening.replace("isi", "si") if state.sampler_state else state.opening:
            if step == "i":
                indices = iter(reads)
            else:
                torch_private.draw_base_seed(loader)
        opened = Standing.of(own_generators(loader))
        if reading is not None:
            reading.restore(own_generators(loader))
        unread = encode_streams(rng_states()) == state.streams_now
        if state.sampler_state:
            if state.spares:
                spares.restore((state.spares[0], state.spares[1], state.spares[2], state.spares[3]))
            mark = Mark(pickle.dumps(state.sampler_state[0], pickle.HIGHEST_PROTOCOL), spares.mark, state.sampler_drain)
            first = state.delivered - state.sampler_skip
            _pass_over(indices, range(first, state.delivered), observing, batched=batched)
        elif not iterable:
            indices = _walk(reads, indices, state.delivered, observing, batched=batched)
        # What a sampler draws when it is first read belongs to here: read it. With generators of its own, as far as the
        # saved run had: from there on these are where it, and whoever shares them, had left them.
        as_far = bool(generators) and state.sampler_reads > 0 and not state.sampler_state
        ahead = max(0, state.sampler_reads - state.delivered) if as_far else 1
        indices = itertools.chain(list(map(once_only, itertools.islice(indices, ahead))), indices)
        onward = rng_states() if unread else None
    if iterable or state.sampler_reads > 0:
        _set_generators(loader, state.generators_now)
    _warn_of_drawn(unsaved, _unsaved_generators(loader) if unsaved else {})
    beginning = Beginning(streams=streams, generators=generators, sampler_epochs=state.sampler_epochs)
    return Resumption(
        state=state,
        beginning=beginning,
        indices=indices,
        spares=spares,
        reads=state.delivered + ahead,
        opened=opened,
        reading=reading,
        mark=mark,
        skipped=state.sampler_skip,
        onward=onward,
    )


def _unsaved_generators(loader: Any) -> dict[str, tuple[Any, bytes]]:
    """The generators of NumPy and Python that samplers keep and no state holds, and where they stand."""
    if stateful_sampler(loader) is not None:
        return {}
    kinds = random.Random, np.random.Generator, np.random.RandomState
    return {
        f"{type(sampler).__qualname__}.{name}": (value, pickle.dumps(value))
        for sampler in all_samplers(loader)
        for name, value in getattr(sampler, "__dict__", {}).items()
        if isinstance(value, kinds)
    }


def _warn_of_drawn(before: dict[str, tuple[Any, bytes]], after: dict[str, tuple[Any, bytes]]) -> None:
    """Warn of those that gave the order of an epoch which was begun again. One that the sampler made anew did not."""
    for name, (generator, stood) in before.items():
        now, stands = after.get(name, (None, b""))
        if now is generator and not same_pickles(stands, stood):
            warn_user(
                f"the sampler draws its order from {name}, which no state holds: unless it seeds it for each epoch, "
                "the rest of this one may repeat samples and lack others; draw from a torch.Generator in its attribute "
                "'generator', or give the sampler state_dict and load_state_dict"
            )


def _walk(
    reads: Any, indices: Iterator[Any], tasks: int, spares: SpareReservoir | None, *, batched: bool
) -> Iterator[Any]:
    """What remains of ``indices`` after the first ``tasks``."""
    if batched and type(reads) is BatchSampler:
        source: Any = range(len(reads.sampler)) if type(reads.sampler) is SequentialSampler else iter(reads.sampler)
        rest = _walk_flat(source, tasks, reads.batch_size, spares)
        batches: Iterator[Any] = iter(BatchSampler(rest, reads.batch_size, reads.drop_last))
        return batches
    if not batched:
        _walk_flat(map(once_only, indices), tasks, 1, spares)
        return indices
    _pass_over(indices, range(tasks), spares, batched=True)
    return indices


def _pass_over(indices: Iterator[Any], tasks: range, spares: SpareReservoir | None, *, batched: bool) -> None:
    """Read these tasks, one by one, to the end of each: iterators may share what they read from."""
    for task in tasks:
        batch = once_only(next(indices, None))
        if batch is None:
            break
        if spares is not None:
            spares.observe(task, as_list(batch, batched=batched))
            spares.close(task)


def _walk_flat(source: Any, tasks: int, size: int, spares: SpareReservoir | None) -> Iterator[Any]:
    """The same where tasks are ``size`` indices each, one after another, but for the last."""
    if isinstance(source, range) and spares is None:
        return iter(range(tasks * size, len(source)))
    indices: Iterator[Any] = iter(source)
    if spares is None:
        collections.deque(itertools.islice(indices, tasks * size), maxlen=0)
        return indices
    step = max(1, _WALK // size)
    for first in range(0, tasks, step):
        wanted = min(step, tasks - first)
        items = list(itertools.islice(indices, wanted * size))
        whole = len(items) // size
        spares.pass_over(items[: whole * size], size)
        if whole < wanted:  # the last batch of an epoch may be a short one
            if items[whole * size :]:
                spares.observe(first + whole, items[whole * size :])
                spares.close(first + whole)
            break
    return indices
