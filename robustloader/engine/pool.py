"""The worker processes of one iterator, as processes: start them, wait for what they say or for their end, stop them.

What to do about it is decided elsewhere. Everything that signals, sends or closes is guarded by the owner's pid: a
forked copy of the training process must not touch the original's workers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import stat
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing import popen_fork
from pickle import PicklingError
from typing import Any, NamedTuple

from robustloader.system import host
from robustloader.transport.arena import ForkToken, own_fork
from robustloader.transport.channel import ArenaLost, Frame, channel_pair
from robustloader.transport.codec import Parcel
from robustloader.transport.messages import Released, Trim
from robustloader.worker.beacon import INIT, Beacon, Reading
from robustloader.worker.process import STACK_SIGNAL, Setup, run_worker

__all__ = ["Died", "Happening", "NotStarted", "Pool", "Said", "Started", "Worker"]

logger = logging.getLogger("robustloader")

STOP_WITHIN_S = 5.0
ABANDON_AFTER_S = 10.0
"""A process that lives so long after SIGKILL hangs in the kernel."""
_TRIM_WITHIN_NS = 30_000_000_000
"""A worker answers between two batches; one that is long at it does not hold up what is done about memory."""
_EOF_GRACE_S = 1.0
_DESCRIPTORS_TO_START = 8
"""More than ``multiprocessing`` opens for a process, whatever the start method."""
_STACK_WAIT_S = 1.0


class Worker:
    """One incarnation of one worker process, as the training process sees it.

    Attributes:
        ready: it has said :class:`~robustloader.transport.messages.Ready`.
        finished: tasks that came back from it.
        dismissed: it was asked to leave; its end is expected.
        killed_for: why it is as good as killed by this process ("hang", "start", "arena"), or "".
        backlogged: the pool waits until its socket takes more.
        arena_lost: why its arena could not be had here, or "".
        trimming_until_ns: until when it may take to give back idle memory, as it was asked to; 0 once it has.
        run: the iterator's epoch it was started in.
        silent_s, task_s: how long it has been in one phase, and with one task, while the trainer waited, in seconds.
        stack: its Python stacks as text, once it was found to hang.
    """

    def __init__(self, worker_id: int, incarnation: int) -> None:
        self.worker_id = worker_id
        self.incarnation = incarnation
        self.page = host.SharedPage()
        self.beacon = Beacon(self.page)
        self.beacon.enter(INIT)
        self.lifeline = host.Lifeline()
        self.stacks_fd = os.memfd_create("robustloader-stacks")
        try:
            self.channel, self._their_end = channel_pair()
        except OSError:
            os.close(self.stacks_fd)
            raise
        self._fork_token = self.channel.worker = ForkToken()
        self.process: Any = None
        self._pid: int | None = None
        self.pidfd: int | None = None
        self.ready = False
        self.finished = 0
        self.dismissed = False
        self.killed_for = ""
        self.arena_lost = ""
        self.backlogged = False
        self.trimming_until_ns = 0
        self.run = 0
        self.gone_ns = 0
        self.killed_ns = 0
        self.silent_s = 0.0
        self.stack = ""
        self.silent_since: tuple[int, int | None] = (0, None)
        self.task = (-1, -1, -1)
        self.task_s = 0.0
        self.reported = False

    @property
    def pid(self) -> int | None:
        """Process id; None before the start."""
        return self._pid

    def start(
        self, context: Any, make_setup: Callable[..., Setup], *, unseen: Collection[int] = (), **details: Any
    ) -> None:
        """Start the process. May block for as long as pickling and a spawned interpreter's start take.

        ``unseen``: where batches lie that were not handed out yet, at which a forked worker will not look.
        """
        self.run = details["run"]
        try:
            setup = make_setup(
                end=self._their_end,
                page=self.page,
                lifeline=host.InheritedFd(self.lifeline.read_fd),
                stacks=host.InheritedFd(self.stacks_fd),
                worker_id=self.worker_id,
                incarnation=self.incarnation,
                **details,
            )
            process = context.Process(target=run_worker, args=(setup,))
            process.daemon = True
            _want_descriptors()
            with own_fork(self._fork_token, unseen), host.signals_held(context.get_start_method()):
                process.start()
                self.process, self._pid = process, process.pid
            self.pidfd = host.open_pidfd(process.pid)
        except BaseException as error:
            _close_pipes_of_refused(error)
            self.close()
            if self.process is not None:  # a signal handler's: nobody will know of this process
                self.kill()
                self.process.join()
            raise
        finally:
            self._their_end.close()
            self.lifeline.hand_over()
            self.page.hand_over()

    def close(self) -> None:
        """Give back every descriptor. Closing the lifeline ends the process if it still lives. If it is known to have
        ended, what nobody looks at of its arenas is given back as well."""
        self.channel.close()
        self.lifeline.hand_over()
        self.lifeline.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None
        if self.stacks_fd >= 0:
            os.close(self.stacks_fd)
            self.stacks_fd = -1
        self._fork_token.settle()

    def kill(self, reason: str = "") -> None:
        """SIGKILL to the worker and the processes it started."""
        self.killed_for = self.killed_for or reason
        self.killed_ns = self.killed_ns or time.monotonic_ns()
        pid = self.pid
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
        self.kill_group()

    def kill_group(self) -> None:
        """SIGKILL to what is left of the worker's process group, whether or not the worker was reaped.

        By the lifeline, not by number: a fork server reaps a dead worker at once, and under fork and spawn the start of
        any process does. From then on its number tells nothing, and may be somebody else's.
        """
        self.lifeline.cut()

    def take_stacks(self) -> str:
        """The worker's Python stacks as text, or what can be had of them within a second."""
        pid = self.pid
        if pid is None or not self.ready:
            return ""
        size = os.fstat(self.stacks_fd).st_size
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, STACK_SIGNAL)
        deadline = time.monotonic() + _STACK_WAIT_S
        seen = size
        # faulthandler writes from a signal handler and says nothing when done: two equal sizes mean it is.
        while time.monotonic() < deadline:
            time.sleep(0.02)
            now = os.fstat(self.stacks_fd).st_size
            if now > size and now == seen:
                break
            seen = now
        return os.pread(self.stacks_fd, 65_536, size).decode(errors="replace")

    def exitcode(self, wait_s: float) -> int | None:
        """Reap the process; None where its exit status cannot be had."""
        self.process.join(wait_s)
        code: int | None = self.process.exitcode
        return code

    def ended(self) -> None:
        """The process has ended: what it inherited is not looked at any more."""
        self._fork_token.ended = True


