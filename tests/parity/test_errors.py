"""What raises with torch's loader raises with ours: same type, same first and last line, and the same goes on."""

from __future__ import annotations

import copy
import gc
import multiprocessing as mp
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from robustloader import RobustDataLoader, SampleError, WorkerError, WorkerStartError
from tests.support import parity_data as data
from tests.support.parity_run import MODES, STRICT, Program, assert_same, describe
from tests.support.torches import WARNS_OF_PICKLING

workers = pytest.mark.parametrize("num_workers", [0, 1, 2])
pytestmark = pytest.mark.filterwarnings(
    # What torch's __del__ says of an iterator whose constructor raised.
    "ignore:Exception ignored in.*_MultiProcessingDataLoaderIter:pytest.PytestUnraisableExceptionWarning"
)

RAISED: tuple[Callable[[], Any], ...] = (
    data.value_error,
    data.key_error,
    data.one_argument_error,
    data.message_error,
    data.os_error,
    data.assertion_error,
    data.grouped_error,
)


def named(function: Any) -> str:
    """For the names of parametrised tests."""
    return str(function.__name__)


# --- strict mode: what the user's code raises -------------------------------------------------------------------------


@workers
@pytest.mark.parametrize("make", RAISED, ids=named)
def test_a_sample_that_raises(make: Any, num_workers: int) -> None:
    """The exception keeps its type and torch's words, and next() goes on with the next batch."""
    torchs = assert_same(
        Program(
            lambda: {
                "dataset": data.Raising(12, {5: make, 9: make}),
                "batch_size": 2,
                "num_workers": num_workers,
            },
            epochs=(None, None),
        )
    )
    assert len(torchs.batches()) == 8


@workers
@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_stream_that_raises(num_workers: int, batch_size: int | None) -> None:
    """The same for an iterable dataset whose iterator can go on."""
    assert_same(
        Program(
            lambda: {
                "dataset": data.RaisingStream(7, {2: data.value_error, 6: data.key_error}),
                "batch_size": batch_size,
                "num_workers": num_workers,
            }
        )
    )


@workers
@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_generator_that_raises(num_workers: int, batch_size: int | None) -> None:
    """A generator is over after it has raised: first the exception, then the end."""
    assert_same(
        Program(
            lambda: {"dataset": Breaking(), "batch_size": batch_size, "num_workers": num_workers},
        )
    )


class Breaking(IterableDataset[Any]):
    """A generator that fails."""

    def __iter__(self) -> Any:
        yield from range(3)
        raise ValueError("the file ended too early")


@workers
@pytest.mark.parametrize("make", [data.two_arguments_error, data.unicode_error], ids=named)
def test_an_exception_that_cannot_be_rebuilt(make: Any, num_workers: int) -> None:
    """In process it is itself. From a worker it is a RuntimeError with torch's text: ours is SampleError, which knows
    the index."""
    program = Program(
        lambda: {"dataset": data.Raising(4, {1: make}), "batch_size": 2, "num_workers": num_workers, "shuffle": False}
    )
    torchs, ours = program.run(DataLoader), program.run(RobustDataLoader, **STRICT)
    if num_workers:
        torchs.notes = [tuple("SampleError" if part == "RuntimeError" else part for part in n) for n in torchs.notes]
        with pytest.raises(RuntimeError) as caught:
            list(RobustDataLoader(data.Raising(4, {1: make}), num_workers=1, **STRICT))
        assert isinstance(caught.value, SampleError)
        assert (caught.value.index, caught.value.worker_id) == (1, 0)
        assert caught.value.error_type == type(make()).__name__
    assert ours.notes == torchs.notes


@workers
def test_a_collate_fn_that_raises(num_workers: int) -> None:
    """Strict mode tells of it as torch does and goes on."""
    assert_same(
        Program(
            lambda: {
                "dataset": range(9),
                "batch_size": 2,
                "num_workers": num_workers,
                "collate_fn": data.failing_collate,
            }
        )
    )


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("after", [0, 1, 3, 6])
@pytest.mark.parametrize("mode", MODES)
def test_a_sampler_that_raises(mode: str, num_workers: int, after: int) -> None:
    """With workers the lookahead meets it early: in iter(), or in next(), in place of a batch. As with torch."""
    assert_same(
        Program(
            lambda: {
                "dataset": range(100),
                "sampler": data.FailingSampler(after),
                "batch_size": None,
                "num_workers": num_workers,
                "prefetch_factor": 1 if num_workers else None,
            }
        ),
        mode,
    )


