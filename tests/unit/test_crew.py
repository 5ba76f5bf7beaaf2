"""The crew's deadlines, on a clock that the test turns, and what its docstring says."""

from __future__ import annotations

import inspect
import re
import signal
import types
from typing import Any

import pytest

from robustloader.engine import crew as crew_module
from robustloader.engine.crew import Crew
from robustloader.policies import RecoveryPolicy
from tests.support.simulation import IDLE, SimPool

LIMIT_S = 40.0


class Clock:
    """Stands in for ``time`` in the crew's module."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = 10**15
        monkeypatch.setattr(crew_module, "time", types.SimpleNamespace(monotonic_ns=lambda: self.now_ns))

    def go(self, seconds: float) -> None:
        self.now_ns += int(seconds * 1e9)


def killed_for(crew: Crew, worker: Any) -> str:
    """What the crew kills ``worker`` for when it looks now, or ""."""
    worker.kill = lambda reason: setattr(worker, "killed_for", reason)
    crew.watch(lambda worker: None, lambda worker: False)
    return str(worker.killed_for)


def starting(policy: RecoveryPolicy) -> tuple[Crew, Any]:
    """A crew of one worker that is not ready yet, and that worker."""
    crew = Crew(SimPool(None, None), num_workers=1, policy=policy, timeout_s=0, heals=True)  # type: ignore[arg-type]
    assert crew.start_all(lambda slot: {"run": 0}, 1) is None
    crew.begin_wait()
    return crew, crew.slots[0].worker


def test_a_start_may_take_so_long_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted while the trainer waits: ``start_timeout_s``, to the tick."""
    clock = Clock(monkeypatch)
    crew, worker = starting(RecoveryPolicy(start_timeout_s=LIMIT_S))
    looks = 0
    while not killed_for(crew, worker):
        clock.go(crew.tick_s)
        looks += 1
        assert looks <= 2 * LIMIT_S / crew.tick_s
    assert worker.killed_for == "start"
    assert LIMIT_S <= looks * crew.tick_s <= LIMIT_S + 2 * crew.tick_s


def test_a_start_is_not_timed_while_the_whole_job_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP, a suspended machine: the trainer, too, sees nothing of that time but a gap."""
    clock = Clock(monkeypatch)
    crew, worker = starting(RecoveryPolicy(start_timeout_s=LIMIT_S))
    clock.go(crew.tick_s)
    assert not killed_for(crew, worker)
    clock.go(100 * LIMIT_S)
    assert not killed_for(crew, worker), "killed on waking"
    clock.go(crew.tick_s)
    assert not killed_for(crew, worker)


def test_a_start_is_not_timed_while_the_trainer_does_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation between two batches."""
    clock = Clock(monkeypatch)
    crew, worker = starting(RecoveryPolicy(start_timeout_s=LIMIT_S))
    for _ in range(10):
        clock.go(LIMIT_S)
        crew.begin_wait()
        clock.go(crew.tick_s)
        assert not killed_for(crew, worker)


@pytest.mark.parametrize("limit_s", [0.4, 3.0, LIMIT_S])
def test_looks_are_frequent_against_the_start_limit(limit_s: float) -> None:
    """A gap counts as two looks at most: that must be little of the limit."""
    crew, _ = starting(RecoveryPolicy(start_timeout_s=limit_s))
    assert 2 * crew.tick_s <= limit_s / 4


def test_silence_begins_anew_when_a_worker_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow start does not count towards ``hang_after_s``."""
    clock = Clock(monkeypatch)
    crew, worker = starting(RecoveryPolicy(start_timeout_s=LIMIT_S, hang_after_s=LIMIT_S / 10))
    while worker.silent_s < LIMIT_S / 2:
        clock.go(crew.tick_s)
        assert not killed_for(crew, worker)
    worker.ready = True
    at_work = IDLE._replace(phase="item", started_ns=clock.now_ns)
    worker.beacon = types.SimpleNamespace(read=lambda: at_work)
    for _ in range(2):
        clock.go(crew.tick_s)
        assert not killed_for(crew, worker)
    assert worker.silent_s < LIMIT_S / 10


def test_only_what_was_explained_is_forgotten() -> None:
    """A batch was condemned: the deaths of other samples and batches stay on the books, whichever came last."""
    crew, _ = starting(RecoveryPolicy())
    crew.spend("crash", 3)
    for _ in range(2):
        crew.spend("crash", ("task", 5))
    crew.spend("killed", None)
    crew.forgive(("task", 5), 2)
    assert not crew.safe_in_process, "sample 3 would crash the training process"
    crew.forgive(3, 1)
    assert crew.safe_in_process


def test_the_pool_grows_back_as_soon_as_its_credit_is_full() -> None:
    """Deaths shortly before it would have grown put that off until their credit is back, and no longer."""
    crew = Crew(SimPool(None, None), num_workers=2, policy=RecoveryPolicy(max_restarts=2), timeout_s=0, heals=True)  # type: ignore[arg-type]
    crew.recording = types.SimpleNamespace(epoch=0, emit=lambda event: None, active_workers=2)  # type: ignore[assignment]
    assert crew.start_all(lambda slot: {"run": 0}, 2) is None
    crew.vacate(crew.slots[1])
    crew.retire(crew.slots[1], "a test")
    for _ in range(95):
        crew.delivered()
    for _ in range(2):
        crew.spend("killed", None)
    batches = 95
    while crew.size == 1:
        assert crew.slots[1].state == "retired"
        crew.delivered()
        batches += 1
        assert batches <= 150
    assert batches == 150


@pytest.mark.parametrize(
    ("readings", "causes"),
    [
        ([5, None, 5], ["killed", "killed"]),
        ([5, None, 6], ["killed", "memory"]),
        ([None, 5, 5], ["killed", "killed"]),
        ([None, 5, 6], ["killed", "memory"]),
        ([0, 1, None], ["memory", "killed"]),
    ],
)
def test_a_count_that_could_not_be_read_is_no_change(
    monkeypatch: pytest.MonkeyPatch, readings: list[int | None], causes: list[str]
) -> None:
    """Of the memory killer's kills: what counts is a rise since the count was last known."""
    counts = iter(readings)
    monkeypatch.setattr(crew_module.host, "memory_kills", lambda: next(counts))
    crew, worker = starting(RecoveryPolicy())
    worker.ready = True
    died = types.SimpleNamespace(worker=worker, exitcode=-signal.SIGKILL)
    assert [crew.account(died) for _ in causes] == causes  # type: ignore[arg-type]


def test_the_docstring_tells_of_every_attribute() -> None:
    """In one list: those that other modules read and set, too."""
    crew, _ = starting(RecoveryPolicy())
    text = inspect.getdoc(Crew) or ""
    assert text.count("Attributes:") == 1
    listed = re.findall(r"^    ([a-z_, ]+):", text.split("Attributes:")[1].split("Args:")[0], re.MULTILINE)
    told = {name for names in listed for name in names.split(", ")}
    assert told == {name for name in vars(crew) if not name.startswith("_")} | {"recording"}
