"""Make links of the roles by which docstrings name other objects, ``:class:`~robustloader.Retry```."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(?P<short>~)?(?P<path>[\w.]+)`")


class Roles(griffe.Extension):
    """A griffe extension that turns each role into a cross-reference."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute, once."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda match: _link(match, obj), obj.docstring.value)


def _link(match: re.Match[str], obj: griffe.Object) -> str:
    path = match["path"]
    shown = path.rpartition(".")[2] if match["short"] else path
    try:
        target = path if path.startswith("robustloader.") else obj.resolve(path)
    except griffe.NameResolutionError:  # not imported where it is named: then it is one of the package's face
        target = f"robustloader.{path}"
    return f"[`{shown}`][{target}]"
