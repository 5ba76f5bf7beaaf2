"""The fast suite under other versions of Python and torch: ``python -m tests.versions python3.12=2.6.0 -o RESULT``.

Question: does what is promised for torch 2.6 to 2.15 and for each Python hold there, and not only where it is made?
Method: for each pair, one after another: an environment from nothing, torch of that version as PyPI has it, everything
else as ``constraints.txt`` pins it (except what torch itself asks for), the last commit unpacked beside it, mypy, and
each file of ``PARTS`` in a pytest of its own, so that an interpreter that dies costs one file. Then the environment is
removed. The result file is written after each pair and keeps the others that it has.
Trap: on Linux, PyPI's torch brings three gigabytes of CUDA or more; TMPDIR should be on a disk that holds 10 GB.
Rerun: as above, with as many pairs as wanted; ``--only TEXT`` runs the files whose path contains it, without mypy;
``--before 'nice -n 19'`` puts a command before each step that computes. Exit status 1 when anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.results import write_json

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    "tests/unit",
    "tests/parity",
    "tests/faults",
    "tests/state",
    "tests/telemetry/test_tensorboard.py",
    "tests/chaos/test_deaths.py",
    "tests/chaos/test_hangs.py",
    "tests/chaos/test_leaving.py",
    "tests/chaos/test_poison.py",
    "tests/chaos/test_starting.py",
    "tests/chaos/test_streams.py",
)
LIMIT_S = 1800.0
"""A file that takes longer has hung: the slowest takes a few minutes on two slow cores."""


@dataclass
class Outcome:
    """What became of one environment."""

    python: str
    torch: str
    versions: dict[str, str]
    commit: str
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, str]] = field(default_factory=list)
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    types: str = ""
    duration_s: float = 0.0

    def add(self, part: str, counts: Counter[str], failures: list[dict[str, str]]) -> None:
        """Enter one file's tests under its folder."""
        so_far = Counter(self.parts.get(part, {}))
        self.parts[part] = dict(sorted((so_far + counts).items()))
        self.counts += counts
        self.failures += failures

    @property
    def ok(self) -> bool:
        """Whether tests ran, none failed, and the types hold."""
        return self.counts["passed"] > 0 and not self.failures and not self.types

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the result file."""
        return {
            "python": self.python,
            "torch": self.torch,
            "commit": self.commit,
            "ok": self.ok,
            "counts": dict(sorted(self.counts.items())),
            "parts": self.parts,
            "failures": self.failures,
            "types": self.types,
            "duration_s": round(self.duration_s, 1),
            "versions": self.versions,
        }


@dataclass(frozen=True)
class Environment:
    """A Python of its own, with one torch and everything the tests need."""

    python: Path
    source: Path
    before: tuple[str, ...]

    def compute(self, *words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        """Run this environment's Python where the source lies."""
        command = [*self.before, str(self.python), *words]
        return subprocess.run(command, cwd=self.source, text=True, check=False, stdin=subprocess.DEVNULL, **settings)

    def install(self, *words: str) -> None:
        """Install with pip, outside of ``before``: most of it is waiting for the network."""
        command = [str(self.python), "-m", "pip", "install", "--quiet", "--no-input", *words]
        subprocess.run(command, cwd=self.source, check=True, stdin=subprocess.DEVNULL)

    def freeze(self) -> dict[str, str]:
        """Installed versions, by the name that pip prints."""
        done = self.compute("-m", "pip", "list", "--format=json", capture_output=True)
        return {entry["name"]: entry["version"] for entry in json.loads(done.stdout)}


def make_environment(interpreter: str, torch: str, folder: Path, before: tuple[str, ...]) -> Environment:
    """An environment with ``torch``, and the last commit unpacked beside it."""
    source = folder / "source"
    source.mkdir()
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", "HEAD"], capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive, check=True)
    subprocess.run([interpreter, "-m", "venv", str(folder / "env")], check=True)
    made = Environment(folder / "env" / "bin" / "python", source, before)
    made.install("--no-cache-dir", f"torch=={torch}")
    pins = folder / "constraints.txt"
    pins.write_text("\n".join(merge_pins((source / "constraints.txt").read_text().splitlines(), made.freeze())) + "\n")
    made.install("-c", str(pins), "-e", ".[demo,dev]")
    return made


def merge_pins(lines: Sequence[str], installed: dict[str, str]) -> Iterator[str]:
    """The project's pins, except for what is installed already: torch and what it asks for stay as they are."""
    taken = {canonical(name) for name in installed}
    yield from (f"{name}=={version}" for name, version in installed.items() if canonical(name) != "pip")
    for line in lines:
        name = line.partition("#")[0].partition("==")[0].strip()
        if name and canonical(name) not in taken:
            yield line