def _want_descriptors() -> None:
    """Raise ``OSError`` where there are not enough to start a process: ``multiprocessing`` would keep those that it got
    before they ran out, and not give them back."""
    with contextlib.ExitStack() as stack:
        for _ in range(_DESCRIPTORS_TO_START):
            stack.callback(os.close, os.eventfd(0, os.EFD_CLOEXEC))


def _close_pipes_of_refused(error: BaseException) -> None:
    """Close what ``multiprocessing`` had opened for a process that the system then refused to fork.

    Their numbers are in the frame that ``os.fork`` raised in, and nowhere else. A process object with a ``pid`` has its
    process, and closes them itself. What is no pipe (any more) is not ours.
    *Source*: ``Popen._launch`` in ``multiprocessing/popen_fork.py`` of Python 3.11 to 3.14.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        # Another frame's names are not looked at: a snapshot that holds the error would keep all of them alive.
        if frame.f_globals is vars(popen_fork) and not hasattr(frame.f_locals["self"], "pid"):
            for name in ("parent_r", "child_w", "child_r", "parent_w"):
                with contextlib.suppress(KeyError, OSError):
                    if stat.S_ISFIFO(os.fstat(frame.f_locals[name]).st_mode):
                        os.close(frame.f_locals[name])


class Said(NamedTuple):
    """A worker sent a frame."""

    worker: Worker
    frame: Frame


class Died(NamedTuple):
    """A worker process ended, or was killed and will not end, then without exit code. ``reading`` is the last that its
    beacon said; everything it had sent was handed out before."""

    worker: Worker
    exitcode: int | None
    reading: Reading


class Started(NamedTuple):
    """A worker that was started off the calling thread is there."""

    worker: Worker


class NotStarted(NamedTuple):
    """A worker could not be started, for want of descriptors, memory, threads or processes, say; where ``error`` is no
    ``Exception``, a signal handler's cut the start short."""

    worker_id: int
    error: BaseException


Happening = Said | Died | Started | NotStarted


@dataclass
class _Shared:
    """What the starter threads and the owner share."""

    outcomes: deque[Started | NotStarted]
    lock: threading.Lock
    closed: bool = False