@workers
@pytest.mark.parametrize("mode", MODES)
def test_a_sampler_that_cannot_begin(mode: str, num_workers: int) -> None:
    """What iter(sampler) raises, iter(loader) raises."""
    torchs = assert_same(
        Program(
            lambda: {
                "dataset": range(9),
                "sampler": data.BrokenIterSampler(1),
                "batch_size": None,
                "num_workers": num_workers,
            }
        ),
        mode,
    )
    assert torchs.notes[-1][:2] == ("iter", "LookupError")
    gc.collect()  # so that torch's __del__ complains here


def test_an_index_out_of_range() -> None:
    """A sampler that asks for too much gets the dataset's own IndexError."""
    for num_workers in (0, 1):
        assert_same(Program(lambda n=num_workers: {"dataset": [1, 2, 3], "sampler": [0, 7, 2], "num_workers": n}))


def test_a_dataset_without_getitem() -> None:
    """What is no dataset at all is told alike."""
    for num_workers in (0, 1):
        assert_same(Program(lambda n=num_workers: {"dataset": object(), "sampler": [0], "num_workers": n}))
        assert_same(Program(lambda n=num_workers: {"dataset": object(), "num_workers": n}))


@workers
def test_getitems_that_raises(num_workers: int) -> None:
    """In strict mode __getitems__ is called once, and what it raises is raised."""
    assert_same(Program(lambda: {"dataset": BadGetItems(), "batch_size": 2, "num_workers": num_workers}))


class BadGetItems(data.Samples):
    """Its batches fail though its samples would not."""

    def __init__(self) -> None:
        super().__init__("int", 6)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        if 2 in indices:
            raise ConnectionError("no batch today")
        return indices


@workers
def test_a_batch_that_does_not_pickle_back(num_workers: int) -> None:
    """What a batch's own unpickling raises reaches the trainer, who can go on."""
    ours = Program(
        lambda: {"dataset": data.Shared(3, unpicklable_at_one), "batch_size": None, "num_workers": num_workers}
    ).run(RobustDataLoader, **STRICT)
    kinds = [note[0] for note in ours.notes]
    if num_workers:
        assert kinds == ["len", "begun", "batch", "error", "batch", "over"]
        assert ours.notes[3][1] == "LookupError"
    else:
        assert kinds.count("batch") == 3


def unpicklable_at_one(index: int) -> Any:
    """A sample whose unpickling fails."""
    return Trapped() if index == 1 else index


class Trapped:
    """Pickles, and does not unpickle."""

    def __reduce__(self) -> Any:
        return fail_to_build, ()

    def __repr__(self) -> str:
        return "Trapped()"


def fail_to_build() -> Any:
    """Called by pickle."""
    raise LookupError("cannot be built")


def test_a_batch_that_does_not_pickle() -> None:
    """torch writes a traceback to stderr and waits for ever; ours raises what pickling raised."""
    loader = RobustDataLoader(data.Shared(2, make_lambda), batch_size=None, num_workers=1, **STRICT)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        next(iter(loader))


def make_lambda(index: int) -> Any:
    """Not picklable."""
    return lambda: index


# --- strict mode: the loader's own ------------------------------------------------------------------------------------


def test_next_after_the_end_goes_on_ending() -> None:
    """StopIteration, again and again, with workers and without, and after an error too."""
    for num_workers in (0, 1):
        for options in MODES.values():
            iterator = iter(RobustDataLoader(range(2), num_workers=num_workers, **options))
            assert len(list(iterator)) == 2
            for _ in range(3):
                assert next(iterator, "over") == "over"


