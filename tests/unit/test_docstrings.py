"""What users may import says what it is, down to each argument: the reference is made from it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader

from docs.site.public import public_names

TORCHS = set(inspect.signature(DataLoader.__init__).parameters) - {"num_workers"}
"""Arguments that torch documents; ``num_workers`` may be something else here."""

NAMES = sorted(set(public_names()))


def find(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:  # an integration without its framework
        if not module.startswith("robustloader.integrations"):
            raise
        pytest.skip(f"{error.name} is not installed")


def arguments(thing: Any) -> list[str]:
    """Names of the arguments that a caller gives, other than torch's own."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = [p.name for p in inspect.signature(thing).parameters.values() if p.kind not in kinds]
    return [name for name in given if name not in TORCHS and name not in ("self", "cls")]


def methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Methods and properties of this package's own that are public, in this class or inherited."""
    for name, member in inspect.getmembers_static(kind):
        owner = next(base for base in kind.__mro__ if name in vars(base))
        if not name.startswith("_") and owner.__module__.startswith("robustloader"):
            if isinstance(member, property):
                yield name, member
            elif callable(getattr(kind, name)) and not isinstance(getattr(kind, name), type):
                yield name, getattr(kind, name)


def told(name: str, text: str) -> bool:
    """Whether a docstring says what ``name`` is: in a section's list, or by its name in the text."""
    return re.search(rf"(^|\s|`|, ){re.escape(name)}(, \w+)*:|``[^`]*\b{re.escape(name)}\b[^`]*``", text) is not None


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{module}.{name}" for module, name in NAMES])
def test_public_names_say_what_they_are(module: str, name: str) -> None:
    """A docstring of its own, and in it each argument or field that has no plain value as its name says."""
    thing = find(module, name)
    text = inspect.getdoc(thing) or ""
    assert text
    if inspect.isclass(thing):
        assert thing.__doc__, "inherited"
        for method, member in methods(thing):
            assert inspect.getdoc(member), method
    if dataclasses.is_dataclass(thing):
        own = [field.name for field in dataclasses.fields(thing) if field.name in thing.__annotations__]
        missing = [field for field in own if not told(field, text)]
    elif inspect.isclass(thing) and issubclass(thing, BaseException):
        missing = [attribute for attribute in _attributes(thing) if not told(attribute, _inherited(thing))]
    elif callable(thing):
        missing = [argument for argument in arguments(thing) if not told(argument, text)]
    else:
        missing = []
    assert not missing


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{module}.{name}" for module, name in NAMES])
def test_signatures_are_annotated(module: str, name: str) -> None:
    """Every argument and result of a public function or method has a type, for the reference and for type checkers."""
    thing = find(module, name)
    for _, member in methods(thing) if inspect.isclass(thing) else [(name, thing)]:
        function = member.fget if isinstance(member, property) else inspect.unwrap(member)
        if not inspect.isfunction(function) and not inspect.ismethod(function):
            continue
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, function
        for parameter in signature.parameters.values():
            if parameter.name not in ("self", "cls"):
                assert parameter.annotation is not inspect.Parameter.empty, f"{function}: {parameter.name}"


def _attributes(error: type[BaseException]) -> list[str]:
    """The facts that an error carries: keyword arguments of its constructor."""
    if not inspect.isfunction(error.__init__):
        return []  # the base's own, which carries nothing but its text
    return [name for name in arguments(error) if name not in ("message", "allowed", "args", "kwargs")]


def _inherited(error: type[BaseException]) -> str:
    """The docstrings of an error and of its bases of ours."""
    return "\n".join(kind.__doc__ or "" for kind in error.__mro__ if kind.__module__.startswith("robustloader"))
