"""The state of a loader: what ``state_dict()`` writes and ``load_state_dict()`` accepts.

A flat dict with a fixed set of keys, so that ``torch.distributed.checkpoint`` finds in a fresh loader the keys that it
saved. Whatever varies in size (shards, the states of users' objects) is inside a tuple, which that library stores
whole. Values are plain: numbers, strings, lists and tuples of them, and what users' own ``state_dict()`` return.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from robustloader.errors import StateError

__all__ = ["SCHEMA", "Delivered", "LoaderState", "Setting", "ShardState", "check_setting"]

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a state and the loader that it is loaded into must have in common.

    Attributes:
        kind: "map" or "iterable".
        dataset_length: None where the dataset has no length.
        batch_size: None without automatic batching, and with a batch sampler other than torch's own.
        drop_last: as given to the loader, or to torch's batch sampler.
        sampler: name of the type of the sampler or, where another than torch's was given, the batch sampler.
        sampler_length: batches (samples without automatic batching) of an epoch; None where that is not known, or
            where the sampler keeps its own state and may be of another size, as for another number of ranks.
    """

    kind: str
    dataset_length: int | None
    batch_size: int | None
    drop_last: bool
    sampler: str
    sampler_length: int | None


_ADDED = {"reading", "sampler_reads"}
"""What states of version 0.1 do not have."""

_REMEDIES = {
    "kind": "load it into a loader of the same kind of dataset",
    "dataset_length": "resume on the same dataset, or begin a new epoch without this state",
    "batch_size": "construct the loader with the batch size of the saved run",
    "drop_last": "construct the loader with the drop_last of the saved run",
    "sampler": "construct the loader with the sampler of the saved run (shuffle=, sampler=, batch_sampler=)",
    "sampler_length": "construct the sampler as in the saved run; for another number of ranks, use "
    "robustloader.ElasticDistributedSampler from the beginning",
}


@dataclass(frozen=True, kw_only=True)
class ShardState:
    """Where one shard of an iterable dataset stands.

    Attributes:
        calls: how often its stream was read for the batches that were delivered.
        batches: how many of its batches were delivered.
        ended: whether there are no more.
        streams: the random states that it began the epoch with; empty for those of its seed.
        snapshot: empty, or the state of a dataset or stream that keeps its own, as a dict (``calls``, ``ended``,
            ``dataset``, ``stream``, ``rng``, ``over``). Of a shard that has ended: the dataset's, for the next epoch of
            a process that stays.
    """

    calls: int = 0
    batches: int = 0
    ended: bool = False
    streams: tuple[str, ...] = ()
    snapshot: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoaderState(Setting):
    """Where a loader stands.

    Attributes:
        epoch: the epoch that runs, or with ``begun=False`` the next one.
        begun: whether ``iter(loader)`` was called for it. What follows but for ``*_now`` has no meaning otherwise.
        delivered: batches that the trainer was given; of a map-style dataset all those numbered below this.
        ahead: numbers of further batches that were delivered (``in_order=False``).
        base_seed: torch's base seed of the epoch begun last.
        opening: what happened at its beginning, in order: ``i`` for ``iter(sampler)``, ``s`` for a draw of the base
            seed. torch does "is" without workers, "isi" with, and "i" for the later epochs of persistent workers.
        openings: the same of the run's next epoch, and of all later ones: whoever goes on does as this run would have.
        streams, generators: states of the global random generators (Python, NumPy, torch), and of the loader's and its
            samplers' own ones, just before that; the same ``_now``: when the state was taken.
        reading: empty, or the same two when the sampler was read for the first time, where others had drawn since the
            epoch was opened: without workers, that is when the first batch is asked for.
        sampler_reads: how often the sampler had been read, its end included; -1 where that is not known.
        sampler_epochs: what samplers with ``set_epoch`` had been told before the epoch began; empty between two epochs,
            where telling them is still to come.
        workers: worker processes that the epoch began with; an iterable epoch keeps as many shards to its end.
        shards: one per shard (one without workers) of an iterable epoch. With ``begun=False``, these two are of the
            epoch before, where what it leaves in its processes is known.
        next_shard: the shard whose turn it is.
        sampler_state, dataset_state: empty, or what the user's object returned.
        sampler_skip: how many more batches were delivered since the sampler was asked for its state.
        sampler_drain: whether that was in the epoch before, so that it must first be read to its end.
        spares: empty, or what replaces bad samples where it cannot be found again by walking through the indices.
        quarantine: samples that must not be fetched, as pairs of key and kind.
        faults, samples: how many samples have failed, of how many; the fault budget goes on from there.
    """

    epoch: int
    begun: bool
    delivered: int = 0
    ahead: tuple[int, ...] = ()
    base_seed: int = 0
    opening: str = ""
    openings: tuple[str, ...] = ("is", "is")
    streams: tuple[str, ...] = ()
    streams_now: tuple[str, ...] = ()
    generators: tuple[str, ...] = ()
    generators_now: tuple[str, ...] = ()
    reading: tuple[tuple[str, ...], ...] = ()
    sampler_reads: int = -1
    sampler_epochs: tuple[int, ...] = ()
    workers: int = 0
    shards: tuple[ShardState, ...] = ()
    next_shard: int = 0
    sampler_state: tuple[Any, ...] = ()
    sampler_skip: int = 0
    sampler_drain: bool = False
    dataset_state: tuple[Any, ...] = ()
    spares: tuple[Any, ...] = ()
    quarantine: tuple[tuple[int | str, str], ...] = ()
    faults: int = 0
    samples: int = 0

    @property
    def moves_datasets(self) -> bool:
        """Whether it holds the state of a dataset, in the training process or in a worker."""
        return bool(self.dataset_state) or any(shard.snapshot for shard in self.shards)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, fresh as far as the loader's own values go."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        plain["shards"] = tuple(
            {each.name: getattr(shard, each.name) for each in fields(shard)} for shard in self.shards
        )
        return {"schema": SCHEMA, **plain}

    @classmethod
    def from_dict(cls, state: object) -> LoaderState:
        """Read what :meth:`to_dict` wrote, also after a round trip through JSON (tuples are lists then).

        Raises:
            StateError: it is not such a state, or of another schema.
        """
        if not isinstance(state, Mapping):
            raise StateError(
                f"a loader's state is a dict, but got {type(state).__name__}: pass what state_dict() returned",
                expected="dict",
                found=type(state).__name__,
            )
        schema = state.get("schema")
        if schema != SCHEMA:
            raise StateError(
                f"this version of robustloader reads states of schema {SCHEMA}, but got schema {schema!r}: load it "
                "with the version that saved it, or begin a new epoch without it",
                expected=SCHEMA,
                found=schema,
            )
        wanted = [each.name for each in fields(cls)]
        missing = [name for name in wanted if name not in state and name not in _ADDED]
        if missing:
            raise StateError(
                f"the state is incomplete, {', '.join(missing)} missing: pass the whole of what state_dict() returned",
                expected=wanted,
                found=sorted(map(str, state)),
            )
        values = {name: state[name] for name in wanted if name in state}
        try:
            for name, value in values.items():
                if isinstance(value, list):
                    values[name] = tuple(value)
            values["quarantine"] = tuple((key, kind) for key, kind in values["quarantine"])
            values["shards"] = tuple(_shard(shard) for shard in values["shards"])
            values["reading"] = tuple(map(tuple, values.get("reading", ())))
            _check_numbers(values)
        except (TypeError, ValueError, KeyError) as error:
            raise StateError(
                f"the state is damaged ({type(error).__name__}: {error}): pass what state_dict() returned, unchanged",
                expected="what state_dict() returned",
                found=str(error),
            ) from error
        return cls(**values)


