"""What does a failure cost: a killed worker, a bad sample?

Question: how long after SIGKILL does the next batch come, how much throughput is left with bad samples and with a kill
    every second, and what do other loaders do after one kill?
Method: (gap) every task notes in a mapped file who began it and that it is done. The trainer takes what lies ready,
    waits until the next batch is in a worker's hands, and kills that worker at a seeded moment; the time runs from the
    signal to the batch's delivery. A kill counts only if that very batch had to be loaded again (``attempts`` > 1).
    The plain gap is the same wait without the signal, in turn with the kills. Between two kills the pool gets time to
    be whole again. (throughput) Blocks of the five conditions in turn, ratios by round to the fault-free block.
    (others) Each loader in a process of its own, one worker killed, with a deadline.
Trap: a kill that hits a worker whose batch is not next measures nothing, since others lie ready. Restarting costs more
    the larger the trainer is (fork copies its page tables), so its RSS is told, and one row has memory added. A task
    waits and hashes, about half each; its real load time is measured and told. Throughput counts samples, not batches.
Rerun: ``make bench-recovery``; ``python -m benchmarks.recovery --help``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import Dataset

from benchmarks import machine, thresholds
from benchmarks.contenders import OURS, WORKERS, peers, release, silence_peers
from benchmarks.harness import close, describe_error, note, turn_order, wait_until_quiet
from benchmarks.stats import paired_ratio
from benchmarks.tables import publish
from benchmarks.thresholds import Verdict
from robustloader import FaultPolicy, RobustDataLoader, RobustLoaderWarning
from robustloader.testing import WorkerKiller

__all__ = ["is_bad", "judge", "percentile", "printed_exceptions", "render", "tell_fate"]

BEGIN = "<!-- recovery: begin -->"
END = "<!-- recovery: end -->"

BATCH = 16
TASKS = 1 << 21
"""More than any iterator here comes to."""
CLEAN = "fault-free"
KILLS = "a kill every second"
BAD = {"0.1 % bad": 0.001, "1 % bad": 0.01, "5 % bad": 0.05}
PEER_BATCHES = 200
PEER_KILL_AT = 20


# --- the load


@dataclass(frozen=True)
class Load:
    """What loading one sample costs: waiting, as a disk makes one wait, and hashing so many bytes."""

    what: str
    wait_s: float
    hash_bytes: int


REALISTIC = Load("realistic: about 10 ms a task of 16 samples", 0.000_25, 400_000)
STRESS = Load("stress: tiny tasks of 16 samples that cost next to nothing", 0.0, 0)


class Samples(Dataset[torch.Tensor]):
    """Samples that say their index and who loaded them; a share of them raises.

    Args:
        load: what each costs.
        tasks: how many batches there are.
        bad: share (0 to 1) of the samples that raise.
        notes: a file that takes, per task, the process that began it and 1 once it is done; None notes nothing.
    """

    def __init__(self, load: Load, tasks: int = TASKS, *, bad: float = 0.0, notes: Path | None = None) -> None:
        self.load, self.tasks, self.bad, self.notes = load, tasks, bad, notes
        self._payload = b"\1" * load.hash_bytes
        self._table: Any = None

    def __len__(self) -> int:
        return self.tasks * BATCH

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_table": None}

    @property
    def table(self) -> Any:
        """The notes, mapped into this process."""
        if self._table is None:
            assert self.notes is not None
            if not self.notes.exists():
                with self.notes.open("wb") as file:
                    file.truncate(TASKS * 16)  # sparse
            self._table = np.memmap(self.notes, dtype=np.int64, mode="r+", shape=(TASKS, 2))
        return self._table

    def __getitem__(self, index: int) -> torch.Tensor:
        task, position = divmod(index, BATCH)
        if self.notes is not None and position == 0:
            self.table[task, 0] = os.getpid()
        if self.load.wait_s:
            time.sleep(self.load.wait_s)
        if self._payload:
            hashlib.sha256(self._payload).digest()
        if self.bad and is_bad(index, self.bad):
            raise ValueError(f"bad sample {index}")
        if self.notes is not None and position == BATCH - 1:
            self.table[task, 1] = 1
        return torch.tensor((index, os.getpid()))


def is_bad(index: int, share: float) -> bool:
    """Whether a sample is one of the bad: the same ones always, ``share`` of all, in no pattern."""
    digest = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def make(dataset: Samples, method: str = "fork") -> RobustDataLoader[Any]:
    """This project's loader with its defaults, but a budget that five bad samples in a hundred do not exhaust."""
    faults = FaultPolicy(max_fraction=0.2)
    return RobustDataLoader(
        dataset, batch_size=BATCH, num_workers=WORKERS, multiprocessing_context=method, faults=faults
    )


