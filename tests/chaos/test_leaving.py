"""However a trainer ends, nothing of the loader is left: no process, no noise, and the trainer's own exit code."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support.running import Trainer
from tests.support.watch import Gate, Mailbox, await_gone, is_gone

METHODS = pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
FORK = pytest.mark.parametrize("method", ["fork"])
FORK_AND_FORKSERVER = pytest.mark.parametrize("method", ["fork", "forkserver"])


def check_silent_end(name: str, method: str, code: int = 0, said: str = "done\n") -> str:
    with Trainer(name, method) as trainer:
        returncode, out, err = trainer.end()
    assert returncode == code, err
    assert out == said
    return err


@FORK
@pytest.mark.parametrize("name", ["breaks", "deletes", "ends_in_a_cycle", "ends_whole"])
def test_ends_well(name: str, method: str) -> None:
    """``break``, ``del``, the end of the interpreter: exit code 0 and not a word on standard error."""
    assert check_silent_end(name, method) == ""


@FORK_AND_FORKSERVER
@pytest.mark.parametrize("name", ["ends", "ends_while_restarting"])
def test_ends_with_a_live_iterator(name: str, method: str) -> None:
    """Kept by a global to the last moment."""
    assert check_silent_end(name, method) == ""


@FORK
def test_an_exception_in_the_loop(method: str) -> None:
    """The trainer's own, once."""
    err = check_silent_end("raises", method, code=1, said="")
    assert err.count("Traceback") == 1
    assert err.rstrip().endswith("ValueError: the loss is NaN")


@FORK
def test_sys_exit_in_the_loop(method: str) -> None:
    """With the code that the trainer chose."""
    assert check_silent_end("exits", method, code=7, said="") == ""


@FORK_AND_FORKSERVER
def test_a_trainer_that_is_a_multiprocessing_child(method: str) -> None:
    """It joins its children before ``atexit`` runs, and must not wait for ever."""
    assert check_silent_end("in_a_child", method, said="done\nexit code 0\n") == ""


@FORK_AND_FORKSERVER
def test_a_forked_copy_of_the_trainer(method: str) -> None:
    """Ends in any way without touching the workers; the trainer goes on with the same ones."""
    assert check_silent_end("forks", method) == ""


@FORK
def test_what_a_workers_own_subprocess_inherits(method: str) -> None:
    """SIGINT and SIGTERM with their default actions."""
    assert check_silent_end("one_without_signals", method, said="0 0\n") == ""


# --- killed -----------------------------------------------------------------------------------------------------------


@METHODS
def test_a_killed_trainer_takes_everything_along(method: str, tmp_path: Path) -> None:
    """SIGKILL to the trainer, with a worker stuck in C that owns a child, and one in the middle of a frame: all are
    gone soon."""
    with (
        Mailbox(tmp_path / "mailbox") as mailbox,
        Gate(tmp_path / "gate") as gate,
        Trainer("sleeping", method, mailbox.path, gate.path) as trainer,
    ):
        workers = trainer.knows(trainer.line())
        stuck_and_child = trainer.knows(mailbox.take())
        assert len(workers) == len(stuck_and_child) == 2
        everybody = trainer.family()
        trainer.process.kill()
        await_gone(everybody)


@FORK
@pytest.mark.parametrize("name", ["forks_and_leaves_a_child", "two_loaders"])
def test_later_forks_do_not_keep_workers_alive(name: str, method: str, tmp_path: Path) -> None:
    """Neither a forked child that outlives the trainer, nor a second loader's workers."""
    with (
        Mailbox(tmp_path / "mailbox") as mailbox,
        Gate(tmp_path / "gate") as gate,
        Trainer(name, method, mailbox.path, gate.path) as trainer,
    ):
        workers = trainer.knows(trainer.line())
        workers += trainer.knows(mailbox.take())
        child = trainer.knows(trainer.line()) if name == "forks_and_leaves_a_child" else []
        trainer.process.kill()
        await_gone(workers)
        assert not any(map(is_gone, child)), "the forked child is its own master"
        for process in child:
            process.kill()
        await_gone(child)


# --- signals ----------------------------------------------------------------------------------------------------------


@FORK_AND_FORKSERVER
def test_sigterm_to_everybody(method: str) -> None:
    """A preempted job whose trainer handles SIGTERM takes twenty more batches, saves, and leaves in peace."""
    with Trainer("preempted", method) as trainer:
        workers = trainer.knows(trainer.line())
        for process in workers:
            process.terminate()
        trainer.process.terminate()
        code, out, err = trainer.end()
        await_gone(workers)
    assert (code, out, err) == (0, "saved\n", "")


@FORK_AND_FORKSERVER
def test_ctrl_c(method: str) -> None:
    """SIGINT to the trainer's whole process group: one traceback, nobody left."""
    with Trainer("interrupted", method) as trainer:
        workers = trainer.knows(trainer.line())
        os.killpg(trainer.process.pid, signal.SIGINT)
        code, _, err = trainer.end()
        await_gone(workers)
    assert code in (-signal.SIGINT, 128 + signal.SIGINT, 1)
    assert err.count("Traceback") == 1, err
    assert err.rstrip().endswith("KeyboardInterrupt")


def test_signals_while_spawned_workers_start() -> None:
    """Ctrl-C and SIGTERM to workers that are still importing: no traceback, no death."""
    assert check_silent_end("interrupted_while_starting", "spawn", said="saved\n") == ""


@FORK
def test_ctrl_c_in_next(method: str, tmp_path: Path) -> None:
    """While the loader waits for a worker that is stuck, with a child of its own."""
    with (
        Mailbox(tmp_path / "mailbox") as mailbox,
        Gate(tmp_path / "gate") as gate,
        Trainer("interrupted_in_next", method, mailbox.path, gate.path) as trainer,
    ):
        workers = trainer.knows(trainer.line())
        workers += trainer.knows(mailbox.take())
        os.killpg(trainer.process.pid, signal.SIGINT)
        code, _, err = trainer.end()
        await_gone(workers)
    assert code in (-signal.SIGINT, 128 + signal.SIGINT, 1)
    assert err.count("Traceback") == 1, err
    assert err.rstrip().endswith("KeyboardInterrupt")
