"""The fast suite under other versions of Python and torch: ``python -m tests.versions python3.12=2.6.0 -o RESULT``.

Question: does what is promised for torch 2.6 to 2.15 and for each Python hold there, and not only where it is made?
Method: for each pair, one after another: an environment from nothing, torch of that version as PyPI has it, everything
else as ``constraints.txt`` pins it (except what torch itself asks for), the last commit unpacked beside it, mypy, and
each file of ``PARTS`` in a pytest of its own, so that an interpreter that dies costs one file. Then the environment is
removed. The result file is written after each file, names the commit of each, and keeps the pairs that it has: started
again on the same commit, a run goes on where it stopped. ``--page PAGE.md`` puts the table of them all into a page.
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
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.tables import insert, write_result

BEGIN, END = "<!-- versions: begin -->", "<!-- versions: end -->"
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
TOOLS = ("hypothesis", "mypy", "opentelemetry-sdk", "pytest", "torchdata", "types-psutil", "types-tqdm")
"""Of the extra ``dev``, what these files need: the rest, with its frameworks, has versions of torch of its own."""

LIMIT_S = 1800.0
"""A file that takes longer has hung: the slowest takes a few minutes on two slow cores."""


@dataclass
class Outcome:
    """What became of one environment: of mypy, and of each file, as far as they have been run."""

    python: str
    torch: str
    versions: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, commit: str, counts: Counter[str], failures: list[dict[str, str]]) -> None:
        """Enter one file's tests, in the place of an earlier run of it."""
        self.files[name] = {"commit": commit, **dict(sorted(counts.items())), "failures": failures}

    def counts(self) -> Counter[str]:
        """Tests of all files together."""
        words = ("passed", "failed", "skipped")
        return Counter({word: sum(entry.get(word, 0) for entry in self.files.values()) for word in words})

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the result file."""
        counts = self.counts()
        return {
            "python": self.python,
            "torch": self.torch,
            "ok": counts["passed"] > 0 and not counts["failed"],
            "counts": dict(counts),
            "commits": sorted({entry["commit"] for entry in self.files.values()}),
            "files": dict(sorted(self.files.items())),
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
    made.install("-c", str(pins), "-e", ".[demo,telemetry,tune,watch]", *TOOLS)
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


def test_files(source: Path, only: str | None) -> Iterator[str]:
    """Each file to run."""
    for part in PARTS:
        for path in sorted((source / part).glob("test_*.py")) if (source / part).is_dir() else [source / part]:
            name = str(path.relative_to(source))
            if only is None or only in name:
                yield name


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
            said = "\n".join(filter(None, (bad[0].get("message"), bad[0].text)))
            failures.append({"test": f"{case.get('classname')}::{case.get('name')}", "said": said[:2000]})
        counts["failed" if bad else "skipped" if case.find("skipped") is not None else "passed"] += 1
    return counts, failures


def run_pair(interpreter: str, torch: str, *, before: tuple[str, ...], only: str | None, out: Path | None) -> Outcome:
    """Make one environment, run everything in it, and remove it."""
    with tempfile.TemporaryDirectory(prefix="robustloader-versions-") as name:
        folder = Path(name)
        commit = ask(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
        environment = make_environment(interpreter, torch, folder, before)
        versions = environment.freeze()
        python = ask([str(environment.python), "-c", "import platform; print(platform.python_version())"])
        outcome = Outcome(python, versions["torch"], versions, kept(out, python, versions["torch"]))
        print(f"Python {outcome.python}, torch {outcome.torch}", flush=True)
        steps = [] if only else ["mypy"]
        for step in (*steps, *test_files(environment.source, only)):
            if outcome.files.get(step, {}).get("commit") == commit:
                continue  # started again: this one is done
            if step == "mypy":
                counts, failures = run_mypy(environment, folder / "mypy")
            else:
                counts, failures = run_file(environment, step, folder / "report.xml")
            outcome.add(step, commit, counts, failures)
            print(f"  {step}: {', '.join(f'{number} {word}' for word, number in counts.items())}", flush=True)
            for failure in failures:
                print(f"    {failure['test']}: {failure['said'].splitlines()[0][:160]}", flush=True)
            if out is not None:
                keep(out, outcome)
    return outcome


def run_mypy(environment: Environment, cache: Path) -> tuple[Counter[str], list[dict[str, str]]]:
    """The package's own types, with the annotations that this torch has; counted as one test."""
    done = environment.compute("-m", "mypy", "--cache-dir", str(cache), capture_output=True)
    if done.returncode:
        return Counter(failed=1), [{"test": "mypy", "said": (done.stdout + done.stderr)[-2000:]}]
    return Counter(passed=1), []


def ask(command: list[str]) -> str:
    """What a command that has to succeed prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def kept(path: Path | None, python: str, torch: str) -> dict[str, dict[str, Any]]:
    """What the result file has of these versions: the files that were run."""
    for entry in read_environments(path):
        if (entry["python"], entry["torch"]) == (python, torch):
            return dict(entry["files"])
    return {}


def keep(path: Path, outcome: Outcome) -> None:
    """Enter an outcome into the result file, in the place of an older one of the same versions."""
    mine = outcome.to_dict()
    key = (mine["python"], mine["torch"])
    others = [entry for entry in read_environments(path) if (entry["python"], entry["torch"]) != key]
    environments = sorted([*others, mine], key=lambda entry: (entry["torch"], entry["python"]))
    write_result({"question": "the fast suite under other versions", "environments": environments}, path)


def read_environments(path: Path | None) -> list[dict[str, Any]]:
    """The environments of a result file; none where there is no file."""
    return list(json.loads(path.read_text())["environments"]) if path is not None and path.exists() else []


def render(environments: Sequence[dict[str, Any]]) -> str:
    """The table of a page: what each environment showed."""
    lines = ["| Python | torch | tests passed | failed | skipped | commit |", "|---|---|--:|--:|--:|---|"]
    for entry in environments:
        counts = entry["counts"]
        commits = ", ".join(f"`{commit[:10]}`" for commit in entry["commits"])
        lines.append(
            f"| {entry['python']} | {entry['torch']} | {counts.get('passed', 0):,} | {counts.get('failed', 0)} "
            f"| {counts.get('skipped', 0)} | {commits} |"
        )
    failures = [
        f"* Python {entry['python']}, torch {entry['torch']}: `{failure['test']}`"
        for entry in environments
        for file in entry["files"].values()
        for failure in file["failures"]
    ]
    return "\n".join([*lines, *(["", "What failed:", "", *failures] if failures else [])]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pairs that were asked for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("pairs", nargs="*", metavar="PYTHON=TORCH", help="an interpreter and a version of torch")
    parser.add_argument("-o", "--out", type=Path, metavar="RESULT.json")
    parser.add_argument("--page", type=Path, metavar="PAGE.md", help="where the table of the result goes, in the end")
    parser.add_argument("--only", metavar="TEXT")
    parser.add_argument("--before", default="", metavar="COMMAND")
    options = parser.parse_args(argv)
    ok = True
    for pair in options.pairs:
        interpreter, _, torch = pair.rpartition("=")
        if not interpreter:
            parser.error(f"{pair!r} is not of the form python3.12=2.6.0")
        before = tuple(shlex.split(options.before))
        found = run_pair(
            os.path.expanduser(interpreter), torch, before=before, only=options.only, out=options.out
        ).to_dict()
        print(f"  {found['counts']}", flush=True)
        ok &= found["ok"]
    if options.page is not None:
        table = render(read_environments(options.out))
        options.page.write_text(insert(options.page.read_text(), table, BEGIN, END))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
