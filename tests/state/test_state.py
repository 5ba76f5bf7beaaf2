"""The schema: what is refused, and how it is said."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, Sampler, SequentialSampler

from robustloader import RobustDataLoader, StateError
from robustloader.decisions.spares import SpareReservoir
from robustloader.state import SCHEMA, Delivered, LoaderState
from tests.support.datasets import Numbers


def loader(size: int = 20, batch_size: int = 3, **options: Any) -> RobustDataLoader[Any]:
    return RobustDataLoader(Numbers(size), batch_size, **{"shuffle": True, **options})


def test_a_state_is_fresh_plain_and_free_of_names_that_others_edit() -> None:
    """It survives JSON, is a new dict each time, and Accelerate finds nothing of its own in it."""
    ours = loader()
    state = ours.state_dict()
    assert state is not ours.state_dict()
    assert state["schema"] == SCHEMA
    assert not {"_num_yielded", "_sampler_iter_yielded", "_index_sampler_state"} & set(state)
    assert LoaderState.from_dict(json.loads(json.dumps(state))) == LoaderState.from_dict(state)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("dataset_length", {"size": 21}),
        ("batch_size", {"batch_size": 4}),
        ("drop_last", {"drop_last": True}),
        ("sampler", {"shuffle": False}),
    ],
)
def test_what_differs_is_named(name: str, other: dict[str, Any]) -> None:
    """With both values, and nothing is changed."""
    theirs = loader(**other)
    with pytest.raises(StateError, match=name) as caught:
        theirs.load_state_dict(loader().state_dict())
    assert set(caught.value.expected) == set(caught.value.found) == {name}
    assert len(list(theirs)) == len(theirs)


def sampled(batch_size: int = 4, drop_last: bool = False, kind: Any = SequentialSampler) -> RobustDataLoader[Any]:
    """A loader that is given torch's batch sampler."""
    return RobustDataLoader(Numbers(11), batch_sampler=BatchSampler(kind(range(11)), batch_size, drop_last))


@pytest.mark.parametrize(
    ("name", "other"),
    [("batch_size", {"batch_size": 5}), ("drop_last", {"drop_last": True}), ("sampler", {"kind": RandomSampler})],
)
def test_what_differs_in_torchs_batch_sampler_is_named(name: str, other: dict[str, Any]) -> None:
    """As where the loader made it, though there are as many batches of 5 as of 4."""
    with pytest.raises(StateError, match=name) as caught:
        sampled(**other).load_state_dict(sampled().state_dict())
    assert set(caught.value.expected) == {name}


def test_torchs_batch_sampler_may_be_given_or_made() -> None:
    """It is the same one. A state from when states did not tell of one that was given is still good."""
    ours = sampled()
    iterator = iter(ours)
    next(iterator)
    state = ours.state_dict()
    older = state | {"batch_size": None, "drop_last": False, "sampler": "SequentialSampler"}
    made = RobustDataLoader(Numbers(11), 4)
    for other, told in ((made, state), (sampled(), state), (sampled(), older)):
        other.load_state_dict(told)
        assert [batch.tolist() for batch in other] == [[4, 5, 6, 7], [8, 9, 10]]
    with pytest.raises(StateError, match="sampler_length"):
        sampled(batch_size=2).load_state_dict(older)
    with pytest.raises(StateError, match="batch_size"):
        sampled(batch_size=1).load_state_dict(RobustDataLoader(Numbers(11), None).state_dict())


class Buckets:
    """Batches of 1 to 6, other ones in each epoch, and before the first epoch none."""

    def __init__(self) -> None:
        self.epoch = -1
        self.batches: list[list[int]] | None = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.batches = epoch, []
        chance = random.Random(epoch)
        order = chance.sample(range(40), 40)
        while order:
            size = chance.randint(1, 6)
            self.batches.append(order[:size])
            order = order[size:]

    def __len__(self) -> int:
        assert self.batches is not None, "ask me once my epoch has begun"
        return len(self.batches)

    def __iter__(self) -> Any:
        assert self.batches is not None
        return iter(self.batches)