class Waiting(Dataset[Any]):
    """Its first sample waits for an event."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        if index == 0:
            assert self.event.wait(60)
        return index


def test_a_timeout() -> None:
    """``timeout`` raises torch's RuntimeError, and next() may be called again."""
    told = []
    for kind, options in ((DataLoader, {}), (RobustDataLoader, STRICT)):
        event = mp.get_context("fork").Event()
        iterator = iter(kind(Waiting(event), batch_size=None, num_workers=1, timeout=0.2, **options))
        with pytest.raises(RuntimeError) as caught:
            next(iterator)
        event.set()
        iterator_timeout_is_long_over(iterator)
        told.append((type(caught.value), str(caught.value), list(iterator)))
    assert told[0] == (RuntimeError, "DataLoader timed out after 0.2 seconds", [0, 1, 2])
    assert told[1] == told[0]


def iterator_timeout_is_long_over(iterator: Any) -> None:
    """From here on the machine may be as slow as it likes."""
    for name in ("_timeout", "timeout_s"):
        if hasattr(iterator, name):
            setattr(iterator, name, 60)


def test_a_worker_that_exits() -> None:
    """A worker's death is a RuntimeError that says what torch's says."""
    for kind, options in ((DataLoader, {}), (RobustDataLoader, STRICT)):
        with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid\(s\) \d+\) exited unexpectedly") as caught:
            list(kind(data.Shared(2, leave), num_workers=1, **options))
    assert isinstance(caught.value, WorkerError)


def leave(index: int) -> Any:
    """Ends the process."""
    import os

    os._exit(3)


def test_a_worker_that_is_killed() -> None:
    """The words that people search for are there."""
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid \d+\) is killed by signal: Segmentation fault"):
        list(RobustDataLoader(data.Shared(2, crash), num_workers=1, **STRICT))


def crash(index: int) -> Any:
    """Dies by a signal."""
    import os
    import signal

    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGSEGV)


# --- constructor ------------------------------------------------------------------------------------------------------

