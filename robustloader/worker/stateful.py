"""Datasets and streams that keep their own state (``state_dict`` and ``load_state_dict``), and where they stand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

from robustloader.decisions.keys import probe
from robustloader.worker.fetch import IterableFetcher, Plan
from robustloader.worker.seeding import preserve_rng, restore_rng, rng_states

__all__ = [
    "StreamSnapshot",
    "is_stateful",
    "pickled_end",
    "pickled_snapshot",
    "put_at_end",
    "restored_fetcher",
    "state_of",
    "take_snapshot",
]


class StreamSnapshot(NamedTuple):
    """Where a stream stands after ``calls`` reads.

    Attributes:
        ended: whether it has come to its end.
        dataset, stream: empty, or the state of the dataset, and of the iterator that ``iter(dataset)`` returned.
        rng: the process's random states; None where these are not the stream's own.
        values: samples of the next batch that had been read when an exception kept the trainer from getting it.
        over: whether the dataset's state is of the end of the epoch before: nothing has been read of this one.
    """

    calls: int
    ended: bool
    dataset: tuple[Any, ...]
    stream: tuple[Any, ...]
    rng: Any = None
    values: tuple[Any, ...] = ()
    over: bool = False


def is_stateful(thing: object) -> bool:
    """Whether an object follows the protocol that torch and torchdata call ``Stateful``."""
    return callable(probe(thing, "state_dict")) and callable(probe(thing, "load_state_dict"))


def state_of(thing: Any, *, copied: bool = True) -> tuple[Any, ...]:
    """A copy of an object's state in a tuple; empty where it keeps none."""
    if not is_stateful(thing):
        return ()
    state = thing.state_dict()
    return (copy.deepcopy(state) if copied else state,)


def take_snapshot(
    fetcher: object, *, with_rng: bool, copied: bool = True, delivered: int | None = None
) -> StreamSnapshot | None:
    """Where a fetcher's stream stands; None where neither the dataset nor the stream can tell.

    Args:
        with_rng: whether the process's random states belong to it.
        copied: False where it is pickled before anything moves on.
        delivered: None, or how many calls the batches came of that the trainer has got: one that was loaded since is
            yet to come.

    Raises:
        Exception: what the user's ``state_dict`` raises.
    """
    if not isinstance(fetcher, IterableFetcher):
        return None
    dataset, stream = state_of(fetcher.plan.dataset, copied=copied), state_of(fetcher.stream, copied=copied)
    if not dataset and not stream:
        return None
    rng = rng_states() if with_rng else None
    calls, values = fetcher.calls, fetcher.values
    if delivered is not None and fetcher.loaded is not None and fetcher.loaded[0] >= delivered:
        calls, values = fetcher.loaded
    over = not (calls or values)
    return StreamSnapshot(calls, fetcher.ended, dataset, stream, rng, tuple(values), over)


def pickled_snapshot(fetcher: object) -> bytes | str | None:
    """The same with the process's random states, pickled here and now: the dataset goes on changing.

    A string says what the user's ``state_dict`` raised. That is no reason to end a run that may never ask for a state.
    """
    try:
        taken = take_snapshot(fetcher, with_rng=True, copied=False)
        return None if taken is None else pickle.dumps(taken, pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def pickled_end(fetcher: object) -> bytes | None:
    """What the dataset of a stream that has ended begins its next epoch with, pickled; None where it cannot tell."""
    if not isinstance(fetcher, IterableFetcher):
        return None
    try:
        dataset = state_of(fetcher.plan.dataset, copied=False)
        end = StreamSnapshot(calls=0, ended=False, dataset=dataset, stream=(), over=True)
        return pickle.dumps(end, pickle.HIGHEST_PROTOCOL) if dataset else None
    except Exception:  # whoever asks for a state has heard of it after the last batch
        return None


def put_at_end(dataset: Any, state: Any) -> None:
    """Give a dataset the state that it had when an epoch of it was over."""
    with preserve_rng():
        dataset.load_state_dict(copy.deepcopy(state))
        _use_up(dataset, iter(dataset), state)


def _use_up(dataset: Any, stream: Iterator[Any], state: Any) -> None:
    """See that a state of the end, which was loaded before ``stream`` was made, does not end the next epoch too.

    Many datasets go by it when they are read the next time, and only then: so they are. One that yields something has
    its next epoch in that state, and is given it again.
    """
    with preserve_rng():
        try:
            next(stream)
        except StopIteration:
            return
        except Exception:  # a sample that fails is one, too
            pass
    if isinstance(stream, Generator):
        stream.close()
    dataset.load_state_dict(copy.deepcopy(state))


def restored_fetcher(plan: Plan, snapshot: StreamSnapshot) -> IterableFetcher:
    """A fetcher that goes on where the snapshot was taken; the dataset is told before ``iter(dataset)``."""
    if snapshot.dataset and snapshot.over:
        put_at_end(plan.dataset, snapshot.dataset[0])
    elif snapshot.dataset:
        plan.dataset.load_state_dict(copy.deepcopy(snapshot.dataset[0]))
    fetcher = IterableFetcher(plan)
    if snapshot.stream:
        stream: Any = fetcher.stream
        stream.load_state_dict(copy.deepcopy(snapshot.stream[0]))
    if snapshot.dataset and snapshot.ended:
        _use_up(plan.dataset, fetcher.stream, snapshot.dataset[0])
    fetcher.calls, fetcher.ended, fetcher.values = snapshot.calls, snapshot.ended, list(snapshot.values)
    if snapshot.rng is not None:
        restore_rng(snapshot.rng)
    return fetcher
