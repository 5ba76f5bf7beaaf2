"""Datasets named on the command line: ``package.module:callable``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from robustloader.cli.ending import CommandError

__all__ = ["DatasetNameError", "load_dataset"]


class DatasetNameError(CommandError):
    """A name that leads to no dataset. The text says why, for people."""


def load_dataset(name: str) -> Any:
    """The dataset that ``name`` makes.

    ``package.module:callable`` is imported (from the working directory, too, as ``python -m`` would) and called without
    arguments; what follows the colon may have dots. A dataset that stands there ready is taken as it is.

    Raises:
        DatasetNameError: there is no such module or name, or what it gives is no dataset. What the module or the
            callable raises is its cause.
    """
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise DatasetNameError(f"{name!r} is not of the form package.module:callable")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's module may raise anything, and scripts exit
        raise DatasetNameError(f"importing {module_name!r} raised {type(error).__name__}: {error}") from error
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise DatasetNameError(f"{module_name!r} has no {path!r}: {error}") from error
    if isinstance(found, type) or not _is_dataset(found):
        if not callable(found):
            raise DatasetNameError(f"{name!r} is a {type(found).__name__}: neither a dataset nor something to call")
        try:
            found = found()
        except (Exception, SystemExit) as error:  # the user's function may raise anything
            raise DatasetNameError(f"calling {name!r} raised {type(error).__name__}: {error}") from error
    if not _is_dataset(found):
        raise DatasetNameError(
            f"{name!r} gives a {type(found).__name__}, which is no dataset: it has neither __getitem__ and __len__ nor "
            "__iter__"
        )
    return found


def _is_dataset(thing: Any) -> bool:
    return (hasattr(thing, "__getitem__") and hasattr(thing, "__len__")) or hasattr(thing, "__iter__")
