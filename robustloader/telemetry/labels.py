"""What the shipped sinks have in common: labels, names of files for many ranks, and what is copied of a sink."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import socket
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from robustloader.errors import OptionError

__all__ = ["ConfiguredSink", "fill_in", "require", "resolve_labels"]

Self = TypeVar("Self", bound="ConfiguredSink")

# Prometheus's rule for label names (https://prometheus.io/docs/concepts/data_model/), which the others allow too.
_NAME = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
_FIELD = re.compile(r"\{(\w*)\}")


class ConfiguredSink:
    """A sink that is what its options say: unpickled in another process it is made anew from them, and opens files and
    connections of its own; a copy in the same process is the sink itself, so that nothing is told twice.

    Attributes:
        LIVE: options that hold objects of this process; a pickle leaves them out.
    """

    LIVE: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **options: Any) -> None:
        self._options = options

    def __reduce__(self) -> tuple[Any, ...]:
        kept = {name: value for name, value in self._options.items() if name not in self.LIVE}
        return functools.partial(type(self), **kept), ()

    def renew(self) -> None:
        """Begin again from the options: in a forked process, what threads and locks were at work is of no use, and the
        environment may say another rank. Worker processes hear of no events, so it is a trainer that comes here.
        """
        type(self).__init__(self, **self._options)

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        return self

    def __copy__(self: Self) -> Self:
        return self

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self._options.items() if value is not None)
        return f"{type(self).__name__}({given})"


def resolve_labels(labels: Mapping[str, str] | None) -> dict[str, str]:
    """The labels of a sink: those given, and ``rank`` from the environment variable RANK where that is set.

    Raises:
        OptionError: a name is not of letters, digits and underscores, or a value is not a string.
    """
    if labels is not None and not isinstance(labels, Mapping):
        raise OptionError("labels", labels, "a mapping of names to strings, such as {'loader': 'train'}")
    rank = os.environ.get("RANK")
    resolved = {**({"rank": rank} if rank else {}), **(labels or {})}
    for name, value in resolved.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise OptionError("labels", labels, "names made of letters, digits and underscores, no digit first")
        if not isinstance(value, str):
            raise OptionError("labels", labels, f"strings as values; {name!r} has {value!r}")
    return resolved


def fill_in(name: str, path: str | os.PathLike[str], labels: Mapping[str, str]) -> str:
    """A path with ``{rank}``, ``{local_rank}``, ``{host}``, ``{pid}`` and ``{<label>}`` filled in.

    Args:
        name: the option that the path was given as, for the error.
        path: the path; ranks are those of torchrun's environment, and 0 without it.
        labels: labels that may be named.

    Raises:
        OptionError: there is no such field, or the path is no path.
    """
    try:
        text = os.fspath(path)
    except TypeError:
        text = ""
    if not isinstance(text, str) or not text:
        raise OptionError(name, path, "a path")
    known = {
        "rank": os.environ.get("RANK", "0"),
        "local_rank": os.environ.get("LOCAL_RANK", "0"),
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        **labels,
    }

    def fill(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise OptionError(name, text, "a path whose {fields} are among " + ", ".join(sorted(known)))
        return known[match[1]].replace(os.sep, "_")

    return _FIELD.sub(fill, text)


def require(module: str, sink: str, extra: str) -> None:
    """Raise ImportError, saying what to install, unless ``module`` can be imported."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{sink} needs {module}: pip install 'robustloader[{extra}]'", name=module)
