"""Contenders side by side: blocks of batches in turn, in one process tree.

All iterators of a workload live at the same time. In each round every one delivers a block: first some batches that
are not counted (what was prefetched while the others ran, and the way back to a steady state), then the counted ones,
as fast as they come. After a block the harness waits until the loader's workers have filled their lookahead and sleep.
The order changes from round to round. A ratio compares two blocks of the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.contenders import WORKERS, Contender, release
from benchmarks.stats import paired_ratio, spread
from benchmarks.workloads import Workload

__all__ = ["LIMIT", "Form", "compare", "compare_anew", "measurement", "start_up"]

LIMIT = "limit"
"""The name of the same fetch and collate with no crossing at all, divided by the cores that the workers can use."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How much is measured.

    Attributes:
        rounds: how often each contender has its turn.
        block_s: how long a block should take; how many batches that is, is found out once per contender.
        budget_s: how long the rounds of one workload should take together; slow ones get fewer.
        min_rounds: but no fewer than these.
        min_batches: no block counts fewer.
        max_batches: nor more.
        fine_starts: how often two settings of one loader, which differ by little, are started anew.
        fine_rounds: rounds of each such start.
    """

    rounds: int
    block_s: float
    budget_s: float
    min_rounds: int = 3
    min_batches: int = 8
    max_batches: int = 4000
    fine_starts: int
    fine_rounds: int


# --- one contender


@dataclass
class _Entrant:
    """A contender with an iterator under way."""

    name: str
    pull: Callable[[int], float]
    lookahead: int = 0
    batches: int = 0
    block_s: float = 0.0
    taken: list[float] = field(default_factory=list)
    cannot: str | None = None


def _puller(iterator: Iterator[Any]) -> Callable[[int], float]:
    def pull(count: int) -> float:
        """Take so many batches and let go of each; seconds."""
        begun = time.perf_counter()
        for _ in range(count):
            next(iterator)
        return time.perf_counter() - begun

    return pull


def in_process(workload: Workload, batches: int, folder: Path) -> Iterator[Any]:
    """The same batches, fetched and collated right here."""
    dataset, size = workload.make(batches, folder), workload.batch_size
    for start in range(0, batches * size, size):
        yield workload.collate_fn([dataset[index] for index in range(start, start + size)])


def usable_cores() -> int:
    """How many cores the workers can use at once."""
    return min(WORKERS, len(os.sched_getaffinity(0)))


# --- the comparison


def compare(
    workload: Workload, contenders: Sequence[Contender], form: Form, folder: Path, *, rounds: int, limit: bool = True
) -> dict[str, list[float] | str]:
    """Milliseconds per batch, round by round, by contender; a text where one cannot do the work."""
    results: dict[str, list[float] | str] = {}
    able = []
    for contender in contenders:
        reason = verify(workload, contender, folder)
        if reason is None:
            able.append(contender)
        else:
            results[contender.name] = reason
    endless = 1 << 30
    with contextlib.ExitStack() as stack:
        entrants = []
        for contender in able:
            loader = contender.loader(workload, endless // workload.batch_size, folder)
            stack.callback(release, loader)
            iterator = iter(loader)
            stack.callback(close, iterator)
            entrants.append(_Entrant(contender.name, _puller(iterator), contender.lookahead))
            del iterator, loader
        if limit:
            entrants.append(_Entrant(LIMIT, _puller(in_process(workload, endless // workload.batch_size, folder))))
        for entrant in entrants:
            _attempt(entrant, partial(_calibrate, entrant, workload, form))
        round_s = sum(entrant.block_s for entrant in entrants)
        for number in range(affordable(rounds, round_s, form)):
            for entrant in turn_order([entrant for entrant in entrants if entrant.cannot is None], number):
                gc.collect()
                wait_until_quiet()
                _attempt(entrant, partial(_run_block, entrant))
    for entrant in entrants:
        divisor = usable_cores() if entrant.name == LIMIT else 1
        results[entrant.name] = entrant.cannot or [taken * 1e3 / divisor for taken in entrant.taken]
    return results


def compare_anew(
    workload: Workload, contenders: Sequence[Contender], form: Form, folder: Path
) -> dict[str, list[float] | str]:
    """The same for settings that differ by little, without the limit: the medians of start after start.

    Equal loaders that live through all rounds differ by several per cent from each other, by where in memory their
    batches happen to lie. Each start draws that anew, and who comes first changes with it.
    """
    results: dict[str, list[float] | str] = {contender.name: [] for contender in contenders}
    for number in range(form.fine_starts):
        made = compare(workload, turn_order(contenders, number), form, folder, rounds=form.fine_rounds, limit=False)
        for name, taken in made.items():
            so_far = results[name]
            if isinstance(taken, str):
                results[name] = taken
            elif not isinstance(so_far, str):
                so_far.append(statistics.median(taken))
    return results


def affordable(rounds: int, round_s: float, form: Form) -> int:
    """How many rounds there is time for: at most those wanted, at least the form's smallest number."""
    return min(rounds, max(form.min_rounds, int(form.budget_s / round_s))) if round_s else rounds


