"""What users type: names, parameters, and what is said to those who mistype."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
import pickle
from typing import Any

import pytest
import tenacity
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler

import robustloader
from robustloader import (
    FaultPolicy,
    MemoryPolicy,
    OptionError,
    RecoveryPolicy,
    Retry,
    RobustDataLoader,
    RobustLoaderError,
    TelemetryPolicy,
)

NAMES = (
    "BatchDelivered",
    "BatchInfo",
    "ChromeTraceSink",
    "Comparison",
    "EpochFinished",
    "EpochProgressed",
    "EpochSummary",
    "Event",
    "FaultBudgetError",
    "FaultLog",
    "FaultPolicy",
    "FaultRecord",
    "HostReport",
    "JsonlSink",
    "MemoryLow",
    "MemoryPolicy",
    "MergedSummary",
    "OpenTelemetrySink",
    "OptionError",
    "PoolHealed",
    "PoolResized",
    "PoolShrunk",
    "PrometheusSink",
    "RecoveryPolicy",
    "ResourceError",
    "RestartBudgetError",
    "Retry",
    "RobustDataLoader",
    "RobustLoaderError",
    "RobustLoaderWarning",
    "SampleError",
    "SampleFaulted",
    "SampleReplaced",
    "Sink",
    "StateError",
    "Statistics",
    "TaskLoaded",
    "TaskReplayed",
    "TelemetryPolicy",
    "TensorBoardSink",
    "TuningReport",
    "WorkerCrashError",
    "WorkerCrashed",
    "WorkerError",
    "WorkerHangError",
    "WorkerHung",
    "WorkerRecycled",
    "WorkerRestarted",
    "WorkerStartError",
    "compare",
    "doctor",
    "merge_summaries",
    "tune",
)
OURS = ("faults", "recovery", "memory", "telemetry", "seeding", "transport")


def test_all_is_sorted_and_complete() -> None:
    """``__all__`` is in order, without repetition, everything in it exists, and nothing promised is missing."""
    names = robustloader.__all__
    assert list(names) == sorted(set(names))
    assert all(hasattr(robustloader, name) for name in names)
    assert set(NAMES) <= set(names)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_documented(name: str) -> None:
    """Each public class says what it is."""
    assert inspect.getdoc(getattr(robustloader, name))


# --- the constructor --------------------------------------------------------------------------------------------------


def test_torchs_parameters_come_first() -> None:
    """All of torch's parameters, in torch's order, of torch's kinds, with torch's defaults; then ours by keyword."""
    torchs = inspect.signature(DataLoader.__init__).parameters
    ours = inspect.signature(RobustDataLoader.__init__).parameters
    assert list(ours)[: len(torchs)] == list(torchs)
    for name, parameter in torchs.items():
        assert ours[name].kind is parameter.kind
        assert ours[name].default == parameter.default
    assert tuple(ours)[len(torchs) :] == (*OURS, "kwargs")
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in OURS)
    assert ours["kwargs"].kind is inspect.Parameter.VAR_KEYWORD


def test_it_is_a_dataloader() -> None:
    """isinstance checks of frameworks hold, and the class can be subscripted in annotations."""
    assert issubclass(RobustDataLoader, DataLoader)
    assert isinstance(RobustDataLoader([1]), DataLoader)
    assert RobustDataLoader[int] is not None
    assert type(RobustDataLoader[int]([1])) is RobustDataLoader


class Stream(IterableDataset[int]):
    """An iterable dataset."""

    def __iter__(self) -> Any:
        yield 1


EVERYTHING: dict[str, Any] = {
    "dataset": [1, 2, 3, 4],
    "batch_size": 2,
    "num_workers": 2,
    "pin_memory": False,
    "drop_last": True,
    "timeout": 17,
    "worker_init_fn": abs,
    "collate_fn": len,
    "prefetch_factor": 3,
    "persistent_workers": True,
    "pin_memory_device": "cuda",
    "in_order": False,
    "faults": FaultPolicy(action="skip", burst=3),
    "recovery": RecoveryPolicy(max_restarts=1),
    "memory": MemoryPolicy(on_low="warn"),
    "telemetry": TelemetryPolicy(history=2),
    "seeding": "batch",
    "transport": "pipe",
}


@pytest.mark.parametrize(
    "arguments",
    [
        {"dataset": [1, 2]},
        EVERYTHING,
        {"dataset": Stream()},
        {"dataset": [1], "num_workers": "auto"},
        {"dataset": [1], "faults": "raise", "recovery": None, "memory": None, "telemetry": None},
        {"dataset": [1], "num_workers": 1, "multiprocessing_context": "fork", "shuffle": True},
        {"dataset": [1], "batch_sampler": [[0]]},
        {"dataset": [1], "batch_size": None},
    ],
)
def test_public_attributes_are_the_parameters(arguments: dict[str, Any]) -> None:
    """Frameworks rebuild a loader from its public attributes: each is a parameter of the constructor, and each
    parameter but ``shuffle`` and ``multiprocessing_context`` is there. Iterating adds none."""
    loader = RobustDataLoader(**arguments)
    parameters = set(inspect.signature(RobustDataLoader.__init__).parameters) - {"self", "kwargs"}
    assert {name for name in vars(loader) if not name.startswith("_")} == parameters - {
        "shuffle",
        "multiprocessing_context",
    }
    for name, value in arguments.items():
        if name not in ("shuffle", "multiprocessing_context", "batch_size", "num_workers"):
            assert getattr(loader, name) is value
    if loader.num_workers == 0:
        list(loader)
        assert {name for name in vars(loader) if not name.startswith("_")} <= parameters


def test_a_loader_can_be_rebuilt_from_its_attributes() -> None:
    """What the attributes hold is what the constructor takes: rebuilt loaders have the same attributes again."""
    first = RobustDataLoader(**EVERYTHING)
    attributes = {name: value for name, value in vars(first).items() if not name.startswith("_")}
    # As Lightning and ignite do: another sampler, or another batch sampler, and the rest as it was.
    sampler = DistributedSampler(first.dataset, num_replicas=2, rank=1)
    second = RobustDataLoader(**(attributes | {"sampler": sampler, "shuffle": False, "batch_sampler": None}))
    batches = BatchSampler(SequentialSampler(first.dataset), 3, False)
    third = RobustDataLoader(
        **(attributes | {"batch_sampler": batches, "batch_size": 1, "drop_last": False, "sampler": None})
    )
    for twin, changed in ((second, {"sampler", "batch_sampler"}), (third, {"sampler", "batch_sampler", "batch_size"})):
        for name, value in attributes.items():
            if name not in changed and not (twin is third and name == "drop_last"):
                assert getattr(twin, name) is value, name


def test_the_iterator_is_a_plain_attribute() -> None:
    """Lightning deletes it."""
    loader = RobustDataLoader([1, 2], num_workers=1, persistent_workers=True)
    assert loader._iterator is None
    assert len(list(loader)) == 2
    assert loader._iterator is not None
    del loader._iterator


def test_unknown_keywords_are_torchs_business() -> None:
    """A typo is torch's own TypeError."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'bathc_size'"):
        RobustDataLoader([1], bathc_size=3)


