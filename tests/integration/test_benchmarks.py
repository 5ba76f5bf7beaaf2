"""The benchmarks run from end to end; nothing here looks at how fast anything was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.tables import BEGIN, END

ROOT = Path(__file__).parents[2]


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=80)
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
