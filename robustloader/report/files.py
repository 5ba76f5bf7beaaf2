"""Files of events: which belong together, and how to follow one that is still written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from robustloader.report.reader import RunReader
from robustloader.report.run import Run

__all__ = ["Tail", "find_parts", "read_run"]

# No event is that long; a file without line ends (not one of ours) is read in pieces, not at once.
_LONGEST_LINE = 16 << 20
_ROTATED = re.compile(r"(?P<base>.+)\.(?P<number>[1-9]\d{0,5})")


def find_parts(path: Path) -> list[Path]:
    """A file and those that rotation renamed (``run.jsonl.2``, ``run.jsonl.1``, ``run.jsonl``), oldest first."""
    numbered = []
    for neighbour in path.parent.iterdir() if path.parent.is_dir() else ():
        match = _ROTATED.fullmatch(neighbour.name)
        if match and match["base"] == path.name and neighbour.is_file():
            numbered.append((int(match["number"]), neighbour))
    older = [neighbour for _, neighbour in sorted(numbered, reverse=True)]
    return [*older, *([path] if path.exists() else [])]


def read_run(paths: Sequence[str | os.PathLike[str]]) -> Run:
    """Read the files of a run, those that rotation renamed included; each file counts once, however often it is named.

    Raises:
        OSError: a file is not there or cannot be read.
    """
    reader = RunReader()
    seen: set[Path] = set()
    named = [Path(path) for path in paths]
    # A renamed file that is named together with its successor belongs before it, whatever their order.
    for path in sorted(named, key=lambda path: bool(_ROTATED.fullmatch(path.name))):
        parts = find_parts(path)
        if path not in parts:
            raise FileNotFoundError(2, "No such file", str(path))
        reader.open(str(path))
        for part in parts:
            if part.resolve() in seen:
                continue
            seen.add(part.resolve())
            with part.open("rb") as file:
                _feed(reader, str(path), file)
    return reader.run()


def _feed(reader: RunReader, name: str, file: BinaryIO) -> None:
    line = b""
    for line in iter(lambda: file.readline(_LONGEST_LINE), b""):
        if line.endswith(b"\n") or _is_whole(line):
            reader.add(name, line)
        elif len(line) >= _LONGEST_LINE:
            reader.add(name, line[:1024])  # no JSON: counted as damaged
    reader.leave(name, truncated=bool(line) and not line.endswith(b"\n") and not _is_whole(line))


def _is_whole(line: bytes) -> bool:
    """Whether a last line without a newline is an object all the same; half of one never ends in its brace."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


class Tail:
    """Follows a file that grows, is renamed by rotation, is cut, or is not there yet.

    It is asked, not told (no inotify): ``poll`` reads what has come since. The old file stays open until it has been
    read to its end, so that a rotation loses nothing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: BinaryIO | None = None
        self._rest = b""

    def poll(self) -> Iterator[bytes]:
        """The whole lines that have come since the last call, oldest first."""
        while True:
            if self._file is None:
                try:
                    self._file = self.path.open("rb")
                except FileNotFoundError:
                    return
                self._rest = b""
            yield from self._lines(self._file)
            if not self._moved(self._file):
                return
            # What the writer added between the last read and its renaming.
            yield from self._lines(self._file)
            self.close()

    def close(self) -> None:
        """Close the file; ``poll`` opens it again, from its beginning."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        if os.fstat(file.fileno()).st_size < file.tell():
            file.seek(0)  # cut: what is there now is new
            self._rest = b""
        while piece := file.read(1 << 20):
            *whole, self._rest = (self._rest + piece).split(b"\n")
            yield from whole
            if len(self._rest) > _LONGEST_LINE:
                yield self._rest[:1024]
                self._rest = b""

    def _moved(self, file: BinaryIO) -> bool:
        """Whether the name leads to another file by now; a file that is only gone may come back under its name."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return False
        ours = os.fstat(file.fileno())
        return (found.st_dev, found.st_ino) != (ours.st_dev, ours.st_ino)
