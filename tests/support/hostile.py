"""Exceptions and results that make trouble on their way to another process."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import default_collate


class RequiredArguments(Exception):
    """Cannot be built from one text."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code


class KeywordOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")


class HasMessage(Exception):
    """torch builds what has a ``message`` with ``message=...``."""

    message = "class-wide"

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.message = text


class BuiltOnce(Exception):
    """Its constructor raises the second time, and says nothing."""

    def __init__(self, text: str) -> None:
        if not text.startswith("original"):
            raise SystemExit(5)
        super().__init__(text)


class StrRaises(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class NotAString(Exception):
    def __str__(self) -> Any:
        return 5


class Ungrateful(Exception):
    """Raises whatever is done to it."""

    def __reduce__(self) -> Any:
        raise RuntimeError("not pickled")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")


class Silent(Exception):
    """Its class cannot be called any more once the error has been made."""

    def __new__(cls, *args: Any) -> Any:
        return super().__new__(cls, *args) if len(args) == 2 else object()


class OwnBase(BaseException):
    """Not an ``Exception``."""


def local_class(index: Any) -> BaseException:
    class Local(Exception):
        pass

    return Local(f"at {index}")


def long_text(index: Any) -> BaseException:
    return ValueError("x" * 10_000_000)


def group(index: Any) -> BaseException:
    return ExceptionGroup("several", [ValueError("one"), ExceptionGroup("inner", [KeyError("two")])])


def circle(index: Any) -> BaseException:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    return one


def holds_a_lambda(index: Any) -> BaseException:
    return ValueError(lambda: index)


def holds_a_tensor(index: Any) -> BaseException:
    return ValueError(torch.zeros(3), torch.zeros(4))


HOSTILE: dict[str, Callable[[Any], BaseException]] = {
    "required arguments": lambda index: RequiredArguments(404, "no such sample"),
    "keyword-only arguments": lambda index: KeywordOnly(code=404),
    "message attribute": lambda index: HasMessage("bad sample"),
    "constructor raises": lambda index: BuiltOnce("original text"),
    "constructor returns something else": lambda index: Silent("a", "b"),
    "local class": local_class,
    "__str__ raises": lambda index: StrRaises("x"),
    "__str__ is no string": lambda index: NotAString("x"),
    "attributes raise": lambda index: Ungrateful("x"),
    "10 MB of text": long_text,
    "exception group": group,
    "circular cause": circle,
    "holds a lambda": holds_a_lambda,
    "holds a tensor": holds_a_tensor,
    "UnicodeDecodeError": lambda index: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad byte"),
    "KeyError": lambda index: KeyError("label"),
    "OSError": lambda index: OSError(2, "No such file or directory", "a.jpg"),
    "no text": lambda index: ValueError(),
    "surrogates": lambda index: ValueError("name \udcff of a file"),
}

CONTROL: dict[str, type[BaseException]] = {
    "StopIteration": StopIteration,
    "StopAsyncIteration": StopAsyncIteration,
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": SystemExit,
    "GeneratorExit": GeneratorExit,
    "own BaseException": OwnBase,
}
"""What means something to the one who iterates, or to the interpreter."""


class Unpicklable:
    """A result that cannot leave its process."""

    def __init__(self, index: Any) -> None:
        self.index = index
        self.handle = lambda: index


class ReduceExits:
    """A result that tries to end the process that pickles it."""

    def __init__(self, index: Any) -> None:
        self.index = index

    def __reduce__(self) -> Any:
        raise SystemExit(7)


class Undecodable:
    """A result that cannot be rebuilt; with ``trainer``, only in that process."""

    def __init__(self, index: Any, trainer: int | None = None) -> None:
        self.index = index
        self.trainer = trainer

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["trainer"] in (None, os.getpid()):
            raise FileNotFoundError(f"the table for {state['index']} is not here")
        self.__dict__.update(state)


class UndecodableHere:
    """Makes results that cannot be rebuilt in the process that makes this."""

    def __init__(self) -> None:
        self.trainer = os.getpid()

    def __call__(self, index: Any) -> Any:
        return Undecodable(index, self.trainer)


def samples_of(batch: list[Any]) -> list[int]:
    """The indices of a batch that ``collate_fn=list`` made."""
    return [int(getattr(sample, "index", sample)) for sample in batch]


class Hostile:
    """Makes one of the hostile exceptions."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, index: Any) -> BaseException:
        return HOSTILE[self.name](index)


class Control:
    """Makes one of the exceptions that mean something to the one who iterates."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, index: Any) -> BaseException:
        return CONTROL[self.name](f"at {index}")


class Moody:
    """A ``collate_fn`` that works for a whole batch only when it was asked about a single sample just before: a search
    for the samples at fault begins with one. A search without end it ends, with an error that no fault policy takes."""

    def __init__(self) -> None:
        self.calls = 0
        self.alone = False

    def __call__(self, samples: list[Any]) -> Any:
        self.calls += 1
        if self.calls > 1_000:
            raise NameError("asked for ever")
        before, self.alone = self.alone, len(samples) == 1
        if len(samples) > 1 and not before:
            raise ValueError("not now")
        return default_collate(samples)
