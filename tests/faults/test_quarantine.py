"""The quarantine: samples that failed for good are written down, and never fetched again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tenacity import stop_after_attempt, wait_none

from robustloader import FaultPolicy, OptionError, Retry, RobustDataLoader, RobustLoaderWarning
from tests.support.datasets import Numbers, Raising, Shaped, damaged, noted
from tests.support.hostile import Unpicklable
from tests.support.listener import flat

quiet = pytest.mark.filterwarnings("ignore::robustloader.RobustLoaderWarning")

WORKERS = pytest.mark.parametrize("workers", [0, 2])
ACTIONS = pytest.mark.parametrize("action", ["replace", "skip"])
BAD = (3, 17, 18)


def keys(path: Path) -> list[Any]:
    return sorted(json.loads(line)["key"] for line in path.read_text().splitlines())


@quiet
@WORKERS
@ACTIONS
def test_known_samples_are_never_fetched_again(workers: int, action: Any, tmp_path: Path) -> None:
    """A second run, with the samples mended or not, does not even ask for them."""
    path, log = tmp_path / "bad.jsonl", tmp_path / "log"
    policy = FaultPolicy(action=action, quarantine=path)
    first = RobustDataLoader(Raising(24, dict.fromkeys(BAD, damaged)), batch_size=8, num_workers=workers, faults=policy)
    before = [len(batch) for batch in first]
    assert keys(path) == list(BAD)
    content = path.read_bytes()

    second = RobustDataLoader(Numbers(24, log=log), batch_size=8, num_workers=workers, faults=policy)
    iterator = iter(second)
    batches, infos = [], []
    for batch in iterator:
        batches.append(batch.tolist())
        infos.append(iterator.batch_info)
    assert [len(batch) for batch in batches] == before
    assert not set(flat(batches)) & set(BAD)
    assert not set(map(int, noted(log))) & set(BAD)
    assert path.read_bytes() == content
    assert sorted((record.index, record.action) for record in second.fault_log) == [(i, "quarantined") for i in BAD]
    summary = second.summary()
    assert (summary.faults, summary.quarantined) == (0, 3)
    for info, batch in zip(infos, batches, strict=True):
        assert list(info.indices) == batch


@quiet
def test_a_program_that_changes_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file stays where the loader was made, and the policy says what it was given."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    policy = FaultPolicy(quarantine="bad.jsonl")
    loader = RobustDataLoader(Raising(24, dict.fromkeys(BAD, damaged)), batch_size=8, faults=policy)
    monkeypatch.chdir(tmp_path / "run")
    list(loader)
    assert keys(tmp_path / "bad.jsonl") == list(BAD)
    assert policy.quarantine == "bad.jsonl"


@quiet
@WORKERS
def test_within_a_run(workers: int, tmp_path: Path) -> None:
    """The next epoch knows what this one found."""
    log = tmp_path / "log"
    dataset = Raising(24, dict.fromkeys(BAD, damaged), log=log)
    policy = FaultPolicy(quarantine=tmp_path / "bad.jsonl")
    loader = RobustDataLoader(dataset, batch_size=8, num_workers=workers, faults=policy)
    for _ in range(3):
        assert len(flat(loader)) == 24
    fetched = list(map(int, noted(log)))
    assert {index: fetched.count(index) for index in BAD} == dict.fromkeys(BAD, 1)


@quiet
@WORKERS
def test_without_a_file_the_next_epoch_tries_again(workers: int, tmp_path: Path) -> None:
    """A file that was mended in between is loaded."""
    log = tmp_path / "log"
    dataset = Raising(24, {3: damaged}, log=log)
    loader = RobustDataLoader(dataset, batch_size=8, num_workers=workers)
    assert 3 not in flat(loader)
    dataset.errors.clear()
    assert flat(loader) == list(range(24))


@quiet
@WORKERS
def test_what_failed_in_passing_is_not_written(workers: int, tmp_path: Path) -> None:
    """Tomorrow the network is back."""
    path, down = tmp_path / "bad.jsonl", tmp_path / "down"
    down.touch()

    class Remote(Numbers):
        def __getitem__(self, index: int) -> Any:
            if index in (3, 10) and down.exists():
                raise ConnectionError("connection refused")
            return super().__getitem__(index)

    policy = FaultPolicy(quarantine=path, retry=Retry(stop=stop_after_attempt(2), wait=wait_none()))
    loader = RobustDataLoader(Remote(24), batch_size=8, num_workers=workers, faults=policy)
    assert not {3, 10} & set(flat(loader))
    assert not path.exists()
    down.unlink()
    assert flat(loader) == list(range(24))


@quiet
@WORKERS
def test_a_fatal_error_condemns_no_sample(workers: int, tmp_path: Path) -> None:
    """A misspelt name is not the data's fault."""
    path = tmp_path / "bad.jsonl"
    loader = RobustDataLoader(
        Raising(24, {3: NameError}), batch_size=8, num_workers=workers, faults=FaultPolicy(quarantine=path)
    )
    with pytest.raises(NameError):
        list(loader)
    assert not path.exists()