@pytest.mark.parametrize("told", [None, 0])
@pytest.mark.parametrize("steps", [5, None])
def test_a_batch_sampler_may_have_another_length_in_each_epoch(steps: int | None, told: int | None) -> None:
    """It is compared as of the state's epoch, and told its own again where it does not fit."""
    ours, other = (RobustDataLoader(Numbers(40), batch_sampler=Buckets()) for _ in range(2))
    assert ours.state_dict()["sampler_length"] is None
    ours.batch_sampler.set_epoch(3)
    iterator = iter(ours)
    head = [batch.tolist() for batch in itertools.islice(iterator, steps)]
    state = ours.state_dict()
    if told is not None:
        other.batch_sampler.set_epoch(told)
        assert len(other) != len(ours)
    if steps is not None:
        with pytest.raises(StateError, match="sampler_length"):
            other.load_state_dict(state | {"sampler_length": 99})
        assert other.batch_sampler.epoch == (-1 if told is None else told)
    other.load_state_dict(state)
    if steps is None:
        other.batch_sampler.set_epoch(4)
        ours.batch_sampler.set_epoch(4)
    rest = [batch.tolist() for batch in other]
    assert ([] if steps is None else head) + rest == [batch.tolist() for batch in ours]


class Growing(Sampler[int]):
    """One index more in each epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 20 + self.epoch

    def __iter__(self) -> Any:
        return iter(range(len(self)))


class Shared(DistributedSampler[int]):
    """A rank's share in an order of one's own: as long as torch's."""

    def __iter__(self) -> Any:
        return iter(list(super().__iter__())[::-1])


class Halves:
    """A batch sampler around another one."""

    def __init__(self, batch_sampler: Any) -> None:
        self.batch_sampler = batch_sampler

    def __len__(self) -> int:
        return len(self.batch_sampler) * 2

    def __iter__(self) -> Any:
        for batch in self.batch_sampler:
            yield from (batch[:2], batch[2:])


def growing(way: str) -> RobustDataLoader[Any]:
    """A loader that draws from such a sampler by itself, through torch's batch sampler, or through another one."""
    sampler = Growing()
    if way == "sampler":
        return RobustDataLoader(Numbers(40), 4, sampler=sampler)
    batches: Any = BatchSampler(sampler, 4, False)
    return RobustDataLoader(Numbers(40), batch_sampler=Halves(batches) if way == "around" else batches)


@pytest.mark.parametrize("way", ["sampler", "given", "around"])
@pytest.mark.parametrize("steps", [None, 2])
def test_a_sampler_may_have_another_length_in_each_epoch(steps: int | None, way: str) -> None:
    """Between two epochs nobody knows which one is next, so that its length says nothing; within one it is compared."""
    ours, other = growing(way), growing(way)
    inner = [innermost(loader) for loader in (ours, other)]
    inner[0].set_epoch(7)
    iterator = iter(ours)
    head = [batch.tolist() for batch in itertools.islice(iterator, steps)]
    state = ours.state_dict()
    if steps is not None:
        with pytest.raises(StateError, match="sampler_length"):
            other.load_state_dict(state | {"sampler_length": 99})
    other.load_state_dict(state)
    if steps is None:
        inner[0].set_epoch(8)
        inner[1].set_epoch(8)
    rest = [batch.tolist() for batch in other]
    assert ([] if steps is None else head) + rest == [batch.tolist() for batch in ours]


def innermost(loader: Any) -> Growing:
    """The sampler that a loader draws from in the end."""
    batch_sampler = loader.batch_sampler
    return getattr(batch_sampler, "batch_sampler", batch_sampler).sampler


