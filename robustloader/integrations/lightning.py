"""Lightning: what its checkpoints mean for a loader at the end of an epoch.

Lightning keeps a loader's class and options, saves its state in every checkpoint and in the middle of an epoch loads it
again, all by itself. The end of an epoch is different. It takes exactly ``len(loader)`` batches and never asks for the
end, so that the loader says "nothing is left of this epoch": a run by ``max_steps`` that went on from there would get
just that, nothing, for the whole of its next epoch. And a run by ``max_epochs`` does not load the state at all, so that
its next epoch is a new loader's first. The callback here, which every ``Trainer`` finds by itself once this package is
installed (through the entry points that Lightning looks at), sees to both.

*Source*: ``pytorch/loops/fit_loop.py``, ``loops/training_epoch_loop.py`` and ``trainer/call.py``, Lightning 2.6.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from robustloader.loader import RobustDataLoader
from robustloader.telemetry.labels import require

__all__ = ["resume_callback"]


class _AtEpochEnd:
    """The part of the callback that is ours. *Runs in* the training process, in its main thread."""

    def __init__(self) -> None:
        super().__init__()
        self._states: list[Any] = []

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Mapping[str, Any]) -> None:
        """Lightning calls this before it gives loops and loaders their states."""
        fit = checkpoint.get("loops", {}).get("fit_loop", {})
        states = fit.get("state_dict", {}).get("combined_loader", [])
        if fit.get("epoch_loop.batch_progress", {}).get("is_last_batch"):
            states[:] = [_after_its_epoch(state) for state in states]
            self._states = list(states)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lightning calls this when the loaders are there; it has given them their states if it is ``restarting``."""
        states, self._states = self._states, []
        loop = trainer.fit_loop
        if not states or loop.restarting:
            return
        loaders = [each for each in loop._combined_loader.flattened if isinstance(each, _Stateful)]
        found = [pair for pair in zip(loaders, states, strict=False) if isinstance(pair[0], RobustDataLoader)]
        for loader, state in found:
            loader.load_state_dict(state)
        if found:
            iter(loop._data_fetcher)  # what it has begun is not what was loaded


@runtime_checkable
class _Stateful(Protocol):
    """What Lightning saves the state of."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state_dict: Any) -> Any: ...


def _after_its_epoch(state: Any) -> Any:
    """The same loader's state once its epoch is over; what is no such state, or of an epoch not read yet, as it is."""
    if not isinstance(state, Mapping) or "schema" not in state or not state.get("begun") or not state["delivered"]:
        return state
    epochs = tuple(epoch + 1 for epoch in state["sampler_epochs"])
    return {
        **state,
        "epoch": state["epoch"] + 1,
        "begun": False,
        "sampler_drain": bool(state["sampler_state"]),  # it stands in the epoch that is over
        "sampler_epochs": epochs,
    }


def resume_callback(package: str = "lightning.pytorch") -> Any:
    """The callback, for a ``Trainer`` that does not find it by itself: where this package is not installed but only
    on the path. Twice does no harm.

    Args:
        package: "lightning.pytorch", or "pytorch_lightning" for a ``Trainer`` of the package of that name.

    Raises:
        ImportError: Lightning is not installed (``robustloader[frameworks]``).
    """
    require(package.partition(".")[0], "resume_callback()", "frameworks")
    base = importlib.import_module(package).Callback
    return type("RobustLoaderResume", (_AtEpochEnd, base), {"__module__": __name__})()


def lightning_callbacks() -> list[Any]:
    """For the entry point ``lightning.pytorch.callbacks_factory``."""
    return [resume_callback()]


def pytorch_lightning_callbacks() -> list[Any]:
    """For the entry point ``pytorch_lightning.callbacks_factory``."""
    return [resume_callback("pytorch_lightning")]