@quiet
@WORKERS
def test_collate_and_pickling_faults_are_written(workers: int, tmp_path: Path) -> None:
    """Whatever made the sample unusable."""
    path = tmp_path / "bad.jsonl"
    policy = FaultPolicy(quarantine=path)
    list(RobustDataLoader(Shaped(24, (5,)), batch_size=8, num_workers=workers, faults=policy))
    if workers:
        from tests.support.datasets import Made

        dataset = Made(24, {7: Unpicklable})
        list(RobustDataLoader(dataset, batch_size=8, num_workers=workers, faults=policy, collate_fn=list))
    assert keys(path) == [5, 7][: 1 + bool(workers)]


@quiet
@WORKERS
def test_a_whole_batch_known_to_be_bad(workers: int, tmp_path: Path) -> None:
    """Is filled with others, or with one other, and nothing of it is fetched."""
    path, log = tmp_path / "bad.jsonl", tmp_path / "log"
    path.write_text("".join(f'{{"schema": 1, "key": {index}}}\n' for index in range(8, 16)))
    for action, size in (("replace", 8), ("skip", 1)):
        policy = FaultPolicy(quarantine=path, action=action)  # type: ignore[arg-type]
        loader = RobustDataLoader(Numbers(24, log=log), batch_size=8, num_workers=workers, faults=policy)
        assert [len(batch) for batch in loader] == [8, size, 8]
    assert not set(map(int, noted(log))) & set(range(8, 16))


@WORKERS
def test_raise_with_known_samples(workers: int, tmp_path: Path) -> None:
    """Known bad samples are still not fetched when new ones shall raise."""
    path, log = tmp_path / "bad.jsonl", tmp_path / "log"
    path.write_text('{"schema": 1, "key": 3}\n')
    policy = FaultPolicy(quarantine=path, action="raise")
    loader = RobustDataLoader(Numbers(24, log=log), batch_size=8, num_workers=workers, faults=policy)
    assert 3 not in flat(loader)
    assert "3" not in noted(log)


@pytest.mark.parametrize("place", ["folder", "missing folder", "damaged"])
def test_a_file_that_cannot_be_used_is_refused_by_the_constructor(place: str, tmp_path: Path) -> None:
    """Before anything is loaded, with the field's name, and without changing a byte."""
    damaged_file = tmp_path / "damaged.jsonl"
    damaged_file.write_bytes(b'{"schema": 1, "key": 3}\n\xff\x00 nothing of ours')
    path = {"folder": tmp_path, "missing folder": tmp_path / "a" / "b.jsonl", "damaged": damaged_file}[place]
    content = damaged_file.read_bytes()
    with pytest.raises(OptionError, match="quarantine") as caught:
        RobustDataLoader(Numbers(8), faults=FaultPolicy(quarantine=path))
    assert caught.value.field == "quarantine"
    assert damaged_file.read_bytes() == content


@WORKERS
def test_a_target_that_cannot_be_written(workers: int, tmp_path: Path) -> None:
    """One warning about it; training goes on."""
    path = tmp_path / "bad.jsonl"
    loader = RobustDataLoader(
        Raising(24, dict.fromkeys(BAD, damaged)),
        batch_size=8,
        num_workers=workers,
        faults=FaultPolicy(quarantine=path),
    )
    path.mkdir()
    with pytest.warns(RobustLoaderWarning) as caught:
        assert len(flat(loader)) == 24
    assert sum("cannot append" in str(warning.message) for warning in caught) == 1
