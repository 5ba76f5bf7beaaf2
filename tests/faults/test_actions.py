"""What becomes of samples that raise: replaced, skipped or raised; at once, after retries, or never."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tenacity import stop_after_attempt, wait_none, wait_random
from torch.utils.data import default_collate

import robustloader.worker.fetch
from robustloader import FaultPolicy, Retry, RobustDataLoader, SampleReplaced
from tests.support.datasets import Damaged, Flaky, Numbers, Raising, Shaped, WithItems, damaged, noted, offline
from tests.support.listener import Listener, flat

pytestmark = pytest.mark.filterwarnings("ignore::robustloader.RobustLoaderWarning")

WORKERS = pytest.mark.parametrize("workers", [0, 2])
NO_WAIT = Retry(stop=stop_after_attempt(3), wait=wait_none())
BAD = (3, 17, 18, 40)


def raising(bad: Sequence[int], size: int = 48) -> Raising:
    return Raising(size, dict.fromkeys(bad, damaged))


@WORKERS
@pytest.mark.parametrize("dataset", [Raising, WithItems])
@pytest.mark.parametrize("last", [0, 5])
def test_replace_keeps_batches_and_their_sizes(workers: int, dataset: Any, last: int) -> None:
    """As many batches as asked for, each of the size the sampler asked for; good samples stay in their places."""
    size = 48 + last
    loader = RobustDataLoader(dataset(size, dict.fromkeys(BAD, damaged)), batch_size=8, num_workers=workers)
    iterator = iter(loader)
    batches, infos = [], []
    for batch in iterator:
        batches.append(batch.tolist())
        infos.append(iterator.batch_info)
    assert len(batches) == len(loader)
    assert [len(batch) for batch in batches] == [8] * 6 + [last] * bool(last)
    for place, sample in enumerate(flat(batches)):
        assert (sample not in BAD) if place in BAD else (sample == place)
    for number, (batch, info) in enumerate(zip(batches, infos, strict=True)):
        assert info.index == number
        assert list(info.indices) == batch
        assert info.skipped == ()
        assert info.attempts == 1
        assert info.worker_id in ((None,) if not workers else (0, 1))
        assert info.replaced == {
            wanted - 8 * number: (wanted, batch[wanted - 8 * number]) for wanted in BAD if wanted // 8 == number
        }


@WORKERS
def test_skip_yields_smaller_batches(workers: int) -> None:
    """What failed is left out, in its place nothing; the number of batches stays."""
    loader = RobustDataLoader(raising(BAD), batch_size=8, num_workers=workers, faults="skip")
    iterator = iter(loader)
    batches, skipped = [], []
    for batch in iterator:
        batches.append(batch.tolist())
        assert list(iterator.batch_info.indices) == batches[-1]
        assert iterator.batch_info.replaced == {}
        skipped.append(iterator.batch_info.skipped)
    assert flat(batches) == [index for index in range(48) if index not in BAD]
    assert [len(batch) for batch in batches] == [7, 8, 6, 8, 8, 7]
    assert skipped == [(3,), (), (1, 2), (), (), (0,)]


@WORKERS
def test_skip_never_yields_an_empty_batch(workers: int) -> None:
    """A batch that lost everything gets one sample of another: exactly ``len()`` batches, none empty."""
    loader = RobustDataLoader(raising(range(8, 16)), batch_size=8, num_workers=workers, faults="skip")
    iterator = iter(loader)
    batches, infos = [], []
    for batch in iterator:
        batches.append(batch.tolist())
        infos.append(iterator.batch_info)
    assert len(batches) == len(loader) == 6
    assert [len(batch) for batch in batches] == [8, 1, 8, 8, 8, 8]
    assert batches[1][0] not in range(8, 16)
    assert list(infos[1].indices) == batches[1]
    assert len(infos[1].replaced) == 1
    assert len(infos[1].skipped) == 7


@WORKERS
@pytest.mark.parametrize("action", ["replace", "skip"])
@pytest.mark.parametrize("batch_size", [1, None])
def test_batches_of_one(workers: int, action: Any, batch_size: int | None) -> None:
    """Also without automatic batching, a bad sample is replaced: never ``None``, never one batch fewer."""
    loader = RobustDataLoader(
        raising((0, 5, 11), 12), batch_size=batch_size, num_workers=workers, faults=FaultPolicy(action=action)
    )
    iterator = iter(loader)
    samples = []
    for batch in iterator:
        samples.append(int(batch))
        assert iterator.batch_info.indices == (samples[-1],)
    assert len(samples) == len(loader) == 12
    assert not {0, 5, 11} & set(samples)
    assert all(samples[place] == place for place in range(12) if place not in (0, 5, 11))


@WORKERS
@pytest.mark.parametrize("faults", ["raise", FaultPolicy(action="raise", retry=NO_WAIT)])
def test_raise_raises_the_users_exception(workers: int, faults: Any) -> None:
    """Its own type, torch's words, a note that names the sample; the batches around it are delivered."""
    loader = RobustDataLoader(raising((17,)), batch_size=8, num_workers=workers, faults=faults)
    iterator = iter(loader)
    batches = [next(iterator), next(iterator)]
    with pytest.raises(Damaged, match="cannot decode 17") as caught:
        next(iterator)
    if workers:
        assert "in DataLoader worker process 0" in str(caught.value)
        assert "raise self.errors[index](index)" in str(caught.value)
    assert any("17" in note for note in caught.value.__notes__)
    batches += list(iterator)
    assert flat(batches) == [index for index in range(48) if not 16 <= index < 24]
    (record,) = loader.fault_log
    assert (record.action, record.error_type, record.task) == ("raised", "Damaged", 2)


