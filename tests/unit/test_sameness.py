"""Two states are the same or not, whatever is in them."""

from __future__ import annotations

import collections
import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from robustloader.worker.sameness import same_pickles, same_values


class Arrays:
    """Answers a comparison with an array, as NumPy does; ``raises``: with an error."""

    def __init__(self, value: float, raises: bool = False) -> None:
        self.value, self.raises = torch.tensor([value]), raises

    def __eq__(self, other: object) -> Any:
        if self.raises:
            raise TypeError
        return np.array([True, False])

    __hash__ = None  # type: ignore[assignment]


class Sliced:
    """Keeps a tensor in a slot."""

    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = torch.tensor([value])


class Tensor(torch.Tensor):
    """A user's own."""


def cycle(value: float) -> list[Any]:
    ring: list[Any] = [torch.tensor(value)]
    ring.append((ring, {"ring": ring}))
    return ring


KINDS: dict[str, Callable[[float], Any]] = {
    "float": lambda value: [float("nan"), value],
    "dict": lambda value: {"a": torch.tensor(value), "b": [(value, None)]},
    "tensor": lambda value: torch.tensor([float("nan"), value]),
    "scalar": lambda value: torch.tensor(value, dtype=torch.bfloat16),
    "complex": lambda value: torch.tensor([1 + 2j, value]).conj(),
    "view": lambda value: torch.tensor([random.random(), value, 0.0])[1:],
    "sparse": lambda value: torch.tensor([[0, value], [1, 0]]).to_sparse(),
    "parameter": lambda value: torch.nn.Parameter(torch.tensor([value])),
    "subclass": lambda value: torch.tensor([value]).as_subclass(Tensor),
    "array": lambda value: np.array([np.nan, value]),
    "record": lambda value: np.array([(1, value)], dtype=[("a", "<i4"), ("b", ">f8")]),
    "objects": lambda value: np.array([None, {"x": torch.tensor(value)}], dtype=object),
    "masked": lambda value: np.ma.array([1, value]),
    "number": lambda value: np.float64(value),
    "generator": lambda value: torch.Generator().manual_seed(int(value)),
    "numpy": lambda value: np.random.default_rng(int(value)),
    "python": lambda value: random.Random(int(value)),
    "deque": lambda value: collections.deque([torch.tensor(value)], 3),
    "defaultdict": lambda value: collections.defaultdict(list, {0: [torch.tensor(value)]}),
    "set": lambda value: {"a", value},
    "arrays": lambda value: Arrays(value),
    "raises": lambda value: [Arrays(value, raises=True)],
    "slots": lambda value: Sliced(value),
    "cycle": cycle,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_is_known_from_the_other(kind: str) -> None:
    """By themselves and pickled."""
    make = KINDS[kind]
    one, again, other = make(2.0), make(2.0), make(3.0)
    assert same_values(one, again)
    assert not same_values(one, other)
    first, second, third = (pickle.dumps(value, pickle.HIGHEST_PROTOCOL) for value in (one, again, other))
    assert same_pickles(first, second) and not same_pickles(first, third)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        ([1], (1,)),
        ([1, 2], [1]),
        ([1], [True]),
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"a": 1}, {"b": 1}),
        (torch.zeros(2), torch.zeros(2, 1)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2), torch.zeros(2, requires_grad=True)),
        (torch.zeros(2), np.zeros(2, np.float32)),
        (np.zeros(2), np.zeros((2, 1))),
        (np.zeros(2), np.zeros(2, np.int64)),
        (int, float),
        (len, max),
        (collections.deque([1]), collections.deque([1], 3)),
    ],
)
def test_what_differs_in_kind_is_not_the_same(one: Any, other: Any) -> None:
    """Types, shapes and lengths count."""
    assert not same_values(one, other) and not same_values([one], [other])
    assert same_values([one, other], [copy.deepcopy(one), copy.deepcopy(other)])


def test_the_order_of_keys_and_what_is_shared_do_not_count() -> None:
    """Both change a pickle, and neither changes what the state says."""
    name = "".join(["na", "me"])
    assert same_pickles(pickle.dumps([name, name]), pickle.dumps([name, "".join(["na", "me"])]))
    assert same_pickles(pickle.dumps({"a": 1, "b": 2}), pickle.dumps({"b": 2, "a": 1}))


class Broken:
    """Cannot be unpickled."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __setstate__(self, state: Any) -> None:
        raise ValueError


def test_what_cannot_be_known_is_not_the_same() -> None:
    """A class that cannot be unpickled, an object that cannot be pickled, one nested too deeply."""
    assert not same_pickles(pickle.dumps(Broken(1)), pickle.dumps(Broken(2)))
    assert not same_values((n for n in ()), (n for n in ()))
    deep: list[list[Any]] = [[], []]
    for place in range(2):
        for _ in range(100_000):
            deep[place] = [deep[place]]
    assert not same_values(*deep)
