"""The benchmarks run from end to end; nothing here looks at how fast anything was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cuda
from benchmarks.tables import BEGIN, END

ROOT = Path(__file__).parents[2]


def run(*words: str, patience_s: float = 80) -> str:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=patience_s)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_quick_run_leaves_a_result_and_its_tables(tmp_path: Path) -> None:
    """Two workloads, the same batches from every loader, every round recorded, and a page made of it."""
    out, page = tmp_path / "results" / "quick.json", tmp_path / "page.md"
    printed = run("benchmarks", "--quick", "--only", "tiny,text", "--rounds", "2", "--out", str(out))
    result = json.loads(out.read_text())

    assert result["form"] == "quick"
    assert result["machine"]["usable_cores"] >= 1
    assert result["versions"]["torch"]
    assert list(result["measurements"]) == ["tiny", "text"]
    for made in result["measurements"].values():
        for name in ("robustloader", "torch", "limit"):
            assert len(made["loaders"][name]["rounds"]) == 2
            assert min(made["loaders"][name]["rounds"]) > 0
        assert made["ratios"]["torch"]["low"] <= made["ratios"]["torch"]["high"]
        assert made["of_limit"] > 0
        # The peers are no part of the development environment; where they are missing, the result says so.
        for name in ("torchdata", "spdl"):
            figures = made["loaders"][name]
            assert len(figures.get("rounds", ())) == 2 or "No module named" in figures["cannot"]
    judged = {(verdict["measurement"], verdict["against"]) for verdict in result["verdicts"]}
    assert judged == {(name, peer) for name in ("tiny", "text") for peer in ("torch", "torchdata", "spdl")}
    assert printed.count("\n") == len(judged) + 1

    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    run("benchmarks.tables", str(out), str(page))
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert sum(line.startswith("| `tiny` |") for line in lines) == 2 + 3


def test_the_study_of_workers_runs(tmp_path: Path) -> None:
    """Both loaders at every number of workers, the choices, the simulator's error, verdicts, figures, and a page."""
    pytest.importorskip("matplotlib")
    out, page = tmp_path / "workers.json", tmp_path / "page.md"
    printed = run(
        "benchmarks.num_workers", "--quick", "--only", "in memory", "--out", str(out), "--plot", str(tmp_path)
    )
    result = json.loads(out.read_text())
    made = result["kinds"]["in memory"]
    assert [row["workers"] for row in made["workers"]] == [0, 1, 2]
    for row in made["workers"]:
        for name in ("robustloader", "torch"):
            assert row[name]["batches_per_s"] > 0
            assert row[name]["memory_mb"] > 0
    assert made["calibration"]["cross_s"] > 0
    assert set(made["simulator_error"]) == {"0", "1", "2"}
    assert made["tuned"]["workers"] >= 0
    assert len(made["auto"]["epochs"]) == 1
    assert made["auto"]["most_workers"] >= 1
    assert {verdict["measurement"] for verdict in result["verdicts"]} == {"in memory"}
    assert printed.count("\n") == len(result["verdicts"]) + 1
    assert {path.name for path in tmp_path.glob("*.svg")} == {"num-workers.svg", "num-workers-batches.svg"}

    page.write_text((ROOT / "docs" / "guide" / "num-workers.md").read_text())
    run("benchmarks.workers_page", str(out), str(page))
    assert "quick form" in page.read_text()


def test_the_simulation_of_scale_runs(tmp_path: Path) -> None:
    """It is repeatable, says that it is simulated, and its figure is drawn."""
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    run("benchmarks.scale", "--quick", "--out", str(first), "--plot", str(tmp_path))
    run("benchmarks.scale", "--quick", "--out", str(second))
    assert first.read_text() == second.read_text()
    assert json.loads(first.read_text())["simulated"] is True
    assert (tmp_path / "scale.svg").exists()


@pytest.mark.deadline(240)
def test_the_cuda_program_runs_on_a_stand_in(tmp_path: Path) -> None:
    """Copies, pinning and training, with the CPU in the place of a device: every round recorded, tables in the page.

    A part that is measured again leaves the others as they are.
    """
    out, page = tmp_path / "cuda.json", tmp_path / "page.md"
    page.write_text(f"before\n{cuda.BEGIN}\n{cuda.END}\nafter\n")
    options = ("--short", "--device", "cpu", "--workers", "1", "--only", "tiny")
    printed = run("benchmarks.cuda", *options, "--out", str(out), "--page", str(page), patience_s=120)
    result = json.loads(out.read_text())
    assert "measures nothing" in result["device"]["name"]
    for made in (result["copies"]["tiny"], result["training"]):
        assert list(made["rounds"]) == ["robustloader", "torch", "limit"]
        assert all(values["batch_s"][0] > 0 for values in made["rounds"].values())
    assert all(0 <= values["idle_share"][0] <= 1 for values in result["training"]["rounds"].values())
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    for row, times in (("| `tiny` |", 2), ("| robustloader |", 1), ("| torch |", 1)):
        assert sum(line.startswith(row) for line in lines) == times
        assert row in printed

    run("benchmarks.cuda", *options, "--parts", "pinning", "--out", str(out), patience_s=110)
    again = json.loads(out.read_text())
    assert (again["copies"], again["training"]) == (result["copies"], result["training"])
    assert list(again["pinning"]["tiny"]["rounds"]) == ["pinned", "pageable"]
    assert again["pinning"] != result["pinning"]