def canonical(name: str) -> str:
    """A package's name as registries compare it."""
    return name.lower().replace("_", "-").replace(".", "-")


def test_files(source: Path, only: str | None) -> Iterator[tuple[str, str]]:
    """Each file to run, with the folder it counts for."""
    for part in PARTS:
        for path in sorted((source / part).glob("test_*.py")) if (source / part).is_dir() else [source / part]:
            name = str(path.relative_to(source))
            if only is None or only in name:
                yield str(Path(name).parent), name


def run_file(environment: Environment, name: str, report: Path) -> tuple[Counter[str], list[dict[str, str]]]:
    """One file's tests: how many passed, failed and were skipped, and what the failures said."""
    report.unlink(missing_ok=True)
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", name)
    try:
        done = environment.compute(*words, capture_output=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return Counter(failed=1), [{"test": name, "said": f"not finished after {LIMIT_S:.0f} s"}]
    if not report.exists():
        return Counter(failed=1), [{"test": name, "said": f"exit status {done.returncode}: {done.stdout[-2000:]}"}]
    counts, failures = read_report(report.read_text())
    if done.returncode not in (0, 5) and not failures:  # 5: a file all of whose tests are left out
        failures = [{"test": name, "said": f"exit status {done.returncode}: {done.stdout[-2000:]}"}]
        counts["failed"] += 1
    return counts, failures


def read_report(text: str) -> tuple[Counter[str], list[dict[str, str]]]:
    """What pytest's XML report says."""
    counts: Counter[str] = Counter()
    failures = []
    for case in ElementTree.fromstring(text).iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error")]
        if bad:
            said = bad[0].get("message") or (bad[0].text or "")
            failures.append({"test": f"{case.get('classname')}::{case.get('name')}", "said": said[:2000]})
        counts["failed" if bad else "skipped" if case.find("skipped") is not None else "passed"] += 1
    return counts, failures


def run_pair(interpreter: str, torch: str, *, before: tuple[str, ...], only: str | None) -> Outcome:
    """Make one environment, run everything in it, and remove it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="robustloader-versions-") as name:
        folder = Path(name)
        environment = make_environment(interpreter, torch, folder, before)
        versions = environment.freeze()
        python = environment.compute("-c", "import platform; print(platform.python_version())", capture_output=True)
        commit = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        outcome = Outcome(python.stdout.strip(), versions["torch"], versions, commit.stdout.strip())
        print(f"Python {outcome.python}, torch {outcome.torch}", flush=True)
        if only is None:
            types = environment.compute("-m", "mypy", "--cache-dir", str(folder / "mypy"), capture_output=True)
            outcome.types = types.stdout[-4000:] if types.returncode else ""
            print(f"  mypy: {types.stdout.strip().splitlines()[-1] if types.stdout else types.stderr}", flush=True)
        for part, test in test_files(environment.source, only):
            counts, failures = run_file(environment, test, folder / "report.xml")
            outcome.add(part, counts, failures)
            print(f"  {test}: {', '.join(f'{number} {word}' for word, number in counts.items())}", flush=True)
            for failure in failures:
                print(f"    {failure['test']}: {failure['said'].splitlines()[0][:160]}", flush=True)
    outcome.duration_s = time.monotonic() - began
    return outcome


def keep(path: Path, outcome: Outcome) -> None:
    """Enter an outcome into the result file, in the place of an older one of the same versions."""
    told = json.loads(path.read_text())["environments"] if path.exists() else []
    mine = outcome.to_dict()
    key = (mine["python"], mine["torch"])
    others = [entry for entry in told if (entry["python"], entry["torch"]) != key]
    environments = sorted([*others, mine], key=lambda entry: (entry["torch"], entry["python"]))
    write_json(path, {"question": "the fast suite under other versions", "environments": environments})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pairs that were asked for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("pairs", nargs="+", metavar="PYTHON=TORCH", help="an interpreter and a version of torch")
    parser.add_argument("-o", "--out", type=Path, metavar="RESULT.json")
    parser.add_argument("--only", metavar="TEXT")
    parser.add_argument("--before", default="", metavar="COMMAND")
    options = parser.parse_args(argv)
    ok = True
    for pair in options.pairs:
        interpreter, _, torch = pair.rpartition("=")
        if not interpreter:
            parser.error(f"{pair!r} is not of the form python3.12=2.6.0")
        outcome = run_pair(
            os.path.expanduser(interpreter), torch, before=tuple(shlex.split(options.before)), only=options.only
        )
        print(f"  {dict(outcome.counts)} in {outcome.duration_s:.0f} s", flush=True)
        ok &= outcome.ok
        if options.out is not None:
            keep(options.out, outcome)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
