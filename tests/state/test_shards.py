"""Shards of iterable datasets: what each of them begins with, ends with, and goes on from."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from torch.utils.data import IterableDataset, get_worker_info

from robustloader import RobustDataLoader


def numbers(batches: Any) -> list[int]:
    return [int(number) for batch in batches for number in batch]


class Shuffled(IterableDataset):
    """Each worker shuffles its share with the global generator, and nobody keeps a place."""

    def __iter__(self) -> Any:
        info = get_worker_info()
        assert info is not None
        share = list(range(info.id, 120, info.num_workers))
        random.shuffle(share)
        yield from share


@pytest.mark.parametrize("transport", ["arena", "pipe"])
@pytest.mark.parametrize("epochs", [0, 1, 2])
@pytest.mark.parametrize(("later", "persistent"), [(2, True), (2, False), (0, False)])
def test_a_later_epoch_of_persistent_workers_goes_on(epochs: int, later: int, persistent: bool, transport: Any) -> None:
    """Its streams began where the epoch before had left them, not at the seed: so does whoever reads them again."""
    ours = RobustDataLoader(Shuffled(), 3, num_workers=2, persistent_workers=True, transport=transport)
    for _ in range(epochs):
        list(ours)
    iterator = iter(ours)
    head = numbers(itertools.islice(iterator, 15))
    state = json.loads(json.dumps(ours.state_dict()))
    assert [bool(shard["streams"]) for shard in state["shards"]] == [epochs > 0] * 2
    other = RobustDataLoader(Shuffled(), 3, num_workers=later, persistent_workers=persistent, transport=transport)
    other.load_state_dict(state)
    rest = numbers(other)
    assert rest == numbers(iterator)
    assert sorted(head + rest) == list(range(120))