def _shard(plain: Mapping[str, Any]) -> ShardState:
    return ShardState(
        calls=int(plain["calls"]),
        batches=int(plain["batches"]),
        ended=bool(plain["ended"]),
        streams=tuple(plain["streams"]),
        snapshot=tuple(plain["snapshot"]),
    )


def _check_numbers(values: Mapping[str, Any]) -> None:
    for name in ("epoch", "delivered", "base_seed", "workers", "next_shard", "sampler_skip", "faults", "samples"):
        if not isinstance(values[name], int) or (values[name] < 0 and name != "base_seed"):
            raise ValueError(f"{name}={values[name]!r}")
    if not isinstance(values.get("sampler_reads", -1), int):
        raise ValueError(f"sampler_reads={values['sampler_reads']!r}")
    if len(values["openings"]) != 2 or any(opening not in ("i", "is", "isi") for opening in values["openings"]):
        raise ValueError(f"openings={values['openings']!r}")


def check_setting(state: LoaderState, setting: Setting) -> None:
    """See that a state was saved by such a loader.

    Raises:
        StateError: naming everything that differs; ``expected`` and ``found`` are dicts by name.
    """
    pairs = {each.name: (getattr(setting, each.name), getattr(state, each.name)) for each in fields(Setting)}
    if None in pairs["sampler_length"]:
        del pairs["sampler_length"]
    wrong = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if _says_little(state):
        wrong = {name: pair for name, pair in wrong.items() if name not in ("batch_size", "drop_last", "sampler")}
    if not wrong:
        return
    if "dataset_length" in wrong or "batch_size" in wrong or "drop_last" in wrong or "sampler" in wrong:
        wrong.pop("sampler_length", None)  # follows from these
    differences = "; ".join(
        f"{name} is {ours!r} here and was {theirs!r} where the state was saved ({_REMEDIES[name]})"
        for name, (ours, theirs) in wrong.items()
    )
    raise StateError(
        f"this state does not fit this loader: {differences}",
        expected={name: ours for name, (ours, _) in wrong.items()},
        found={name: theirs for name, (_, theirs) in wrong.items()},
    )


def _says_little(state: LoaderState) -> bool:
    """Whether a state is of a loader that was given torch's batch sampler, from when states told only of how many
    batches it has: one sample at a time, they would be as many as the dataset has."""
    plain = state.batch_size is None and state.sampler == "SequentialSampler"
    return plain and state.sampler_length != state.dataset_length


@dataclass(slots=True)
class Delivered:
    """Which of an epoch's batches were delivered: all below ``count``, and those in ``ahead``."""

    count: int = 0
    ahead: set[int] = field(default_factory=set)

    def add(self, number: int) -> None:
        """Batch ``number`` was delivered."""
        if number == self.count and not self.ahead:  # as a rule
            self.count += 1
            return
        self.ahead.add(number)
        while self.count in self.ahead:
            self.ahead.remove(self.count)
            self.count += 1