def turn_order(entrants: Sequence[Any], number: int) -> list[Any]:
    """Who comes after whom in a round: rotated, and backwards every other time, so that nobody always follows the
    same one."""
    start = (number // 2) % len(entrants) if entrants else 0
    order = [*entrants[start:], *entrants[:start]]
    return order[::-1] if number % 2 else order


def _attempt(entrant: _Entrant, action: Callable[[], None]) -> None:
    try:
        action()
    except Exception as error:  # the peer's, whatever it raises when it cannot do the work
        entrant.cannot = describe_error(error)


def describe_error(error: BaseException) -> str:
    """One line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]


def _calibrate(entrant: _Entrant, workload: Workload, form: Form) -> None:
    count = entrant.lookahead + 2
    took = entrant.pull(count)
    if took < form.budget_s / 8:  # else it is slow, and this has told enough
        count = 4
        took = entrant.pull(count)
    while took < min(0.05, form.block_s) and count < form.max_batches:
        count *= 2
        took = entrant.pull(count)
    entrant.batches = block_size(took / count, form, workload.granule)
    entrant.block_s = (entrant.batches + entrant.lookahead + 2) * took / count


def block_size(batch_s: float, form: Form, granule: int) -> int:
    """How many batches a block counts."""
    wanted = min(max(form.block_s / batch_s, form.min_batches), form.max_batches)
    return math.ceil(wanted / granule) * granule


def _run_block(entrant: _Entrant) -> None:
    if entrant.lookahead:
        entrant.pull(entrant.lookahead + 2)
    entrant.taken.append(entrant.pull(entrant.batches) / entrant.batches)


def close(iterator: Any) -> None:
    """End an iterator's workers now, not when it is collected."""
    for name in ("_shutdown_workers", "close"):
        method = getattr(iterator, name, None)
        if method is not None:
            method()
            return


# --- start-up


def start_up(
    workload: Workload, contenders: Sequence[Contender], folder: Path, *, rounds: int, batches: int = 10
) -> tuple[dict[str, list[float] | str], dict[str, list[float] | str]]:
    """Milliseconds from ``iter()`` to the first batch, and for a whole epoch of a few batches, workers ended."""
    firsts: dict[str, list[float] | str] = {}
    epochs: dict[str, list[float] | str] = {}
    able = []
    for contender in contenders:
        reason = verify(workload, contender, folder)
        if reason is None:
            able.append(contender)
            firsts[contender.name], epochs[contender.name] = [], []
        else:
            firsts[contender.name] = epochs[contender.name] = reason
    for number in range(-1, rounds):  # the first round is the warm-up
        for contender in turn_order(able, number + 1):
            loader = contender.loader(workload, batches, folder)
            gc.collect()
            wait_until_quiet()
            begun = time.perf_counter()
            iterator = iter(loader)
            next(iterator)
            first = time.perf_counter()
            for _ in iterator:
                pass
            del iterator
            ended = time.perf_counter()
            release(loader)
            if number >= 0:
                firsts[contender.name].append((first - begun) * 1e3)  # type: ignore[union-attr]
                epochs[contender.name].append((ended - begun) * 1e3)  # type: ignore[union-attr]
    return firsts, epochs


# --- fairness


def verify(workload: Workload, contender: Contender, folder: Path) -> str | None:
    """None where a contender yields exactly the wanted batches, else why it does not."""
    try:
        loader = contender.loader(workload, workload.check_batches, folder)
        wanted = in_process(workload, workload.check_batches, folder)
        count = 0
        for batch in loader:
            expected = next(wanted, None)
            if expected is None or not equal(batch, expected):
                return f"batch {count} is not the one that was asked for"
            count += 1
        release(loader)
    except Exception as error:  # the peer's, whatever it raises when it cannot do the work
        return describe_error(error)
    return None if count == workload.check_batches else f"{count} batches instead of {workload.check_batches}"


def equal(one: Any, other: Any) -> bool:
    """Whether two batches have the same structure, types and values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def wait_until_quiet(window_s: float = 0.01, patience_s: float = 0.5) -> None:
    """Wait until the workers of all loaders have loaded ahead and sleep: what they still do is not the next one's."""
    deadline = time.monotonic() + patience_s
    before = _children_ns()
    while time.monotonic() < deadline:
        time.sleep(window_s)
        now = _children_ns()
        if now - before < window_s * 1e9 * 0.02:
            return
        before = now


def _children_ns() -> int:
    """Processor time of all children's threads, from ``/proc/PID/task/TID/schedstat``, which counts nanoseconds."""
    total = 0
    for child in psutil.Process().children(recursive=True):
        for path in Path(f"/proc/{child.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError, ValueError):
                total += int(path.read_text().split()[0])
    return total


# --- what goes into the result


def measurement(
    what: str,
    unit: str,
    results: dict[str, list[float] | str],
    subject: str,
    *,
    per_second: bool = True,
    limited: bool = True,
) -> dict[str, Any]:
    """The results of one comparison as plain JSON. A ratio is the other's figure over the subject's: above 1, the
    subject needs less. The distance to the limit is left out where the limit does not bound the work."""
    loaders: dict[str, Any] = {}
    for name, values in results.items():
        if isinstance(values, str):
            loaders[name] = {"cannot": values}
            continue
        median, low, high = spread(values)
        loaders[name] = {"median": median, "low": low, "high": high, "rounds": [round(value, 6) for value in values]}
        if per_second:
            loaders[name]["batches_per_s"] = 1e3 / median
    own = results.get(subject)
    ratios = {}
    if isinstance(own, list) and own:
        for name, values in results.items():
            if name != subject and isinstance(values, list) and len(values) == len(own):
                ratios[name] = paired_ratio(values, own)._asdict()
    limit = ratios.pop(LIMIT, None)
    return {
        "what": what,
        "unit": unit,
        "subject": subject,
        "loaders": loaders,
        "ratios": ratios,
        "of_limit": limit["median"] if limit is not None and limited else None,
    }


def chosen(parser: argparse.ArgumentParser, only: str | None, names: Iterable[str]) -> tuple[str, ...]:
    """What ``--only`` names, with commas between, or all of ``names``; ends the program where one is unknown."""
    known = tuple(names)
    wanted = tuple(only.split(",")) if only else known
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
    return wanted


def note(text: str) -> None:
    """Tell whoever watches how far the run is."""
    print(text, file=sys.stderr, flush=True)
