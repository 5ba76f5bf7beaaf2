"""The one place that touches names torch keeps to itself. Works with torch 2.6 to 2.15.

Everything here either subclasses or calls ``torch.utils.data.dataloader`` and its ``_utils``. Where a name is gone,
importing this module says so, with the versions that are known to work. A newer torch that has them all is driven like
the newest known one.

*Source*: ``torch/utils/data/dataloader.py``, ``_utils/worker.py``, ``_utils/pin_memory.py`` of torch 2.13.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from robustloader.errors import RobustLoaderWarning, hold_warnings, release_warnings

__all__ = [
    "HookedDataLoader",
    "LoaderIterator",
    "auto_collation",
    "draw_base_seed",
    "end_iterator",
    "enter_worker",
    "is_datapipe",
    "is_iterable",
    "key_error_message",
    "new_worker_info",
    "numpy_seed",
    "pin_memory",
    "plain_within",
    "prepare_worker_process",
    "tensor_collate",
    "worker_info",
    "worker_processes",
]

_KNOWN = "torch 2.6 to 2.15"

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
    raise ImportError(
        f"robustloader needs {_KNOWN}; this is torch {torch.__version__}, which is too old: upgrade torch"
    )

try:
    from torch._C._autograd import _profiler_enabled
    from torch._tensor import _rebuild_from_type_v2
    from torch._utils import KeyErrorMessage, _rebuild_tensor_v2, _rebuild_tensor_v3
    from torch.utils.data._utils import collate as _torch_collate
    from torch.utils.data._utils import pin_memory as _torch_pin
    from torch.utils.data._utils import signal_handling as _torch_signals
    from torch.utils.data._utils import worker as _torch_worker
    from torch.utils.data.dataloader import _BaseDataLoaderIter, _DatasetKind
except ImportError as error:
    raise ImportError(
        f"robustloader needs {_KNOWN}; torch {torch.__version__} has moved a name it builds on: {error}"
    ) from error

# Class → what it must have: as an attribute, or set by its constructor.
_BUILT_ON: dict[type, tuple[tuple[str, ...], tuple[str, ...]]] = {
    DataLoader: (
        ("__iter__", "_auto_collation", "_get_iterator", "_index_sampler", "check_worker_number_rationality"),
        ("_dataset_kind", "_iterator"),
    ),
    _BaseDataLoaderIter: (
        ("__next__", "_next_index", "_reset"),
        (
            *("_base_seed", "_collate_fn", "_dataset_kind", "_index_sampler", "_num_workers", "_num_yielded"),
            *("_pin_memory", "_sampler_iter", "_timeout"),
        ),
    ),
}


def _missing() -> list[str]:
    """What this module builds on that torch has no longer."""
    lacking = []
    for kind, (attributes, fields) in _BUILT_ON.items():
        stored = kind.__init__.__code__.co_names  # type: ignore[misc]
        lacking += [f"{kind.__name__}.{name}" for name in attributes if not hasattr(kind, name)]
        lacking += [f"{kind.__name__}.{name}" for name in fields if name not in stored]
    return lacking


if _gone := _missing():
    raise ImportError(
        f"robustloader needs {_KNOWN}; torch {torch.__version__} has moved names it builds on: {', '.join(_gone)}"
    )

_ITERABLE = _DatasetKind.Iterable

try:
    from torch.utils.data import IterDataPipe, MapDataPipe
    from torch.utils.data.datapipes.datapipe import _IterDataPipeSerializationWrapper, _MapDataPipeSerializationWrapper

    _DATAPIPES: tuple[type, ...] = (
        IterDataPipe,
        MapDataPipe,
        _IterDataPipeSerializationWrapper,
        _MapDataPipeSerializationWrapper,
    )
except ImportError:  # pragma: no cover - DataPipes are deprecated and will go
    _DATAPIPES = ()


def is_datapipe(dataset: object) -> bool:
    """Whether ``dataset`` is one of torch's (deprecated) DataPipes."""
    return isinstance(dataset, _DATAPIPES)


def is_iterable(loader: DataLoader[Any]) -> bool:
    """Whether the loader reads an iterable-style dataset."""
    return bool(loader._dataset_kind == _DatasetKind.Iterable)


def auto_collation(loader: DataLoader[Any]) -> bool:
    """Whether the loader makes batches itself (``batch_size`` or ``batch_sampler`` given)."""
    return bool(loader._auto_collation)


def draw_base_seed(loader: DataLoader[Any]) -> int:
    """Draw the base seed of an epoch from the loader's generator, as the constructor of torch's iterators does."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=loader.generator).item())


def key_error_message(text: str) -> str:
    """``text`` as a string whose ``repr`` is itself: ``KeyError`` shows the ``repr`` of its argument."""
    return KeyErrorMessage(text)  # type: ignore[no-untyped-call,no-any-return,unused-ignore]


def pin_memory(batch: Any, device: str | None) -> Any:
    """A copy of ``batch`` in page-locked memory, as torch's pin thread makes it."""
    return _torch_pin.pin_memory(batch, device)


