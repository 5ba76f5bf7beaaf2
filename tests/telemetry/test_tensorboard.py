"""Curves for TensorBoard, read back by TensorBoard's own reader."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from robustloader import OptionError, TensorBoardSink
from tests.support.telemetry import BATCHES, run_epoch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_a_run_as_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One point per epoch, live points over the batches delivered so far, failures where they happened."""
    monkeypatch.setenv("RANK", "1")
    sink = TensorBoardSink(tmp_path / "input-{rank}")
    try:
        summaries = [run_epoch(sink, workers=2), run_epoch(sink, workers=0)]
        told = read(tmp_path / "input-1")  # before it is closed: the end of an epoch is flushed
    finally:
        sink.close()
    tags = set(told.Tags()["scalars"])
    assert {"robustloader/epoch/wait_fraction", "robustloader/live/samples_per_s"} <= tags
    durations = told.Scalars("robustloader/epoch/duration_s")
    assert [event.value for event in durations] == pytest.approx([summary.duration_s for summary in summaries])
    # Two loaders of one process, each with an epoch 0; the live curves go on.
    assert [event.step for event in durations] == [0, 0]
    live = told.Scalars("robustloader/live/wait_fraction")
    assert [event.step for event in live] == list(range(1, 2 * BATCHES + 1))
    assert all(0 <= event.value <= 1 for event in live)
    assert [event.value for event in told.Scalars("robustloader/total/faults")] == [1, 2]
    assert [event.value for event in told.Scalars("robustloader/total/deaths")] == [1]
    text = told.Tensors("robustloader/epoch/summary/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "verdict" in text and "samples/s" in text
    labels = told.Tensors("robustloader/labels/text_summary")[0].tensor_proto.string_val[0].decode()
    assert labels == "rank=1"


def test_a_writer_of_the_users(tmp_path: Path) -> None:
    """It is used as it is, and left open."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        sink = TensorBoardSink(writer=writer, prefix="val")
        run_epoch(sink, workers=0)
        twin = pickle.loads(pickle.dumps(sink))
        assert twin.log_dir == str(tmp_path)
        sink.close()
        writer.add_scalar("loss", 1.0, 0)
    assert {"val/epoch/samples_per_s", "loss"} <= set(read(tmp_path).Tags()["scalars"])


def test_one_of_folder_and_writer() -> None:
    with pytest.raises(OptionError, match="log_dir"):
        TensorBoardSink()