# --- from a kill to the next batch


def measure_gap(
    method: str, kills: int, folder: Path, *, added_mb: int = 0, deadline_s: float = 45.0
) -> dict[str, Any]:
    """Milliseconds from SIGKILL to the next batch, and of the same wait without one.

    Stops early at ``deadline_s``, with the kills so far.
    """
    added = np.ones(added_mb * 1_000_000, dtype=np.uint8)
    dataset = Samples(REALISTIC, notes=folder / f"notes-{method}-{added_mb}")
    iterator: Any = iter(make(dataset, method))
    chance = random.Random(7)
    killed: list[float] = []
    plain: list[float] = []
    loads: list[float] = []
    missed = 0
    number = 0

    def take() -> float:
        nonlocal number
        batch = next(iterator)
        now = time.perf_counter()
        if batch[:, 0].tolist() != list(range(number * BATCH, (number + 1) * BATCH)):
            raise AssertionError(f"batch {number} is not the one that was asked for")
        number += 1
        return now

    def reach() -> int:
        """Take what is ready until the next batch is in hand; the process that has it, at a random moment of it."""
        while True:
            patience = time.monotonic() + 1.0  # a worker that died by itself is noticed by who takes, not by who waits
            while not dataset.table[number, 0] and time.monotonic() < patience:
                time.sleep(0.000_1)
            time.sleep(chance.uniform(0.0, 0.008))
            pid, done = dataset.table[number].tolist()
            if pid == os.getpid():
                raise RuntimeError("the pool is gone: the trainer loads by itself")
            if pid and not done:
                return int(pid)
            take()

    def settle() -> None:
        """Let the restart credit come back, and every worker deliver again."""
        least, recent = number + 40, []
        while number < least or len(set(recent[-8:])) < WORKERS:
            take()
            recent.append(iterator.batch_info.worker_id)
            loads.append(iterator.batch_info.load_s * 1e3)

    rss = 0
    begun = time.monotonic()
    try:
        while len(killed) < kills and time.monotonic() - begun < deadline_s:
            settle()
            reach()
            start = time.perf_counter()
            plain.append((take() - start) * 1e3)
            settle()
            rss = max(rss, psutil.Process().memory_info().rss)
            victim = reach()
            start = time.perf_counter()
            os.kill(victim, signal.SIGKILL)
            took = (take() - start) * 1e3
            if iterator.batch_info.attempts > 1:
                killed.append(took)
            else:
                missed += 1  # it had sent its batch already
    finally:
        close(iterator)
    del added
    if not killed:
        raise RuntimeError(f"{method}: of {missed} kills none hit a worker before it had sent the next batch")
    return {
        "method": method,
        "added_mb": added_mb,
        "kills": len(killed),
        "not_counted": missed,
        "p50_ms": percentile(killed, 0.50),
        "p95_ms": percentile(killed, 0.95),
        "max_ms": max(killed, default=math.nan),
        "plain_p50_ms": percentile(plain, 0.50),
        "plain_p95_ms": percentile(plain, 0.95),
        "load_ms": statistics.median(loads),
        "trainer_rss_mb": rss / 1e6,
        "all_ms": [round(value, 3) for value in killed],
        "all_plain_ms": [round(value, 3) for value in plain],
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of all do not exceed; not a number where there is none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]


# --- throughput


def measure_throughput(load: Load, rounds: int, block_s: float) -> dict[str, Any]:
    """Samples a second under each condition, by round, and the ratio to the fault-free block of the same round."""
    speeds: dict[str, list[float]] = {name: [] for name in (CLEAN, *BAD, KILLS)}
    strikes = 0
    with contextlib.ExitStack() as stack:
        iterators: dict[str, Any] = {}
        for name in speeds:
            iterators[name] = iter(make(Samples(load, bad=BAD.get(name, 0.0))))
            stack.callback(close, iterators[name])
            next(iterators[name])
        killer = WorkerKiller(iterators[KILLS], seed=7)
        for number in range(rounds):
            for name in turn_order(list(speeds), number):
                wait_until_quiet()
                speeds[name].append(block(iterators[name], block_s, killer if name == KILLS else None))
        strikes = killer.kills
    return {
        "what": load.what,
        "block_s": block_s,
        "kills": strikes,
        "samples_per_s": {name: [round(value, 1) for value in values] for name, values in speeds.items()},
        "median": {name: statistics.median(values) for name, values in speeds.items()},
        "ratios": {name: paired_ratio(speeds[name], speeds[CLEAN])._asdict() for name in speeds if name != CLEAN},
    }


