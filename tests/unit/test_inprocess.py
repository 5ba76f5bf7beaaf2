"""What is told of a batch that the training process has loaded itself."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from robustloader.engine.inprocess import batch_nbytes, count_tensors

Pair = namedtuple("Pair", "image label")


class Lazy:
    """Whoever asks it for anything has it decoded, which fails."""

    def __getattribute__(self, name: str) -> Any:
        raise OSError(f"cannot decode to answer for {name}")


class Strange(torch.Tensor):
    """Knows no size."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise KeyError("no")


class Unsized(np.ndarray[Any, Any]):
    """The same for NumPy."""

    nbytes = None  # type: ignore[assignment]


class OwnList(list[Any]):
    """A list that cannot be walked through twice, nor once."""

    def __iter__(self) -> Any:
        raise RuntimeError("not now")


FLOATS = torch.zeros(10)


@pytest.mark.parametrize(
    ("batch", "nbytes", "tensors"),
    [
        (FLOATS, 40, 1),
        (np.zeros(10), 80, 1),
        ([FLOATS, "a", 1, None, np.zeros(10)], 120, 2),
        ({"image": FLOATS, "more": OrderedDict(label=[FLOATS])}, 80, 2),
        (Pair(FLOATS, [FLOATS]), 80, 2),
        ([[[FLOATS]]], 40, 1),
        ([[[[FLOATS]]]], 0, 0),
        (torch.nn.Parameter(FLOATS), 40, 1),
        (torch.eye(3).to_sparse(), 36, 1),
        (OwnList([FLOATS]), 40, 1),
        ([FLOATS, Lazy()], 40, 1),
        ({"a": {"b": {"c": Lazy()}}}, 0, 0),
        ([FLOATS, torch.zeros(4).as_subclass(Strange)], 40, 2),
        ([FLOATS, np.zeros(4).view(Unsized)], 40, 2),
        ([FLOATS, torch.nn.UninitializedParameter()], 40, 2),
        ("text", 0, 0),
    ],
)
def test_the_size_of_a_batch(batch: Any, nbytes: int, tensors: int) -> None:
    """Tensors and arrays in common containers count, three deep; nobody's own code is run, or fails."""
    assert batch_nbytes(batch) == nbytes
    assert count_tensors(batch) == tensors


def test_a_bounded_look() -> None:
    """A long list neither takes long nor hides what lies beside it."""
    batch = {"names": [FLOATS] * 50, "images": [FLOATS, [FLOATS]], "label": FLOATS}
    assert batch_nbytes(batch) == 53 * 40
    assert batch_nbytes(batch, most=5) == 6 * 40
    assert batch_nbytes(["a"] * 50, most=5) == 0
