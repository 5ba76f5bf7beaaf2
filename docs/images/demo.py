"""Run ``robustloader demo`` and keep what it prints: the picture demo.svg, and the summary in README.md.

    python docs/images/demo.py            # about two minutes
    python docs/images/demo.py OUTPUT     # draw again from a demo's output that was kept

The picture is a selection of the output's lines, each as it was printed but for what is cut at the right edge, and for
how long it took, which is the machine's. What is left out is shown as an ellipsis, as is the summary, which README.md
has as text. Needs rich (extra ``watch``).
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich import _export_format
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[2]
PICTURE = Path(__file__).with_name("demo.svg")
README = ROOT / "README.md"
BEGIN, END = "<!-- summary: begin -->", "<!-- summary: end -->"
WIDTH = 104
FAULTS_SHOWN = 5
CLAIMS_SHOWN = 5
ELLIPSIS = "  …"

STYLES = (
    (r"^\d  .*$|^-{3,}$", "bold cyan"),
    (r"^  - .*$", "red"),
    (r"^  \+ .*$", "green"),
    (r"^    (\w*Error|from \w*Error).*$", "red"),
    (r"^  RobustLoaderWarning:", "yellow"),
    (r"^  holds\b|^\d+ of \d+ claims hold.*$", "green"),
    (r"^  FAILS\b", "bold red"),
    (r"^  (epoch \d+:.*batches in.*|epoch  sample.*)$", "bold"),
    (r"^  (speed|delivered|waiting|computing|per batch|faults|crashes|workers|memory|verdict|advice)\b", "cyan"),
    (r"^\$ .*$", "bold"),
)
"""What matches is drawn so."""


def run_demo() -> str:
    """What the demo prints when nobody watches it."""
    folder = Path(tempfile.gettempdir()) / "digits"
    command = [sys.executable, "-m", "robustloader", "demo", "--dir", str(folder)]
    try:
        return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def chapter(lines: list[str], number: int) -> list[str]:
    """The lines of one chapter, its heading first."""
    starts = [at for at, line in enumerate(lines) if re.match(r"\d  \S", line)] + [len(lines)]
    begin = next(at for at in starts if lines[at].startswith(f"{number}  "))
    return lines[begin : starts[starts.index(begin) + 1]]


def summary(lines: list[str]) -> list[str]:
    """The first epoch's summary."""
    begin = next(at for at, line in enumerate(lines) if re.match(r"  epoch 0: \d+ batches in", line))
    return lines[begin : lines.index("", begin)]


def faults(lines: list[str]) -> list[str]:
    """The fault log's heading, its first lines, and the one of the sample that kills workers."""
    begin = lines.index("  The fault log") + 2
    rows = [line for line in lines[begin:] if re.match(r"\s+(epoch|0)\s+(sample|\d+)  ", line)]
    shown = rows[: FAULTS_SHOWN + 1]
    return [*shown, ELLIPSIS, *(row for row in rows if " poison " in row and row not in shown), ELLIPSIS]


def selection(lines: list[str]) -> list[str]:
    """What the picture shows."""
    third = chapter(lines, 3)
    progress = [line for line in third if line.startswith(("  - ", "  + ", "  RobustLoaderWarning", "  epoch 0: "))]
    before = progress[: next(at for at, line in enumerate(progress) if "batches in" in line)]
    accuracy = next(line for line in third if line.startswith("  test accuracy"))
    claims = chapter(lines, 5)
    held = [line for line in claims if line.startswith(("  holds", "  FAILS"))]
    return [
        "$ robustloader demo",
        ELLIPSIS,
        *chapter(lines, 2),
        *third[:2],
        *before,
        ELLIPSIS,
        accuracy,
        "",
        *faults(lines),
        "",
        *claims[:2],
        *held[:CLAIMS_SHOWN],
        ELLIPSIS,
        next(line.partition(",")[0] for line in claims if "claims hold" in line),
    ]


def draw(lines: list[str]) -> None:
    """Write the picture. Without the web font that rich names: whoever reads it needs no network."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    for line in lines:
        text = Text(line if len(line) <= WIDTH else line[: WIDTH - 1] + "…")
        for pattern, style in STYLES:
            text.highlight_regex(pattern, style)
        console.print(text, no_wrap=True, overflow="ellipsis")
    template = re.sub(r"@font-face \{\{.*?\}\}\s*", "", _export_format.CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    template = template.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace")
    svg = console.export_svg(title="robustloader demo", code_format=template, unique_id="demo")
    PICTURE.write_text(svg, encoding="utf-8")


def write_summary(lines: list[str]) -> None:
    """Put the first epoch's summary between the markers in README.md."""
    text = README.read_text(encoding="utf-8")
    block = "\n".join(line.removeprefix("  ") for line in summary(lines))
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n```text\n{block}\n```\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    printed = Path(sys.argv[1]).read_text(encoding="utf-8") if len(sys.argv) > 1 else run_demo()
    draw(selection(printed.splitlines()))
    write_summary(printed.splitlines())
    print(f"wrote {PICTURE} and the summary in {README}")
