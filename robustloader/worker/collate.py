"""Torch's ``default_collate`` in a worker, without shared memory.

In a worker, torch stacks tensors into a new entry of ``/dev/shm``, which a container's 64 MB cannot hold for long and
which is copied into a frame here anyway. Plain tensors that are all alike are stacked into ordinary memory instead,
with ``out=`` as torch does; everything else is left to torch's function, with its errors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from robustloader.system import torch_private

__all__ = ["private_collate"]


def private_collate() -> contextlib.AbstractContextManager[None]:
    """While active, ``default_collate`` in this process stacks into ordinary memory."""
    return torch_private.tensor_collate(_stack)


def _stack(torch_collate: Callable[..., Any], batch: Sequence[Any], collate_fn_map: Any) -> Any:
    if not _alike(batch):
        return torch_collate(batch, collate_fn_map=collate_fn_map)
    first = batch[0]
    return torch.stack(tuple(batch), 0, out=torch.empty((len(batch), *first.shape), dtype=first.dtype))


def _alike(batch: Sequence[Any]) -> bool:
    first = batch[0]
    if type(first) is not torch.Tensor or first.is_quantized or first.is_nested or first.is_complex():
        return False  # complex ones may be conjugated views, with which torch's function has ways of its own
    shape, dtype = first.shape, first.dtype
    return all(
        type(tensor) is torch.Tensor
        and tensor.dtype == dtype
        and tensor.shape == shape
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.requires_grad
        and not tensor.is_neg()
        for tensor in batch
    )
