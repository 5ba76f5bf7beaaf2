"""Copies of the user's dataset, so that measuring in this process leaves the original as it was."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import torch

__all__ = ["copy_sharing_data"]


def copy_sharing_data(thing: Any) -> Any:
    """A copy of ``thing`` that shares its tensors and arrays: they may be larger than what memory is left.

    Everything else (positions, random generators, caches in lists and dicts) is the copy's own.

    Raises:
        Exception: it cannot be pickled; user code may raise anything.
    """
    shared: list[Any] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, part: Any) -> int | None:
            if type(part) in (torch.Tensor, np.ndarray):
                shared.append(part)
                return len(shared) - 1
            return None

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, place: int) -> Any:
            return shared[place]

    buffer = io.BytesIO()
    Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(thing)
    buffer.seek(0)
    return Unpickler(buffer).load()