def block(iterator: Any, seconds: float, killer: WorkerKiller | None = None) -> float:
    """Samples a second while taking batches for so long; with a killer, it strikes in the middle of each second."""
    for _ in range(2 * WORKERS + 2):  # what was ready before
        next(iterator)
    begun = now = time.perf_counter()
    due = begun + 0.5
    count = 0
    while now < begun + seconds:
        count += len(next(iterator))
        now = time.perf_counter()
        if killer is not None and now >= due:
            killer.strike()
            due += 1.0
    return count / (now - begun)


# --- the others


def measure_peer(name: str, deadline_s: float) -> dict[str, Any]:
    """What a loader does after one SIGKILL: it runs in a process of its own, which is ended after so long."""
    command = [sys.executable, "-m", "benchmarks.recovery", "--peer", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as child:
        status: int | None
        try:
            out, err = child.communicate(timeout=deadline_s)
            status = child.returncode
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # its own group: the loader's workers as well
            out, err = child.communicate()
            status = None
    lines = [json.loads(line) for line in out.decode().splitlines() if line.startswith("{")]
    indices = [index for line in lines for index in line.get("indices", ())]
    error = next((line["error"] for line in lines if "error" in line), None)
    struck = any("killed" in line for line in lines)
    return tell_fate(
        indices,
        PEER_BATCHES * BATCH,
        error=error,
        status=status,
        struck=struck,
        deadline_s=deadline_s,
        printed=printed_exceptions(err.decode(errors="replace")),
    )


def printed_exceptions(text: str) -> list[str]:
    """The names of the exceptions whose tracebacks are in a text, each once."""
    names: dict[str, None] = {}
    inside = False
    for line in text.splitlines():
        if line.startswith("Traceback (most recent call last):"):
            inside = True
        elif inside and line and not line[0].isspace():
            names[line.partition(":")[0].rpartition(".")[2]] = None
            inside = False
    return list(names)


def tell_fate(
    indices: Sequence[int],
    wanted: int,
    *,
    error: str | None,
    status: int | None,
    struck: bool,
    deadline_s: float,
    printed: Sequence[str] = (),
) -> dict[str, Any]:
    """What became of an epoch of ``wanted`` samples, in numbers and in words.

    Args:
        indices: the samples that were delivered.
        wanted: how many were asked for.
        error: what the loop raised.
        status: of the process; None is past the deadline.
        struck: whether a worker was killed.
        deadline_s: that deadline, in seconds.
        printed: exceptions that were only printed.
    """
    missing, doubled = wanted - len(set(indices)), len(indices) - len(set(indices))
    if not struck:
        fate = f"no worker was killed: {error or f'status {status}'}"
    elif error is not None:
        fate = f"stops: {error}"
    elif status is None:
        fate = f"hangs: not at its end after {deadline_s:g} s"
    elif status:
        fate = f"its process ends with status {status}"
    elif missing or doubled:
        wrong = " and ".join(what for count, what in ((missing, "lost"), (doubled, "doubled")) if count)
        fate = f"the loop ends without an exception, samples are {wrong}"
        if printed:
            fate += f" ({', '.join(printed)} on stderr)"
    else:
        fate = "goes on; every sample arrives once"
    return {"fate": fate, "delivered": len(indices), "missing": missing, "doubled": doubled}


def run_peer(name: str) -> None:
    """What runs in the process of its own: an epoch that tells of each batch, and a kill in it."""
    silence_peers()
    contender = next(peer for peer in peers("auto") if peer.name == name)
    dataset = Samples(REALISTIC, tasks=PEER_BATCHES)
    loader = contender.make(dataset, batch_size=BATCH, num_workers=WORKERS, multiprocessing_context="fork")
    try:
        for number, batch in enumerate(loader, 1):
            print(json.dumps({"indices": batch[:, 0].tolist()}), flush=True)
            if number == PEER_KILL_AT:
                pid = int(batch[0, 1])
                if pid == os.getpid():
                    raise AssertionError("the batch was not loaded by a worker")
                os.kill(pid, signal.SIGKILL)
                print(json.dumps({"killed": pid}), flush=True)
    except Exception as error:  # the peer's, whatever it raises
        print(json.dumps({"error": describe_error(error)}), flush=True)
    release(loader)


# --- the result


def judge(result: Mapping[str, Any]) -> Iterator[Verdict]:
    """What must be shown, what is shown, and whether that suffices."""
    measurements: dict[str, Any] = {}
    for row in result["gaps"]:
        added = f", {row['added_mb']} MB added" if row["added_mb"] else ""
        measurements[f"kill to next batch, {row['method']}{added}"] = row
    realistic = result["throughput"].get("realistic", {"ratios": {}})
    for name, ratio in realistic["ratios"].items():
        measurements[name] = {"ratios": {CLEAN: ratio}}
    return thresholds.judge(measurements, thresholds.RECOVERY)


def render(result: Mapping[str, Any]) -> str:
    """A result as Markdown."""
    return "\n".join(_lines(result)) + "\n"


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    where, commit = result["machine"], result["commit"]
    yield (
        f"{where['cpu']}, {where['usable_cores']} cores, Linux {where['kernel']}, torch {result['versions']['torch']}; "
        f"{WORKERS} workers; commit `{(commit['hash'] or 'unknown')[:10]}`"
        f"{' with changes' if commit['dirty'] else ''}, {result['started'][:10]}"
        f"{', short form' if result['short'] else ''}."
    )
    yield ""
    yield "From SIGKILL of the worker that has the next batch in hand to that batch, nothing lying ready:"
    yield ""
    yield "| start method | kills | p50, ms | p95, ms | p50 without, ms | task's load time, ms | trainer RSS, MB |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for row in result["gaps"]:
        figures = [f"{row[key]:.1f}" for key in ("p50_ms", "p95_ms", "plain_p50_ms", "load_ms")]
        yield f"| {row['method']} | {row['kills']} | {' | '.join(figures)} | {row['trainer_rss_mb']:.0f} |"
    for made in result["throughput"].values():
        yield ""
        yield f"Throughput, {made['what']}:"
        yield ""
        yield "| condition | samples a second | of fault-free (95 % interval) |"
        yield "|---|--:|--:|"
        for name, speed in made["median"].items():
            ratio = made["ratios"].get(name)
            told = f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})" if ratio else "1"
            yield f"| {name} | {speed:,.0f} | {told} |"
    if result["peers"]:
        yield ""
        yield f"One worker killed after {PEER_KILL_AT} of {PEER_BATCHES} batches of {BATCH} samples:"
        yield ""
        yield "| loader | what it does | delivered | missing | doubled |"
        yield "|---|---|--:|--:|--:|"
        for name, row in result["peers"].items():
            fate = row["fate"].replace("|", "\\|")
            yield f"| {name} | {fate} | {row['delivered']} | {row['missing']} | {row['doubled']} |"
    yield ""
    yield "| must show | wanted | shown | |"
    yield "|---|---|---|---|"
    for verdict in judge(result):
        passed = "yes" if verdict.passed else "**no**"
        yield f"| {verdict.measurement} | {verdict.wanted} | {verdict.shown} | {passed} |"


