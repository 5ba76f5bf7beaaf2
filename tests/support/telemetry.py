"""Real epochs for sinks to hear of, and events that are as nasty as users' objects can be."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from robustloader import (
    EpochSummary,
    FaultRecord,
    RobustDataLoader,
    SampleFaulted,
    SampleReplaced,
    Sink,
    TelemetryPolicy,
    WorkerCrashed,
)
from tests.support.datasets import Raising, damaged

BATCHES = 24
BATCH_SIZE = 4
EVERY_BATCH_S = 1e-9
"""As ``progress_s``: whenever a batch is delivered, it is time."""


def run_epoch(*sinks: Sink, workers: int = 2, progress_s: float | None = EVERY_BATCH_S) -> EpochSummary:
    """An epoch of 24 batches of 4, in which sample 50 is damaged and, with workers, worker 1 is killed."""
    loader: RobustDataLoader[Any] = RobustDataLoader(
        Raising(BATCHES * BATCH_SIZE, {50: damaged}),
        batch_size=BATCH_SIZE,
        num_workers=workers,
        telemetry=TelemetryPolicy(sinks=sinks, progress_s=progress_s),
    )
    with warnings.catch_warnings(record=True) as caught:  # of the fault and the death; none of a sink
        warnings.simplefilter("always")
        batches = iter(loader)
        next(batches)
        if workers:
            os.kill(batches._workers[1].pid, signal.SIGKILL)
        assert sum(1 for _ in batches) == BATCHES - 1
    assert not [warning for warning in caught if "telemetry" in str(warning.message)]
    return loader.summary()


class Hostile:
    """An index that can be neither compared, copied, pickled nor printed."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("no copy")

    def __reduce__(self) -> Any:
        raise RuntimeError("no pickle")


class Endless(list):  # type: ignore[type-arg]
    """A list that has no end."""

    def __iter__(self) -> Any:
        while True:
            yield 1


class Loop(str):
    """A text that is not what it says."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def hostile_values() -> st.SearchStrategy[Any]:
    """Indices of every kind: JSON's own, numbers that it lacks, tensors, containers in containers, and worse."""
    import numpy as np
    import torch

    def itself() -> list[Any]:
        loop: list[Any] = [1]
        loop.append(loop)
        return loop

    leaves = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=True)
        | st.text()
        | st.text(alphabet='\ud800\udfff\u2028\u2029\x00\x1f\n\r"\\é', max_size=20)
        | st.binary(max_size=10)
        | st.builds(lambda: 10**5000)
        | st.sampled_from([-(10**400), complex(1, 2), ..., int, object()])
        | st.builds(Hostile)
        | st.builds(Endless)
        | st.just(Loop("a\nb"))
        | st.builds(itself)
        | st.just("x" * 100_000)
        | st.sampled_from([torch.tensor(3), torch.tensor([[1.5, float("nan")]]), torch.zeros(10_000), torch.tensor([])])
        | st.sampled_from([torch.empty(2, device="meta"), torch.tensor([1 + 2j])])
        | st.sampled_from([np.int64(7), np.float32("inf"), np.array(["a", "b"]), np.array([object()]), np.bool_(True)])
        | st.just(Path("/x"))
    )
    keys = st.text(max_size=5) | st.integers() | st.tuples(st.integers(), st.text(max_size=3)) | st.none()
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(keys, inner, max_size=3),
        max_leaves=10,
    )


def hostile_events() -> st.SearchStrategy[Any]:
    """Events about such indices."""
    values, text = hostile_values(), st.text(max_size=200)
    faults = st.builds(
        FaultRecord, kind=st.just("exception"), index=values, replacement=values, message=text, traceback=text
    )
    return (
        st.builds(SampleFaulted, fault=faults)
        | st.builds(SampleReplaced, task=st.integers(), position=st.integers(), wanted=values, used=values)
        | st.builds(
            WorkerCrashed,
            worker_id=st.integers(),
            incarnation=st.integers(),
            pid=st.integers(),
            exitcode=st.none(),
            signal=text,
            cause=text,
            phase=text,
            index=values,
            tasks=st.integers(),
        )
    )
