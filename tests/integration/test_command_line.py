"""What holds for every command: an output that cannot be written, one that is closed, another encoding, Ctrl-C."""

from __future__ import annotations

import io
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from robustloader.cli import main
from tests.support.runs import write_run
from tests.support.watch import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
NAME = "tests.support.tuned"
"""Where the datasets are."""

COMMANDS: list[tuple[str, ...]] = [
    ("--help",),
    ("doctor",),
    ("doctor", "--json"),
    ("tune", f"{NAME}:Waiting", "--candidates", "0", "--seconds", "0.5"),
    ("compare", f"{NAME}:Waiting", "--batches", "2"),
    ("report", "{run}", "-o", "{tmp}/page.html"),
    ("report", "{run}", "--json"),
    ("watch", "{run}", "--once"),
]

ENDLESS = """
import os

class Endless:
    def __len__(self):
        return 100_000_000

    def __getitem__(self, index):
        if index == 3:
            os.write(1, b"loading\\n")
        return index
"""


def filled(words: tuple[str, ...], folder: Path) -> list[str]:
    """A command about a run in ``folder``."""
    run = write_run(folder / "run.jsonl", epochs=1)
    return [word.format(run=run, tmp=folder) for word in words]


def command(words: tuple[str, ...], folder: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run it as users do, with buffered output."""
    return subprocess.run(
        [sys.executable, "-m", "robustloader", *filled(words, folder)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE_S,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        **settings,
    )


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_full_disk(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and status 1."""
    if words[0] == "watch":
        pytest.importorskip("rich")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(filled(words, tmp_path)) == 1
    name = "robustloader" if words[0] == "--help" else f"robustloader {words[0]}"
    told = capsys.readouterr().err.splitlines()
    assert told[-1] == f"{name}: cannot write the output: No space left on device"


def test_a_full_disk_at_the_end_of_a_process(tmp_path: Path) -> None:
    """What Python still holds when it ends makes no second message, and no other status."""
    with open("/dev/full", "w") as full:
        done = command(("report", "{run}", "--json"), tmp_path, stdout=full)
    assert done.stderr == "robustloader report: cannot write the output: No space left on device\n"
    assert done.returncode == 1


def test_no_output_at_all(tmp_path: Path) -> None:
    """``robustloader report run.jsonl >&-``: the page is written, and nobody hears of it."""
    done = command(("report", "{run}", "-o", "{tmp}/page.html"), tmp_path, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "page.html").exists()


def test_an_encoding_that_lacks_a_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of ``tune`` comes out where the terminal knows ASCII only."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["tune", f"{NAME}:Waiting", "--candidates", "0", "--seconds", "0.5"]) == 0
    assert "workers" in written.getvalue().decode("ascii")


def test_a_page_for_a_device(tmp_path: Path) -> None:
    """``-o /dev/stdout`` writes there; a device or a pipe is never replaced by a file."""
    run = write_run(tmp_path / "run.jsonl", epochs=1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    assert main(["report", str(run), "-o", str(pipe)]) == 0
    assert reader.communicate(timeout=PATIENCE_S)[0].rstrip().endswith("</html>")
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("name", ["leaves", "leaves_at_import"])
@pytest.mark.parametrize("verb", ["tune", "compare", "doctor"])
def test_a_dataset_that_exits(
    verb: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A module that is really a script, or a function that calls ``sys.exit``: told, not obeyed."""
    module = f"exiting_{verb}_{name}"
    body = "import sys\n" + ("sys.exit(0)\n" if name == "leaves_at_import" else "def leaves():\n    sys.exit(0)\n")
    (tmp_path / f"{module}.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    named = ("--dataset", f"{module}:{name}") if verb == "doctor" else (f"{module}:{name}",)
    assert main([verb, *named]) == 2
    assert "raised SystemExit: 0" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(capsys: pytest.CaptureFixture[str]) -> None:
    """``demo --dir`` below something that is no folder."""
    pytest.importorskip("sklearn")
    assert main(["demo", "--dir", "/proc/nowhere/files"]) == 2
    assert "robustloader demo: cannot make the folder /proc/nowhere/files" in capsys.readouterr().err


def test_what_a_dataset_raises_is_safe_to_print(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line by line, with escape sequences as text."""
    (tmp_path / "escaping.py").write_text("def make():\n    raise OSError('first \\x1b[2J\\nsecond')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["compare", "escaping:make"]) == 2
    told = capsys.readouterr().err
    assert "first  [2J\nsecond" in told
    assert "\x1b" not in told


def test_ctrl_c(tmp_path: Path) -> None:
    """In the middle of loading: one line, status 130, and no process is left."""
    (tmp_path / "endless.py").write_text(ENDLESS)
    process = subprocess.Popen(
        [sys.executable, "-m", "robustloader", "compare", "endless:Endless", "--batches", "100000000"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    with process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == "loading\n"
            process.send_signal(signal.SIGINT)
            printed, errors = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()  # where it goes on, nobody waits for it
    assert (printed, errors) == ("", "robustloader: interrupted\n")
    assert process.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
