"""Accelerate: its prepared loaders with a ``RobustDataLoader`` inside.

``Accelerator.prepare`` makes a plain torch loader from a fixed list of attributes, and a wrapper around it that shares
out, moves to the device, and runs one batch ahead to see the end. The wrapper stays Accelerate's; the loader inside it,
``prepared.base_dataloader``, becomes ours.

*Source*: ``accelerate/data_loader.py`` and ``checkpointing.py``, Accelerate 1.15.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from robustloader.errors import OptionError, StateError
from robustloader.loader import RobustDataLoader
from robustloader.telemetry.labels import require

__all__ = ["robust_dataloaders", "robustify"]

_TORCH = inspect.signature(DataLoader.__init__).parameters
_OWN = {
    name: parameter.default
    for name, parameter in inspect.signature(RobustDataLoader.__init__).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in _TORCH
}
"""The options that Accelerate does not know, with their defaults."""

_REST = set(_TORCH) - {"self", "dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "drop_last"}
"""What a loader is made of besides its samplers."""


def robustify(
    prepared: Any, *, like: RobustDataLoader[Any] | None = None, stateful: bool | None = None, **options: Any
) -> Any:
    """Put a ``RobustDataLoader`` into a loader that ``Accelerator.prepare`` returned. Before it is iterated over.

    Args:
        prepared: what ``prepare`` returned for a loader; changed in place, so that ``save_state`` finds it.
        like: the loader that was given to ``prepare``, whose options are to be kept.
        stateful: whether ``save_state`` and ``load_state`` save where the loader stands; None does as the accelerator's
            ``use_stateful_dataloader`` says. After ``load_state``, iterate over the loader itself:
            ``skip_first_batches`` would skip once more.
        options: our keyword arguments of ``RobustDataLoader`` (``faults``, ``recovery`` and so on), instead of those of
            ``like``.

    Returns:
        ``prepared``. Summaries, the fault log and the other members of the loader inside can be had from it.

    Raises:
        ImportError: Accelerate is not installed (``robustloader[accelerate]``).
        OptionError: ``prepared`` was not prepared by Accelerate.
    """
    module = _accelerate("robustify()")
    if not issubclass(type(prepared), module.DataLoaderAdapter):
        raise OptionError("prepared", type(prepared), "a loader that Accelerator.prepare() has returned")
    _check(options)
    base = prepared.base_dataloader
    if like is None and isinstance(base, RobustDataLoader):
        like = base
    kept = {} if like is None else {name: getattr(like, name) for name in _OWN}
    prepared.base_dataloader = _rebuild(base, kept | options)
    _adopt(prepared, stateful)
    return prepared


@contextlib.contextmanager
def robust_dataloaders(*, stateful: bool | None = None, **options: Any) -> Iterator[None]:
    """While the block runs, Accelerate makes ``RobustDataLoader`` objects where it makes torch's.

    ``Accelerator.prepare`` keeps the options of a ``RobustDataLoader``; what it makes from another loader gets
    ``options``. ``skip_first_batches`` keeps those of the loader it is given. The change is to the module
    ``accelerate.data_loader``, for all threads of this process, and undone at the end of the block; what was made
    stays as it is.

    Args:
        stateful: as for :func:`robustify`.
        options: our keyword arguments of ``RobustDataLoader`` (``faults``, ``recovery`` and so on).

    Raises:
        ImportError: Accelerate is not installed (``robustloader[accelerate]``).
    """
    module = _accelerate("robust_dataloaders()")
    _check(options)
    adapter, names = module.DataLoaderAdapter, ("DataLoader", "_PYTORCH_DATALOADER_KWARGS")
    before = {name: getattr(module, name) for name in names}, adapter.__init__

    def init(self: Any, dataset: Any, use_stateful_dataloader: bool = False, **kwargs: Any) -> None:
        # As Accelerate's own, but for torchdata's loader, which would take the place of ours.
        self.base_dataloader = RobustDataLoader(dataset, **kwargs)
        self.use_stateful_dataloader = use_stateful_dataloader
        _adopt(self, stateful)

    module.DataLoader = RobustDataLoader
    module._PYTORCH_DATALOADER_KWARGS = module._PYTORCH_DATALOADER_KWARGS | _OWN | options
    adapter.__init__ = init
    try:
        yield
    finally:
        vars(module).update(before[0])
        adapter.__init__ = before[1]


def _accelerate(who: str) -> Any:
    require("accelerate", who, "accelerate")
    return importlib.import_module("accelerate.data_loader")


def _check(options: Mapping[str, Any]) -> None:
    """A misspelt option is said at once, not when a loader is made of it."""
    unknown = sorted(set(options) - set(_OWN))
    if unknown:
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}: the options are {', '.join(_OWN)}")


def _rebuild(base: DataLoader[Any], options: Mapping[str, Any]) -> RobustDataLoader[Any]:
    """A loader like ``base``, around the same samplers."""
    arguments = {name: getattr(base, name) for name in sorted(_REST) if hasattr(base, name)}
    if isinstance(base.dataset, IterableDataset):
        arguments |= {"batch_size": base.batch_size, "drop_last": base.drop_last}
    elif base.batch_sampler is None:
        arguments |= {"batch_size": None, "sampler": base.sampler}
    else:
        arguments["batch_sampler"] = base.batch_sampler
    return RobustDataLoader(base.dataset, **arguments, **options)


# --- where a loader stands


def _adopt(adapter: Any, stateful: bool | None) -> None:
    """Let a wrapper say where its trainer stands.

    Accelerate asks the loader inside for its state before each batch, whether anybody wants it or not, and drops the
    number of the epoch, which chooses the permutation of ``SeedableRandomSampler``.
    """
    if stateful is not None:
        adapter.use_stateful_dataloader = stateful
    adapter._update_state_dict = functools.partial(_note, adapter) if adapter.use_stateful_dataloader else _note_nothing
    adapter.state_dict = functools.partial(_state, adapter)
    adapter.load_state_dict = functools.partial(_load, adapter)
    adapter.set_sampler = functools.partial(_set_sampler, adapter)
    _settle(adapter)
    adapter.dl_state_dict = None


def _note_nothing() -> None:
    """Nobody will ask."""


def _note(adapter: Any) -> None:
    """Note the state; the wrapper calls this when the trainer has taken what was read, and before it reads on."""
    try:
        state = adapter.base_dataloader.state_dict()
    except Exception as error:  # of the user's objects: to be raised where somebody wants the state
        adapter.dl_state_dict = error
        return
    adapter.dl_state_dict = {**state, "iteration": _iteration(adapter) + bool(adapter.end_of_dataloader)}


def _iteration(adapter: Any) -> int:
    """The number of the epoch as the wrapper counts; a bare ``SkipDataLoader`` does not."""
    return int(getattr(adapter, "iteration", 0))


def _state(adapter: Any) -> dict[str, Any]:
    if not adapter.use_stateful_dataloader:
        raise StateError(
            "this loader does not keep its state: pass stateful=True to robustify() or robust_dataloaders(), or "
            "use_stateful_dataloader=True to Accelerate's DataLoaderConfiguration"
        )
    replicas = getattr(getattr(adapter, "state", None), "num_processes", 1)
    if replicas > 1 and hasattr(adapter, "slice_fn"):
        raise StateError(
            f"rank 0 reads for all {replicas} processes here, several batches at a time, and their state is not that "
            "of any trainer: pass dispatch_batches=False to Accelerate's DataLoaderConfiguration"
        )
    if adapter.dl_state_dict is None:
        return {**adapter.base_dataloader.state_dict(), "iteration": _iteration(adapter)}
    if isinstance(adapter.dl_state_dict, Exception):
        raise adapter.dl_state_dict
    return dict(adapter.dl_state_dict)


def _load(adapter: Any, state_dict: Mapping[str, Any]) -> None:
    adapter.base_dataloader.load_state_dict(state_dict)
    if hasattr(adapter, "iteration"):
        adapter.iteration = state_dict.get("iteration", state_dict["epoch"])
    adapter.dl_state_dict = dict(state_dict)


def _set_sampler(adapter: Any, sampler: Any) -> None:
    type(adapter).set_sampler(adapter, sampler)
    _settle(adapter)


def _settle(adapter: Any) -> None:
    """Accelerate's own sampler makes its generator when it is first read: a loader that goes on has it before."""
    module = _accelerate("this loader")
    sampler = module.get_sampler(adapter)
    if isinstance(sampler, module.SeedableRandomSampler) and sampler.generator is None:
        sampler.generator = torch.Generator()
