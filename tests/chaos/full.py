"""The whole table of situations, again and again: ``python -m tests.chaos.full --rounds 20 -o RESULT.json``.

Question: does every situation pass in every mode, every time?
Method: the modes that share a start method, and whether the trainer is itself a child, make a lane, or two. A lane's
rows run one after the other in a trainer process; the lanes run side by side. Under fork each row gets a process of its
own. Elsewhere a process runs many, so that the fork server is warm: importing torch costs seconds of a processor.
Spawned workers pay that each time, and their rounds come last. After each row the process has nothing left of it (no
child, descriptor, thread or shared memory). A row that fails or does not end within its limit is noted with what it
said, its process is thrown away, and the rest goes on. The result file is written all the while; started again with the
same file, it goes on where it stopped, if the rounds are the same and the code of every module of the package that
the rows load. ``--anew TEXT`` forgets rows first, for the day a row itself was mended.
Trap: rows that run side by side slow each other down; nothing here measures time except for the record.
Rerun: as above; ``--only TEXT`` runs the rows whose name or mode contains it. Exit status 1 when anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import logging
import multiprocessing as mp
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import describe
from benchmarks.tables import write_result
from robustloader.testing import no_leaks
from tests.chaos.situations import PRODUCT, Mode, Situation, child_context, columns, run_here
from tests.support import watch

LIMIT_S = 240.0
PATIENCE_S = 90.0
"""How long a row waits for what must happen: others use this machine for hours."""
SIDE_BY_SIDE = 4
LANES = {"fork": 1, "forkserver": 1, "spawn": 2}
"""How many share the rows of a start method with the same kind of trainer; spawned workers are awaited the longest."""
WRITE_EVERY_S = 5.0

Run = tuple[Situation, Mode]


def key_of(row: Situation, mode: Mode) -> str:
    """Names a row in the result."""
    return f"{row.number} {row.name} {mode}"


RUNS: dict[str, Run] = {key_of(*run): run for run in PRODUCT}


# --- in the trainer process -------------------------------------------------------------------------------------------


def host(link: Connection, method: str, child: bool, noise: Path) -> int:
    """A fresh process: be the trainer, or start one as a ``multiprocessing`` child."""
    os.setsid()  # Ctrl-C is the parent's business, and who hangs is killed with all it started
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever it was that a shell chose
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    fd = os.open(noise, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for standard in (1, 2):
        os.dup2(fd, standard)
    os.close(fd)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if not child:
        serve(link, method)
        return 0
    process = child_context(method).Process(target=serve, args=(link, method))
    process.start()
    link.close()
    process.join()
    return process.exitcode or 0


def serve(link: Connection, method: str) -> None:
    """Run rows as they are named, and tell what was wrong with each, until nobody asks any more."""
    watch.PATIENCE_S = PATIENCE_S
    if method == "spawn":
        sys.modules["__main__"] = importlib.import_module("tests.support.light")
    logging.getLogger("robustloader").setLevel(logging.ERROR)
    mp.set_forkserver_preload(["torch", "robustloader", "tests.chaos.situations"])
    try:
        with contextlib.suppress(EOFError):
            while True:
                link.send(attempt(*RUNS[link.recv()]))
    finally:
        for helper in psutil.Process().children(recursive=True):  # multiprocessing's own, which see it only later
            with contextlib.suppress(psutil.NoSuchProcess):
                helper.kill()


def attempt(row: Situation, mode: Mode) -> str:
    """Run a row here: what was wrong, or \"\"."""
    with tempfile.TemporaryDirectory(prefix="robustloader-chaos-") as folder:
        try:
            with no_leaks(settle_s=PATIENCE_S / 3):
                run_here(row, mode, Path(folder))
        except BaseException:
            return traceback.format_exc()
    return ""


# --- in the process that keeps the books ------------------------------------------------------------------------------


@dataclass
class Lane:
    """Rows that wait for a process of one kind, and that process.

    Attributes:
        waiting: names of rows, one for each run that is still to be done.
        pid, link: of that process, where there is one.
        row: what it runs now, since ``began``.
    """

    method: str
    child: bool
    waiting: deque[str]
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="robustloader-chaos-")))
    pid: int = 0
    link: Connection | None = None
    row: str = ""
    began: float = 0.0

    @property
    def noise(self) -> Path:
        """Where what its process says goes."""
        return self.folder / "output"

    def next_row(self) -> None:
        """Let the process run the next row; a fresh process where there is none."""
        if self.link is None:
            self._start()
        assert self.link is not None
        self.row, self.began = self.waiting.popleft(), time.monotonic()
        self.link.send(self.row)

    def _start(self) -> None:
        self.noise.unlink(missing_ok=True)
        self.link, theirs = mp.Pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                self.link.close()
                code = host(theirs, self.method, self.child, self.noise)
            finally:
                os._exit(code)
        theirs.close()

    def outcome(self, *, late: bool) -> tuple[str, float, str]:
        """The row that has ended, or must end now: its name, seconds, and what was wrong or \"\"."""
        assert self.link is not None
        row, self.row = self.row, ""
        try:
            problem = f"did not end within {LIMIT_S:g} s" if late else self.link.recv()
        except EOFError:
            problem = "its process died"
        if problem:
            said = self.noise.read_text(errors="replace") if self.noise.exists() else ""
            problem += f"\n{said[-2_000:]}"
        if problem or self.method == "fork":
            self.end()
        return row, time.monotonic() - self.began, problem

    def end(self) -> None:
        """No process any more: it is killed with all it started."""
        if self.link is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, signal.SIGKILL)
            os.killpg(self.pid, signal.SIGKILL)
        self.link.close()
        os.waitpid(self.pid, 0)
        self.link, self.pid = None, 0

    def close(self) -> None:
        """Nothing is left."""
        self.end()
        shutil.rmtree(self.folder, ignore_errors=True)