class Pool:
    """The processes. Used by one thread at a time, whichever calls ``next()``.

    ``busy`` is set while what ``wait`` found is read and seen to; whoever does that resets it. Found set later, it says
    that an exception from elsewhere (a signal handler of the user's) cut that short, and frames may be torn.

    Args:
        context: a multiprocessing context, or the ``torch.multiprocessing`` module.
        make_setup: makes a worker's :class:`Setup` from what belongs to the process. Must not know the iterator, which
            would never be collected: whatever ends the pool at exit holds the pool.
    """

    def __init__(self, context: Any, make_setup: Callable[..., Setup]) -> None:
        self._context = context
        self._make_setup = make_setup
        self._owner = os.getpid()
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake_fd, selectors.EVENT_READ, None)
        self._shared = _Shared(deque(), threading.Lock())
        self.workers: list[Worker] = []
        self.stopped = False
        self.busy = False

    @property
    def owned(self) -> bool:
        """Whether this process made the pool (a forked copy did not)."""
        return os.getpid() == self._owner

    @property
    def start_method(self) -> str:
        """One of "fork", "forkserver" and "spawn"."""
        return str(self._context.get_start_method())

    # --- starting

    def start(self, worker_id: int, incarnation: int, **details: Any) -> Worker:
        """Start a worker on the calling thread; raises what starting a process raises."""
        worker = Worker(worker_id, incarnation)
        try:
            worker.start(self._context, self._make_setup, **details)
        except (TypeError, AttributeError, PicklingError):
            warnings.warn(
                "Got pickle error when attempting to start a worker Process. "
                "This might be because the worker Process arguments are not picklable. "
                "Python 3.14+ changed the multiprocessing start method in non-Mac POSIX platforms "
                "to 'forkserver', which requires the worker Process arguments to be picklable. "
                "You can also try multiprocessing.set_start_method('fork').",
                stacklevel=2,
            )
            raise
        self._watch(worker)
        return worker

    def start_aside(self, worker_id: int, incarnation: int, **details: Any) -> None:
        """Start a worker without holding up the calling thread where that takes long (spawn, forkserver).

        ``wait`` tells how it went. A fork is quick, and forking from another thread would gain nothing. What a signal
        handler raises meanwhile is raised here, once the outcome is kept. Ctrl-C and SIGTERM are held back until then;
        a start that another signal cuts short has failed.
        """
        order = worker_id, incarnation, details
        if self.start_method == "fork":
            with host.signals_held("fork"):
                self._start_now(*order)
            return
        name = f"robustloader-start-{worker_id}"
        try:
            threading.Thread(target=self._start_now, args=order, name=name, daemon=True).start()
        except RuntimeError as error:  # no thread, and nothing to close: the worker is made there
            self._keep(NotStarted(worker_id, error))

    def _start_now(self, worker_id: int, incarnation: int, details: dict[str, Any]) -> None:
        try:
            worker = Worker(worker_id, incarnation)
            worker.start(self._context, self._make_setup, **details)
        except BaseException as error:
            self._keep(NotStarted(worker_id, error))
            if not isinstance(error, Exception) and self.start_method == "fork":  # on the calling thread
                raise
            return
        self._keep(Started(worker))

    def _keep(self, outcome: Started | NotStarted) -> None:
        """Let ``wait`` tell of it; a worker that comes when all is over goes at once."""
        with self._shared.lock:
            if not self._shared.closed:
                self._shared.outcomes.append(outcome)
                os.eventfd_write(self._wake_fd, 1)
                return
        if isinstance(outcome, Started):
            outcome.worker.kill()
            outcome.worker.close()

    def _watch(self, worker: Worker) -> None:
        self.workers.append(worker)
        self._selector.register(worker.channel, selectors.EVENT_READ, worker)
        death = worker.pidfd if worker.pidfd is not None else worker.process.sentinel
        self._selector.register(death, selectors.EVENT_READ, worker)

    def _unwatch(self, worker: Worker) -> None:
        self.workers.remove(worker)
        death = worker.pidfd if worker.pidfd is not None else worker.process.sentinel
        for thing in (worker.channel, death):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(thing)

    # --- talking

    def send(self, worker: Worker, message: Any, parcel: Parcel | None = None) -> None:
        """Queue a message; never blocks."""
        worker.channel.send(message, parcel)
        self._watch_writing(worker)

    def tell_released(self) -> None:
        """Tell the workers now what they may use again, where otherwise their next task would."""
        for worker in self.workers:
            if worker.channel.has_released:
                self.send(worker, Released())

    def ask_to_trim(self) -> None:
        """Have the workers give back what lies idle in their arenas, where otherwise it would stay for many batches."""
        until_ns = time.monotonic_ns() + _TRIM_WITHIN_NS
        for worker in self.workers:
            if worker.ready and not worker.dismissed:
                worker.trimming_until_ns = until_ns
                self.send(worker, Trim())

    def _watch_writing(self, worker: Worker) -> None:
        backlog = worker.channel.backlog
        if backlog == worker.backlogged or worker.channel.closed or worker.gone_ns:
            return
        worker.backlogged = backlog
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if backlog else 0)
        self._selector.modify(worker.channel, events, worker)

    def wake(self) -> None:
        """Let a ``wait`` under way return. Runs in any thread."""
        with self._shared.lock:
            if not self._shared.closed:
                os.eventfd_write(self._wake_fd, 1)

    def wait(self, timeout_s: float | None) -> list[Happening]:
        """What has happened, waiting up to ``timeout_s`` seconds (None: until something does)."""
        happenings: list[Happening] = []
        dead: list[Worker] = []
        ready = self._selector.select(timeout_s)
        self.busy = bool(ready)
        for key, events in ready:
            worker: Worker | None = key.data
            if worker is None:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake_fd)
                happenings.extend(self._take_outcomes())
            elif key.fileobj is not worker.channel:
                dead.append(worker)
            else:
                if events & selectors.EVENT_WRITE:
                    worker.channel.flush()
                    self._watch_writing(worker)
                if events & selectors.EVENT_READ:
                    happenings.extend(self._read(worker))
        for worker in self.workers:
            grace_s = STOP_WITHIN_S if worker.dismissed else _EOF_GRACE_S
            if worker.gone_ns and time.monotonic_ns() - worker.gone_ns > grace_s * 1e9:
                worker.kill()  # it lives, but nobody can talk with it
        happenings.extend(self._bury(worker, happenings) for worker in dead)
        for worker in list(self.workers):
            if worker.killed_ns and time.monotonic_ns() - worker.killed_ns > ABANDON_AFTER_S * 1e9:
                happenings.append(self._abandon(worker))
        return happenings

    def _take_outcomes(self) -> list[Started | NotStarted]:
        taken = []
        while self._shared.outcomes:
            outcome = self._shared.outcomes.popleft()
            if isinstance(outcome, Started):
                self._watch(outcome.worker)
            taken.append(outcome)
        return taken

    def _read(self, worker: Worker) -> list[Said]:
        try:
            frames, gone = worker.channel.receive()
        except ArenaLost as error:  # nothing it sends can be read any more
            worker.arena_lost = str(error)
            worker.kill("arena")
            frames, gone = [], True
        if gone and not worker.gone_ns:
            worker.gone_ns = time.monotonic_ns()
            self._selector.unregister(worker.channel)
        return [Said(worker, frame) for frame in frames]

    def _bury(self, worker: Worker, happenings: list[Happening]) -> Died:
        """The process has ended: hand out what it still managed to send, then take leave of it."""
        while not worker.gone_ns:
            said = self._read(worker)
            happenings.extend(said)
            if not said:
                break
        reading = worker.beacon.read()
        worker.kill_group()
        exitcode = worker.exitcode(STOP_WITHIN_S)
        worker.ended()
        self._unwatch(worker)
        worker.close()
        return Died(worker, exitcode, reading)

    def _abandon(self, worker: Worker) -> Died:
        """The process was killed and does not end: it hangs in the kernel, in a device or file system that does not
        answer. It ends when that call returns; until then its memory is its own."""
        logger.warning("worker %d (pid %s) does not end, although killed, and is left", worker.worker_id, worker.pid)
        reading = worker.beacon.read()
        self._unwatch(worker)
        worker.close()
        return Died(worker, None, reading)

    # --- stopping

    def dismiss(self, worker: Worker) -> None:
        """Ask one worker to leave when it is done with the task in hand; ``wait`` tells when it has.

        One that has not within five seconds is killed by ``wait``: a thread that user code left behind, say, holds up
        the interpreter's end for ever.
        """
        worker.dismissed = True
        worker.beacon.dismiss()
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(worker.channel)
        worker.gone_ns = time.monotonic_ns()
        worker.channel.close()

    def stop(self) -> None:
        """End all workers: ask, wait up to five seconds in all, then SIGKILL. Idempotent, silent, and without effect
        in a process that does not own the pool."""
        if self.stopped or not self.owned:
            return
        self.stopped = True
        with self._shared.lock:
            self._shared.closed = True
            late = [outcome.worker for outcome in self._shared.outcomes if isinstance(outcome, Started)]
        for worker in late:
            worker.kill()
        everyone = [*self.workers, *late]
        for worker in everyone:
            worker.beacon.dismiss()
            worker.channel.close()  # a worker that waits for a task, or for us to read, wakes up
        deadline = time.monotonic() + STOP_WITHIN_S
        try:
            for worker in everyone:
                self._await_end(worker, max(0.0, deadline - time.monotonic()))
        finally:  # also when a second Ctrl-C cuts the waiting short
            for worker in everyone:
                if worker.process.exitcode is None:
                    worker.kill()
        for worker in everyone:
            if worker.process.exitcode is None:
                worker.process.join(1.0)  # one that cannot even be killed (a dead network mount) is left behind
            if worker.process.exitcode is not None:
                worker.ended()
            if worker.process.exitcode:  # it did not leave: it died, and nobody had noticed yet
                worker.kill_group()
            worker.close()
        self.workers.clear()
        self._selector.close()
        os.close(self._wake_fd)

    @staticmethod
    def _await_end(worker: Worker, timeout_s: float) -> None:
        if worker.pidfd is None:
            worker.process.join(timeout_s)
            return
        with selectors.DefaultSelector() as selector:
            selector.register(worker.pidfd, selectors.EVENT_READ)
            if selector.select(timeout_s):
                worker.process.join(1.0)
