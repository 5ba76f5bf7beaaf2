"""Samplers whose order does not depend on the number of ranks, so that a job may be resumed with another number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Sampler

from robustloader.errors import OptionError, StateError

__all__ = ["ElasticDistributedBatchSampler", "ElasticDistributedSampler"]

_SCHEMA = 1
_CHUNK = 1 << 15
"""Indices turned into Python integers at a time."""


class _Order:
    """One global order per epoch, the same for every number of ranks, and how far all ranks together have read it.

    After the last index its state is the end of the order (``ends_in_place``): of an epoch that all have read, nothing
    is left, until ``set_epoch`` names another one or the next iteration begins.
    """

    ends_in_place = True

    def __init__(
        self, dataset: Any, num_replicas: int | None, rank: int | None, shuffle: bool, seed: int, drop_last: bool
    ) -> None:
        if num_replicas is None or rank is None:
            if not dist.is_available():
                raise RuntimeError("Requires distributed package to be available")
            num_replicas = dist.get_world_size() if num_replicas is None else num_replicas
            rank = dist.get_rank() if rank is None else rank
        if not 0 <= rank < num_replicas:
            raise ValueError(f"Invalid rank {rank}, rank should be in the interval [0, {num_replicas - 1}]")
        self.dataset = dataset
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch: int = 0
        self.drop_last = drop_last
        self.shuffle = shuffle
        self.seed = seed
        self._start = 0
        self._position = 0
        self._reader: object = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order, on every rank and before ``iter(loader)``, as with torch's sampler.

        The epoch of a state that was just loaded keeps its position; another one begins at its beginning.
        """
        if epoch != self.epoch:
            self.epoch = epoch
            self._start = self._position = 0

    def _order(self) -> np.ndarray[Any, Any]:
        size = len(self.dataset)
        narrow = size < 1 << 27  # torch draws the same permutation in either width there
        kind = torch.int32 if narrow else torch.int64
        if not self.shuffle:
            return torch.arange(size, dtype=kind, device="cpu").numpy()
        generator = torch.Generator()
        generator.manual_seed(self.seed + self.epoch)
        return torch.randperm(size, generator=generator, dtype=kind, device="cpu").numpy()

    def _take_start(self, reader: object) -> int:
        """Where this iteration begins: where the loaded state says, once."""
        start, self._start = self._start, 0
        self._position = start
        self._reader = reader
        return start

    def _leave(self, reader: object) -> None:
        """An iteration was given up: whoever iterates again gets a whole epoch."""
        if self._reader is reader:
            self._position = 0

    def state_dict(self) -> dict[str, Any]:
        """How far all ranks together have read, in samples of the global order; the same on ranks in step."""
        return {
            "schema": _SCHEMA,
            "epoch": self.epoch,
            "position": self._position,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "length": len(self.dataset),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next iteration go on from a state, that of any rank of a run with any number of ranks.

        Raises:
            StateError: another schema, seed, shuffle or length of the dataset.
        """
        ours = {"schema": _SCHEMA, "seed": self.seed, "shuffle": self.shuffle, "length": len(self.dataset)}
        wrong = {name: value for name, value in ours.items() if state_dict.get(name) != value}
        if wrong:
            found = {name: state_dict.get(name) for name in wrong}
            raise StateError(
                f"this sampler's state was saved with {found}, but the sampler has {wrong}: construct it as in the "
                "saved run (num_replicas and rank may differ)",
                expected=wrong,
                found=found,
            )
        self.epoch = state_dict["epoch"]
        self._start = self._position = state_dict["position"]
        self._reader = None


class ElasticDistributedSampler(_Order, Sampler[int]):
    """A drop-in for ``torch.utils.data.DistributedSampler`` whose run may go on with another number of ranks.

    All ranks together read one global order, rank ``r`` of ``n`` every ``n``-th index from the ``r``-th on; that is
    torch's own choice, index for index. The state is a position in the global order: saved with 8 ranks, it is loaded
    with 6 or 16, and within the epoch no sample is lost or repeated but for the padding at the very end.

    Args:
        dataset: anything with a length.
        num_replicas: number of ranks; by default that of the current process group.
        rank: this process's, from 0; by default that of the current process group.
        shuffle: whether each epoch has an order of its own, as torch's; call ``set_epoch`` before each.
        seed: of that order, the same on all ranks.
        drop_last: what to do with the last indices, too few for one each: drop them (True), or repeat the first ones of
            the order, so that all ranks have the same number of steps (False).

    ``len()`` is that of a whole epoch with this number of ranks, also while a resumed epoch has less left.

    Memory: the permutation takes 4 bytes per sample of the dataset while an epoch begins, then each rank keeps its
    share of it.

    *Source*: ``DistributedSampler``, ``torch/utils/data/distributed.py``, torch 2.13, for arguments, order and padding.
    """

    def __init__(
        self,
        dataset: Any,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle, seed, drop_last)

    @property
    def num_samples(self) -> int:
        """Indices of a whole epoch for each rank."""
        return self._share_of(len(self.dataset))

    @property
    def total_size(self) -> int:
        """Indices of a whole epoch for all ranks together."""
        return self.num_samples * self.num_replicas

    def _share_of(self, samples: int) -> int:
        return samples // self.num_replicas if self.drop_last else math.ceil(samples / self.num_replicas)

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        reader = object()
        start = self._take_start(reader)
        order = self._order()
        steps = self._share_of(max(0, len(order) - start))
        places = np.arange(steps, dtype=np.int64) * self.num_replicas + (start + self.rank)
        share = order[places % max(1, len(order))]
        del order, places
        replicas = self.num_replicas
        try:
            for first in range(0, steps, _CHUNK):
                for index in share[first : first + _CHUNK].tolist():
                    self._position += replicas
                    yield index
        except GeneratorExit:
            self._leave(reader)
            raise


class ElasticDistributedBatchSampler(_Order, Sampler[list[int]]):
    """Batches of a *global* size, shared out among the ranks: the steps of a run, and the samples of each step, are the
    same with any number of ranks.

    Step ``k`` is the ``k``-th piece of ``global_batch_size`` indices of the global order; rank ``r`` of ``n`` takes
    every ``n``-th of it from the ``r``-th on, so the ranks' shares differ by one index at most. Pass it as
    ``batch_sampler``.

    Args:
        dataset: anything with a length.
        global_batch_size: indices per step of all ranks together; at least ``num_replicas``.
        num_replicas: number of ranks, as for :class:`ElasticDistributedSampler`.
        rank: this process's, as there.
        shuffle: as there.
        seed: as there.
        drop_last: drop the last, incomplete step (True), or take it; where it has fewer indices than there are ranks,
            it is filled up with the first ones of the order (False).

    Memory: the permutation takes 4 bytes per sample of the dataset during an epoch.
    """

    def __init__(
        self,
        dataset: Any,
        global_batch_size: int,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle, seed, drop_last)
        if not isinstance(global_batch_size, int) or global_batch_size < self.num_replicas:
            raise OptionError("global_batch_size", global_batch_size, f"an int of at least {self.num_replicas} (ranks)")
        self.global_batch_size = global_batch_size

    def __len__(self) -> int:
        size = len(self.dataset)
        return size // self.global_batch_size if self.drop_last else math.ceil(size / self.global_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        reader = object()
        start = self._take_start(reader)
        order = self._order()
        size, ranks = self.global_batch_size, self.num_replicas
        stop = len(order) // size * size if self.drop_last else len(order)
        try:
            for first in range(start, stop, size):
                piece = order[first : min(first + size, stop)]
                if len(piece) < ranks:
                    piece = np.concatenate([piece, np.resize(order, ranks - len(piece))])
                self._position = first + size
                yield piece[self.rank :: ranks].tolist()
        except GeneratorExit:
            self._leave(reader)
            raise
