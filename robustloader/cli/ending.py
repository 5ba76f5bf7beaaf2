"""How a command ends: what it could not do, in a few lines on standard error, and its exit status."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from robustloader.errors import OptionError
from robustloader.telemetry.units import as_line

__all__ = ["CommandError", "OutputError", "delivering", "tell", "users_errors"]


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
