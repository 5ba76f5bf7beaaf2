"""Running a trainer in a process of its own."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.support import watch
from tests.support.trainers import TRANSPORT_VARIABLE
from tests.support.transports import chosen_transport
from tests.support.watch import await_gone, is_gone, processes

ROOT = Path(__file__).resolve().parents[2]


class Trainer:
    """A running ``tests.support.trainers`` program, in a process group of its own. Its loaders use the transport that
    loaders use here.
    """

    def __init__(self, name: str, *arguments: object) -> None:
        command = [sys.executable, "-X", "faulthandler", "-m", "tests.support.trainers", name, *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONWARNINGS": "error::ResourceWarning",
                TRANSPORT_VARIABLE: chosen_transport(),
            },
        )
        self._text = b""
        self.known: list[psutil.Process] = []

    def line(self) -> str:
        """The next line it prints."""
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        while b"\n" not in self._text:
            assert select.select([fd], [], [], watch.PATIENCE_S)[0], "the trainer says nothing"
            piece = os.read(fd, 65_536)
            assert piece, f"the trainer ended: {self._rest()}"
            self._text += piece
        line, _, self._text = self._text.partition(b"\n")
        return line.decode()

    def knows(self, pids: str) -> list[psutil.Process]:
        """Remember processes it told of, so that the test can see to their end."""
        found = processes(map(int, pids.split()))
        self.known += found
        return found

    def end(self) -> tuple[int, str, str]:
        """Wait for its end: exit code, the rest of its output, and what it wrote to standard error."""
        out, err = self.process.communicate(timeout=2 * watch.PATIENCE_S)
        return self.process.returncode, (self._text + out).decode(), err.decode()

    def family(self) -> list[psutil.Process]:
        """Everything that descends from it now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.known += psutil.Process(self.process.pid).children(recursive=True)
        return self.known

    def _rest(self) -> str:
        return self.process.communicate()[1].decode()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.family()
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        left = [process for process in self.known if not is_gone(process)]
        for process in left:  # only a failed test leaves any
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        await_gone(left)
