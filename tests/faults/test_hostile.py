"""Exceptions that make trouble themselves: they never hang, never hide the cause, and never end an epoch early."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch.utils.data import default_collate

from robustloader import FaultPolicy, RobustDataLoader, RobustLoaderWarning, SampleError
from tests.support.datasets import Raising
from tests.support.hostile import CONTROL, HOSTILE, Control, OwnBase
from tests.support.listener import flat

pytestmark = pytest.mark.filterwarnings("ignore::robustloader.RobustLoaderWarning")

WORKERS = pytest.mark.parametrize("workers", [0, 2])
EVERY = pytest.mark.parametrize("name", HOSTILE)
CONTROLS = pytest.mark.parametrize("name", CONTROL)


def nice(text: str) -> bool:
    return len(text) < 100_000


@WORKERS
@EVERY
def test_a_hostile_exception_is_replaced(workers: int, name: str) -> None:
    """Recorded by its type, with bounded texts; everything else is delivered."""
    make = HOSTILE[name]
    loader = RobustDataLoader(Raising(16, {5: make}), batch_size=4, num_workers=workers)
    samples = flat(loader)
    assert [samples[place] for place in range(16) if place != 5] == [place for place in range(16) if place != 5]
    (record,) = loader.fault_log
    assert record.index == 5
    assert record.error_type.rpartition(".")[2] == type(make(5)).__name__
    assert nice(record.message)
    assert nice(record.traceback)
    assert "Traceback" in record.traceback


@WORKERS
@EVERY
@pytest.mark.parametrize("faults", ["raise", FaultPolicy(action="raise")])
def test_a_hostile_exception_is_raised(workers: int, name: str, faults: Any) -> None:
    """As its own type where it can be rebuilt, as ``SampleError`` otherwise; either way with the cause to be read."""
    make = HOSTILE[name]
    kind = type(make(5)).__name__
    loader = RobustDataLoader(Raising(16, {5: make}), batch_size=4, num_workers=workers, faults=faults)
    iterator = iter(loader)
    next(iterator)
    try:
        next(iterator)
    except Exception as error:
        caught = error
    else:
        pytest.fail("nothing was raised")
    assert type(caught).__name__ in (kind, "SampleError")
    notes = " ".join(vars(caught).get("__notes__", ()))
    if name == "attributes raise":
        return  # not even a note can be put on it
    assert "sample index 5" in notes
    if workers:
        try:
            shown = str(caught)
        except Exception:
            shown = ""
        assert kind in shown + notes
        assert "worker" in shown + notes
        assert nice(shown + notes)
    if isinstance(caught, SampleError):
        assert caught.index == 5
        assert caught.worker_id == 1
        assert caught.error_type.rpartition(".")[2] == kind
    assert flat(iterator) == list(range(8, 16))


class CollateRaises:
    """Raises it from collate when sample 5 is in the batch."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, samples: list[Any]) -> Any:
        if 5 in samples:
            raise CONTROL[self.name]("in collate")
        return default_collate(samples)


def raising_loader(name: str, place: str, workers: int, faults: Any) -> RobustDataLoader[Any]:
    return RobustDataLoader(
        Raising(16, {5: Control(name)} if place == "item" else {}),
        batch_size=4,
        num_workers=workers,
        collate_fn=CollateRaises(name) if place == "collate" else None,
        faults=faults,
    )


@CONTROLS
@pytest.mark.parametrize("place", ["item", "collate"])
def test_in_a_worker_it_is_a_fault(name: str, place: str) -> None:
    """Nobody but user code can have raised it there: the sample is replaced, the worker lives."""
    loader = raising_loader(name, place, 2, "replace")
    iterator = iter(loader)
    before = [process.pid for process in iterator._workers]
    first = next(iterator)
    after = [process.pid for process in iterator._workers]
    samples = flat([first, *iterator])
    assert len(samples) == 16
    assert 5 not in samples
    assert before == after
    (record,) = loader.fault_log
    assert record.index == 5
    assert record.kind == ("exception" if place == "item" else "collate")
    assert record.error_type.rpartition(".")[2] == CONTROL[name].__name__


@CONTROLS
@pytest.mark.parametrize("place", ["item", "collate"])
@pytest.mark.parametrize("faults", ["raise", FaultPolicy(action="raise")])
def test_raised_in_a_worker_it_does_not_end_the_loop_or_the_program(name: str, place: str, faults: Any) -> None:
    """It comes as an ordinary error that names its type."""
    iterator = iter(raising_loader(name, place, 2, faults))
    next(iterator)
    with pytest.raises(SampleError, match=CONTROL[name].__name__) as caught:
        next(iterator)
    assert caught.value.error_type.rpartition(".")[2] == CONTROL[name].__name__
    assert flat(iterator) == list(range(8, 16))


@pytest.mark.parametrize("name", ["KeyboardInterrupt", "SystemExit"])
@pytest.mark.parametrize("place", ["item", "collate"])
@pytest.mark.parametrize("faults", ["replace", "skip", "raise"])
def test_in_process_it_is_the_users_own(name: str, place: str, faults: Any) -> None:
    """Ctrl-C and a signal handler's ``sys.exit`` must get through."""
    iterator = iter(raising_loader(name, place, 0, faults))
    next(iterator)
    with pytest.raises(CONTROL[name]):
        next(iterator)


@pytest.mark.parametrize("place", ["item", "collate"])
def test_in_process_another_base_exception_passes(place: str) -> None:
    """Frameworks steer with their own."""
    iterator = iter(raising_loader("own BaseException", place, 0, "replace"))
    next(iterator)
    with pytest.raises(OwnBase):
        next(iterator)


@pytest.mark.parametrize("place", ["item", "collate"])
@pytest.mark.parametrize("name", ["StopIteration", "StopAsyncIteration"])
def test_in_process_stop_iteration_is_a_fault(place: str, name: str) -> None:
    """It never shortens the epoch."""
    loader = raising_loader(name, place, 0, "replace")
    samples = flat(loader)
    assert len(samples) == 16
    assert 5 not in samples
    assert [record.error_type for record in loader.fault_log] == [name]


@pytest.mark.parametrize("place", ["item", "collate"])
@pytest.mark.parametrize("faults", ["raise", FaultPolicy(action="raise")])
def test_in_process_stop_iteration_is_raised_as_an_error(place: str, faults: Any) -> None:
    """A ``for`` loop would take it for the end."""
    loader = raising_loader("StopIteration", place, 0, faults)
    delivered = []
    with pytest.raises(SampleError, match="StopIteration"):
        for batch in loader:
            delivered.append(batch.tolist())
    assert flat(delivered) == [0, 1, 2, 3]


def test_a_name_moves_no_cursor() -> None:
    """Escape sequences in what a sample raises reach neither the warning nor the table of faults."""
    bad = "a\x1b[2J\x1b]0;owned\x07b\x9b1A"
    loader = RobustDataLoader(Raising(8, {5: lambda index: OSError(bad)}), batch_size=4)
    with pytest.warns(RobustLoaderWarning, match="sample 5 was replaced") as caught:
        assert len(flat(loader)) == 8
    for text in (*(str(warning.message) for warning in caught), str(loader.fault_log), str(loader.summary())):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert loader.fault_log[0].message == bad
