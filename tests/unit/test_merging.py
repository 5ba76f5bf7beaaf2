"""The summaries of many ranks as one."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustloader import EpochSummary, MergedSummary, OptionError, merge_summaries
from robustloader.telemetry import WorkerSummary

WORKER = WorkerSummary(
    worker_id=0, tasks=10, samples=320, busy_s=1.0, load_p95_s=0.1, peak_rss_bytes=1 << 28, restarts=0
)


def summary(**changes: Any) -> EpochSummary:
    zeros = {each.name: 0 for each in dataclasses.fields(EpochSummary)}
    made: dict[str, Any] = {
        **zeros,
        "complete": True,
        "batches": 100,
        "samples": 3200,
        "bytes": 1 << 20,
        "duration_s": 10.0,
        "wait_s": 1.0,
        "step_s": 9.0,
        "workers_requested": 2,
        "workers_at_end": 2,
        "workers": (WORKER,),
        "resizes": (),
        "verdict": "balanced",
        "advice": "Nothing to do.",
    }
    return EpochSummary(**{**made, **changes})


def ranks() -> list[EpochSummary]:
    slow = summary(wait_s=6.0, step_s=4.0, verdict="input-bound", advice="More workers.", load_p95_s=0.5)
    return [summary(), slow, summary(faults=3, replaced=3, crashes=1, restarts=1, duration_s=12.5)]


def test_what_all_did_and_who_is_worst() -> None:
    """Sums over the ranks, the slowest one's time, and the advice of the one that waits most."""
    merged = merge_summaries(ranks())
    assert (merged.ranks, merged.epoch, merged.complete, merged.in_step) == (3, 0, True, True)
    assert (merged.batches, merged.samples, merged.faults, merged.crashes, merged.restarts) == (300, 9600, 3, 1, 1)
    assert (merged.duration_s, merged.samples_per_s) == (12.5, 768)
    assert (merged.wait_s, merged.step_s, merged.wait_fraction) == (8, 22, 8 / 30)
    assert (merged.worst_rank, merged.verdict, merged.advice) == (1, "input-bound", "More workers.")
    waits = merged.spreads["wait_s"]
    assert (waits.lowest, waits.median, waits.highest) == (1, 1, 6)
    assert (waits.lowest_rank, waits.highest_rank) == (0, 1)
    assert merged.spreads["faults"].highest_rank == 2


def test_ranks_out_of_step_are_named() -> None:
    """With their numbers of batches, in the first line; an epoch that one rank left early is not complete."""
    merged = merge_summaries([summary(), summary(batches=98, complete=False)])
    assert not merged.in_step and not merged.complete
    first = str(merged).splitlines()[0]
    assert "NOT IN STEP: 98 batches on rank 1, 100 on rank 0" in first
    assert first.endswith("not complete")


def test_it_takes_what_was_sent_or_written() -> None:
    """Summaries, their dicts and their JSON, mixed; and what a newer version may have added."""
    first, second, third = ranks()
    newer = {**second.to_dict(), "colour": "blue", "workers": [{**dataclasses.asdict(WORKER), "mood": "good"}]}
    assert merge_summaries([first, newer, json.dumps(third.to_dict())]) == merge_summaries(ranks())


def test_it_prints_and_is_plain() -> None:
    """Within a screen; and JSON gives the same dict back."""
    merged = merge_summaries(ranks())
    lines = str(merged).splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 100
    assert lines[0] == "epoch 0 of 3 ranks: 100 batches each, in 12.5 s"
    assert "verdict    input-bound (rank 1)" in lines
    assert json.loads(json.dumps(merged.to_dict())) == merged.to_dict()


@pytest.mark.parametrize(
    "wrong",
    [[], [None], ["{"], [{"epoch": 1}], [summary(), summary(epoch=1)], [3]],
)
def test_what_is_refused(wrong: Any) -> None:
    """No summaries, something else, half a summary, or two epochs."""
    with pytest.raises(OptionError, match="summar"):
        merge_summaries(wrong)


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 100), st.integers(0, 5)), min_size=1, max_size=9))
def test_one_rank_more_or_less_adds_up(rows: list[tuple[int, float, int]]) -> None:
    """Sums and extremes are those of the parts, also of ranks that did nothing at all."""
    told = [summary(batches=b, wait_s=w, faults=f, duration_s=w, step_s=0) for b, w, f in rows]
    merged: MergedSummary = merge_summaries(told)
    assert merged.batches == sum(b for b, _, _ in rows)
    assert merged.faults == sum(f for _, _, f in rows)
    assert merged.spreads["wait_s"].highest == told[merged.worst_rank].wait_s == max(w for _, w, _ in rows)
    assert merged.in_step == (len({b for b, _, _ in rows}) == 1)
    assert str(merged)