FATAL = (
    NameError,
    UnboundLocalError,
    SyntaxError,
    ImportError,
    ModuleNotFoundError,
    RecursionError,
    MemoryError,
    NotImplementedError,
)


class Make:
    """Makes errors of one type."""

    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind

    def __call__(self, index: Any) -> BaseException:
        return self.kind(f"at {index}")


@WORKERS
@pytest.mark.parametrize("action", ["replace", "skip"])
@pytest.mark.parametrize("kind", FATAL)
def test_programming_errors_raise_at_once(workers: int, action: Any, kind: Any, tmp_path: Path) -> None:
    """Every sample would fail alike, so nothing is retried and nothing replaced."""
    dataset = Raising(24, {10: Make(kind)}, log=tmp_path / "log")
    policy = FaultPolicy(action=action, retry=NO_WAIT)
    loader = RobustDataLoader(dataset, batch_size=8, num_workers=workers, faults=policy)
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(kind) as caught:
        next(iterator)
    assert type(caught.value) is kind
    assert "at 10" in str(caught.value)
    iterator._shutdown_workers()
    assert noted(tmp_path / "log").count("10") == 1
    (record,) = loader.fault_log
    assert (record.index, record.action, record.attempts) == (10, "raised", 1)


@WORKERS
def test_fatal_is_the_users_to_choose(workers: int) -> None:
    """Whatever types stand in the policy; and none of the standard ones, if they do not."""
    dataset = Raising(24, {3: Make(NameError), 10: damaged})
    loader = RobustDataLoader(dataset, batch_size=8, num_workers=workers, faults=FaultPolicy(fatal=(Damaged,)))
    iterator = iter(loader)
    assert len(next(iterator)) == 8
    with pytest.raises(Damaged):
        next(iterator)
    iterator._shutdown_workers()


@WORKERS
def test_a_passing_failure_is_retried(workers: int, tmp_path: Path) -> None:
    """Two failures, then it loads: nothing is lost, and the log says so."""
    loader = RobustDataLoader(
        Flaky(24, (3, 10), 2, tmp_path), batch_size=8, num_workers=workers, faults=FaultPolicy(retry=NO_WAIT)
    )
    assert flat(loader) == list(range(24))
    assert [
        (record.index, record.action, record.attempts) for record in sorted(loader.fault_log, key=lambda r: r.task)
    ] == [
        (3, "retried", 3),
        (10, "retried", 3),
    ]
    summary = loader.summary()
    assert (summary.retries, summary.faults, summary.replaced) == (2, 0, 0)


class FlakyNoise(Flaky):
    """Each sample is a random number."""

    def load(self, index: int) -> int:
        super().load(index)
        return random.randrange(1 << 30)


@WORKERS
@pytest.mark.parametrize("seeding", ["worker", "batch"])
def test_a_retry_leaves_the_random_numbers_alone(workers: int, seeding: Any, tmp_path: Path) -> None:
    """The jitter of its pause is drawn apart: batches, and what the trainer draws next, are those without a failure."""
    told = []
    for failures in (0, 1):
        folder = tmp_path / str(failures)
        folder.mkdir()
        torch.manual_seed(3)
        random.seed(5)
        retry = Retry(stop=stop_after_attempt(3), wait=wait_random(0, 1e-3))
        loader = RobustDataLoader(
            FlakyNoise(24, (3, 10), failures, folder),
            batch_size=8,
            num_workers=workers,
            seeding=seeding,
            faults=FaultPolicy(retry=retry),
        )
        told.append((flat(loader), random.random()))
        assert len(loader.fault_log) == 2 * failures
    assert told[0] == told[1]


