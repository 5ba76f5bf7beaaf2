"""Faults in iterable datasets: the next sample takes the place of a lost one, and a stream that ends early says so."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.data import default_collate

from robustloader import FaultBudgetError, FaultPolicy, RobustDataLoader, RobustLoaderWarning, ShardEnded
from tests.support.datasets import CannotBegin, Damaged, Generated, Stream, damaged
from tests.support.hostile import CONTROL, Moody
from tests.support.listener import Listener, flat

WORKERS = pytest.mark.parametrize("workers", [0, 2])
quiet = pytest.mark.filterwarnings("ignore::robustloader.RobustLoaderWarning")


def errors(*numbers: int) -> dict[int, Any]:
    return dict.fromkeys(numbers, damaged)


@quiet
@WORKERS
@pytest.mark.parametrize("faults", ["replace", "skip"])
def test_a_lost_sample_is_followed_by_the_next(workers: int, faults: Any) -> None:
    """All batches but each share's last one are full; every other sample is delivered once."""
    loader = RobustDataLoader(Stream(40, errors=errors(0, 7, 8, 39)), batch_size=4, num_workers=workers, faults=faults)
    batches = [batch.tolist() for batch in loader]
    assert sorted(flat(batches)) == [number for number in range(40) if number not in (0, 7, 8, 39)]
    assert sum(len(batch) < 4 for batch in batches) <= max(1, workers)
    assert len(loader.fault_log) == 4
    assert all(record.index is None and record.kind == "exception" for record in loader.fault_log)
    assert all(record.error_type == "Damaged" and "cannot decode" in record.message for record in loader.fault_log)


@quiet
@WORKERS
def test_without_batching(workers: int) -> None:
    """One sample at a time."""
    loader = RobustDataLoader(Stream(12, errors=errors(3, 4)), batch_size=None, num_workers=workers)
    assert sorted(map(int, loader)) == [number for number in range(12) if number not in (3, 4)]


@WORKERS
@pytest.mark.parametrize("faults", ["raise", FaultPolicy(action="raise")])
def test_raise(workers: int, faults: Any) -> None:
    """The user's own error, and the stream goes on behind it."""
    iterator = iter(RobustDataLoader(Stream(40, errors=errors(16)), batch_size=4, num_workers=workers, faults=faults))
    delivered: list[int] = []
    raised = 0
    while True:
        try:
            delivered += next(iterator).tolist()
        except StopIteration:
            break
        except Damaged as error:
            assert "cannot decode 16" in str(error)
            raised += 1
    assert raised == 1
    assert {17, 19, 39} <= set(delivered) | {17, 19, 39} - {16}
    assert len(delivered) >= 36


@WORKERS
def test_a_generator_that_raised_is_over(workers: int) -> None:
    """Python closes it: its share ends there, with an event and a warning, and the other shares do not suffer."""
    listener = Listener()
    loader = RobustDataLoader(
        Generated(40, errors=errors(20)), batch_size=4, num_workers=workers, telemetry=listener.policy
    )
    with pytest.warns(RobustLoaderWarning) as caught:
        delivered = flat(loader)
    assert sorted(delivered) == (sorted([*range(0, 20, 2), *range(1, 40, 2)]) if workers else list(range(20)))
    (event,) = listener.of(ShardEnded)
    assert event.worker_id == 0
    assert "Damaged" in event.reason
    assert any("ended early" in str(warning.message) for warning in caught)


@WORKERS
def test_a_fatal_error_raises(workers: int) -> None:
    """A misspelt name in the stream's code."""
    stream = Stream(40, errors={4: NameError})
    with pytest.raises(NameError):
        list(RobustDataLoader(stream, batch_size=4, num_workers=workers))


@WORKERS
@pytest.mark.parametrize("faults", ["replace", "raise"])
def test_a_stream_that_cannot_begin(workers: int, faults: Any) -> None:
    """An error that names the cause; never an empty epoch."""
    with pytest.raises((FileNotFoundError, RuntimeError), match="the archive is not mounted"):
        list(RobustDataLoader(CannotBegin(8), batch_size=4, num_workers=workers, faults=faults))


class Dislikes:
    """A ``collate_fn`` that raises on some samples."""

    def __init__(self, *samples: int) -> None:
        self.samples = samples

    def __call__(self, batch: list[int]) -> Any:
        if set(self.samples) & set(batch):
            raise Damaged(f"no {batch}")
        return default_collate(batch)


@quiet
@WORKERS
def test_collate(workers: int) -> None:
    """The odd ones are left out, and later ones move up."""
    loader = RobustDataLoader(Stream(40), batch_size=4, num_workers=workers, collate_fn=Dislikes(5, 20))
    assert sorted(flat(loader)) == [number for number in range(40) if number not in (5, 20)]
    assert [record.kind for record in loader.fault_log] == ["collate", "collate"]