# --- auto -------------------------------------------------------------------------------------------------------------


def test_auto_is_a_number_and_stays_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """num_workers="auto" becomes an int at once, and is worked out anew where a loader is rebuilt."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    loader = RobustDataLoader([1, 2], num_workers="auto", timeout=9)
    assert isinstance(loader.num_workers, int)
    assert 1 <= loader.num_workers <= len(os.sched_getaffinity(0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    rebuilt = RobustDataLoader([1, 2], num_workers=loader.num_workers)
    assert rebuilt.num_workers == 1
    for twin in (copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))):
        assert RobustDataLoader([1], num_workers=twin.num_workers).num_workers == 1
    assert RobustDataLoader([1], num_workers=int(loader.num_workers)).num_workers == int(loader.num_workers)


@pytest.mark.parametrize("ranks", ["", "0", "-1", "many", "2.5", "²"])
def test_auto_survives_an_odd_environment(monkeypatch: pytest.MonkeyPatch, ranks: str) -> None:
    """A LOCAL_WORLD_SIZE that is no count of ranks means one rank."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    one = RobustDataLoader([1], num_workers="auto").num_workers
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert RobustDataLoader([1], num_workers="auto").num_workers == one


def test_auto_loads() -> None:
    """It is a number like any other."""
    loader = RobustDataLoader([1, 2, 3], batch_size=None, num_workers="auto")
    assert list(loader) == [1, 2, 3]