@WORKERS
@pytest.mark.parametrize(("action", "failures"), [("replace", 3), ("skip", 3), ("raise", 3)])
def test_retries_end(workers: int, action: Any, failures: int, tmp_path: Path) -> None:
    """What still fails the third time is a fault like others."""
    policy = FaultPolicy(action=action, retry=NO_WAIT)
    loader = RobustDataLoader(Flaky(24, (3,), failures, tmp_path), batch_size=8, num_workers=workers, faults=policy)
    iterator = iter(loader)
    if action == "raise":
        with pytest.raises(ConnectionError, match="no route to 3"):
            next(iterator)
    assert len(list(iterator)) == (2 if action == "raise" else 3)
    (record,) = loader.fault_log
    done = {"replace": "replaced", "skip": "skipped", "raise": "raised"}[action]
    assert (record.index, record.action, record.attempts, record.error_type) == (3, done, 3, "ConnectionError")
    assert len(noted(tmp_path / "tries-3")) == 3


@WORKERS
def test_no_retry(workers: int, tmp_path: Path) -> None:
    """``retry=None`` replaces at the first failure."""
    loader = RobustDataLoader(
        Flaky(24, (3,), 1, tmp_path), batch_size=8, num_workers=workers, faults=FaultPolicy(retry=None)
    )
    assert 3 not in flat(loader)
    (record,) = loader.fault_log
    assert (record.action, record.attempts) == ("replaced", 1)


@WORKERS
@pytest.mark.parametrize(
    "kind", [ConnectionResetError, TimeoutError, InterruptedError, BlockingIOError, BrokenPipeError]
)
def test_what_is_transient(workers: int, kind: Any, tmp_path: Path) -> None:
    """What networks and busy file systems raise in passing is tried three times."""
    dataset = Raising(8, {3: Make(kind)}, log=tmp_path / "log")
    loader = RobustDataLoader(dataset, batch_size=8, num_workers=workers, faults=FaultPolicy(retry=NO_WAIT))
    assert len(flat(loader)) == 8
    assert noted(tmp_path / "log").count("3") == 3


@WORKERS
@pytest.mark.parametrize("kind", [ValueError, OSError, FileNotFoundError, PermissionError, EOFError, AssertionError])
def test_what_is_a_data_fault(workers: int, kind: Any, tmp_path: Path) -> None:
    """Damaged data stays damaged: it is tried once."""
    dataset = Raising(8, {3: Make(kind)}, log=tmp_path / "log")
    loader = RobustDataLoader(dataset, batch_size=8, num_workers=workers)
    assert len(flat(loader)) == 8
    assert noted(tmp_path / "log").count("3") == 1


def test_no_retry_machinery_without_a_transient_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The happy path, and a data fault, never touch tenacity."""

    def explode(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("tenacity was entered")

    monkeypatch.setattr(robustloader.worker.fetch, "Retrying", explode)
    assert flat(RobustDataLoader(Numbers(24), batch_size=8)) == list(range(24))
    assert len(flat(RobustDataLoader(raising((3,)), batch_size=8))) == 48
    with pytest.raises(AssertionError, match="tenacity"):
        list(RobustDataLoader(Raising(8, {3: offline}), batch_size=8, faults=FaultPolicy(fatal=(AssertionError,))))


@WORKERS
def test_each_good_sample_is_fetched_once(workers: int, tmp_path: Path) -> None:
    """A fault does not make its neighbours load twice, where ``__getitem__`` is all there is."""
    dataset = Raising(24, {3: damaged, 5: damaged}, log=tmp_path / "log")
    loader = RobustDataLoader(dataset, batch_size=8, num_workers=workers)
    iterator = iter(loader)
    used = []
    for _ in iterator:
        used += [spare for _, spare in iterator.batch_info.replaced.values()]
    fetched = sorted(map(int, noted(tmp_path / "log")))
    assert len(used) == 2
    assert fetched == sorted([*range(24), *used])


@WORKERS
@pytest.mark.parametrize("faults", ["replace", "skip", "raise"])
def test_without_faults_nothing_changes(workers: int, faults: Any) -> None:
    """No record, no event, no warning, and torch's batches."""
    listener = Listener()
    kwargs: dict[str, Any] = {"batch_size": 7, "num_workers": workers, "shuffle": True}
    loader = RobustDataLoader(
        Numbers(40), faults=faults, telemetry=listener.policy, generator=torch.Generator().manual_seed(1), **kwargs
    )
    stock = torch.utils.data.DataLoader(Numbers(40), generator=torch.Generator().manual_seed(1), **kwargs)
    assert [batch.tolist() for batch in loader] == [batch.tolist() for batch in stock]
    assert not loader.fault_log
    assert not listener.of(SampleReplaced)


