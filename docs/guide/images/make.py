"""Make the screenshot of the guide: a made-up run, its report, and headless Chromium."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

from robustloader.cli import main  # noqa: E402
from tests.support.browser import browse  # noqa: E402
from tests.support.runs import write_run  # noqa: E402

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        page = folder / "report.html"
        status = main(["report", str(write_run(folder / "run.jsonl")), "-o", str(page)])
        if status:
            raise subprocess.CalledProcessError(status, "robustloader report")
        target = Path(__file__).with_name("report.png")
        browse(page, folder / "profile", "--window-size=1100,1180", f"--screenshot={target}", fragment="#theme=light")
        print(f"wrote {target}")
