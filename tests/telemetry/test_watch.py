"""The terminal shows the run as it goes on, and is left as it was."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

from robustloader import JsonlSink, RobustDataLoader
from robustloader.cli import main
from robustloader.policies import TelemetryPolicy
from robustloader.report import RunReader
from tests.support.datasets import Raising, damaged
from tests.support.runs import BEGIN, fault, made_run, started, write_run
from tests.support.telemetry import EVERY_BATCH_S
from tests.support.watch import Gate, wait_at

pytest.importorskip("rich")

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
LEAVES_SCREEN = "\x1b[?1049l"


class GatedFrom(Dataset):
    """Another dataset, whose samples from ``first`` on wait at a gate."""

    def __init__(self, first: int, dataset: Any, gate: str) -> None:
        self.first, self.dataset, self.gate = first, dataset, gate

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if index >= self.first:
            wait_at(self.gate)
        return self.dataset[index]


class Terminal:
    """``robustloader watch`` in a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.before = termios.tcgetattr(slave)
        self._slave = slave
        self.seen = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "robustloader", "watch", *arguments],
            stdin=slave, stdout=slave, stderr=subprocess.PIPE, cwd=ROOT, start_new_session=True,
            # Its controlling terminal, so that Ctrl-C is a key.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def await_text(self, text: str) -> None:
        """Read until it has been shown, since the last text that was awaited."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} was not shown: {self.seen[-3000:]!r}"
            self._read()
        self.seen = self.seen.partition(text)[2]

    def press(self, key: bytes) -> None:
        os.write(self.master, key)

    def end(self) -> tuple[int, str]:
        """Wait for its end: the exit status and what it said on standard error."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "it does not leave"
            self._read()
        self._read()
        assert self.process.stderr is not None
        return self.process.returncode, self.process.stderr.read().decode()

    def settings(self) -> list[Any]:
        return termios.tcgetattr(self._slave)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        os.close(self.master)
        os.close(self._slave)

    def _read(self) -> None:
        if select.select([self.master], [], [], 0.1)[0]:
            self.seen += os.read(self.master, 65_536).decode("utf-8", "replace")


@contextlib.contextmanager
def watching(*arguments: str) -> Iterator[Terminal]:
    terminal = Terminal(*arguments)
    try:
        yield terminal
    finally:
        terminal.close()


