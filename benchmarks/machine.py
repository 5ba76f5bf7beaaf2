"""Where and with what a result was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

__all__ = ["describe"]

PACKAGES = ("robustloader", "torch", "numpy", "torchdata", "spdl-core", "pillow", "psutil")


def describe(*code: str) -> dict[str, Any]:
    """Machine, versions and commit, as plain JSON; ``code``: git pathspecs of what was run besides the benchmarks."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "kernel": platform.release(),
            "load_at_start": round(os.getloadavg()[0], 2),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "commit": _commit(code),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit(more: tuple[str, ...]) -> dict[str, Any]:
    """The commit of the working tree, git's name for the content of ``robustloader/`` in it, which other commits may
    share, and whether the code that was measured differs from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        code = (":/robustloader", ":/benchmarks/*.py", *more)
        return {
            "hash": git("rev-parse", "HEAD"),
            "package": git("rev-parse", "HEAD:robustloader"),
            "dirty": bool(git("status", "--porcelain", "--", *code)),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"hash": None, "package": None, "dirty": None}
