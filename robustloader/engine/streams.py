"""Random generators as a state sees them: the three global ones, and those that belong to a loader and its samplers."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from robustloader.decisions.keys import probe
from robustloader.errors import StateError
from robustloader.worker.sameness import same_values
from robustloader.worker.seeding import restore_rng, rng_states
from robustloader.worker.stateful import is_stateful

__all__ = [
    "Continuation",
    "Standing",
    "Streams",
    "all_samplers",
    "decode_generator",
    "decode_streams",
    "encode_generator",
    "encode_streams",
    "own_generators",
]

Streams = tuple[Any, Any, torch.Tensor]
"""States of the global Python, NumPy and torch CPU generators."""

_NESTED = 3
"""How many batch samplers around one another are looked into."""


def encode_streams(streams: Streams) -> tuple[str, ...]:
    """The states as text: about 14 kB. NumPy's is left out where the user has replaced its Mersenne twister."""
    version, words, gauss = streams[0]
    python = f"{version}:{_text(np.array(words, '<u4'))}:{'' if gauss is None else gauss.hex()}"
    numpy = ""
    if isinstance(streams[1], tuple) and streams[1][0] == "MT19937":
        _, keys, position, has_gauss, cached = streams[1]
        numpy = f"{_text(np.asarray(keys, '<u4'))}:{position}:{has_gauss}:{float(cached).hex()}"
    return python, numpy, encode_generator(streams[2])


def decode_streams(texts: tuple[str, ...]) -> Streams:
    """The states again. Raises :class:`StateError` for anything that :func:`encode_streams` did not write."""
    try:
        version, words, gauss = texts[0].split(":")
        values = np.frombuffer(base64.b64decode(words), "<u4").tolist()
        python = (int(version), tuple(values), float.fromhex(gauss) if gauss else None)
        numpy: Any = np.random.get_state()
        if texts[1]:
            keys, position, has_gauss, cached = texts[1].split(":")
            array = np.frombuffer(base64.b64decode(keys), "<u4").astype(np.uint32)
            numpy = ("MT19937", array, int(position), int(has_gauss), float.fromhex(cached))
        return python, numpy, decode_generator(texts[2])
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise StateError(
            f"the state's random states are damaged ({error})", expected="text", found=str(error)
        ) from error


def encode_generator(state: torch.Tensor) -> str:
    """The state of a torch generator as text."""
    return _text(state.numpy())


def decode_generator(text: str) -> torch.Tensor:
    """The state of a torch generator again."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), np.uint8).copy())


def _text(array: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(array.tobytes()).decode()


def own_generators(loader: Any) -> list[torch.Generator]:
    """The generators of a loader and its samplers, each once.

    Without torch's global one, which is nobody's own, and those of samplers that keep their own state.
    """
    found: dict[int, torch.Generator] = {}
    samplers = all_samplers(loader)
    for place in [loader, *samplers]:
        generator = probe(place, "generator")
        if isinstance(generator, torch.Generator) and generator is not torch.default_generator:
            found.setdefault(id(generator), generator)
    for place in samplers:
        if is_stateful(place):
            found.pop(id(probe(place, "generator")), None)
    return list(found.values())


def all_samplers(loader: Any) -> list[Any]:
    """The samplers of a loader, each once.

    Frameworks put a batch sampler around another one (Accelerate shares batches out so): the inner ones count too.
    """
    batch_sampler = loader.batch_sampler
    places = [batch_sampler, loader.sampler, probe(batch_sampler, "sampler")]
    for _ in range(_NESTED):
        batch_sampler = probe(batch_sampler, "batch_sampler")
        places += [batch_sampler, probe(batch_sampler, "sampler")]
    return list({id(place): place for place in places if place is not None}.values())


class Standing(NamedTuple):
    """Where the random generators stand: the global ones, and those that belong to a loader and its samplers."""

    streams: Streams
    generators: list[torch.Tensor]

    @classmethod
    def of(cls, generators: list[torch.Generator]) -> Standing:
        """Where they stand now."""
        return cls(rng_states(), [generator.get_state() for generator in generators])

    @classmethod
    @contextlib.contextmanager
    def kept(cls, generators: list[torch.Generator]) -> Iterator[None]:
        """Put them back to where they are now afterwards."""
        now = cls.of(generators)
        try:
            yield
        finally:
            now.restore(generators)

    def restore(self, generators: list[torch.Generator]) -> None:
        """Put them back there."""
        restore_rng(self.streams)
        for generator, state in zip(generators, self.generators, strict=True):
            generator.set_state(state)

    def is_at(self, other: Standing) -> bool:
        """Whether both are the same place."""
        return same_values(self.streams, other.streams) and same_values(tuple(self.generators), tuple(other.generators))

    def encode(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The states as text."""
        return encode_streams(self.streams), tuple(map(encode_generator, self.generators))

    @classmethod
    def decode(cls, texts: tuple[tuple[str, ...], ...]) -> Standing:
        """The states again. Raises :class:`StateError` for damaged ones."""
        return cls(decode_streams(texts[0]), list(map(decode_generator, texts[1])))


class Continuation:
    """The global random generators where a saved run had left them, for epochs that draw from those.

    The next epoch of a resumed run should be that of the run that was saved; but the global generators are the user's,
    and loading a state leaves them alone. So: as long as nobody touches a global generator, the loader draws from the
    remembered one in its place. As soon as anybody draws from it, seeds it or restores it, it is the user's word, and
    the loader draws from it as torch does.
    """

    def __init__(self) -> None:
        self._marks: list[Any] = [None, None, None]
        self._states: list[Any] = [None, None, None]

    def begin(self, states: Streams | None) -> None:
        """Remember where the saved run was; ``None`` forgets."""
        self._states = list(states) if states is not None else [None, None, None]
        self.mark()

    def go_on(self, states: Streams) -> None:
        """The saved run would be there by now, where the user has not taken over."""
        self._states = [state if kept is not None else None for kept, state in zip(self._states, states, strict=True)]

    def mark(self) -> None:
        """From here on, the user's hand is seen."""
        self._marks = list(rng_states())

    def heed(self) -> None:
        """Where the user's hand was seen, forget: it is the user's word."""
        for place, state in enumerate(rng_states()):
            if not same_values(state, self._marks[place]):
                self._states[place] = None

    @property
    def active(self) -> bool:
        """Whether anything is remembered."""
        return any(state is not None for state in self._states)

    def view(self) -> Streams:
        """What the next epoch would draw from."""
        states = list(rng_states())
        for place, state in enumerate(self._states):
            if state is not None and same_values(states[place], self._marks[place]):
                states[place] = state
        return states[0], states[1], states[2]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """An epoch begins: let it draw from what is remembered, and leave the global generators as they were."""
        if not self.active:
            yield
            return
        self.heed()
        current = list(rng_states())
        kept = [place for place in range(3) if self._states[place] is not None]
        _restore([self._states[place] if place in kept else current[place] for place in range(3)])
        try:
            yield
        finally:
            after = list(rng_states())
            for place in kept:
                self._states[place], after[place] = after[place], current[place]
            _restore(after)


def _restore(states: list[Any]) -> None:
    restore_rng((states[0], states[1], states[2]))
