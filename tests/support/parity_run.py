"""Runs the same program with torch's loader and with ours, and writes down everything a trainer could notice."""

from __future__ import annotations

import dataclasses
import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from robustloader import RobustDataLoader
from tests.support.parity_data import random_state

STRICT: dict[str, Any] = {"faults": "raise", "recovery": None, "memory": None, "telemetry": None}
DEFAULTS: dict[str, Any] = {}
MODES: dict[str, dict[str, Any]] = {"strict": STRICT, "defaults": DEFAULTS}

Note = tuple[Any, ...]


def fingerprint(value: Any) -> Any:
    """Everything about a value that a trainer could notice: types of containers, dtypes, strides, values."""
    kind = type(value).__qualname__
    if isinstance(value, torch.Tensor):
        plain = value.detach()
        facts = (kind, str(value.dtype), tuple(value.shape), value.stride(), value.requires_grad, value.is_pinned())
        return (*facts, str(value.layout), value.device.type, repr(plain.resolve_conj().tolist()))
    if isinstance(value, np.ndarray):
        strides = value.strides if value.size else None  # an empty array's mean nothing
        return (kind, str(value.dtype), value.shape, strides, value.flags.writeable, repr(value.tolist()))
    if isinstance(value, Mapping):
        return (kind, tuple((key, fingerprint(part)) for key, part in value.items()))
    if isinstance(value, (list, tuple)):
        return (kind, tuple(fingerprint(part) for part in value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return (kind, tuple((f.name, fingerprint(getattr(value, f.name))) for f in dataclasses.fields(value)))
    return (kind, repr(value))


@dataclass
class Transcript:
    """What happened, in order; and where the random streams were left."""

    notes: list[Note] = field(default_factory=list)
    warned: list[tuple[str, str]] = field(default_factory=list)
    random_state: str = ""
    generator_state: Any = None
    sampler_log: list[Any] | None = None

    def batches(self) -> list[Any]:
        """The batches alone."""
        return [note[1] for note in self.notes if note[0] == "batch"]

    def as_terse_as(self, other: Transcript) -> Transcript:
        """The same, with the texts of errors left out where the other has none: older torch has bare assertions."""
        notes = [
            (*mine[:2], *("" for _ in mine[2:])) if mine[:2] == theirs[:2] and not any(theirs[2:]) else mine
            for mine, theirs in zip(self.notes, other.notes, strict=False)
        ]
        return dataclasses.replace(self, notes=[*notes, *self.notes[len(notes) :]])

    def unordered(self) -> Transcript:
        """The same, with each epoch's batches in an order of their own."""
        parts: list[list[Note]] = [[]]
        for note in self.notes:
            if note[0] == "batch":
                parts[-1].append(note)
            else:
                parts[-1].sort(key=repr)
                parts.append([note])
                parts.append([])
        parts[-1].sort(key=repr)
        return dataclasses.replace(self, notes=[note for part in parts for note in part])


@dataclass
class Program:
    """What to do with a loader.

    Attributes:
        arguments: makes the constructor's keyword arguments, afresh for each loader.
        epochs: for each epoch, after how many batches to break off; None goes to the end.
        ask_length: whether to call ``len(loader)`` first.
        seed: for the three global random streams.
    """

    arguments: Callable[[], dict[str, Any]]
    epochs: tuple[int | None, ...] = (None,)
    ask_length: bool = True
    seed: int = 1234
    errors_allowed: int = 20

    def run(self, kind: type[DataLoader[Any]], **ours: Any) -> Transcript:
        """Do it with one kind of loader."""
        transcript = Transcript()
        arguments = self.arguments()
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self._use(kind, arguments, ours, transcript.notes)
        transcript.random_state = random_state()
        generator = arguments.get("generator")
        transcript.generator_state = generator.get_state().tolist() if isinstance(generator, torch.Generator) else None
        sampler = arguments.get("sampler") or arguments.get("batch_sampler")
        transcript.sampler_log = getattr(sampler, "log", None)
        transcript.warned = [
            (warning.category.__name__, str(warning.message))
            for warning in caught
            if "multi-threaded, use of" not in str(warning.message)
        ]
        return transcript

    def _use(self, kind: type[DataLoader[Any]], arguments: Any, ours: Any, notes: list[Note]) -> None:
        try:
            loader = kind(**arguments, **ours)
        except Exception as error:
            notes.append(("constructor", type(error).__name__, str(error)))
            return
        if self.ask_length:
            try:
                notes.append(("len", len(loader)))
            except TypeError as error:
                notes.append(("len", str(error)))
        for stop in self.epochs:
            self._epoch(loader, stop, notes)

    def _epoch(self, loader: DataLoader[Any], stop: int | None, notes: list[Note]) -> None:
        try:
            iterator = iter(loader)
        except Exception as error:
            notes.append(("iter", *describe(error)))
            return
        notes.append(("begun",))
        given = failures = 0
        while stop is None or given < stop:
            try:
                batch = next(iterator)
            except StopIteration:
                notes.append(("over", random_state()))
                again = [ended(iterator) for _ in range(2)]
                assert all(again), "next() after the end raises StopIteration again"
                return
            except Exception as error:
                notes.append(("error", *describe(error)))
                failures += 1
                if failures >= self.errors_allowed:
                    return
                continue
            given += 1
            notes.append(("batch", fingerprint(batch)))
        notes.append(("broken off", random_state()))


def ended(iterator: Any) -> bool:
    """Whether ``next`` says so."""
    try:
        next(iterator)
    except StopIteration:
        return True
    return False


def describe(error: BaseException) -> tuple[str, str, str]:
    """Type, first line and last line of an exception: the traceback between them names the loader's own files."""
    lines = str(error).strip().splitlines() or [""]
    return (type(error).__name__, lines[0], lines[-1])


def assert_same(program: Program, mode: str = "strict", *, ordered: bool = True) -> Transcript:
    """Run the program with both loaders; what they did must be equal. Returns torch's transcript."""
    expected = program.run(DataLoader)
    found = program.run(RobustDataLoader, **MODES[mode])
    if not ordered:
        expected, found = expected.unordered(), found.unordered()
    assert found.notes == expected.notes
    assert found.sampler_log == expected.sampler_log
    assert found.warned == expected.warned
    assert found.generator_state == expected.generator_state
    assert found.random_state == expected.random_state
    return expected
