"""Situations in which recovery itself once went wrong: each was seen to hang, lose or double samples."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from robustloader import RecoveryPolicy, RobustDataLoader, RobustLoaderWarning, WorkerStartError
from tests.support.listener import flat
from tests.support.peek import pids
from tests.support.watch import kill

QUICK = RecoveryPolicy(backoff_s=0, max_restarts=100)


class Uneven(IterableDataset[int]):
    """Worker 0 has two samples, the others forty each."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        assert info is not None
        return iter(range(info.id * 1000, info.id * 1000 + (2 if info.id == 0 else 40)))


@pytest.mark.parametrize("persistent", [False, True])
def test_an_orphan_gets_the_place_of_a_worker_whose_shard_has_ended(persistent: bool) -> None:
    """The pool shrinks while the worker of an ended shard still sits there: it gives way, and nothing is lost."""
    recovery = RecoveryPolicy(max_restarts=0)
    loader = RobustDataLoader(Uneven(), batch_size=1, num_workers=2, persistent_workers=persistent, recovery=recovery)
    for _ in range(2 if persistent else 1):
        iterator, got = iter(loader), []
        for number, batch in enumerate(iterator):
            got += batch.tolist()
            if number == 10:
                kill(max(pids(iterator)), signal.SIGKILL)
        assert sorted(got) == [0, 1, *range(1000, 1040)]


class Drawn(IterableDataset[int]):
    """An order drawn anew in each epoch, from the worker's own generator."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(100).tolist())


@pytest.mark.parametrize("persistent", [False, True])
def test_a_later_epochs_stream_is_replayed_with_that_epochs_random_states(persistent: bool) -> None:
    """A death in the second epoch of a persistent worker neither doubles nor loses what the stream drew."""
    loader = RobustDataLoader(Drawn(), batch_size=5, num_workers=1, persistent_workers=persistent, recovery=QUICK)
    for epoch in range(3):
        iterator, got = iter(loader), []
        for number, batch in enumerate(iterator):
            got += batch.tolist()
            if epoch and number in (4, 8):
                kill(pids(iterator)[0], signal.SIGKILL)
        assert sorted(got) == list(range(100)), f"epoch {epoch}"


class Paced(IterableDataset[int]):
    """Each sample waits for a descriptor that never becomes readable: about 20 ms, whatever the machine does."""

    def __iter__(self) -> Iterator[int]:
        import select

        for number in range(60):
            select.select([], [], [], 0.02)
            yield number


def test_reading_a_stream_again_is_no_task_with_a_deadline() -> None:
    """A shard whose replay takes longer than ``timeout`` goes on after a death."""
    loader = RobustDataLoader(Paced(), batch_size=1, num_workers=1, timeout=0.4, recovery=QUICK)
    iterator, got = iter(loader), []
    for number, batch in enumerate(iterator):
        got += batch.tolist()
        if number == 45:
            kill(pids(iterator)[0], signal.SIGKILL)
    assert got == list(range(60))


class Noise(Dataset[Any]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        return torch.randn(2)


class SharedNoise(Noise):
    """Draws for the batch as a whole, and kills its worker once."""

    def __init__(self, flag: Path | None) -> None:
        self.flag = flag

    def __getitems__(self, indices: list[int]) -> list[Any]:
        die_once(self.flag)
        shift = torch.randn(1)
        return [torch.randn(2) + shift for _ in indices]


class Mixing:
    """A collate that draws, and kills its worker once."""

    def __init__(self, flag: Path | None) -> None:
        self.flag = flag

    def __call__(self, samples: list[Any]) -> Any:
        die_once(self.flag)
        return default_collate(samples) + torch.randn(1)


def die_once(flag: Path | None) -> None:
    if flag is not None and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("where", ["collate", "items"])
def test_seeded_batches_are_the_same_after_a_death(where: str, tmp_path: Path) -> None:
    """With ``seeding="batch"`` even a death that made a batch be loaded sample by sample leaves it as it was."""

    def run(flag: Path | None, workers: int) -> list[Any]:
        return list(
            RobustDataLoader(
                Noise() if where == "collate" else SharedNoise(flag),
                batch_size=8,
                num_workers=workers,
                collate_fn=Mixing(flag) if where == "collate" else None,
                seeding="batch",
                recovery=QUICK,
                generator=torch.Generator().manual_seed(0),
            )
        )

    plain, killed = run(None, 0), run(tmp_path / "flag", 2)
    assert (tmp_path / "flag").exists()
    assert all(torch.equal(one, other) for one, other in zip(plain, killed, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_indices_that_can_be_read_once(workers: int) -> None:
    """A batch sampler may yield iterators."""
    batches: Any = [iter([0, 1, 2]), iter([3, 4])]
    loader = RobustDataLoader(list(range(5)), batch_sampler=batches, num_workers=workers)
    # The sampler is asked for twice with workers, and the same two iterators are read once.
    assert flat(loader) == [0, 1, 2, 3, 4]


class Bad(Noise):
    def __getitem__(self, index: int) -> int:
        if index == 2:
            raise ValueError("bad")
        return index


@pytest.mark.parametrize("workers", [0, 2])
def test_a_warning_made_an_error_costs_no_batch(workers: int) -> None:
    """The batch comes with the next ``next()``."""
    loader = RobustDataLoader(Bad(), batch_size=2, num_workers=workers)
    iterator, sizes, warned = iter(loader), [], 0
    while True:
        try:
            sizes.append(len(next(iterator)))
        except RobustLoaderWarning:
            warned += 1
        except StopIteration:
            break
    assert (sizes, warned) == ([2] * 32, 1)


def test_default_collate_needs_no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a byte of ``/dev/shm``: torch's own collate would put each batch there."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", refuse)
    monkeypatch.setattr(torch.TypedStorage, "_new_shared", refuse)
    loader = RobustDataLoader(Noise(), batch_size=8, num_workers=2)
    assert sum(len(batch) for batch in loader) == 64
    assert loader.fault_log.total == 0


def test_workers_that_never_get_through_pythons_start_up(tmp_path: Path) -> None:
    """A script without the guard for ``__main__`` ends in one clear error, not in a long row of restarts."""
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from robustloader import RobustDataLoader\n"
        "loader = RobustDataLoader(list(range(8)), num_workers=1, multiprocessing_context='spawn')\n"
        "print(len(list(loader)))\n"
    )
    import subprocess

    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=80, env=environment, check=False
    )
    assert done.returncode == 1
    assert f"{WorkerStartError.__name__}: no worker became ready" in done.stderr
    assert '__name__ == "__main__"' in done.stderr