@pytest.mark.parametrize("kind", [DistributedSampler, Shared])
def test_the_length_of_torchs_samplers_is_compared_between_epochs(kind: Any) -> None:
    """It is the same in each: a run with another number of ranks is told so."""
    ours, other = (
        RobustDataLoader(Numbers(40), 4, sampler=kind(range(40), num_replicas=ranks, rank=0)) for ranks in (2, 4)
    )
    list(ours)
    with pytest.raises(StateError, match="sampler_length"):
        other.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("state", [None, 3, {}, {"schema": 99}, {"schema": SCHEMA}, {"schema": "1"}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    """Another schema, half a state, or something else."""
    with pytest.raises(StateError):
        loader().load_state_dict(state)


def test_a_damaged_state_is_refused() -> None:
    """Not loaded halfway."""
    ours = loader()
    with pytest.raises(StateError):
        ours.load_state_dict(ours.state_dict() | {"delivered": "many"})
    with pytest.raises(StateError):
        ours.load_state_dict(ours.state_dict() | {"streams_now": ("x", "y", "z")})
    assert len(list(ours)) == len(ours)


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
def test_a_checkpoint_library_stores_it(tmp_path: Any) -> None:
    """``torch.distributed.checkpoint`` saves a loader in mid-epoch and loads it into a fresh one."""
    ours = loader()
    iterator = iter(ours)
    head = [next(iterator).tolist() for _ in range(3)]
    dcp.save({"loader": ours}, checkpoint_id=tmp_path)
    rest = [batch.tolist() for batch in iterator]
    fresh = loader()
    dcp.load({"loader": fresh}, checkpoint_id=tmp_path)
    assert [batch.tolist() for batch in fresh] == rest
    assert sorted(itertools.chain.from_iterable(head + rest)) == list(range(20))


def test_a_file_stores_it(tmp_path: Any) -> None:
    """``torch.save``, and ``torch.load`` with nothing but plain values allowed."""
    torch.save(loader().state_dict(), tmp_path / "state.pt")
    loader().load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


@given(st.permutations(range(12)), st.integers(0, 12))
def test_delivered_counts_a_prefix_and_the_rest(order: list[int], count: int) -> None:
    """Whatever the order, exactly what was delivered."""
    delivered = Delivered()
    for number in order[:count]:
        delivered.add(number)
    assert set(range(delivered.count)) | delivered.ahead == set(order[:count])
    assert delivered.count not in delivered.ahead


@given(st.integers(1, 20), st.integers(1, 2500), st.integers(0, 1 << 63))
def test_passing_over_is_observing(size: int, tasks: int, seed: int) -> None:
    """The walk leaves the spares as reading every task would have."""
    one, other = SpareReservoir(seed=seed, epoch=2), SpareReservoir(seed=seed, epoch=2)
    items = list(range(size * tasks))
    for task in range(tasks):
        one.observe(task, items[task * size : (task + 1) * size])
        one.close(task)
    half = tasks // 2 * size
    other.pass_over(items[:half], size)
    other.pass_over(items[half:], size)
    assert one.mark == other.mark


@given(st.integers(1, 20), st.integers(0, 300), st.integers(0, 1 << 63))
def test_spares_go_on_from_a_mark(size: int, tasks: int, seed: int) -> None:
    """Through JSON, and taken while other tasks had been read ahead: later tasks draw the same."""
    one, other = SpareReservoir(seed=seed, epoch=2), SpareReservoir(seed=seed, epoch=2)
    items = list(range(size * (tasks + 6)))
    one.pass_over(items[: size * tasks], size)
    mark = json.loads(json.dumps(one.mark))
    other.restore(mark)
    for reservoir in (one, other):
        for task in range(tasks, tasks + 6):
            reservoir.observe(task, items[task * size : (task + 1) * size])
    assert one.mark == other.mark
    for task, round in itertools.product(range(tasks, tasks + 4), (1, 3)):
        assert one.draw(task, 4, round=round) == other.draw(task, 4, round=round)