def plain_within(reduced: Any) -> Any:
    """What ``__reduce_ex__`` of a tensor subclass gives, with a plain tensor for its memory instead of a storage and a
    place in it; as it is, where it has another form or the tensor lies on a device.

    *Source*: ``torch.Tensor.__reduce_ex__`` of torch 2.13.
    """
    match reduced:
        case (rebuild, (make, kind, (typed, offset, size, stride, requires_grad, _), state)) if (
            rebuild is _rebuild_from_type_v2 and make is _rebuild_tensor_v2
        ):
            storage, dtype = typed._untyped_storage, typed.dtype
        case (rebuild, (make, kind, (storage, offset, size, stride, requires_grad, _, dtype), state)) if (
            rebuild is _rebuild_from_type_v2 and make is _rebuild_tensor_v3
        ):
            pass
        case _:
            return reduced
    if storage.device.type != "cpu":
        return reduced
    plain = torch.empty(0, dtype=dtype, device="cpu").set_(storage, offset, size, stride)
    return rebuild, (torch.Tensor.requires_grad_, kind, (plain, requires_grad), state)


def numpy_seed(base_seed: int, worker_id: int) -> list[int]:
    """The state that torch seeds NumPy with in a worker."""
    return list(_torch_worker._generate_state(base_seed, worker_id))


@contextlib.contextmanager
def tensor_collate(stack: Callable[..., Any]) -> Iterator[None]:
    """Let ``default_collate`` stack tensors with ``stack(torch's own function, batch, collate_fn_map)``.

    Nothing happens where the entry is no longer torch's own: the user's choice stands.
    """
    entries, own = _torch_collate.default_collate_fn_map, _torch_collate.collate_tensor_fn
    if entries.get(torch.Tensor) is not own:
        yield
        return
    entries[torch.Tensor] = lambda batch, *, collate_fn_map=None: stack(own, batch, collate_fn_map)
    try:
        yield
    finally:
        entries[torch.Tensor] = own


def prepare_worker_process() -> None:
    """What torch does first in a worker: C handlers that name a fatal signal on stderr, and a thread name."""
    _torch_signals._set_worker_signal_handlers()  # type: ignore[attr-defined,unused-ignore]
    set_name = getattr(torch.multiprocessing, "_set_thread_name", None)
    if set_name is not None:
        set_name("pt_data_worker")


def enter_worker(*, worker_id: int, num_workers: int, seed: int, dataset: Any) -> Any:
    """Make ``torch.utils.data.get_worker_info()`` answer for this worker; returns the info object."""
    info = new_worker_info(worker_id=worker_id, num_workers=num_workers, seed=seed, dataset=dataset)
    _torch_worker._worker_info = info
    return info


@contextlib.contextmanager
def worker_info(info: Any) -> Iterator[None]:
    """Let ``get_worker_info()`` answer ``info`` for a while: the training process does a worker's work."""
    before = _torch_worker._worker_info
    _torch_worker._worker_info = info
    try:
        yield
    finally:
        _torch_worker._worker_info = before


def new_worker_info(*, worker_id: int, num_workers: int, seed: int, dataset: Any) -> Any:
    """An info object as ``get_worker_info()`` returns it in a worker."""
    return _torch_worker.WorkerInfo(id=worker_id, num_workers=num_workers, seed=seed, dataset=dataset)


def worker_processes(iterator: Any) -> list[Any]:
    """The worker processes of an iterator, torch's own or one of ours; empty where it loads in process."""
    return list(getattr(iterator, "_workers", ()))


def end_iterator(iterator: Any) -> None:
    """End the workers of an iterator now, torch's own or one of ours; nothing where it loads in process."""
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()


