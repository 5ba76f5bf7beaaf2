"""Abandoned epochs end when the garbage collector comes by: their end is told, and waits for no lock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.collecting import LEFT_EARLY
from tests.support.running import ROOT
from tests.support.traceformat import check, load


def run(sink: str, workers: int, folder: Path) -> str:
    """What the trainer prints; one that hangs ends by itself, with its stack on standard error."""
    command = [sys.executable, "-m", "tests.support.collecting", sink, str(workers), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize("workers", [0, 1])
def test_while_a_line_is_built(workers: int, tmp_path: Path) -> None:
    """All are told, each once and by a line of its own, the last at the end of the program."""
    run("jsonl", workers, tmp_path)
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert sum('"event": "EpochFinished"' in line for line in lines) == LEFT_EARLY + 1


def test_while_a_trace_is_drawn(tmp_path: Path) -> None:
    run("trace", 1, tmp_path)
    events = load(tmp_path / "trace.json")
    check(events)
    assert sum(event["ph"] == "e" for event in events) == LEFT_EARLY + 1


@pytest.mark.parametrize("place", ["sink", "loop"])
def test_while_a_lock_of_the_users_is_held(place: str, tmp_path: Path) -> None:
    """In a sink of the user's, or in the loop, which uses what is behind the sink too."""
    assert run(place, 0, tmp_path).split() == [str(LEFT_EARLY + 1)]


SIGNAL = """
import gc, signal, time
import robustloader

rung = []

class Alarm(Exception):
    pass

def ring(number, frame):
    rung.append(number)
    raise Alarm

signal.signal(signal.SIGALRM, ring)
heap = [[] for _ in range(2_000_000)]
try:
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    gc.collect()
    while not rung:
        time.sleep(0.01)
except Alarm:
    print("heard")
"""


def test_a_signal_that_comes_during_a_collection_is_heard() -> None:
    """What its handler raises reaches the loop; in a callback of the collector it would be dropped."""
    done = subprocess.run([sys.executable, "-c", SIGNAL], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "heard\n", done.stderr
