"""``tune()`` and ``compare()`` with real workers, and their commands. Nothing here looks at how fast anything was."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import RandomSampler

from robustloader import OptionError, ResourceError, compare, tune
from robustloader.cli import main
from robustloader.tuning.report import check_plot
from tests.support.parity_data import random_state
from tests.support.tuned import Clock, Drawing, NoCopy, Says, Stream, Troubled, Waiting, make_empty

NAME = "tests.support.tuned"


@pytest.fixture(scope="module", autouse=True)
def fonts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """matplotlib keeps the files of its fonts open for good once it has drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure()
    figure.subplots().set_title("0")
    for suffix in ("png", "svg"):
        figure.savefig(tmp_path_factory.mktemp("fonts") / f"0.{suffix}")


def quick(dataset: Any, **options: Any) -> Any:
    arguments = {"batch_size": 4, "candidates": (0, 1, 2), "seconds": 2, "progress": False}
    return tune(dataset, **(arguments | options))


# --- tune -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1])
def test_nothing_of_the_callers_is_used_up(seed: int) -> None:
    """Not the random states, not the dataset's own generator, not the sampler's, not the generator argument."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    dataset, generator, own = Drawing(), torch.Generator(), torch.Generator()
    sampler = RandomSampler(dataset, generator=generator)
    before = (random_state(), generator.get_state().tolist(), own.get_state().tolist(), dataset.own.getstate())
    report = quick(dataset, sampler=sampler, generator=own)
    after = (random_state(), generator.get_state().tolist(), own.get_state().tolist(), dataset.own.getstate())
    assert before == after
    assert dataset.calls == 0
    assert [row.num_workers for row in report.rows] == [0, 1, 2]
    assert all(row.batches_per_s > 0 for row in report.rows)


def test_a_stream() -> None:
    """It is read from its beginning for each turn, by copies."""
    stream = Stream()
    report = quick(stream)
    assert stream.given == 0
    assert {row.num_workers for row in report.rows} <= {0, 1, 2}


def test_a_stream_that_is_too_short() -> None:
    """What cannot be measured is left out, and said."""
    report = quick(Stream(12), seconds=1)
    assert [row.num_workers for row in report.rows]
    assert report.best in (0, 1, 2)


def test_a_stream_that_cannot_be_measured_at_all() -> None:
    """The error says what was tried."""
    with pytest.raises(ValueError, match="nothing was measured: num_workers=0 could not be measured: the dataset ends"):
        quick(Stream(3), candidates=(0, 1), seconds=1)


def test_a_dataset_that_cannot_be_copied() -> None:
    """It is loaded in workers only."""
    report = quick(NoCopy())
    assert [row.num_workers for row in report.rows] == [1, 2]
    assert "cannot be copied" in report.notes[0]


def test_a_slow_step_hides_the_data() -> None:
    """A batch is ready long before the trainer wants it, and the report says so."""
    report = quick(Drawing(), step_s=0.1, candidates=(0, 1))
    assert report.verdict == "data is not your bottleneck"


@pytest.mark.filterwarnings("ignore::robustloader.RobustLoaderWarning")
def test_faults_and_deaths_are_told() -> None:
    """In words and in the rows: the figures are not those of a dataset that loads."""
    report = quick(Troubled(), candidates=(0, 1), seconds=1)
    deaths, faults = report.notes
    assert deaths.startswith("workers died or hung ")
    assert "(SIGKILL) with num_workers=1: " in deaths
    assert " samples failed for good (OSError, poison): " in faults
    told = {row["num_workers"]: row for row in json.loads(json.dumps(report.to_dict()))["rows"]}
    assert told[0]["deaths"] == 0 < told[1]["deaths"]
    assert told[0]["faults"] > 0
    assert "Note: workers died" in str(report)


def test_an_empty_dataset() -> None:
    """There is nothing to measure."""
    with pytest.raises(ValueError, match="empty"):
        quick(make_empty())


@pytest.mark.parametrize("batch_size", [64, 65, 999_999_999])
def test_a_batch_is_no_larger_than_an_epoch(batch_size: int) -> None:
    """What the training gets is measured, and the report says how large that is."""
    report = quick(Drawing(), batch_size=batch_size, candidates=(0, 1), seconds=1)
    assert report.batch_size == 64
    assert report.batch_bytes == 64 * 4 * 4
    noted = [f"an epoch is one batch of 64 samples, fewer than batch_size={batch_size}"] if batch_size > 64 else []
    assert list(report.notes) == noted
    with pytest.raises(ValueError, match="with batch_size=65 and drop_last there is no batch"):
        quick(Drawing(), batch_size=65, drop_last=True)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"seconds": 0}, "seconds"),
        ({"step_s": -1}, "step_s"),
        ({"candidates": ()}, "candidates"),
        ({"candidates": (1.5,)}, "candidates"),
        ({"candidates": 3}, "candidates"),
        ({"candidates": [1, "2"]}, "candidates"),
        ({"candidates": [1, [2]]}, "candidates"),
        ({"prefetch_factor": 0}, "prefetch_factor"),
        ({"prefetch_factor": "2"}, "prefetch_factor"),
        ({"num_workers": 3}, "num_workers"),
        ({"batch_sampler": [[0]]}, "batch_sampler"),
    ],
)
def test_wrong_options(options: dict[str, Any], name: str) -> None:
    """Refused by name."""
    with pytest.raises(OptionError, match=name):
        quick(Waiting(), **options)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """JSON on stdout, progress on stderr, a picture in a file, status 0."""
    pytest.importorskip("matplotlib")
    plot = tmp_path / "curve.svg"
    words = ["tune", f"{NAME}:Waiting", "--batch-size", "4", "--candidates", "0,1", "--seconds", "1.5"]
    assert main([*words, "--json", "--plot", str(plot)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["num_workers"] for row in told["rows"]] == [0, 1]
    assert plot.read_text().rstrip().endswith("</svg>")


@pytest.mark.parametrize("name", ["curve.nonsense", "missing/curve.png", "missing/curve"])
def test_a_plot_that_cannot_be_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    """It is said before anything is measured; the dataset is not even made."""
    pytest.importorskip("matplotlib")
    assert main(["tune", "nowhere:make", "--plot", str(tmp_path / name)]) == 1
    assert "no plot: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_plot_that_can_be_drawn(tmp_path: Path) -> None:
    """Looking leaves no trace: not of a new file, not in one that is there, and it waits for no reader of a pipe."""
    pytest.importorskip("matplotlib")
    (tmp_path / "there.svg").write_text("kept")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "curve").mkdir()  # a name without a suffix becomes curve.png
    before = sorted(tmp_path.iterdir())
    for name in ("new.PDF", "there.svg", "pipe.png", "curve"):
        check_plot(tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.svg").read_text() == "kept"


@pytest.mark.parametrize("command", ["tune", "compare"])
@pytest.mark.parametrize(
    ("words", "status"),
    [
        ((), 2),
        (("nowhere:make",), 2),
        ((f"{NAME}:Drawing", "--batch-size", "0"), 2),
        ((f"{NAME}:make_empty",), 1),
        ((f"{NAME}:Fails",), 1),
    ],
)
def test_exit_statuses(capsys: pytest.CaptureFixture[str], command: str, words: tuple[str, ...], status: int) -> None:
    """2 for bad arguments, 1 for trouble, and a line that says what."""
    assert main([command, *words]) == status
    assert f"robustloader {command}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("tune", f"{NAME}:make_chatty", "--candidates", "0,1", "--seconds", "0.5"),
        ("compare", f"{NAME}:make_chatty", "--batches", "2"),
        ("doctor", "--dataset", f"{NAME}:make_chatty"),
    ],
)
def test_a_dataset_that_prints(words: tuple[str, ...]) -> None:
    """Standard output holds the JSON document alone, whoever prints."""
    command = [sys.executable, "-m", "robustloader", *words, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert json.loads(ended.stdout)
    for line in (
        "making",
        "to the first standard output",
        "sample through Python",
        "sample through the descriptor",
    ):
        assert line in ended.stderr


def test_warnings_have_no_place_in_the_interpreter() -> None:
    """No line of the user's calls the loader: the text alone is told."""
    command = [
        sys.executable,
        "-m",
        "robustloader",
        "tune",
        f"{NAME}:Troubled",
        "--candidates",
        "0",
        "--seconds",
        "0.3",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert "warning: sample 13 was replaced: OSError: no such photograph" in ended.stderr
    assert "runpy" not in ended.stderr


@pytest.mark.parametrize(("closed", "dataset"), [(">&-", "Drawing"), ("2>&-", "make_chatty"), (">&- 2>&-", "Drawing")])
def test_closed_outputs(closed: str, dataset: str) -> None:
    """A command works without them, and puts nothing where it does not belong."""
    words = f"{sys.executable} -m robustloader compare {NAME}:{dataset} --batches 1 --json {closed}"
    ended = subprocess.run(["sh", "-c", words], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended
    assert bool(ended.stdout) == (closed == "2>&-")
    assert not ended.stdout or json.loads(ended.stdout)["identical"]


# --- compare ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_same_batches(workers: int, shuffle: bool) -> None:
    """With random augmentations, in process and in workers; nothing of the caller's is used up."""
    dataset, generator = Drawing(), torch.Generator()
    before = (random_state(), generator.get_state().tolist(), dataset.own.getstate())
    found = compare(dataset, batch_size=4, num_workers=workers, shuffle=shuffle, generator=generator)
    assert found.identical, found
    assert found.batches == 16
    assert found.ratio > 0
    assert "identical: 16 batches" in str(found)
    assert (random_state(), generator.get_state().tolist(), dataset.own.getstate()) == before


def test_a_stream_is_compared() -> None:
    """Up to the number of batches asked for."""
    found = compare(Stream(), batches=5, batch_size=4, num_workers=1)
    assert found.identical
    assert found.batches == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_is_not_deterministic(workers: int) -> None:
    """The first difference is found in its place, NaNs are none, and torch's loader is shown to differ from itself."""
    found = compare(Clock(), batch_size=4, num_workers=workers)
    assert not found.identical
    assert found.first_difference is not None
    assert found.torch_difference is not None
    for difference in (found.first_difference, found.torch_difference):
        assert (difference.batch, difference.path, difference.what) == (2, "batch['image'][1][1, 1]", "value")
        assert difference.first != difference.second
    assert "not deterministic" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["identical"] is False


def test_a_difference_between_the_loaders_is_not_laid_at_the_datasets_door() -> None:
    """seeding="batch" gives other random numbers: torch's loader still agrees with itself."""
    found = compare(Drawing(), batch_size=4, num_workers=1, seeding="batch")
    assert not found.identical
    assert found.torch_difference is None
    assert "not deterministic" not in str(found)


def test_the_compare_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Status 0 for the same batches, 1 for others."""
    assert main(["compare", f"{NAME}:Drawing", "--batch-size", "4", "--batches", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"] is True
    assert main(["compare", f"{NAME}:Clock", "--batch-size", "4", "--num-workers", "0"]) == 1
    assert "batch['image'][1][1, 1]" in capsys.readouterr().out


@pytest.mark.parametrize(
    "torch_says",
    [
        "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)",
        "Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm).",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
    ],
)
def test_shared_memory_is_torchs_trouble(torch_says: str) -> None:
    """The error says whose it is and what to do; another one stays what it was."""
    with pytest.raises(
        ResourceError, match=r"torch's loader has run out of shared memory: .*/dev/shm.*To compare"
    ) as told:
        compare(Says(torch_says), num_workers=0)
    assert told.value.remedy
    assert torch_says in str(told.value.__cause__)
    with pytest.raises(RuntimeError, match="another") as other:
        compare(Says("another"), num_workers=0)
    assert not isinstance(other.value, ResourceError)


def test_a_small_dev_shm() -> None:
    """The command says so in one line, with status 1."""
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", mount, "sh")
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("needs root, and unshare(1) to mount a small /dev/shm")
    command = [*prefix, sys.executable, "-m", "robustloader", "compare", f"{NAME}:Large"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1
    assert "torch's loader has run out of shared memory" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