NUMBERS: dict[str, Any] = {"dataset": [1, 2, 3]}
STREAM: dict[str, Any] = {"dataset": data.Stream("int", 3, shard="none")}
WRONG: tuple[dict[str, Any], ...] = (
    NUMBERS | {"num_workers": -1},
    NUMBERS | {"timeout": -1},
    NUMBERS | {"prefetch_factor": 2},
    NUMBERS | {"prefetch_factor": 0},
    NUMBERS | {"num_workers": 1, "prefetch_factor": -1},
    NUMBERS | {"num_workers": 1, "prefetch_factor": 0},
    NUMBERS | {"persistent_workers": True},
    NUMBERS | {"sampler": [1], "shuffle": True},
    NUMBERS | {"batch_sampler": [[1]], "batch_size": 2},
    NUMBERS | {"batch_sampler": [[1]], "batch_size": None},
    NUMBERS | {"batch_sampler": [[1]], "shuffle": True},
    NUMBERS | {"batch_sampler": [[1]], "sampler": [1]},
    NUMBERS | {"batch_sampler": [[1]], "drop_last": True},
    NUMBERS | {"batch_size": None, "drop_last": True},
    NUMBERS | {"batch_size": 0},
    NUMBERS | {"batch_size": -3},
    NUMBERS | {"batch_size": 1.5},
    NUMBERS | {"batch_size": True},
    NUMBERS | {"batch_size": "many"},
    NUMBERS | {"drop_last": 3},
    NUMBERS | {"num_workers": 2, "multiprocessing_context": "thread"},
    NUMBERS | {"num_workers": 2, "multiprocessing_context": 7},
    NUMBERS | {"multiprocessing_context": "fork"},
    NUMBERS | {"num_workers": "two"},
    NUMBERS | {"num_workers": None},
    NUMBERS | {"timeout": "long"},
    NUMBERS | {"timeout": None},
    NUMBERS | {"timeout": 1},
    NUMBERS | {"generator": 7, "shuffle": True},
    NUMBERS | {"generator": "seed"},
    NUMBERS | {"no_such_option": 1},
    NUMBERS | {"sampler": 7},
    NUMBERS | {"batch_sampler": 7},
    NUMBERS | {"collate_fn": 7},
    NUMBERS | {"sampler": iter([2, 0])},
    STREAM | {"shuffle": True},
    STREAM | {"shuffle": False},
    STREAM | {"sampler": [1]},
    STREAM | {"batch_sampler": [[1]]},
    STREAM | {"batch_size": None, "drop_last": True},
    {"dataset": [], "shuffle": True},
    {"dataset": {}, "shuffle": True},
    {"dataset": None},
    {"dataset": iter([1])},
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arguments", WRONG, ids=lambda a: ",".join(f"{k}={v}" for k, v in a.items())[:70])
def test_wrong_arguments(arguments: dict[str, Any], mode: str) -> None:
    """torch's arguments, right or wrong, are torch's business: same type, same text, at the same moment."""
    program = Program(lambda: {k: copy.copy(v) if k == "sampler" else v for k, v in arguments.items()})
    torchs, ours = program.run(DataLoader), program.run(RobustDataLoader, **MODES[mode])
    if mode == "defaults" and any(note[0] == "error" for note in torchs.notes):
        # What a sample or collate_fn raises is a fault then; the constructor's business is still torch's.
        assert ours.notes[:2] == torchs.notes[:2]
    else:
        assert ours.as_terse_as(torchs) == torchs
    gc.collect()  # so that torch's __del__ complains here


@pytest.mark.parametrize("mode", MODES)
def test_a_worker_init_fn_that_is_no_function(mode: str) -> None:
    """It fails as any other worker_init_fn that raises: in iter()."""
    with pytest.raises((TypeError, WorkerStartError), match="'int' object is not callable"):
        iter(RobustDataLoader([1], num_workers=1, worker_init_fn=7, **MODES[mode]))


def test_a_missing_dataset() -> None:
    """So is the lack of one."""
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'dataset'"):
        RobustDataLoader()  # type: ignore[call-arg]


def test_positional_arguments() -> None:
    """torch takes thirteen by position, in this order, and no more."""
    dataset = list(range(10))
    row = (dataset, 3, False, [1, 2, 3, 4], None, 0, data.identity, False, True, 0, None, None, None)
    for kind in (DataLoader, RobustDataLoader):
        assert list(kind(*row)) == [[1, 2, 3]]
        with pytest.raises(TypeError, match="positional"):
            kind(*row, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 3),
        ("batch_sampler", [[1]]),
        ("sampler", [1]),
        ("drop_last", True),
        ("dataset", [1]),
        ("persistent_workers", True),
    ],
)
def test_what_may_not_be_set_later(name: str, value: Any) -> None:
    """torch refuses to change these after construction; the text names the class."""
    told = []
    for kind in (DataLoader, RobustDataLoader):
        loader = kind([1, 2, 3])
        with pytest.raises(ValueError, match="should not be set after") as caught:
            setattr(loader, name, value)
        told.append(str(caught.value).replace(kind.__name__, "DataLoader"))
    assert told[0] == told[1]


def test_what_may_be_set_later() -> None:
    """torch lets these be changed between epochs, and so it is here."""
    for kind in (DataLoader, RobustDataLoader):
        loader = kind([3, 1, 2], batch_size=3)
        assert torch.equal(next(iter(loader)), torch.tensor([3, 1, 2]))
        loader.collate_fn = sorted
        assert next(iter(loader)) == [1, 2, 3]
        loader.num_workers = 1
        loader.prefetch_factor = 1
        loader.multiprocessing_context = "fork"
        assert next(iter(loader)) == [1, 2, 3]
        loader.worker_init_fn = data.shard_in_init
        loader.timeout = 30
        assert next(iter(loader)) == [1, 2, 3]
        with pytest.raises(ValueError, match="should specify a valid start method"):
            loader.multiprocessing_context = "thread"


# --- stated differences -----------------------------------------------------------------------------------------------


@workers
@pytest.mark.parametrize("mode", MODES)
def test_stop_iteration_from_a_map_style_dataset_never_ends_the_epoch(mode: str, num_workers: int) -> None:
    """With torch, in process, it ends the epoch without a word. Here it is a fault: raised, or replaced."""
    loader = RobustDataLoader(
        data.Raising(4, {2: data.stop_iteration}), batch_size=None, num_workers=num_workers, **MODES[mode]
    )
    if mode == "defaults":
        with pytest.warns(match="sample 2 was replaced"):
            batches = list(loader)
        assert batches[:2] + batches[3:] == [0, 1, 3]
        assert batches[2] in (0, 1, 3)
        return
    iterator = iter(loader)
    assert [next(iterator), next(iterator)] == [0, 1]
    with pytest.raises(SampleError) as caught:
        next(iterator)
    assert caught.value.index == 2
    assert caught.value.error_type == "StopIteration"
    assert next(iterator) == 3
    assert next(iterator, "over") == "over"


