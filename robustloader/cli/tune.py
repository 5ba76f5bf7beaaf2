"""``robustloader tune``: how many workers a dataset needs on this machine."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from typing import Any

from robustloader import tune
from robustloader.cli.datasets import load_dataset
from robustloader.cli.ending import CommandError, others_prints_to_stderr, plain_warnings, tell, users_errors
from robustloader.cli.numbers import count, counts, seconds_above_0, seconds_at_least_0
from robustloader.tuning.report import check_plot

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "tune",
        help="measure how many workers a dataset needs",
        description="Measure numbers of workers on your own dataset, and recommend the fewest that suffice. Ctrl-C "
        "ends it early, with the result so far. The exit status is 0 when there is a recommendation, 1 when the "
        "dataset raised or could not be measured, 2 for bad arguments.",
    )
    parser.add_argument("dataset", metavar="MODULE:CALLABLE", help="what to call for a dataset: my_project.data:train")
    parser.add_argument("--batch-size", type=count, default=1, metavar="N", help="samples in a batch (default: 1)")
    parser.add_argument("--candidates", type=counts, metavar="N,N,...", help="measure these numbers of workers")
    parser.add_argument("--seconds", type=seconds_above_0, default=20.0, metavar="S", help="time for it (default: 20)")
    parser.add_argument(
        "--step-s", type=seconds_at_least_0, default=0.0, metavar="S", help="what the trainer does with a batch takes S"
    )
    parser.add_argument("--prefetch-factor", type=count, metavar="N", help="batches ahead per worker (default: 2)")
    parser.add_argument(
        "--shuffle", action="store_true", help="read in a random order, as a training with shuffle does"
    )
    parser.add_argument("--plot", metavar="FILE", help="also draw the curves (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, print, and tell: the exit status."""
    if options.plot:
        with _no_plot():  # before the search, which takes its time
            check_plot(options.plot)
    with others_prints_to_stderr(), plain_warnings():
        dataset = load_dataset(options.dataset)
        with users_errors():
            report = tune(
                dataset,
                batch_size=options.batch_size,
                candidates=options.candidates,
                seconds=options.seconds,
                step_s=options.step_s,
                prefetch_factor=options.prefetch_factor,
                shuffle=options.shuffle,
            )
    tell(json.dumps(report.to_dict(), indent=2) if options.json else report)
    if options.plot:
        with _no_plot():
            report.plot(options.plot)
    return 0


@contextlib.contextmanager
def _no_plot() -> Iterator[None]:
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        raise CommandError(f"no plot: {error}", status=1) from error