def run(*, short: bool) -> dict[str, Any]:
    """Measure everything; the result as plain JSON."""
    logging.basicConfig(filename=os.devnull)  # what is logged of each fault is made and written, and not seen
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "schema": 1,
        "short": short,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine.describe(),
        "gaps": [],
        "throughput": {},
        "peers": {},
    }
    plan = [("fork", 5, 0), ("spawn", 2, 0)] if short else [("fork", 80, 0), ("fork", 20, 1000), *LATE]
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        for method, kills, added_mb in plan:
            note(f"{method}, {kills} kills, {added_mb} MB added")
            result["gaps"].append(measure_gap(method, kills, Path(folder), added_mb=added_mb))
    for name, load in (("realistic", REALISTIC), ("stress", STRESS)):
        note(f"throughput, {load.what}")
        rounds, block_s = (2, 1.0) if short else (6 if load is REALISTIC else 4, 2.0)
        result["throughput"][name] = measure_throughput(load, rounds, block_s)
    for peer in (OURS, "torch", "torchdata", "spdl"):
        note(f"one kill, {peer}")
        result["peers"][peer] = measure_peer(peer, 20.0 if short else 15.0)
    return result


LATE = (("forkserver", 6, 0), ("spawn", 6, 0))
"""Start methods whose workers take seconds to start: few kills, each waits for a whole pool."""


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the result and the page, print the tables; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recovery", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--short", action="store_true", help="a few kills and short blocks, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recovery.json"), help="the result file")
    parser.add_argument("--page", type=Path, help="a page to put the tables into, between its markers")
    parser.add_argument("--strict", action="store_true", help="exit status 1 where something falls short")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peer:
        run_peer(options.peer)
        return 0
    begun = time.monotonic()
    with warnings.catch_warnings():
        silence_peers()
        warnings.simplefilter("ignore", RobustLoaderWarning)  # the bad samples are there on purpose
        result = run(short=options.short)
    result["took_s"] = round(time.monotonic() - begun, 1)
    result["verdicts"] = [verdict.to_dict() for verdict in judge(result)]
    publish(result, render, options.out, options.page, BEGIN, END)
    return 1 if options.strict and not all(verdict.passed for verdict in judge(result)) else 0


if __name__ == "__main__":
    sys.exit(main())