@quiet
@WORKERS
def test_a_collate_that_fails_in_rhythm_with_the_search(workers: int) -> None:
    """The search finds nobody at fault, and the batch that it has made on the way is the batch."""
    loader = RobustDataLoader(Stream(40), batch_size=4, num_workers=workers, collate_fn=Moody())
    assert sorted(flat(loader)) == list(range(40))
    assert not loader.fault_log


@quiet
@WORKERS
def test_drop_last(workers: int) -> None:
    """Only full batches, refilled over the gap."""
    loader = RobustDataLoader(Stream(40, errors=errors(2, 4)), batch_size=4, num_workers=workers, drop_last=True)
    batches = [batch.tolist() for batch in loader]
    assert {len(batch) for batch in batches} == {4}
    assert len(batches) == (9 if not workers else 4 + 5)


@quiet
@WORKERS
def test_a_stream_of_nothing_but_errors_ends(workers: int) -> None:
    """The budget stops it, or its end does."""
    stream = Stream(10_000, errors=errors(*range(10_000)))
    with pytest.raises(FaultBudgetError) as caught:
        list(RobustDataLoader(stream, batch_size=4, num_workers=workers))
    assert 16 < caught.value.faults < 1_000


class Endless(Stream):
    """Raises for ever, as a reader of a lost connection does."""

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        raise Damaged("connection lost")


@quiet
@WORKERS
def test_a_stream_that_raises_for_ever_ends(workers: int) -> None:
    """So does this one, which has no end of its own."""
    with pytest.raises(FaultBudgetError):
        list(RobustDataLoader(Endless(1), batch_size=4, num_workers=workers))


@quiet
@WORKERS
def test_the_budget_alone_ends_it(workers: int) -> None:
    """Not the number of reports that the faults come in."""
    with pytest.raises(FaultBudgetError) as caught:
        list(RobustDataLoader(Endless(1), batch_size=4, num_workers=workers, faults=FaultPolicy(burst=1_000)))
    assert caught.value.faults > 1_000


@quiet
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(("batch_size", "damages"), [(1, 100), (4, 100), (None, 100), (4, 700)])
def test_batches_around_a_long_damage_keep_their_order(workers: int, batch_size: int | None, damages: int) -> None:
    """However many reports it takes to tell of it, and whatever was asked for ahead."""
    shares = max(1, workers)
    begin, end, size = 6 * shares, (6 + damages) * shares, (26 + damages) * shares
    stream = Stream(size, errors=errors(*range(begin, end)))
    loader = RobustDataLoader(stream, batch_size, num_workers=workers, faults=FaultPolicy(burst=10_000))
    delivered = flat(batch.reshape(-1).tolist() if batch_size else [batch] for batch in loader)
    assert sorted(delivered) == [*range(begin), *range(end, size)]
    for share in range(shares):
        numbers = [number for number in delivered if number % shares == share]
        assert numbers == sorted(numbers)


class LostThenFound(Stream):
    """Raises for ever after its second sample when it is read for the first time in its process, and not later."""

    times = 0
    number = -1

    def __iter__(self) -> Any:
        self.times, self.number = self.times + 1, -1
        return self

    def __next__(self) -> int:
        self.number += 1
        if self.number > 1 and self.times == 1:
            raise Damaged("connection lost")
        return self.number


@quiet
def test_a_new_epoch_calls_a_persistent_worker_away() -> None:
    """From a stretch of a stream that has nothing but errors, and no end in sight."""
    policy = FaultPolicy(burst=1 << 40)
    loader = RobustDataLoader(LostThenFound(1), num_workers=1, persistent_workers=True, faults=policy)
    assert next(iter(loader)).tolist() == [0]
    iterator = iter(loader)
    assert [next(iterator).tolist() for _ in range(4)] == [[0], [1], [2], [3]]


@quiet
@pytest.mark.parametrize("name", sorted(set(CONTROL) - {"StopIteration"}))
def test_control_exceptions_in_a_worker_are_faults(name: str) -> None:
    """They end neither the worker nor the loop. (``StopIteration`` is a stream's own way to end.)"""
    stream = Stream(40, errors={9: CONTROL[name]})
    loader = RobustDataLoader(stream, batch_size=4, num_workers=2)
    assert sorted(flat(loader)) == [number for number in range(40) if number != 9]


@pytest.mark.parametrize("name", ["KeyboardInterrupt", "SystemExit"])
def test_control_exceptions_in_process_pass(name: str) -> None:
    """They are the trainer's."""
    with pytest.raises(CONTROL[name]):
        list(RobustDataLoader(Stream(40, errors={9: CONTROL[name]}), batch_size=4))
