"""Put the figures of the study of num_workers into ``docs/guide/num-workers.md``.

Question: what do the curves of ``num_workers.py`` show, for a reader?
Method: the page has places with names; what stands in each is replaced by what :func:`render` makes of the JSON.
Trap: none of the figures is written by hand; a test compares the page with the result file. Edit the prose outside the
    markers only, and without figures.
Rerun: ``python -m benchmarks.workers_page RESULT PAGE``
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import insert

__all__ = ["RESULT", "fill", "markers", "render"]

RESULT = "../../benchmarks/results/num_workers.json"
"""From the page."""

OURS, TORCH = "robustloader", "torch"
WORDS = {True: "yes", False: "**no**", None: "not compared"}


def markers(name: str) -> tuple[str, str]:
    """What stands before and after a place of the page."""
    return f"<!-- measured, {name}: begin -->", f"<!-- measured, {name}: end -->"


def fill(page: str, result: Mapping[str, Any]) -> str:
    """The page with every place filled anew.

    Raises:
        ValueError: a place is missing or there twice.
    """
    for name, text in render(result).items():
        page = insert(page, text, *markers(name))
    return page


def render(result: Mapping[str, Any]) -> dict[str, str]:
    """Markdown by the name of its place."""
    kinds = result["kinds"]
    places = {
        "machine": _machine(result),
        "overview": _overview(kinds),
        "overhead": _overhead(kinds),
        "crossing": _crossing(kinds),
        "zero": _zero(kinds),
        "too many": _too_many(kinds),
        "prefetch": _prefetch(kinds),
        "batch size": _batch_sizes(kinds),
        "pin_memory": _pinning(kinds),
        "memory": _memory(kinds),
        "first batch": _first_batch(kinds),
        "choices": _choices(result),
        "simulator": _simulator(kinds),
    }
    return {name: "\n".join(lines) + "\n" for name, lines in places.items()}


def _cite(text: str) -> str:
    """A figure, and where it comes from."""
    return f"[{text}]({RESULT})"


def _row(made: Mapping[str, Any], workers: int) -> Mapping[str, Any]:
    return next(row for row in made["workers"] if row["workers"] == workers)


def _rate(made: Mapping[str, Any], workers: int, loader: str = OURS) -> float:
    return float(_row(made, workers)[loader]["batches_per_s"])


def _numbers(made: Mapping[str, Any]) -> list[int]:
    return [row["workers"] for row in made["workers"]]


def _best(made: Mapping[str, Any], loader: str = OURS) -> int:
    return max(_numbers(made), key=lambda number: _rate(made, number, loader))


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|---|{'--:|' * (len(head) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _machine(result: Mapping[str, Any]) -> Iterator[str]:
    machine, commit = result["machine"], result["commit"]
    yield (
        f"{machine['cpu']}, {machine['usable_cores']} cores, {machine['memory_gib']:g} GiB, Linux {machine['kernel']}, "
        f"Python {result['versions']['python']}, torch {result['versions']['torch']}; commit "
        f"`{(commit['hash'] or 'unknown')[:10]}`{' with changes' if commit['dirty'] else ''}, "
        f"{result['started'][:10]}, {result['form']} form, {result['took_s'] / 60:.1f} minutes: "
        f"[the result file]({RESULT}), each single round included."
    )
    others = max(made["disturbance"]["others"] for made in result["kinds"].values())
    steal = max(made["disturbance"]["steal"] for made in result["kinds"].values())
    yield ""
    yield (
        f"Meanwhile other processes of this machine took at most {_cite(f'{others:.1%}')} of its processors, its host "
        f"{_cite(f'{steal:.1%}')}."
    )


def _overview(kinds: Mapping[str, Any]) -> Iterator[str]:
    yield from _table(
        ("dataset", "a batch", "best", "batches/s there", "without workers", "2 workers", "most", "torch's best"),
        (
            (
                kind,
                made["what"],
                str(made["best"]),
                _figure(_rate(made, made["best"])),
                _figure(_rate(made, 0)),
                _figure(_rate(made, 2)),
                f"{_numbers(made)[-1]}: {_figure(_rate(made, _numbers(made)[-1]))}",
                f"{_best(made, TORCH)}: {_figure(_rate(made, _best(made, TORCH), TORCH))}",
            )
            for kind, made in kinds.items()
        ),
    )


def _overhead(kinds: Mapping[str, Any]) -> Iterator[str]:
    yield from _table(
        (
            "processor time a batch, ms",
            "no worker",
            "1 worker: training process",
            "1 worker: worker",
            f"{_last(kinds)} workers: together",
            "throughput, 1 against none",
        ),
        (
            (
                kind,
                _figure(_row(made, 0)[OURS]["trainer_ms"]),
                _figure(_row(made, 1)[OURS]["trainer_ms"]),
                _figure(_row(made, 1)[OURS]["workers_ms"]),
                _figure(sum(_row(made, _numbers(made)[-1])[OURS][name] for name in ("trainer_ms", "workers_ms"))),
                f"{_rate(made, 1) / _rate(made, 0):.2f} ×",
            )
            for kind, made in kinds.items()
        ),
    )
    slower = {kind: _rate(made, 1) / _rate(made, 0) for kind, made in kinds.items()}
    losing = [kind for kind, ratio in slower.items() if ratio < 0.97]
    yield ""
    if losing:
        worst = min(losing, key=lambda kind: slower[kind])
        yield (
            f"One worker is slower than none for {len(losing)} of {len(kinds)} ({', '.join(losing)}), down to "
            f"{_cite(f'{slower[worst]:.2f} ×')} for *{worst}*."
        )
    else:
        yield f"One worker is slower than none for {_cite('none')} of the {len(kinds)}."


def _last(kinds: Mapping[str, Any]) -> int:
    return max(_numbers(made)[-1] for made in kinds.values())


def _crossing(kinds: Mapping[str, Any]) -> Iterator[str]:
    def cost(made: Mapping[str, Any], loader: str) -> float:
        one, none = _row(made, 1)[loader], _row(made, 0)[loader]
        return float(one["trainer_ms"] + one["workers_ms"] - none["trainer_ms"])

    yield from _table(
        ("processor time for a crossing, ms", "sending", "receiving", "both, torch's loader: more than no worker"),
        (
            (
                kind,
                _figure(1e3 * made["calibration"]["send_s"]),
                _figure(1e3 * made["calibration"]["cross_s"]),
                f"{cost(made, TORCH):.3g}",
            )
            for kind, made in kinds.items()
        ),
    )
    received = [1e3 * made["calibration"]["cross_s"] for made in kinds.values()]
    yield ""
    yield (
        f"Receiving a batch takes {_cite(f'{min(received):.2g} to {max(received):.2g} ms')} of the training process, "
        "and that does not grow with its size: large tensors stay where the worker wrote them."
    )


def _zero(kinds: Mapping[str, Any]) -> Iterator[str]:
    zero = [kind for kind, made in kinds.items() if made["best"] == 0]
    if zero:
        for kind in zero:
            made = kinds[kind]
            second = max((number for number in _numbers(made) if number), key=lambda number: _rate(made, number))
            one = f"{_rate(made, 0) / _rate(made, second):.2f} ×"
            yield (
                f"* *{kind}*: loading in the training process is {_cite(one)} as fast as the best number of workers, "
                f"which is {second}."
            )
    else:
        yield f"Here {_cite('none')} of the {len(kinds)} is fastest without workers."


def _too_many(kinds: Mapping[str, Any]) -> Iterator[str]:
    yield from _table(
        ("throughput, × the best", *(str(number) for number in range(_last(kinds) + 1))),
        (
            (kind, *(f"{_rate(made, number) / _rate(made, made['best']):.2f}" for number in _numbers(made)))
            for kind, made in kinds.items()
        ),
    )
    share = {kind: _rate(made, _numbers(made)[-1]) / _rate(made, made["best"]) for kind, made in kinds.items()}
    worst = min(share, key=lambda kind: share[kind])
    yield ""
    yield f"With {_last(kinds)} workers *{worst}* keeps {_cite(f'{share[worst]:.0%}')} of its best throughput."


def _prefetch(kinds: Mapping[str, Any]) -> Iterator[str]:
    factors = [row["prefetch_factor"] for row in next(iter(kinds.values()))["prefetch"]]
    yield from _table(
        ("throughput, × that with prefetch_factor=2", "workers", *map(str, factors)),
        (
            (kind, str(made["prefetch"][0]["workers"]), *(f"{ratio:.2f}" for ratio in _against(made, "prefetch", 2)))
            for kind, made in kinds.items()
        ),
    )
    deepest = {kind: _against(made, "prefetch", 2)[-1] for kind, made in kinds.items()}
    most = max(deepest, key=lambda kind: deepest[kind])
    yield ""
    yield (
        f"Looking {factors[-1]} batches ahead instead of 2 changes the throughput by "
        f"{_cite(f'{deepest[most] - 1:+.0%}')} for *{most}*, by "
        f"{_cite(f'{statistics.median(deepest.values()) - 1:+.0%}')} in the middle."
    )


def _against(made: Mapping[str, Any], sweep: str, usual: int) -> list[float]:
    """Throughput in samples against the usual setting."""
    name = {"prefetch": "prefetch_factor", "batch_sizes": "batch_size"}[sweep]
    rates = {
        row[name]: row[OURS]["batches_per_s"] * (row[name] if sweep == "batch_sizes" else 1) for row in made[sweep]
    }
    return [rate / rates[usual] for rate in rates.values()]


def _batch_sizes(kinds: Mapping[str, Any]) -> Iterator[str]:
    factors = next(iter(kinds.values()))["batch_sizes"]
    usual = next(iter(kinds.values()))["batch_size"]
    yield from _table(
        (
            "samples/s, × those with the usual size",
            "usual size",
            *(f"× {row['batch_size'] / usual:g}" for row in factors),
        ),
        (
            (kind, str(made["batch_size"]), *_sizes(made, [row["batch_size"] / usual for row in factors]))
            for kind, made in kinds.items()
        ),
    )
    gains = {kind: _against(made, "batch_sizes", made["batch_size"])[-1] for kind, made in kinds.items()}
    most = max(gains, key=lambda kind: gains[kind])
    yield ""
    yield (
        f"Batches of the largest size load {_cite(f'{gains[most]:.2f} ×')} as many samples a second as the usual ones "
        f"for *{most}*."
    )


def _sizes(made: Mapping[str, Any], factors: Sequence[float]) -> list[str]:
    ratios = dict(
        zip(
            (row["batch_size"] / made["batch_size"] for row in made["batch_sizes"]),
            _against(made, "batch_sizes", made["batch_size"]),
            strict=True,
        )
    )
    return [f"{ratios[factor]:.2f}" if factor in ratios else "" for factor in factors]


def _pinning(kinds: Mapping[str, Any]) -> Iterator[str]:
    measured = {kind: made["pin_memory"] for kind, made in kinds.items() if made["pin_memory"]}
    if not measured:
        yield (
            "Not measured: this machine has no accelerator, and without one `pin_memory` does nothing. Where there is "
            "one, the same command measures it."
        )
        return
    yield from _table(
        ("batches/s, copied to the device", "pageable", "pinned"),
        ((kind, *(_figure(row[OURS]["batches_per_s"]) for row in rows)) for kind, rows in measured.items()),
    )
    yield ""
    yield f"All figures: {_cite('the result file')}."


def _memory(kinds: Mapping[str, Any]) -> Iterator[str]:
    def each(made: Mapping[str, Any], loader: str) -> float:
        """Least squares over one worker and more."""
        points = [(row["workers"], row[loader]["memory_mb"]) for row in made["workers"] if row["workers"]]
        return statistics.linear_regression(*zip(*points, strict=True)).slope

    yield from _table(
        ("memory of all processes, MB", "no worker", "1", str(_last(kinds)), "each worker", "each, torch's loader"),
        (
            (
                kind,
                *(f"{_row(made, number)[OURS]['memory_mb']:,.0f}" for number in (0, 1, _numbers(made)[-1])),
                f"{each(made, OURS):.0f}",
                f"{each(made, TORCH):.0f}",
            )
            for kind, made in kinds.items()
        ),
    )
    slopes = {kind: each(made, OURS) for kind, made in kinds.items()}
    least, most = min(slopes, key=lambda kind: slopes[kind]), max(slopes, key=lambda kind: slopes[kind])
    yield ""
    yield (
        f"A worker takes {_cite(f'{slopes[least]:.0f} MB')} for *{least}*, and {_cite(f'{slopes[most]:.0f} MB')} for "
        f"*{most}*."
    )


def _first_batch(kinds: Mapping[str, Any]) -> Iterator[str]:
    chosen = [number for number in (0, 1, 2, 4, 8) if number <= _last(kinds)]
    yield from _table(
        ("ms to the first batch, by workers", *map(str, chosen)),
        (
            (kind, *(f"{_row(made, number)[OURS]['first_batch_ms']:.0f}" for number in chosen))
            for kind, made in kinds.items()
        ),
    )
    added = statistics.median(
        (_row(made, chosen[-1])[OURS]["first_batch_ms"] - _row(made, 1)[OURS]["first_batch_ms"]) / (chosen[-1] - 1)
        for made in kinds.values()
    )
    yield ""
    yield f"Each worker more delays the first batch by {_cite(f'{added:.0f} ms')}, in the middle of the {len(kinds)}."


def _choices(result: Mapping[str, Any]) -> Iterator[str]:
    yield "| dataset | what | wanted | shown | |"
    yield "|---|---|---|---|---|"
    for verdict in result["verdicts"]:
        if verdict["against"] != "simulator":
            yield (
                f"| {verdict['measurement']} | `{verdict['against']}` | {verdict['wanted']} | {verdict['shown']} | "
                f"{WORDS[verdict['passed']]} |"
            )
    short = [
        verdict for verdict in result["verdicts"] if verdict["passed"] is False and verdict["against"] != "simulator"
    ]
    yield ""
    total = sum(verdict["against"] != "simulator" for verdict in result["verdicts"])
    yield f"Of these {total} lines {_cite(str(len(short)))} fall short."
    more = [kind for kind, made in result["kinds"].items() if made["auto"]["most_workers"] > made["auto"]["ceiling"]]
    if more:
        yield ""
        yield f'`"auto"` tried more workers than `tune()` would for {_cite(", ".join(more))}.'


def _simulator(kinds: Mapping[str, Any]) -> Iterator[str]:
    def errors(made: Mapping[str, Any]) -> list[float]:
        return sorted(made["simulator_error"].values())

    yield from _table(
        ("how far the simulator is off", "in the middle", "at most", "with so many workers"),
        (
            (
                kind,
                f"{statistics.median(errors(made)):.1%}",
                f"{errors(made)[-1]:.1%}",
                max(made["simulator_error"], key=lambda number: made["simulator_error"][number]),
            )
            for kind, made in kinds.items()
        ),
    )
    everything = [error for made in kinds.values() for error in errors(made)]
    yield ""
    yield (
        f"Over all {len(everything)} points it is off by {_cite(f'{statistics.median(everything):.1%}')} in the middle "
        f"and by {_cite(f'{max(everything):.1%}')} at most."
    )


def main() -> None:
    """Rewrite a page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    options.page.write_text(fill(options.page.read_text(), result))


if __name__ == "__main__":
    main()
