"""What the facts of a machine mean, line by line."""

from __future__ import annotations

from typing import Any

import pytest

from robustloader.checkup import HostReport
from robustloader.decisions.limits import Descriptors, Memory, Processes, SharedMemory
from robustloader.decisions.verdicts import Check, HostFacts, SampleFacts, judge_host

MIB = 1 << 20
GIB = 1 << 30
HEALTHY: dict[str, Any] = {
    "cpus": 16,
    "ranks": 1,
    "memory": Memory(limit_bytes=64 * GIB, free_bytes=50 * GIB),
    "shared": SharedMemory(size_bytes=32 * GIB, free_bytes=32 * GIB),
    "descriptors": Descriptors(used=10, soft=65_536, hard=1 << 20),
    "processes": Processes(free=None),
    "kills_group": False,
    "start_methods": ("fork", "spawn", "forkserver"),
    "sharing": "file_descriptor",
    "container": "none",
    "pidfd": True,
    "workers": 8,
    "prefetch_factor": 2,
    "batch_size": 64,
}
BATCH = SampleFacts(batch_bytes=38 * MIB, tensors=2, load_s=0.1, worker_bytes=300 * MIB)


def judge(**changes: Any) -> dict[str, Check]:
    return {check.name: check for check in judge_host(HostFacts(**{**HEALTHY, **changes}))}


def test_a_healthy_machine() -> None:
    """Nothing to say, on the machine or on the plan."""
    for checks in (judge(), judge(sample=BATCH)):
        assert {check.verdict for check in checks.values()} == {"ok"}
        assert not any(check.remedy for check in checks.values())
        assert HostReport(tuple(checks.values())).ok


@pytest.mark.parametrize(
    ("changes", "name", "verdict", "remedy"),
    [
        ({"workers": 17}, "processors", "warning", "num_workers=16"),
        ({"ranks": 4}, "processors", "warning", "num_workers=4"),
        ({"memory": Memory(limit_bytes=64 * GIB, free_bytes=6 * GIB)}, "memory", "warning", "more memory"),
        ({"memory": Memory(limit_bytes=64 * GIB, free_bytes=1 * GIB)}, "memory", "problem", "more memory"),
        ({"kills_group": True}, "memory killer", "warning", "memory.oom.group"),
        ({"kills_group": True, "container": "kubernetes"}, "memory killer", "warning", "singleProcessOOMKill"),
        ({"shared": None}, "/dev/shm", "warning", "mount"),
        (
            {"shared": SharedMemory(size_bytes=64 * MIB, free_bytes=64 * MIB), "container": "docker"},
            "/dev/shm",
            "warning",
            "--shm-size",
        ),
        (
            {"shared": SharedMemory(size_bytes=GIB, free_bytes=MIB), "container": "kubernetes"},
            "/dev/shm",
            "warning",
            "medium: Memory",
        ),
        (
            {"shared": SharedMemory(size_bytes=GIB, free_bytes=GIB, stale=("torch_1_2_3",), stale_bytes=5)},
            "left behind",
            "warning",
            "rm /dev/shm/torch_1_2_3",
        ),
        ({"descriptors": Descriptors(used=10, soft=64, hard=4096)}, "open files", "warning", "ulimit -n 106"),
        ({"descriptors": Descriptors(used=10, soft=64, hard=64)}, "open files", "problem", "ulimit -Hn"),
        ({"descriptors": Descriptors(used=10, soft=1024, hard=4096)}, "open files", "ok", "for torch: ulimit -n 4096"),
        ({"processes": Processes(free=7, limit="pids.max")}, "processes", "problem", "--pids-limit"),
        ({"pidfd": False}, "pidfd", "warning", "seccomp"),
        (
            {"sample": BATCH, "shared": SharedMemory(size_bytes=64 * MIB, free_bytes=64 * MIB)},
            "torch's loader",
            "warning",
            "RobustDataLoader",
        ),
        (
            {"sample": BATCH, "descriptors": Descriptors(used=1000, soft=1024, hard=1024), "workers": 0},
            "torch's files",
            "ok",
            "",
        ),
        (
            {"sample": BATCH, "descriptors": Descriptors(used=10, soft=40, hard=4096)},
            "torch's files",
            "warning",
            "for torch: ulimit -n",
        ),
        (
            {"sample": BATCH, "memory": Memory(limit_bytes=2 * GIB, free_bytes=GIB)},
            "lookahead",
            "warning",
            "prefetch_factor=1",
        ),
        (
            {"sample": BATCH, "memory": Memory(limit_bytes=GIB, free_bytes=110 * MIB)},
            "lookahead",
            "problem",
            "num_workers=1, prefetch_factor=1, and smaller batches",
        ),
    ],
)
def test_one_thing_is_wrong(changes: dict[str, Any], name: str, verdict: str, remedy: str) -> None:
    """It is found, judged, and what to do is said."""
    check = judge(**changes)[name]
    assert check.verdict == verdict
    assert remedy in check.remedy


def test_what_torch_would_do() -> None:
    """Its lookahead and the trainer's batch lie in /dev/shm: 2 × 8 + 1 batches of 38 MiB."""
    check = judge(sample=BATCH)["torch's loader"]
    assert check.facts == {"wanted_bytes": 17 * 38 * MIB, "free_bytes": 32 * GIB}
    assert judge(sample=BATCH, workers=0, shared=None)["torch's loader"].verdict == "ok"


def test_the_table_is_a_table() -> None:
    """At most 100 columns, every line of it, and a count at its end."""
    checks = judge(sample=BATCH, kills_group=True, shared=None, descriptors=Descriptors(used=10, soft=64, hard=64))
    report = HostReport(tuple(checks.values()))
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 100
    for check in report.checks:
        assert any(line.startswith(f"{check.name:<15} {check.verdict}") for line in lines)
    assert lines[-1].startswith("1 problem, ")
    assert not report.ok
    assert str(HostReport(tuple(judge().values()))).endswith("all is well")
