"""Torch's ``default_collate`` in a worker, without ``/dev/shm``.

In a worker, torch stacks tensors into a new entry of ``/dev/shm``, which a container's 64 MB cannot hold for long. Here
plain tensors are stacked with ``out=`` as torch does, but straight into the arena, where the training process will find
them; or into ordinary memory, where there is no arena, and where user code calls ``default_collate`` outside of the
loader's ``collate_fn``: what it makes there need not be part of a batch. Everything else is left to torch's function.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from robustloader.system import torch_private
from robustloader.transport.arena import Arena

__all__ = ["Stacker"]


class Stacker:
    """Stacks tensors for ``default_collate``.

    Runs in a worker process, or in the training process when it stands in for one (``arena`` is None then).
    """

    def __init__(self, arena: Arena | None = None) -> None:
        self._arena = arena
        self._collating = 0

    def installed(self) -> contextlib.AbstractContextManager[None]:
        """While active, ``default_collate`` in this process stacks with :meth:`stack`."""
        return torch_private.tensor_collate(self.stack)

    def around(self, collate_fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """``collate_fn``, with the arena open to what it stacks in its own thread."""

        def collate(samples: Any) -> Any:
            self._collating = threading.get_ident()
            try:
                return collate_fn(samples)
            finally:
                self._collating = 0

        return collate if self._arena is not None else collate_fn

    def stack(self, torch_collate: Callable[..., Any], batch: Sequence[Any], collate_fn_map: Any) -> Any:
        """A new tensor of all the tensors in ``batch``, which get a first dimension.

        The rest of a batch need not be looked at: ``out=`` has the same effect here as in torch's function, which makes
        the same call. Only where tensors of unequal sizes, or what is no tensor, are refused has that one an earlier
        error, and raises it.
        """
        first = batch[0]
        if not _is_plain(first):
            return torch_collate(batch, collate_fn_map=collate_fn_map)
        shape = (len(batch), *first.shape)
        out = None
        if self._arena is not None and self._collating == threading.get_ident():
            out = self._arena.empty(shape, first.dtype)
        if out is None:
            out = torch.empty(shape, dtype=first.dtype, device="cpu")
        try:
            return torch.stack(tuple(batch), 0, out=out)
        except (RuntimeError, TypeError):
            return torch_collate(batch, collate_fn_map=collate_fn_map)


def _is_plain(tensor: Any) -> bool:
    return (
        type(tensor) is torch.Tensor
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.requires_grad
        and not tensor.is_quantized
        and not tensor.is_nested
        and not tensor.is_complex()  # may be conjugated views, with which torch's function has ways of its own
        and not tensor.is_neg()
    )
