"""``robustloader watch``: a run that goes on, live in a terminal."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from robustloader.cli.ending import CommandError, delivering
from robustloader.report import RunReader, Tail, find_parts

__all__ = ["add_parser", "run"]

POLL_S = 0.25
"""How often the files are looked at, in seconds."""


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "watch",
        help="follow a run in the terminal",
        description="Follow what JsonlSink writes while the run goes on: verdict, throughput, waiting, workers, faults "
        "and deaths. Waits for a file that is not there yet. q or Ctrl-C leaves. Needs rich: pip install "
        "'robustloader[watch]'. The exit status is 0, or 2 when something is missing.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a JSON-lines file of a run; one per rank")
    parser.add_argument("--once", action="store_true", help="print one frame and leave; so does output to a pipe")
    parser.set_defaults(run=run)


class _Watched:
    """The files and what was read of them so far."""

    def __init__(self, paths: list[str]) -> None:
        self._reader = RunReader()
        self._tails = {path: Tail(path) for path in paths}
        for path in paths:
            for part in find_parts(Path(path))[:-1] if os.path.exists(path) else ():
                with contextlib.closing(Tail(part)) as older:
                    for line in older.poll():
                        self._reader.add(path, line)

    def poll(self) -> bool:
        """Read what has come; whether there was anything."""
        grown = False
        for path, tail in self._tails.items():
            for line in tail.poll():
                self._reader.add(path, line)
                grown = True
        return grown

    @property
    def missing(self) -> list[str]:
        """Files that are not there yet."""
        return [path for path, tail in self._tails.items() if not tail.path.exists()]

    def close(self) -> None:
        for tail in self._tails.values():
            tail.close()

    def screen(self, width: int, height: int, note: str) -> Any:
        from robustloader.report.screen import make_screen

        name = ", ".join(os.path.basename(path) for path in self._tails)
        return make_screen(self._reader.run(), name=name, width=width, height=height, note=note)


def run(options: argparse.Namespace) -> int:
    """Follow until the reader leaves, or print one frame."""
    try:
        from rich.console import Console
    except ImportError:
        raise CommandError("rich is missing: pip install 'robustloader[watch]'") from None
    console = Console(highlight=False)
    for path in options.files:
        if os.path.isdir(path):
            raise CommandError(f"{path} is a folder: name the file in it")
        if os.path.exists(path) and not os.path.isfile(path):
            raise CommandError(f"{path} is no file: a pipe or a device cannot be followed")
    try:
        watched = _Watched(list(dict.fromkeys(options.files)))
        try:
            if options.once or not console.is_terminal:
                _print_once(console, watched)
                return 0
            with contextlib.suppress(KeyboardInterrupt):
                _follow(console, watched)
        finally:
            watched.close()
    except OSError as error:
        raise CommandError(f"cannot read {error.filename or 'a file'}: {error.strerror}") from error
    return 0


def _print_once(console: Any, watched: _Watched) -> None:
    if watched.missing:
        raise CommandError(f"cannot read {watched.missing[0]}: No such file or directory")
    watched.poll()
    with delivering():
        console.print(watched.screen(console.width, max(console.height, 40), ""))


def _follow(console: Any, watched: _Watched) -> None:
    """Draw when something has come, or when the window has another size."""
    from rich.live import Live

    shown: tuple[Any, ...] = ()
    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            grown = watched.poll()
            note = "q leaves"
            if watched.missing:
                note = f"waiting for {watched.missing[0]} to appear   {note}"
            state = (note, console.size)
            if grown or state != shown:
                with delivering():
                    live.update(watched.screen(console.width, console.height, note), refresh=True)
                shown = state
            if pressed(POLL_S) in ("q", "Q"):
                return


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """Single key presses without echo, where there is a keyboard; the terminal is put back as it was."""
    if not sys.stdin.isatty():
        yield _no_keys
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield lambda wait_s: _press(fd, wait_s)
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _press(fd: int, wait_s: float) -> str:
    if not select.select([fd], [], [], wait_s)[0]:
        return ""
    key = os.read(fd, 1).decode("ascii", "replace")
    return key or "q"  # the keyboard is gone, and so is the reader


def _no_keys(wait_s: float) -> str:
    time.sleep(wait_s)
    return ""
