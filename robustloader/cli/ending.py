"""How a command ends: what it could not do, in a few lines on standard error, and its exit status."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO

from robustloader.errors import OptionError, RobustLoaderWarning
from robustloader.telemetry.units import as_line

__all__ = [
    "CommandError",
    "OutputError",
    "delivering",
    "others_prints_to_stderr",
    "plain_warnings",
    "tell",
    "users_errors",
]


class CommandError(Exception):
    """A command cannot go on. ``main`` prints the text and returns the status.

    Args:
        text: what is wrong, for people; may come from outside, :meth:`lines` makes it safe to print.
        status: 2 for what the user typed, 1 for trouble that was found.
    """

    def __init__(self, text: str, *, status: int = 2) -> None:
        super().__init__(text)
        self.status = status

    def lines(self) -> str:
        """The text, without what would move the reader's cursor."""
        return "\n".join(as_line(line) for line in str(self).splitlines())


class OutputError(CommandError):
    """Standard output takes no more: a full disk, a terminal that is gone."""


@contextlib.contextmanager
def delivering() -> Iterator[None]:
    """What is printed inside has arrived at the end, or :class:`OutputError` says why not.

    Raises:
        OutputError: the output cannot be written.
        BrokenPipeError: whoever read it has left, as in ``| head``.
    """
    try:
        yield
        if sys.stdout is not None:  # closed from the start, as in ">&-": nobody wants to read
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write the output: {error.strerror or error}", status=1) from error


def tell(text: object) -> None:
    """Print, and be sure that it arrived; what the output's encoding lacks becomes a question mark."""
    with delivering():
        try:
            print(text)
        except UnicodeEncodeError as error:
            print(str(text).encode(error.encoding, "replace").decode(error.encoding))


@contextlib.contextmanager
def others_prints_to_stderr() -> Iterator[None]:
    """What is printed inside goes to standard error: standard output is for the command's own result.

    Print as they may: this process through ``sys.stdout``, a C library through its descriptor, workers through either,
    whichever way they are started.

    Raises:
        OutputError: what stands in the buffer already cannot be written.
    """
    with delivering():
        python = sys.stdout
    try:
        own = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)  # 3: where standard error is closed, its number stays free
    except OSError:  # closed from the start
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    try:
        try:
            os.dup2(2, 1)
        except OSError:  # standard error is closed
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 1)
        with contextlib.redirect_stdout(sys.stderr or python):
            yield
    finally:
        if python is not None:  # held by somebody, such as a handler of logging
            with contextlib.suppress(OSError, ValueError):
                python.flush()
        ctypes.CDLL(None).fflush(None)
        os.dup2(own, 1)
        os.close(own)


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Our own warnings inside are lines on standard error, without the place: no line there is the user's."""
    usual = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, RobustLoaderWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            usual(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual


@contextlib.contextmanager
def users_errors(doing: str = "") -> Iterator[None]:
    """What a user's dataset raises inside ends the command with status 1; a refused option, with status 2.

    Args:
        doing: what goes on, such as "loading one batch"; begins the text.
    """
    try:
        yield
    except OptionError as error:
        raise CommandError(str(error)) from error
    except Exception as error:  # the user's dataset may raise anything
        told = f"{type(error).__name__}: {error}"
        raise CommandError(f"{doing} raised {told}" if doing else told, status=1) from error
