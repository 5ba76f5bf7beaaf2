"""One key per sample, whatever type its index has."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustloader.decisions.keys import as_list, count_indices, index_key, positions_of, probe

SIMPLE = st.recursive(st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3).map(tuple))


class Rude:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "same", [7, np.int64(7), np.uint8(7), np.array(7), np.array([7]), torch.tensor(7), torch.tensor([7])]
)
def test_integers_of_any_kind_are_one_sample(same: Any) -> None:
    """Samplers yield Python integers, NumPy's and tensors."""
    assert index_key(same) == 7
    assert type(index_key(same)) is int


@pytest.mark.parametrize(
    ("one", "other"), [(7, "7"), ("a", ("a",)), (1, (1,)), ((1, 2), (12,)), ("t:[1]", (1,)), ("r:1.5", 1.5)]
)
def test_different_samples_have_different_keys(one: Any, other: Any) -> None:
    """Prefixes keep the kinds apart."""
    assert index_key(one) != index_key(other)


@given(SIMPLE, SIMPLE)
def test_keys_tell_samples_apart(one: Any, other: Any) -> None:
    """Equal keys mean equal indices, for all that integers, strings and tuples can make."""
    assert (index_key(one) == index_key(other)) == (one == other)


@given(SIMPLE)
def test_keys_survive_json(index: Any) -> None:
    """The quarantine file holds them."""
    key = index_key(index)
    assert json.loads(json.dumps(key)) == key
    assert hash(key) == hash(index_key(index))


def test_lists_and_tuples_are_alike() -> None:
    """A pickle or a JSON file turns one into the other."""
    assert index_key([1, "a"]) == index_key((1, "a"))


@pytest.mark.parametrize("index", [PurePosixPath("a/b"), 1.5, None, {"shard": 3}, torch.arange(3), np.zeros((2, 2))])
def test_anything_has_a_key(index: Any) -> None:
    """Objects are known by their ``repr``."""
    assert index_key(index) == "r:" + repr(index)


def test_a_repr_that_raises() -> None:
    """Still a key."""
    assert isinstance(index_key(Rude()), str)


class Silent:
    """Raises where it is asked for anything."""

    def __init__(self, *indices: int) -> None:
        self.__dict__["indices"] = indices

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Any:
        return iter(self.indices)

    def __repr__(self) -> str:
        return f"Silent{self.indices}"


def test_objects_that_raise_when_asked() -> None:
    """They are indices all the same, known by their ``repr``, and may hold some."""
    assert index_key(Silent(1)) == "r:Silent(1,)"
    assert as_list(Silent(3, 1), batched=True) == [3, 1]
    assert count_indices(Silent(3, 1)) == 1
    assert probe(Silent(), "generator") is None
    assert probe(3, "real") == 3


@pytest.mark.parametrize(
    ("indices", "expected"),
    [([3, 1], [3, 1]), ((3, 1), [3, 1]), (range(2), [0, 1]), ("ab", ["a", "b"]), (object(), []), (5, [])],
)
def test_the_samples_of_a_batch(indices: Any, expected: list[Any]) -> None:
    """One entry per sample; nothing where the batch sampler yielded something only the dataset understands."""
    assert as_list(indices, batched=True) == expected


def test_without_batching_the_index_is_the_sample() -> None:
    """Even where it is a list."""
    assert as_list([1, 2], batched=False) == [[1, 2]]


def test_positions() -> None:
    """Where known samples stand, by key."""
    assert positions_of([5, np.int64(3), torch.tensor(5)], {5}) == (0, 2)
    assert positions_of([5], set()) == ()
