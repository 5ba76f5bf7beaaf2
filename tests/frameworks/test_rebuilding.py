"""What frameworks do to a loader, without any framework: other ways to end an epoch, copies."""

from __future__ import annotations

import copy

import pytest

from robustloader import RobustDataLoader
from tests.support.frameworks import KEPT, make_loader


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("persistent", [False, True])
def test_an_epoch_whose_batches_were_all_taken_is_complete(num_workers: int, persistent: bool) -> None:
    """Lightning and others take ``len()`` batches and never ask for the end: such an epoch was not abandoned."""
    if persistent and not num_workers:
        pytest.skip("there are no workers to keep")
    loader = RobustDataLoader(range(6), batch_size=2, num_workers=num_workers, persistent_workers=persistent)
    for _ in range(2):
        iterator = iter(loader)
        for _ in range(len(loader)):
            next(iterator)
    del iterator
    summary = loader.summary(0)
    assert (summary.batches, summary.complete) == (3, True)


def test_a_loader_survives_a_copy_in_the_middle_of_an_epoch() -> None:
    """Frameworks deepcopy what holds a loader, whatever it is doing: the copy has the same options."""
    original = make_loader(seeding="worker", persistent_workers=False)
    iterator = iter(original)
    next(iterator)
    twin = copy.deepcopy(original)
    assert all(getattr(twin, name) == getattr(original, name) for name in KEPT)
    assert [sorted(batch) for batch in twin] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
