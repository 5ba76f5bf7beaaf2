"""The whole table of situations, again and again: ``python -m tests.chaos.full --rounds 20 -o RESULT.json``.

Question: does every situation pass in every mode, every time?
Method: each run of a row is a process of its own, forked from one that has imported everything; two at a time. A row
that fails or does not end within its limit is noted with what it said, and the rest goes on. The result file is written
after each row: started again with the same file, it goes on where it stopped, if commit and rounds are the same.
Trap: rows that run side by side slow each other down; nothing here measures time except for the record.
Rerun: as above; ``--only TEXT`` runs the rows whose name or mode contains it. Exit status 1 when anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing as mp
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import describe
from robustloader.testing import no_leaks
from tests.chaos.situations import PRODUCT, Mode, Situation, columns, run
from tests.support.results import write_json

LIMIT_S = 120.0
SIDE_BY_SIDE = 2


@dataclass
class Running:
    """One run of a row, in a process of its own."""

    key: str
    pid: int
    pidfd: int
    began: float
    folder: Path


def key_of(row: Situation, mode: Mode) -> str:
    """Names a row in the result."""
    return f"{row.number} {row.name} {mode}"


def start(row: Situation, mode: Mode) -> Running:
    """Fork a process that runs the row and tells by its exit status."""
    folder = Path(tempfile.mkdtemp(prefix="robustloader-chaos-"))
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        os._exit(_run_here(row, mode, folder))
    return Running(key_of(row, mode), pid, os.pidfd_open(pid), time.monotonic(), folder)


def _run_here(row: Situation, mode: Mode, folder: Path) -> int:
    os.setsid()  # Ctrl-C is the parent's business, and who hangs is killed with all it started
    noise = os.open(folder / "output", os.O_WRONLY | os.O_CREAT, 0o600)
    for fd in (1, 2):
        os.dup2(noise, fd)
    os.close(noise)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    logging.getLogger("robustloader").setLevel(logging.ERROR)
    mp.set_forkserver_preload(["torch"])
    inside = folder / "inside"
    inside.mkdir()
    try:
        with no_leaks():
            run(row, mode, inside)
    except BaseException:
        (folder / "failure").write_text(traceback.format_exc())
        return 1
    finally:
        _stop_helpers()
    return 0


def _stop_helpers() -> None:
    """multiprocessing's forkserver and resource tracker end when they see that nobody holds their pipes any more."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def finish(running: Running) -> tuple[float, str]:
    """Reap a run that has ended, or ends now: seconds, and what was wrong or \"\"."""
    seconds = time.monotonic() - running.began
    ended = bool(select.select([running.pidfd], [], [], 0)[0])
    if not ended:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    _, status = os.waitpid(running.pid, 0)
    os.close(running.pidfd)
    problem = ""
    if not ended:
        problem = f"did not end within {LIMIT_S:g} s"
    elif status:
        told, output = running.folder / "failure", running.folder / "output"
        problem = told.read_text() if told.exists() else f"exit {os.waitstatus_to_exitcode(status)}"
        problem += output.read_text(errors="replace")[-2_000:]
    shutil.rmtree(running.folder, ignore_errors=True)
    return seconds, problem


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """A fresh result, or the one to go on with."""
    fresh = {"what": "chaos", **describe(), "rounds": options.rounds, "ok": False, "rows": {}}
    if options.output is not None and options.output.exists():
        before: dict[str, Any] = json.loads(options.output.read_text())
        if before.get("commit") == fresh["commit"] and before.get("rounds") == options.rounds:
            return before
    return fresh


def main(argv: list[str] | None = None) -> int:
    """Run, print, write; the exit status says whether every run passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.full", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="", help="rows whose name or mode contains this")
    parser.add_argument("-o", "--output", type=Path, help="write the result as JSON, and go on from it")
    options = parser.parse_args(argv)
    result = begin(options)
    chosen = [(row, mode) for row, mode in PRODUCT if options.only in key_of(row, mode)]
    for row, mode in chosen:
        entry = {**columns(row, mode), "passed": 0, "failed": 0, "seconds": [], "problems": []}
        result["rows"].setdefault(key_of(row, mode), entry)
    entries = result["rows"]
    todo = [
        (row, mode)
        for number in range(options.rounds)
        for row, mode in chosen
        if entries[key_of(row, mode)]["passed"] + entries[key_of(row, mode)]["failed"] <= number
    ]
    todo.reverse()
    running: list[Running] = []
    while todo or running:
        while todo and len(running) < SIDE_BY_SIDE:
            running.append(start(*todo.pop()))
        wait_s = max(0.0, min(each.began for each in running) + LIMIT_S - time.monotonic())
        ready = select.select([each.pidfd for each in running], [], [], wait_s)[0]
        for each in list(running):
            if each.pidfd in ready or time.monotonic() - each.began > LIMIT_S:
                running.remove(each)
                note(entries[each.key], each.key, *finish(each))
                if options.output is not None:
                    write_json(options.output, result)
    failed = sum(entry["failed"] for entry in entries.values())
    passed = sum(entry["passed"] for entry in entries.values())
    result["ok"] = not failed and all(entry["passed"] >= options.rounds for entry in entries.values())
    result["passed"], result["failed"] = passed, failed
    if options.output is not None:
        write_json(options.output, result)
    print(f"{len(chosen)} rows, {passed} runs passed, {failed} failed")
    return 1 if failed else 0


def note(entry: dict[str, Any], key: str, seconds: float, problem: str) -> None:
    """Enter one run."""
    entry["failed" if problem else "passed"] += 1
    entry["seconds"].append(round(seconds, 2))
    if problem:
        entry["problems"].append(problem)
    print(f"{'FAILED' if problem else 'passed'} {seconds:6.2f} s  {key}", flush=True)
    if problem:
        print(problem, flush=True)


if __name__ == "__main__":
    sys.exit(main())