def loaded() -> str:
    """A name for the code of all modules of the package that the rows load; the package imports none later on."""
    code = hashlib.sha256()
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] == "robustloader" and module.__file__ is not None:
            code.update(name.encode() + b"\0" + Path(module.__file__).read_bytes() + b"\0")
    return code.hexdigest()


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """A fresh result, or the one to go on with."""
    setting = {**describe(":/tests"), "loaded": loaded()}
    fresh = {"what": "chaos", **setting, "rounds": options.rounds, "ok": False, "passed": 0, "failed": 0, "rows": {}}
    if options.output is None or not options.output.exists():
        return fresh
    before: dict[str, Any] = json.loads(options.output.read_text())
    same = before.get("loaded") == setting["loaded"] and before["rounds"] == options.rounds
    if not same or before["commit"]["dirty"] or setting["commit"]["dirty"]:
        return fresh
    return {**before, "commit": setting["commit"]}


def lanes_of(names: Iterable[str], rows: dict[str, Any], rounds: int) -> list[Lane]:
    """What is still to be done, round by round; spawn last."""
    lane_of: dict[str, tuple[str, bool, int]] = {}
    members: Counter[tuple[str, bool]] = Counter()
    for name in names:
        mode = RUNS[name][1]
        kind = mode.method, mode.child
        lane_of[name] = *kind, members[kind] % LANES[mode.method]
        members[kind] += 1
    waiting: dict[tuple[str, bool, int], deque[str]] = defaultdict(deque)
    for number in range(rounds):
        for name, lane in lane_of.items():
            if rows[name]["passed"] + rows[name]["failed"] <= number:
                waiting[lane].append(name)
    lanes = [Lane(method, child, names) for (method, child, _), names in waiting.items()]
    return sorted(lanes, key=lambda lane: lane.method == "spawn")


class Book:
    """The result as it grows."""

    def __init__(self, result: dict[str, Any], path: Path | None) -> None:
        self.result, self.path = result, path
        self.written = time.monotonic()

    def note(self, name: str, seconds: float, problem: str) -> None:
        """Enter one run."""
        entry, commit = self.result["rows"][name], self.result["commit"]["hash"]
        entry["failed" if problem else "passed"] += 1
        entry["seconds"].append(round(seconds, 2))
        if commit not in entry["commits"]:
            entry["commits"].append(commit)
        if problem:
            entry["problems"].append(problem)
        print(f"{'FAILED' if problem else 'passed'} {seconds:6.2f} s  {name}", flush=True)
        if problem:
            print(problem, flush=True)
        if time.monotonic() - self.written > WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Sum up, and write the file if there is to be one."""
        entries = self.result["rows"].values()
        self.result["passed"] = sum(entry["passed"] for entry in entries)
        self.result["failed"] = sum(entry["failed"] for entry in entries)
        enough = all(entry["passed"] >= self.result["rounds"] for entry in entries)
        self.result["ok"] = enough and not self.result["failed"]
        if self.path is not None:
            write_result(self.result, self.path, table="rows")
        self.written = time.monotonic()


def main(argv: list[str] | None = None) -> int:
    """Run, print, write; the exit status says whether every run passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.full", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="", help="rows whose name or mode contains this")
    parser.add_argument("--anew", help="begin again with the rows whose name or mode contains this")
    parser.add_argument("-o", "--output", type=Path, help="write the result as JSON, and go on from it")
    options = parser.parse_args(argv)
    book = Book(begin(options), options.output)
    rows = book.result["rows"]
    for name, run in RUNS.items():
        if name not in rows or (options.anew is not None and options.anew in name):
            rows[name] = {**columns(*run), "passed": 0, "failed": 0, "seconds": [], "commits": [], "problems": []}
    for name in set(rows) - set(RUNS):
        del rows[name]
    names = [name for name in RUNS if options.only in name]
    lanes = lanes_of(names, rows, options.rounds)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while active := [lane for lane in lanes if lane.row or lane.waiting][:SIDE_BY_SIDE]:
            for lane in active:
                if not lane.row:
                    lane.next_row()
            due_s = min(lane.began for lane in active) + LIMIT_S - time.monotonic()
            ready = wait([lane.link for lane in active if lane.link is not None], max(0.0, due_s))
            for lane in active:
                late = time.monotonic() - lane.began > LIMIT_S
                if lane.link in ready or late:
                    book.note(*lane.outcome(late=late and lane.link not in ready))
                if not lane.waiting and not lane.row:
                    lane.close()
    except KeyboardInterrupt:
        print("interrupted: started again with the same file, it goes on", flush=True)
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)
        for lane in lanes:
            lane.close()
        book.write()
    failed = sum(rows[name]["failed"] for name in names)
    print(f"{len(names)} rows, {sum(rows[name]['passed'] for name in names)} runs passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