@pytest.mark.parametrize("word", ["automatic", ""])
def test_only_auto_is_auto(word: str) -> None:
    """Another word is torch's own error."""
    with pytest.raises(TypeError):
        RobustDataLoader([1], num_workers=word)


@pytest.mark.parametrize("word", ["Auto", "AUTO", " auto"])
def test_auto_is_written_in_one_way(word: str) -> None:
    """Our own word, nearly: torch would only say that it cannot compare it with a number."""
    with pytest.raises(OptionError, match='num_workers must be a number, or "auto"'):
        RobustDataLoader([1], num_workers=word)


# --- wrong options ----------------------------------------------------------------------------------------------------

NOT_COUNTS = (-1, 1.5, "3", None, True, float("nan"), float("inf"))
NOT_SECONDS = (-0.1, "3", True, float("nan"), float("inf"), [1])
NOT_POSITIVE = (0, -1, "3", True, float("nan"), float("inf"))

WRONG: list[tuple[Any, str, tuple[Any, ...], str]] = [
    (FaultPolicy, "action", ("ignore", None, 3, "Replace", ["raise"]), "'raise', 'skip', 'replace'"),
    (FaultPolicy, "retry", (3, "twice", Retry), "a Retry or None"),
    (FaultPolicy, "fatal", (ValueError, [ValueError], (3,), ("ValueError",), None, (int,)), "tuple of exception types"),
    (FaultPolicy, "burst", NOT_COUNTS, "a whole number at least 0"),
    (FaultPolicy, "max_fraction", (*NOT_SECONDS, None, 1.01, 5), "at least 0 and at most 1"),
    (FaultPolicy, "quarantine", (3, b"x", ["a"], True), "a path or None"),
    (Retry, "stop", (3, None, tenacity.stop_never), "stop_after_attempt"),
    (Retry, "wait", (3, None, "long"), "wait"),
    (Retry, "on", (ValueError, [ValueError], (3,), None), "tuple of exception types"),
    (RecoveryPolicy, "max_restarts", NOT_COUNTS, "a whole number at least 0"),
    (RecoveryPolicy, "backoff_s", (*NOT_SECONDS, None), "a number at least 0"),
    (RecoveryPolicy, "max_backoff_s", (*NOT_SECONDS, None, 0.05), "at least"),
    (RecoveryPolicy, "poison_after", (*NOT_COUNTS, 0), "a whole number at least 1"),
    (RecoveryPolicy, "hang_after_s", NOT_POSITIVE, "a number greater than 0, or None"),
    (RecoveryPolicy, "stall_report_s", NOT_POSITIVE, "a number greater than 0, or None"),
    (RecoveryPolicy, "start_timeout_s", NOT_POSITIVE, "a number greater than 0, or None"),
    (RecoveryPolicy, "min_workers", (*NOT_COUNTS, 0), "a whole number at least 1"),
    (RecoveryPolicy, "in_process", (1, 0, None, "yes"), "True or False"),
    (MemoryPolicy, "on_low", ("ignore", None, 1), "'warn', 'raise', 'adapt'"),
    (MemoryPolicy, "headroom_fraction", (*NOT_SECONDS, None, 1.5), "at least 0 and at most 1"),
    (MemoryPolicy, "max_worker_bytes", (-1, 0, 1.5, "3", True, float("inf")), "a whole number at least 1, or None"),
    (MemoryPolicy, "max_arena_bytes", (-1, 1.5, "3", True, float("inf")), "a whole number at least 0, or None"),
    (TelemetryPolicy, "sinks", ([], None, print, (print,), (3,)), "tuple of"),
    (TelemetryPolicy, "log_epochs", (1, None, "yes"), "True or False"),
    (TelemetryPolicy, "history", (*NOT_COUNTS, 0), "a whole number at least 1"),
    (TelemetryPolicy, "progress_s", (0, -1.0, "5", True, float("nan")), "a number greater than 0, or None"),
]
LOADER_WRONG: list[tuple[str, tuple[Any, ...], str]] = [
    ("faults", ("ignore", None, True, 3, RecoveryPolicy(), "REPLACE", ["skip"]), "a FaultPolicy, or one of 'raise', "),
    ("recovery", (True, False, 3, "yes", FaultPolicy(), RecoveryPolicy), "a RecoveryPolicy, or None"),
    ("memory", (True, 0.5, "adapt", RecoveryPolicy()), "a MemoryPolicy, or None"),
    ("telemetry", (True, False, "log", ()), "a TelemetryPolicy, or None"),
    ("seeding", ("epoch", None, 3, True), "'worker', 'batch'"),
    ("transport", ("queue", None, 3, True), "'auto', "),
]


