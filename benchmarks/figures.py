"""Draw a result.

Question: how do the loaders compare, at a glance?
Method: bars from the JSON alone: how many times as long each peer takes as this project's loader, with the interval,
    and how long a batch takes in each, against the limit.
Trap: both axes are logarithmic; a bar twice as long is not twice as much. Read the tables for numbers.
Rerun: ``python -m benchmarks.figures RESULT FOLDER``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib import ticker

PEERS = ("torch", "torchdata", "spdl")
COLOURS = {
    "robustloader": "#2166ac",
    "torch": "#ee4c2c",
    "torchdata": "#f4a582",
    "spdl": "#878787",
    "limit": "#000000",
}
# The same figure from the same numbers is the same file.
plt.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "none", "font.size": 10})


def draw_ratios(measurements: Mapping[str, Any], path: Path) -> None:
    """How many times as long the peers take."""
    figure, axes = plt.subplots(figsize=(8, 0.55 * len(measurements) + 1.4))
    height = 0.8 / len(PEERS)
    for place, peer in enumerate(PEERS):
        for row, made in enumerate(measurements.values()):
            ratio = made["ratios"].get(peer)
            if ratio is None:
                continue
            errors = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
            where = row + (place - 1) * height
            axes.barh(where, ratio["median"] - 1, height, left=1, color=COLOURS[peer])
            axes.errorbar(ratio["median"], where, xerr=errors, color="#333333", linewidth=0.8, capsize=1.5)
        axes.barh(0, 0, 0, color=COLOURS[peer], label={"spdl": "SPDL"}.get(peer, peer))
    axes.axvline(1, color=COLOURS["robustloader"], linewidth=1.5)
    _finish(axes, measurements, "time a batch takes, × robustloader's (blue line; right of it is slower)")
    _save(figure, path)


def draw_times(measurements: Mapping[str, Any], path: Path) -> None:
    """Milliseconds a batch, all loaders and the limit."""
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(measurements) + 1.4))
    for name, colour in COLOURS.items():
        rows = [row for row, made in enumerate(measurements.values()) if "median" in made["loaders"].get(name, {})]
        medians = [list(measurements.values())[row]["loaders"][name]["median"] for row in rows]
        if rows:
            marker, size = ("|", 160) if name == "limit" else ("o", 36)
            label = {"spdl": "SPDL"}.get(name, name)
            axes.scatter(medians, rows, s=size, marker=marker, color=colour, label=label)
    _finish(axes, measurements, "milliseconds a batch")
    _save(figure, path)


def _finish(axes: Any, measurements: Mapping[str, Any], label: str) -> None:
    axes.set_xscale("log")
    axes.margins(y=0.03)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_yticks(range(len(measurements)), list(measurements))
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(COLOURS), loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", facecolor="white", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Draw both figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    speed = {
        name: made
        for name, made in result["measurements"].items()
        if made["subject"] == "robustloader" and name != "memory"
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    draw_ratios(speed, options.folder / "benchmarks-ratios.svg")
    draw_times(speed, options.folder / "benchmarks-times.svg")


if __name__ == "__main__":
    main()