@pytest.mark.parametrize("num_workers", [1])
def test_hostile_exceptions_keep_their_cause(num_workers: int) -> None:
    """An exception without a text, of a class that nobody can import, or no Exception at all, arrives as an error that
    shows where it was raised."""

    class Local(Exception):
        """Cannot be pickled."""

    def local() -> Exception:
        return Local("kept inside")

    for make, name in ((data.hostile_error, "HostileError"), (local, "Local"), (SystemExit, "SystemExit")):
        loader = RobustDataLoader(data.Raising(2, {0: make}), batch_size=None, num_workers=num_workers, **STRICT)
        iterator = iter(loader)
        with pytest.raises(Exception) as caught:  # noqa: PT011 - any type; what it shows is looked at below
            next(iterator)
        notes = getattr(caught.value, "__notes__", [])
        shown = "\n".join([*notes, *(str(caught.value) for _ in range(1) if name != "HostileError")])
        assert f"Caught {name.rpartition('.')[2]} in DataLoader worker process 0" in shown
        assert "parity_data.py" in shown
        assert next(iterator) == 1


@pytest.mark.parametrize("persistent", [False, True])
def test_iter_raises_what_a_worker_init_fn_raised(persistent: bool) -> None:
    """torch raises it from the first next(). Here iter() waits for the workers: its own type in strict mode, and a
    WorkerStartError with it as cause otherwise."""
    options: dict[str, Any] = {
        "num_workers": 2,
        "worker_init_fn": data.failing_init,
        "persistent_workers": persistent,
    }
    torchs = Program(lambda: {"dataset": range(4), **options}, errors_allowed=1).run(DataLoader).notes[-1]
    assert torchs[:3] == ("error", "OSError", "Caught OSError in DataLoader worker process 0.")
    with pytest.raises(OSError, match="Caught OSError in DataLoader worker process 0") as ours:
        iter(RobustDataLoader(range(4), **options, **STRICT))
    assert describe(ours.value) == torchs[1:]
    with pytest.raises(WorkerStartError, match="no such device") as robust:
        iter(RobustDataLoader(range(4), **options))
    assert isinstance(robust.value, RuntimeError)
    assert isinstance(robust.value.__cause__, OSError)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_that_cannot_begin(num_workers: int) -> None:
    """What iter(dataset) raises is raised, by iter(loader) or by the first next()."""
    for kind, options in ((DataLoader, {}), (RobustDataLoader, STRICT)):
        loader = kind(data.BrokenIterStream("int", 3, shard="none"), num_workers=num_workers, **options)
        with pytest.raises(LookupError, match="no stream"):
            next(iter(loader))


# --- what a worker process cannot be given ----------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_a_dataset_that_does_not_pickle(context: str) -> None:
    """Under spawn and forkserver iter() raises what pickling raised, with torch's warning before it.

    Torch has that warning since a later version than the oldest one; here it is always given.
    """
    told = []
    for kind, options in ((DataLoader, {}), (RobustDataLoader, STRICT)):
        dataset = data.Shared(2, lambda index: index)
        loader = kind(dataset, num_workers=1, multiprocessing_context=context, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises((AttributeError, pickle.PicklingError), match="lambda") as raised:
                iter(loader)
        told.append((type(raised.value), [(w.category, str(w.message)) for w in caught]))
    assert told[0][0] is told[1][0]
    assert told[0][1] == (told[1][1] if WARNS_OF_PICKLING else [])
    with (
        pytest.warns(match="Got pickle error when attempting to start a worker Process"),
        pytest.raises(WorkerStartError, match="lambda") as robust,
    ):
        iter(RobustDataLoader(data.Shared(2, lambda i: i), num_workers=1, multiprocessing_context=context))
    assert isinstance(robust.value.__cause__, (AttributeError, pickle.PicklingError))