@pytest.mark.parametrize(
    ("kind", "field", "value", "allowed"),
    [(kind, field, value, allowed) for kind, field, values, allowed in WRONG for value in values],
)
def test_wrong_policy_options(kind: Any, field: str, value: Any, allowed: str) -> None:
    """Each wrong value of each option is refused at once, with the field, the value and what is allowed."""
    check_refusal(lambda: kind(**{field: value}), field, value, allowed)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [(field, value, allowed) for field, values, allowed in LOADER_WRONG for value in values],
)
def test_wrong_loader_options(field: str, value: Any, allowed: str) -> None:
    """The same for the loader's own."""
    check_refusal(lambda: RobustDataLoader([1], **{field: value}), field, value, allowed)


def check_refusal(make: Any, field: str, value: Any, allowed: str) -> None:
    """It raises an OptionError with all the facts, which is a ValueError and survives pickling."""
    with pytest.raises(OptionError) as caught:
        make()
    error = caught.value
    assert isinstance(error, RobustLoaderError)
    assert isinstance(error, ValueError)
    assert error.field == field
    assert error.value is value or error.value == value
    text = str(error)
    assert f"{field}={value!r}" in text
    assert allowed in text
    twin = copy.copy(error)
    assert (type(twin), str(twin), twin.field) == (OptionError, text, field)


@pytest.mark.parametrize("kind", [FaultPolicy, RecoveryPolicy, MemoryPolicy, TelemetryPolicy])
def test_every_option_is_in_the_table(kind: Any) -> None:
    """An option added later gets its wrong values here, too."""
    tabled = {field for owner, field, _, _ in WRONG if owner is kind}
    assert {field.name for field in dataclasses.fields(kind)} <= tabled


@pytest.mark.parametrize("kind", [FaultPolicy, Retry, RecoveryPolicy, MemoryPolicy, TelemetryPolicy])
def test_policies_are_values(kind: Any) -> None:
    """They compare, hash, print, pickle, do not change, and take keywords only."""
    policy = kind()
    assert policy == kind()
    assert hash(policy) == hash(kind())
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert repr(policy).startswith(kind.__name__ + "(")
    name = dataclasses.fields(kind)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(policy, name, None)
    with pytest.raises(TypeError):
        kind(1)


def test_policies_that_differ_are_not_equal() -> None:
    """Also where tenacity's strategies make the difference."""
    assert Retry(stop=tenacity.stop_after_attempt(2)) != Retry()
    assert Retry(wait=tenacity.wait_fixed(1)) != Retry()
    assert Retry() != 3
    assert FaultPolicy(retry=None) != FaultPolicy()


@pytest.mark.parametrize(
    "make",
    [
        lambda: FaultPolicy(action="raise", retry=None, fatal=(), burst=0, max_fraction=0),
        lambda: FaultPolicy(max_fraction=1, quarantine="x.jsonl"),
        lambda: RecoveryPolicy(max_restarts=0, backoff_s=0, max_backoff_s=0, hang_after_s=None, stall_report_s=None),
        lambda: RecoveryPolicy(start_timeout_s=None, hang_after_s=0.5, min_workers=3, in_process=False),
        lambda: MemoryPolicy(headroom_fraction=0),
        lambda: TelemetryPolicy(log_epochs=False, history=1),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(make: Any) -> None:
    """What the documentation allows is taken."""
    assert make() == make()


def test_torchs_errors_are_raised_first() -> None:
    """A wrong argument of torch's is told in torch's words even if one of ours is wrong as well."""
    with pytest.raises(ValueError, match="num_workers option should be non-negative"):
        RobustDataLoader([1], num_workers=-1, seeding="nothing")
    assert torch.utils.data.get_worker_info() is None