@pytest.mark.parametrize("action", ["replace", "skip"])
@pytest.mark.parametrize("dataset", [Raising, WithItems])
def test_the_same_in_process_and_with_workers(action: Any, dataset: Any) -> None:
    """Batches, records and ``batch_info`` do not depend on who loads."""

    def run(workers: int) -> Any:
        loader = RobustDataLoader(
            dataset(64, dict.fromkeys((0, 9, 10, 31, 33, 63), damaged)),
            batch_size=8,
            num_workers=workers,
            shuffle=True,
            generator=torch.Generator().manual_seed(3),
            faults=FaultPolicy(action=action),
        )
        iterator = iter(loader)
        told = []
        for batch in iterator:
            info = iterator.batch_info
            told.append((batch.tolist(), info.index, info.indices, info.replaced, info.skipped))
        records = sorted((r.task, r.index, r.kind, r.action, r.replacement, r.message) for r in loader.fault_log)
        return told, records

    assert run(0) == run(1) == run(3)


@WORKERS
def test_indices_of_any_kind(workers: int) -> None:
    """A sampler may yield strings, tuples or tensors: records and replacements hold them as they are."""

    class ByName(Numbers):
        def __getitem__(self, index: Any) -> Any:
            if index == ("val", "b"):
                raise ValueError("bad file")
            return index

    names = [("val", letter) for letter in "abcdefgh"]
    loader = RobustDataLoader(ByName(8), batch_size=4, sampler=names, num_workers=workers, collate_fn=list)
    batches = [[tuple(sample) for sample in batch] for batch in loader]
    assert [len(batch) for batch in batches] == [4, 4]
    assert set(batches[0]) | set(batches[1]) <= set(names) - {("val", "b")}
    (record,) = loader.fault_log
    assert record.index == ("val", "b")
    assert record.replacement == batches[0][1]


@WORKERS
def test_collate_sees_what_torch_would_give_it(workers: int) -> None:
    """A list of samples in the order of the batch, replaced ones in their places."""
    seen = []

    def collate(samples: list[Any]) -> Any:
        seen.append(list(samples))
        return default_collate(samples)

    loader = RobustDataLoader(raising((2,), 8), batch_size=4, num_workers=workers, collate_fn=collate)
    first, second = (batch.tolist() for batch in loader)
    assert [first[place] for place in (0, 1, 3)] == [0, 1, 3]
    assert second == [4, 5, 6, 7]
    if not workers:
        assert seen == [first, second]


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


class Chained(Numbers):
    """Sample 3 raises because of something else."""

    def load(self, index: int) -> Any:
        if index == 3:
            try:
                raise damaged(index)
            except Damaged as error:
                raise ValueError("no picture") from error
        return index


class ChainedItems(Chained):
    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return [self[index] for index in indices]


FAULTY: dict[str, Callable[[Path], Any]] = {
    "raised": lambda folder: raising((3,), 8),
    "raised by __getitems__": lambda folder: WithItems(8, {3: damaged}),
    "raised from another": lambda folder: Chained(8),
    "raised by __getitems__ from another": lambda folder: ChainedItems(8),
    "retried": lambda folder: Flaky(8, (3,), 1, folder),
    "retried in vain": lambda folder: Flaky(8, (3,), 9, folder),
    "of another shape": lambda folder: Shaped(8, (3,)),
}


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("action", ["replace", "skip"])
@pytest.mark.parametrize("faulty", FAULTY)
def test_an_iterator_that_met_a_fault_goes_with_its_last_reference(faulty: str, action: Any, tmp_path: Path) -> None:
    """As one that met none: an error that is dealt with holds neither the iterator nor the samples."""
    loader = RobustDataLoader(FAULTY[faulty](tmp_path), 4, faults=FaultPolicy(action=action, retry=NO_WAIT))
    iterator = iter(loader)
    next(iterator)
    assert loader.fault_log.total == 1
    gone = weakref.ref(iterator)
    del iterator
    assert gone() is None
