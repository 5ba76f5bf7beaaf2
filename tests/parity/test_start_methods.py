"""The start method changes nothing that a trainer can notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import parity_data as data
from tests.support.parity_run import Program, assert_same

contexts = pytest.mark.parametrize("context", ["spawn", "forkserver"])


@contexts
def test_a_map_style_dataset(context: str) -> None:
    """Three epochs with persistent workers, one of them broken off: batches, seeds and random streams are torch's."""

    def arguments() -> dict[str, Any]:
        return {
            "dataset": data.Samples("dict", 11),
            "batch_size": 2,
            "shuffle": True,
            "generator": torch.Generator().manual_seed(8),
            "num_workers": 2 if context == "forkserver" else 1,
            "persistent_workers": True,
            "worker_init_fn": data.reseed_in_init,
            "multiprocessing_context": context,
        }

    assert_same(Program(arguments, epochs=(None, 2, None)), "defaults")


@contexts
def test_an_iterable_dataset(context: str) -> None:
    """Shards set up by a worker_init_fn, in strict mode."""

    def arguments() -> dict[str, Any]:
        return {
            "dataset": data.SizedStream("mixed", 9, shard="init"),
            "batch_size": 2,
            "num_workers": 2,
            "worker_init_fn": data.shard_in_init,
            "multiprocessing_context": torch.multiprocessing.get_context(context),
        }

    assert_same(Program(arguments), "strict")


def test_a_sample_that_raises() -> None:
    """Exceptions come back from a fresh interpreter alike."""

    def arguments() -> dict[str, Any]:
        return {
            "dataset": data.Raising(4, {1: data.one_argument_error}),
            "num_workers": 1,
            "multiprocessing_context": "forkserver",
        }

    assert_same(Program(arguments), "strict")
