"""The command ``robustloader``.

Each subcommand is a module with two functions: ``add_parser(commands)`` declares it, ``run(options)`` does it and
returns the exit status, 0 when all is well and 1 when a check found trouble, or raises a ``CommandError`` that says
what is wrong, with status 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import robustloader
from robustloader.cli import compare, demo, doctor, report, tune, watch
from robustloader.cli.ending import CommandError, OutputError, delivering

__all__ = ["main"]

DESCRIPTION = "A DataLoader for PyTorch that survives damaged samples and dying workers."
COMMANDS = (doctor, tune, compare, demo, report, watch)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Returns:
        The exit status: 0 when all is well, 1 when a check found trouble, 2 for bad arguments, 130 after Ctrl-C, 141
        where whoever read the output has left (128 and the signal's number, as a shell would say).
    """
    parser = argparse.ArgumentParser(prog="robustloader", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"%(prog)s {robustloader.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    name = parser.prog
    try:
        try:
            options = parser.parse_args(argv)
        except SystemExit as stop:  # argparse exits where a caller of main() wants a status
            status = stop.code if isinstance(stop.code, int) else 2
        else:
            name = f"{parser.prog} {options.command}"
            status = int(options.run(options))
        with delivering():  # what is still buffered: of argparse, or of the user's own code
            return status
    except CommandError as error:
        if isinstance(error, OutputError):
            _discard_output()
        print(f"{name}: {error.lines()}", file=sys.stderr)
        return error.status
    except BrokenPipeError:
        _discard_output()
        return 141
    except KeyboardInterrupt:
        print("robustloader: interrupted", file=sys.stderr)
        return 130


def _discard_output() -> None:
    """What Python still holds of an output that cannot be written must not fail when it is flushed at the end.

    *Source*: https://docs.python.org/3/library/signal.html#note-on-sigpipe
    """
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
