"""Who is to blame for a dead worker: nobody, a task, or one sample; and when that is proved.

A death while one sample was in hand makes that sample *suspect*. After ``poison_after`` such deaths it is tried alone
in a fresh worker, and only a death in the trial convicts it: a machine that kills workers at random will now and then
hit the same sample twice, but hardly ever the short moment in which that sample is alone in a worker. Where the death
looks like a kill from outside (SIGKILL with no sign of the kernel's memory killer), one trial is not proof enough
either, so several must end so in a row.

A death in ``__getitems__``, collate or encode names no sample: the task is loaded again *carefully*, sample by sample,
with each sample collated and encoded alone first, so that the next death does name one.

Some samples kill only in company: each survives its trial, and their batch goes on crashing. Once a batch has had a
suspect of crashes cleared, the next one is not tried but left out of that batch, one after the other.

A stream cannot be jumped, so none of its samples is tried alone. A share is given up when its processes die again and
again and no batch arrives; kills from outside count only while they hit the very same sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from robustloader.decisions.keys import Key

__all__ = ["OUTSIDE_TRIALS", "Blame", "Cause", "Judgement", "Point", "ShardBlame"]

Cause = Literal["memory", "shared memory", "crash", "exit", "killed", "start", "hang", "unknown"]

# With 200 ms samples and a kill a second over two workers, a trial is hit about one time in ten; four in a row are then
# one in ten thousand suspects, and a suspect itself is rare.
OUTSIDE_TRIALS = 4

OUTSIDE: frozenset[Cause] = frozenset(("killed", "unknown", "memory"))
"""What somebody else may have brought about, an operator, a scheduler, another program's hunger for memory."""

Point = tuple[object, ...]
"""Names the moment of loading a batch at which a process died: a sample, or collating, or encoding."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What follows from a death.

    Attributes:
        action: "replay" (nobody is to blame), "careful" (replay the task sample by sample), "trial" (try the sample
            alone), "convict" (the sample is poison), "exclude" (the task does without it: it kills in its company) or
            "condemn" (the task kills, though no sample of it does alone).
        refund: deaths to give back to the restart budget.
        deaths: deaths counted so far against the sample or task.
    """

    action: Literal["replay", "careful", "trial", "convict", "exclude", "condemn"]
    refund: int = 0
    deaths: int = 0


@dataclass(slots=True)
class _Suspect:
    deaths: int = 0
    crashes: int = 0  # of those, the ones that nobody outside can have brought about
    trial_deaths: int = 0
    memory_deaths: int = 0


@dataclass(slots=True)
class Blame:
    """The open cases of one epoch."""

    poison_after: int
    _samples: dict[Key, _Suspect] = field(default_factory=dict)
    _tasks: dict[int, int] = field(default_factory=dict)
    _cleared: set[int] = field(default_factory=set)

    def sample_died(self, key: Key, cause: Cause, *, on_trial: bool, task: int = -1) -> Judgement:
        """A worker died of ``cause`` with one sample in hand, of that task (-1: not one that a task can do without)."""
        suspect = self._samples.setdefault(key, _Suspect())
        if cause == "memory" and not suspect.memory_deaths:
            # The kernel takes whoever is largest, not whoever asked for the last page.
            suspect.memory_deaths += 1
            return Judgement("trial" if on_trial else "replay", deaths=suspect.deaths)
        suspect.deaths += 1
        suspect.crashes += cause not in OUTSIDE
        if on_trial:
            suspect.trial_deaths += 1
            if suspect.trial_deaths >= (OUTSIDE_TRIALS if cause in ("killed", "unknown") else 1):
                del self._samples[key]
                return Judgement("convict", refund=suspect.deaths, deaths=suspect.deaths)
        if not on_trial and task in self._cleared and suspect.crashes >= self.poison_after:
            del self._samples[key]
            return Judgement("exclude", refund=suspect.deaths, deaths=suspect.deaths)
        if suspect.deaths >= self.poison_after:
            return Judgement("trial", deaths=suspect.deaths)
        return Judgement("replay", deaths=suspect.deaths)

    def task_died(self, task: int, cause: Cause, *, careful: bool) -> Judgement:
        """A worker died of ``cause`` while it worked on a whole task, so that no single sample is known."""
        deaths = self._tasks[task] = self._tasks.get(task, 0) + 1
        limit = self.poison_after + 1
        if cause in OUTSIDE:
            limit += OUTSIDE_TRIALS
        if careful and deaths >= limit:
            del self._tasks[task]
            return Judgement("condemn", refund=deaths, deaths=deaths)
        return Judgement("careful", deaths=deaths)

    def trial_passed(self, key: Key, task: int) -> None:
        """The sample of that task survived its trial: what was counted against it is forgotten."""
        suspect = self._samples.get(key)
        if suspect is not None and suspect.crashes >= self.poison_after:
            self._cleared.add(task)
        self.acquit(key)

    def acquit(self, key: Key) -> None:
        """What was counted against the sample is forgotten."""
        self._samples.pop(key, None)

    def arrived(self, task: int, keys: Iterable[Key] = ()) -> None:
        """The task came back with these samples in it, so none of them kills for certain."""
        self._tasks.pop(task, None)
        self._cleared.discard(task)
        if self._samples:
            for key in keys:
                self.acquit(key)

    @property
    def open(self) -> bool:
        """Whether anything is suspected."""
        return bool(self._samples or self._tasks)

    def suspects(self, task: int, keys: Iterable[Key]) -> bool:
        """Whether a worker has died on this task or on one of these samples, and nothing has cleared them since."""
        return task in self._tasks or (bool(self._samples) and any(key in self._samples for key in keys))

    def deaths_on(self, task: int) -> int:
        """Deaths counted against a task as a whole."""
        return self._tasks.get(task, 0)

    def deaths_of(self, key: Key) -> int:
        """Deaths counted against a sample that has been neither convicted nor acquitted."""
        suspect = self._samples.get(key)
        return suspect.deaths + suspect.memory_deaths if suspect else 0


@dataclass(slots=True)
class ShardBlame:
    """The open case of one share of a stream: whether the place that its processes come to kills them.

    Attributes:
        deaths: how many have died by themselves since the last batch arrived.
        kills: how many were killed, perhaps from outside, at ``point``, one after the other.
        point: where the last of those was.
    """

    deaths: int = 0
    kills: int = 0
    point: Point | None = None

    def died(self, point: Point, cause: Cause, *, poison_after: int) -> int:
        """A process died of ``cause`` at ``point``: how many died so, where that is proof, or 0."""
        if cause not in OUTSIDE:
            self.deaths += 1
            return self.deaths if self.deaths > poison_after else 0
        if point != self.point:
            self.point, self.kills = point, 0
        self.kills += 1
        return self.kills if self.kills >= poison_after + OUTSIDE_TRIALS else 0
