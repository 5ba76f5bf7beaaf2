"""``robustloader doctor``: what this machine allows a loader, in one table."""

from __future__ import annotations

import argparse
import contextlib
import json
from typing import Any

from robustloader.checkup import doctor
from robustloader.cli.datasets import load_dataset
from robustloader.cli.ending import others_prints_to_stderr, plain_warnings, tell, users_errors
from robustloader.cli.numbers import count

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "doctor",
        help="look at this machine's limits: memory, /dev/shm, open files, processes",
        description="Look at everything that limits a loader here, and say what to do about it. With a dataset, one "
        "batch is loaded by one worker process and the plan is judged by its size. The exit status is 0 when a loader "
        "as planned would work, 1 when a check found a problem, 2 for bad arguments.",
    )
    parser.add_argument(
        "--dataset", metavar="MODULE:CALLABLE", help="what to call for a dataset, such as my_project.data:train_set"
    )
    parser.add_argument("--batch-size", type=count, default=1, metavar="N", help="samples in a batch (default: 1)")
    parser.add_argument(
        "--num-workers", type=count, metavar="N", help="worker processes planned (default: one per usable processor)"
    )
    parser.add_argument(
        "--prefetch-factor", type=count, default=2, metavar="N", help="batches ahead per worker (default: 2)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Look, print, and tell: the exit status."""
    with others_prints_to_stderr(), plain_warnings():
        dataset = load_dataset(options.dataset) if options.dataset else None
        with users_errors("loading one batch") if dataset is not None else contextlib.nullcontext():
            report = doctor(
                dataset,
                batch_size=options.batch_size,
                num_workers=options.num_workers,
                prefetch_factor=options.prefetch_factor,
            )
    tell(json.dumps(report.to_dict(), indent=2) if options.json else report)
    return 0 if report.ok else 1