def append(path: Path, *lines: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_a_run_is_followed_from_before_its_beginning(tmp_path: Path) -> None:
    """The file may come later; what a real sink writes is shown while the run goes on, progress included; rotation
    loses nothing; q leaves.
    """
    path = tmp_path / "run.jsonl"
    with watching(str(path)) as terminal, Gate(tmp_path / "gate") as gate:
        terminal.await_text("waiting for")
        with JsonlSink(path) as sink:
            loader = RobustDataLoader(
                GatedFrom(48, Raising(64, {5: damaged, 9: damaged}), gate.path),
                batch_size=4,
                num_workers=2,
                telemetry=TelemetryPolicy(sinks=(sink,), progress_s=EVERY_BATCH_S),
            )
            with pytest.warns(UserWarning, match="fault|sample|replaced"):
                batches = iter(loader)
                for number in range(12):
                    next(batches)
                    if number == 3:
                        terminal.await_text("epoch 0 (running)")
                        terminal.await_text("sample 5")
                terminal.await_text("12 batches")  # all there are before the gate is opened: the epoch still runs
                gate.open()
                assert sum(1 for _ in batches) == 4
            terminal.await_text("epoch 0 (complete)")
        os.replace(path, tmp_path / "run.jsonl.1")
        append(path, started(time.time(), "0"), fault(time.time(), "0", 1, "after-the-rotation"))
        terminal.await_text("after-the-rotation")
        terminal.press(b"q")
        status, errors = terminal.end()
        assert (status, errors) == (0, "")
        assert LEAVES_SCREEN in terminal.seen
        assert terminal.settings() == terminal.before


def test_ctrl_c_leaves_cleanly(tmp_path: Path) -> None:
    """Status 0, no traceback, the terminal as it was."""
    path = write_run(tmp_path / "run.jsonl", epochs=1)
    with watching(str(path)) as terminal:
        terminal.await_text("q leaves")
        terminal.press(b"\x03")
        status, errors = terminal.end()
        assert (status, errors) == (0, "")
        assert LEAVES_SCREEN in terminal.seen
        assert terminal.settings() == terminal.before


def test_a_file_that_is_cut_is_followed_on(tmp_path: Path) -> None:
    """A run that begins again in the same file is shown."""
    path = write_run(tmp_path / "run.jsonl", epochs=1)
    with watching(str(path)) as terminal:
        terminal.await_text("q leaves")
        path.write_text("")
        append(path, fault(BEGIN + 9_000, "0", 0, "after-the-cut"))
        terminal.await_text("after-the-cut")
        terminal.press(b"q")
        assert terminal.end()[0] == 0


def once(capsys: pytest.CaptureFixture[str], *files: Path) -> str:
    assert main(["watch", "--once", *map(str, files)]) == 0
    return capsys.readouterr().out


def test_once_prints_one_frame_without_colour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For pipes: no escape sequences, and everything that the page's head says."""
    frame = once(capsys, write_run(tmp_path / "run.jsonl", wait_s=0.06, deaths=2, epochs=3, faults=0))
    assert "\x1b" not in frame
    for part in ("input-bound", "epoch 2 (complete)", "samples/s", "load p95", "Worker", "SIGSEGV", "run.jsonl"):
        assert part in frame


def test_ranks_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The slowest one is named, and comes first."""
    files = [write_run(tmp_path / f"{r}.jsonl", rank=str(r), wait_s=0.01 + 0.1 * (r == 2), epochs=2) for r in range(3)]
    frame = once(capsys, *files)
    assert "2 (slowest)" in frame and "Rank 2 is the slowest" in " ".join(frame.replace("│", " ").split())


@pytest.mark.parametrize("lines", [[], [started(BEGIN, "0")]], ids=["empty", "begun"])
def test_nothing_yet_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[dict[str, Any]]) -> None:
    """An empty file, and a run without a batch."""
    path = tmp_path / "run.jsonl"
    path.touch()
    append(path, *lines)
    assert ("No progress yet" if lines else "no events yet") in once(capsys, path)


def test_names_move_no_cursor_and_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Escape sequences, line ends and rich's own markup in what the run says are shown as text."""
    path = tmp_path / "run.jsonl"
    append(path, *made_run(epochs=1, deaths=0, faults=0))
    append(path, fault(BEGIN + 900, "0", 0, "a\x1b[2Jb\r\n[bold red]c[/]", message="[link=x]y[/link]\x07"))
    frame = once(capsys, path)
    assert not re.search("[\x00-\x09\x0b-\x1f]", frame)
    assert "[bold red]c[/]" in frame


def test_a_frame_fits_its_window() -> None:
    """At 80 by 24 and at 120 by 50, with many ranks, workers and faults, no line and no list is too long."""
    from rich.console import Console

    from robustloader.report.screen import make_screen

    reader = RunReader()
    for rank in range(40):
        for line in made_run(rank=str(rank), epochs=2, workers=30, faults=60):
            reader.add("r", json.dumps(line).encode())
    for width, height in ((80, 24), (120, 50)):
        console = Console(width=width, height=height, file=open(os.devnull, "w"), color_system=None)  # noqa: SIM115
        with console.capture() as captured:
            console.print(make_screen(reader.run(), name="r", width=width, height=height, note="q leaves"))
        console.file.close()
        lines = captured.get().splitlines()
        assert max(map(len, lines)) <= width
        assert len(lines) <= height, captured.get()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["watch", "--once", "{tmp}/none.jsonl"], "cannot read {tmp}/none.jsonl"),
        (["watch", "{tmp}"], "is a folder"),
        (["watch", "--once", "/dev/null"], "/dev/null is no file"),
        (["watch"], "required: FILE"),
    ],
)
def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str) -> None:
    """Status 2, and one line that says why."""
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    assert told.format(tmp=tmp_path) in capsys.readouterr().err


def test_without_rich_the_remedy_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """rich is an extra."""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["watch", "--once", str(write_run(tmp_path / "run.jsonl", epochs=1))]) == 2
    assert "pip install 'robustloader[watch]'" in capsys.readouterr().err
