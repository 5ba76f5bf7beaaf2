"""Where two batches differ first."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from robustloader.decisions.differences import find_difference
from robustloader.tuning.comparison import _compare_leaves

NAN = float("nan")
Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Record:
    """A dataclass in a batch."""

    name: str
    value: Any


class Plain:
    """Compares by identity."""

    def __init__(self, value: int) -> None:
        self.value = value


class Hostile:
    """Cannot be compared."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    __hash__ = None  # type: ignore[assignment]


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1, 1),
        (NAN, NAN),
        (tensor(1, NAN), tensor(1, NAN)),
        (torch.tensor([complex(NAN, 1)]), torch.tensor([complex(NAN, 1)])),
        (np.array([NAN]), np.array([NAN])),
        (np.array(["a"]), np.array(["a"])),
        ({"a": [1, (2, None)]}, {"a": [1, (2, None)]}),
        (Record("x", tensor(1)), Record("x", tensor(1))),
        (Plain(1), Plain(1)),
        (torch.eye(3).to_sparse(), torch.eye(3).to_sparse()),
        (torch.zeros(0), torch.zeros(0)),
    ],
)
def test_alike(first: Any, second: Any) -> None:
    """NaN is NaN."""
    assert find_difference(first, second, _compare_leaves) is None


@pytest.mark.parametrize(
    ("first", "second", "path", "what"),
    [
        (1, 1.0, "batch", "type"),
        (0.0, -0.0, "batch", "value"),
        (tensor(0.0), tensor(-0.0), "batch[0]", "value"),
        (tensor(1, 2, NAN), tensor(1, 2, 3), "batch[2]", "value"),
        (torch.eye(2), torch.eye(2).double(), "batch", "dtype"),
        (torch.eye(2), torch.eye(3), "batch", "shape"),
        (torch.tensor(3), torch.tensor(4), "batch", "value"),
        (np.eye(2), np.zeros((2, 2)), "batch[0, 0]", "value"),
        ([1, 2], [1], "batch", "length"),
        ({"a": 1}, {"b": 1}, "batch", "keys"),
        ({"a": [0, {"b": (1, 2)}]}, {"a": [0, {"b": (1, 3)}]}, "batch['a'][1]['b'][1]", "value"),
        (Pair(1, 2), Pair(1, 3), "batch.right", "value"),
        (Record("x", tensor(1)), Record("x", tensor(2)), "batch.value[0]", "value"),
        (Plain(1), Plain(2), "batch", "value"),
        (Hostile(), Hostile(), "batch", "value"),
        (torch.eye(3).to_sparse(), torch.zeros(3, 3).to_sparse(), "batch", "value"),
    ],
)
def test_unlike(first: Any, second: Any, path: str, what: str) -> None:
    """The place and the kind of the first difference."""
    found = find_difference(first, second, _compare_leaves)
    assert found is not None
    assert found[:2] == (path, what)
