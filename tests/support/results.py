"""What a result file says about where it comes from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import psutil
import torch

import robustloader
from robustloader.system import host

ROOT = Path(__file__).resolve().parents[2]


def origin() -> dict[str, Any]:
    """Machine, versions and commit."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain").splitlines(),
        "versions": {
            "robustloader": robustloader.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "psutil": version("psutil"),
        },
        "machine": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpus": os.cpu_count(),
            "usable_cpus": host.usable_cpus(),
            "memory_bytes": psutil.virtual_memory().total,
            "load_average": [round(load, 2) for load in os.getloadavg()],
        },
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result in one step: who is interrupted leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()
