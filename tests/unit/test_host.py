"""What the operating system offers: pids, lifelines, shared pages, limits."""

from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from robustloader.system import host
from tests.support.watch import PATIENCE_S, await_gone, is_gone, processes


@pytest.mark.parametrize(
    ("exitcode", "name"), [(None, None), (0, None), (3, None), (-9, "SIGKILL"), (-11, "SIGSEGV"), (-200, "signal 200")]
)
def test_signal_names(exitcode: int | None, name: str | None) -> None:
    """Of an exit code as multiprocessing gives it."""
    assert host.signal_name(exitcode) == name


def test_usable_cpus() -> None:
    """At least one, at most what the affinity allows."""
    assert 1 <= host.usable_cpus() <= len(os.sched_getaffinity(0))


def test_free_memory() -> None:
    """Something of something."""
    free, limit = host.free_memory_bytes()
    assert 0 <= free <= limit
    assert limit > 2**20


def test_memory_kills_is_a_count() -> None:
    """It only ever rises."""
    first, second = host.memory_kills(), host.memory_kills()
    assert first is not None
    assert second is not None
    assert 0 <= first <= second


def test_a_pidfd_tells_of_a_death_at_once_although_a_child_lives() -> None:
    """Unlike a sentinel, which the dead process's child inherits."""
    parent = "import os, signal\nif child := os.fork():\n    os.write(1, b'%d\\n' % child)\nsignal.pause()"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert process.stdout is not None
    grandchild = int(process.stdout.readline())
    fd = host.open_pidfd(process.pid)
    assert fd is not None
    try:
        assert not select.select([fd], [], [], 0)[0]
        process.kill()
        assert select.select([fd], [], [], PATIENCE_S)[0]
    finally:
        handles = processes([grandchild])
        os.kill(grandchild, signal.SIGKILL)
        await_gone(handles)
        os.close(fd)
        process.wait()
        process.stdout.close()


def test_no_pidfd_for_nobody() -> None:
    """None, not an error."""
    assert host.open_pidfd(2**22 - 1) is None


def test_a_lifeline_takes_a_process_and_its_child_along() -> None:
    """Closing it kills the process group, whatever its members are doing."""
    lifeline = host.Lifeline()
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        host.hold_lifeline(lifeline.read_fd)
        child = os.fork()
        if child:
            os.write(writer, f"{child}\n".encode())
        while True:
            signal.pause()
    os.close(writer)
    with open(reader) as lines:
        child = int(lines.readline())
    handles = processes([pid, child])
    lifeline.hand_over()
    lifeline.close()
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    await_gone(handles)


def _leader_that_leaves_a_program(lifeline: host.Lifeline) -> int:
    """Start a process that holds the lifeline, starts a program and ends, and reap it; the program's process id."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        host.hold_lifeline(lifeline.read_fd)
        os.write(writer, b"%d\n" % subprocess.Popen(["sleep", "600"]).pid)
        os._exit(0)
    os.close(writer)
    with open(reader) as lines:
        program = int(lines.readline())
    lifeline.hand_over()
    os.waitpid(pid, 0)
    return program


def test_cutting_a_lifeline_reaches_what_a_reaped_process_left() -> None:
    """Also while somebody else has the write end; and twice does no harm."""
    lifeline = host.Lifeline()
    other_end = os.dup(lifeline._write_fd)
    handles = processes([_leader_that_leaves_a_program(lifeline)])
    lifeline.cut()
    await_gone(handles)
    lifeline.cut()
    os.close(other_end)


def test_closing_a_lifeline_spares_what_a_reaped_process_left() -> None:
    """A process that left of its own accord may leave a program behind."""
    lifeline = host.Lifeline()
    (program,) = processes([_leader_that_leaves_a_program(lifeline)])
    lifeline.close()
    try:
        assert not is_gone(program)
    finally:
        program.kill()
        await_gone([program])


def test_a_lifeline_cut_before_it_is_held() -> None:
    """The process leaves at once."""
    lifeline = host.Lifeline()
    reader = os.dup(lifeline.read_fd)
    lifeline.close()
    pid = os.fork()
    if not pid:
        host.hold_lifeline(reader)
        signal.pause()
    os.close(reader)
    lifeline.hand_over()
    _, status = os.waitpid(pid, 0)
    assert os.WIFEXITED(status)
    assert os.WEXITSTATUS(status) == 1


def test_a_later_forked_process_does_not_keep_a_lifeline() -> None:
    """Its copy of the write end is closed first of all."""
    lifeline = host.Lifeline()
    ready, go = os.pipe(), os.pipe()
    stranger = os.fork()
    if not stranger:
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    lifeline.close()
    try:
        poll = select.poll()
        poll.register(lifeline.read_fd, 0)
        assert poll.poll(PATIENCE_S * 1_000), "the forked process holds the write end"
    finally:
        os.write(go[1], b"x")
        os.waitpid(stranger, 0)
        lifeline.hand_over()
        for fd in (*ready, *go):
            os.close(fd)


def test_a_later_forked_process_does_not_keep_a_lifelines_descriptors() -> None:
    """Neither end, once the worker has its own."""
    lifeline = host.Lifeline()
    fds = lifeline.read_fd, lifeline._write_fd
    pipe = os.fstat(fds[0]).st_ino
    lifeline.hand_over()
    pid = os.fork()
    if not pid:
        kept = [fd for fd in fds if _leads_to(fd, pipe)]
        os._exit(len(kept))
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    lifeline.close()
    assert not [fd for fd in fds if _leads_to(fd, pipe)]


def _leads_to(fd: int, inode: int) -> bool:
    try:
        return os.fstat(fd).st_ino == inode
    except OSError:
        return False


def test_lifelines_close_when_collected() -> None:
    """And twice does no harm."""
    lifeline = host.Lifeline()
    fd = os.dup(lifeline.read_fd)
    lifeline.close()
    lifeline.close()
    del lifeline
    gc.collect()
    poll = select.poll()
    poll.register(fd, 0)
    assert poll.poll(0)
    os.close(fd)


def test_a_shared_page_is_shared() -> None:
    """What a forked process writes is read here, and nothing lies in /dev/shm."""
    page = host.SharedPage()
    page.hand_over()
    pid = os.fork()
    if not pid:
        page.memory[:5] = b"hello"
        os._exit(0)
    os.waitpid(pid, 0)
    assert page.memory[:5] == b"hello"


def test_what_must_be_closed_in_forked_children(tmp_path: Path) -> None:
    """Is closed there, and only there."""

    class Thing:
        def close(self) -> None:
            (tmp_path / f"closed-by-{os.getpid()}").touch()

    thing = Thing()
    host.close_in_forked_children(thing)
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    assert [path.name for path in tmp_path.iterdir()] == [f"closed-by-{pid}"]
