"""Put the tables of a result into ``docs/benchmarks.md``.

Question: what does the result say, for a reader?
Method: everything between the two markers is replaced by what :func:`render` makes of the JSON.
Trap: none of the numbers is written by hand; edit the prose outside the markers only.
Rerun: ``python -m benchmarks.tables RESULT PAGE``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["BEGIN", "END", "insert", "publish", "render", "write_result"]

BEGIN = "<!-- measured: begin -->"
END = "<!-- measured: end -->"

PEERS = ("torch", "torchdata", "spdl")
OURS = "robustloader"


def render(result: Mapping[str, Any]) -> str:
    """A result as Markdown."""
    return "\n".join(_lines(result)) + "\n"


def insert(page: str, text: str, opening: str = BEGIN, closing: str = END) -> str:
    """``page`` with ``text`` between its markers.

    Raises:
        ValueError: the page does not have both markers, in order, once.
    """
    before, begin, rest = page.partition(opening)
    _, end, after = rest.partition(closing)
    if not begin or not end or opening in after or closing in after:
        raise ValueError(f"the page needs {opening} and {closing}, once each")
    return f"{before}{opening}\n\n{text}\n{closing}{after}"


def write_result(result: Mapping[str, Any], out: Path, *, table: str = "") -> None:
    """Replace the result file in one step: who is interrupted leaves the old file or the new one.

    Args:
        result: plain JSON.
        out: the file.
        table: the key of a dictionary with many entries, each of which gets one line.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = result.get(table, {})
    text = json.dumps({**result, table: {}} if rows else result, indent=1)
    if rows:
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
        text = text.replace(f"{json.dumps(table)}: {{}}", f"{json.dumps(table)}: {{\n{lines}\n }}")
    beside = out.with_name(f"{out.name}.new")
    beside.write_text(text + "\n")
    beside.replace(out)


def publish(
    result: Mapping[str, Any],
    render: Callable[[Mapping[str, Any]], str],
    out: Path,
    page: Path | None,
    opening: str,
    closing: str,
) -> None:
    """Write a result, put its tables between the markers of ``page``, if one is given, and print them."""
    write_result(result, out)
    text = render(result)
    if page:
        page.write_text(insert(page.read_text(), text, opening, closing))
    print(f"{text}\n{out}, {result['took_s']:.0f} s")


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    measurements, machine, versions = result["measurements"], result["machine"], result["versions"]
    commit = result["commit"]
    yield "![Time a batch takes in other loaders, as a multiple of this one's](images/benchmarks-ratios.svg)"
    yield ""
    yield "![Milliseconds a batch, with the limit](images/benchmarks-times.svg)"
    yield ""
    yield "All numbers: [the result file](../benchmarks/results/full.json), each single round included."
    yield ""
    yield (
        f"{machine['cpu']}, {machine['usable_cores']} cores, {machine['memory_gib']:g} GiB, Linux {machine['kernel']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        + f"; {result['workers']} workers, transport `{result['transport']}`; commit "
        f"`{(commit['hash'] or 'unknown')[:10]}`{' with changes' if commit['dirty'] else ''}, "
        f"{result['started'][:10]}, {result['form']} form, {result['took_s'] / 60:.1f} minutes."
    )
    speed = {name: made for name, made in measurements.items() if made["subject"] == OURS and name != "memory"}
    if speed:
        yield ""
        yield "| workload | what | robustloader, ms | torch, ms | torchdata, ms | SPDL, ms | limit, ms | of the limit |"
        yield "|---|---|--:|--:|--:|--:|--:|--:|"
        for name, made in speed.items():
            cells = [_figure(made["loaders"].get(loader)) for loader in (OURS, *PEERS, "limit")]
            share = "" if made["of_limit"] is None else f"{made['of_limit']:.2f}"
            yield f"| `{name}` | {made['what']} | {' | '.join(cells)} | {share} |"
        yield ""
        yield "How many times as long the others take, with the 95 % interval of the median:"
        yield ""
        yield "| workload | torch | torchdata | SPDL |"
        yield "|---|--:|--:|--:|"
        for name, made in speed.items():
            yield f"| `{name}` | {' | '.join(_ratio(made['ratios'].get(peer)) for peer in PEERS)} |"
    if "memory" in measurements:
        yield ""
        yield f"Memory, {measurements['memory']['what']}:"
        yield ""
        yield "| loader | peak, MB | before the loader was made, MB |"
        yield "|---|--:|--:|"
        for name, figures in measurements["memory"]["loaders"].items():
            yield f"| {name} | {_figure(figures)} | {figures.get('before_mb', 0):.0f} |"
    pairs = {name: made for name, made in measurements.items() if made["subject"] != OURS}
    if pairs:
        yield ""
        yield "What the policies and telemetry cost: time without them over time with them, 1 is nothing."
        yield ""
        yield "| comparison | ratio |"
        yield "|---|--:|"
        for made in pairs.values():
            yield f"| {made['what']} | {_ratio(next(iter(made['ratios'].values()), None), digits=3)} |"
    if result["verdicts"]:
        yield ""
        yield "What this project wants to show, and whether this result does:"
        yield ""
        yield "| workload | against | wanted | shown | |"
        yield "|---|---|---|---|---|"
        words = {True: "yes", False: "**no**", None: "not compared"}
        for verdict in result["verdicts"]:
            row = (f"`{verdict['measurement']}`", verdict["against"], verdict["wanted"], verdict["shown"])
            yield f"| {' | '.join(map(_cell, row))} | {words[verdict['passed']]} |"
    refused = [
        f"* `{name}`, {loader}: {_cell(figures['cannot'])}"
        for name, made in measurements.items()
        for loader, figures in made["loaders"].items()
        if "cannot" in figures
    ]
    if refused:
        yield ""
        yield "What could not be measured:"
        yield ""
        yield from refused


def _figure(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return ""
    return "cannot" if "cannot" in figures else f"{figures['median']:.3g}"


def _ratio(ratio: Mapping[str, float] | None, digits: int = 2) -> str:
    if ratio is None:
        return ""
    return f"{ratio['median']:.{digits}f} ({ratio['low']:.{digits}f} to {ratio['high']:.{digits}f})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Rewrite a page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    options.page.write_text(insert(options.page.read_text(), render(result)))


if __name__ == "__main__":
    main()