class HookedDataLoader(DataLoader):  # type: ignore[type-arg]  # torch 2.15 takes two type parameters, 2.6 takes one
    """torch's loader with its private hook for making iterators under a name of ours."""

    def make_iterator(self) -> Any:
        """A new iterator over one epoch; called by ``iter(loader)``."""
        raise NotImplementedError

    def make_torch_iterator(self) -> Any:
        """The iterator torch's own loader would make."""
        return super()._get_iterator()

    def __iter__(self) -> Any:
        """A new epoch; with ``persistent_workers``, by the workers of the one before unless these are gone."""
        kept = self._kept_iterator
        if kept is not None and (getattr(kept, "closed", False) or getattr(kept, "once", False)):
            self.drop_iterator()
        return super().__iter__()

    @property
    def _kept_iterator(self) -> Any:
        """The iterator whose workers persist, if there is one; code that ends them by hand deletes the attribute."""
        return getattr(self, "_iterator", None)

    def natural_openings(self) -> tuple[str, str]:
        """What torch does at the beginning of the next epoch, and of all later ones: ``i`` for ``iter(sampler)``, ``s``
        for a draw of the base seed."""
        if not self.num_workers:
            return "is", "is"
        kept = self._kept_iterator
        goes_on = kept is not None and not getattr(kept, "closed", False) and not getattr(kept, "once", False)
        return "i" if goes_on else "isi", "i" if self.persistent_workers else "isi"

    def drop_iterator(self) -> None:
        """Close the persistent iterator, if there is one: the next epoch gets another."""
        kept = self._kept_iterator
        if hasattr(kept, "close"):
            kept.close()
        self._iterator = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the persistent iterator, which cannot leave its process."""
        return {**self.__dict__, "_iterator": None}

    def _get_iterator(self) -> Any:
        return self.make_iterator()


class _Opened:
    """A loader as torch's constructor may see it when an epoch is resumed: its sampler and generator are left alone."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._index_sampler = ()
        self.generator = torch.Generator()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class LoaderIterator(_BaseDataLoaderIter):
    """Base of our iterators: torch's bookkeeping (sampler, base seed, pinning, warnings) under names of ours.

    torch's constructor, in this order, warns about pinning, calls ``iter()`` on the sampler and draws the base seed
    from the loader's generator; ``__next__`` counts batches and warns when an iterable dataset yields more than its
    ``len()``. Both are kept by not repeating them.

    Args:
        indices: of an epoch that is resumed: what its sampler yields from there on. The sampler and the generators have
            been seen to, with ``base_seed``, after ``yielded`` batches.
    """

    def __init__(
        self, loader: DataLoader[Any], *, indices: Iterator[Any] | None = None, base_seed: int = 0, yielded: int = 0
    ) -> None:
        super().__init__(loader if indices is None else _Opened(loader))  # type: ignore[arg-type]
        self._reopened = indices is not None
        if indices is not None:
            self._index_sampler = loader._index_sampler
            self._sampler_iter = indices
            self._base_seed = base_seed
            self._num_yielded = yielded
        self.num_workers: int = self._num_workers
        self.collate_fn: Callable[[Any], Any] = self._collate_fn
        self.timeout_s: float = self._timeout
        self.base_seed: int = int(self._base_seed)
        self.pins: bool = self._pin_memory
        self._kept: list[Any] = []
        self.note_held: Callable[[bool], None]  # told whether a batch is held that a warning was raised in place of
        self.pin_device: str | None = getattr(self, "_pin_memory_device", None)

    def next_indices(self) -> Any:
        """What the sampler yields next; raises ``StopIteration`` at its end."""
        return self._next_index()  # type: ignore[no-untyped-call,unused-ignore]

    def next_batch(self) -> Any:
        """The next batch; raises ``StopIteration`` at the end of the epoch."""
        raise NotImplementedError

    def begin_epoch(self, loader: DataLoader[Any], *, first: bool) -> None:
        """Make ready for a new epoch; ``iter(sampler)`` has just been called."""

    def reset(self, loader: DataLoader[Any], *, first: bool) -> None:
        """Call ``iter()`` on the sampler (again) and begin an epoch."""
        if first and self._reopened:
            self.begin_epoch(loader, first=True)
        else:
            self._reset(loader, first)

    def open_as(self, loader: DataLoader[Any], opening: str, base_seed: int) -> None:
        """A later epoch of persistent workers begins otherwise than torch's (``i``): do the rest of ``opening``.

        Without a draw in it, the epoch has ``base_seed``.
        """
        self._base_seed = self.base_seed = base_seed
        for step in opening.removeprefix("i"):
            if step == "s":
                self._base_seed = self.base_seed = draw_base_seed(loader)
            else:
                self._sampler_iter = iter(self._index_sampler)

    def processes(self) -> list[Any]:
        """The worker processes, in the order of their ids."""
        return []

    def close(self) -> None:
        """Stop the workers and release everything; safe to call more than once."""

    def __next__(self) -> Any:
        """torch's, without what it does for a profiler (6 µs a batch) where none is running."""
        if _profiler_enabled() or self._sampler_iter is None or self._dataset_kind == _ITERABLE:
            return super().__next__()
        data = self._next_data()
        self._num_yielded += 1
        return data

    def _next_data(self) -> Any:
        if self._kept:
            self.note_held(False)
            return self._kept.pop()
        held = hold_warnings()
        try:
            batch = self.next_batch()
        except BaseException as error:
            try:
                release_warnings(held)
            except RobustLoaderWarning:
                if isinstance(error, StopIteration):
                    raise
            raise
        try:
            release_warnings(held)
        except BaseException:
            self._kept.append(batch)  # the warning is an error to the user; the batch comes next
            self.note_held(True)
            raise
        return batch

    def _reset(self, loader: DataLoader[Any], first_iter: bool = False) -> None:
        super()._reset(loader, first_iter)  # type: ignore[no-untyped-call,unused-ignore]
        self._kept.clear()
        self.begin_epoch(loader, first=first_iter)

    @property
    def _workers(self) -> list[Any]:
        return self.processes()

    def _shutdown_workers(self) -> None:
        self.close()
