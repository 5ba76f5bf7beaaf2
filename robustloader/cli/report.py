"""``robustloader report``: a run as a page, or as JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from robustloader.cli.ending import CommandError, tell
from robustloader.report import read_run
from robustloader.telemetry.units import as_line

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "report",
        help="make a page from the events of a run",
        description="Read what JsonlSink wrote, rotated files included, and write one HTML page that needs no network: "
        "the verdict, throughput, waiting, workers, faults and memory. Several files are the ranks of one run. The "
        "exit status is 0 when every file could be read in full, 1 when one is empty or lines had to be left out (the "
        "page is written all the same, and says so), and 2 when a file is not there.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a JSON-lines file of a run; one per rank")
    parser.add_argument("-o", "--output", metavar="PAGE", help="where to write the page (default: report.html)")
    parser.add_argument("--json", action="store_true", help="print the run as one JSON document; no page without -o")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Read, write, and tell."""
    try:
        found = read_run(options.files)
    except OSError as error:
        raise CommandError(f"cannot read {error.filename}: {error.strerror}") from error
    target = options.output or (None if options.json else "report.html")
    if target is not None:
        from robustloader.report.page import make_page

        if any(os.path.exists(target) and os.path.samefile(target, path) for path in options.files):
            raise CommandError(f"{target} is one of the files to read: name another page with -o")
        if os.path.isdir(target):
            raise CommandError(f"cannot write {target}: it is a folder")
        try:
            _write(Path(target), make_page(found, made_at=time.time()))
        except OSError as error:
            raise CommandError(f"cannot write {target}: {error.strerror}") from error
    if options.json:
        tell(json.dumps(found.to_dict(), allow_nan=False))
    else:
        lead = found.leading
        if lead is not None and lead.total("batches"):
            tell(as_line(f"{lead.verdict}: {lead.advice}"))
            if len(found.ranks) > 1:
                tell(as_line(found.comparison.reason))
        tell(as_line(f"wrote {target}"))
    for note in found.notes:
        print(f"robustloader report: {as_line(note)}", file=sys.stderr)
    return 0 if found.sound else 1


def _write(target: Path, text: str) -> None:
    """All of the page, or what was there before; what is no file, as /dev/stdout, stays what it is."""
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")
        return
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
