"""``robustloader compare``: torch's loader and this one on a dataset, bit for bit, and their speeds."""

from __future__ import annotations

import argparse
import json
from typing import Any

from robustloader import compare
from robustloader.cli.datasets import load_dataset
from robustloader.cli.ending import others_prints_to_stderr, plain_warnings, tell, users_errors
from robustloader.cli.numbers import count, count_or_0

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "compare",
        help="compare this loader with torch's on a dataset, bit for bit",
        description="Load the same batches with torch's loader and with this one, compare them bit for bit, and show "
        "both speeds. The exit status is 0 when all batches are the same, 1 when they differ or the dataset raised, 2 "
        "for bad arguments.",
    )
    parser.add_argument("dataset", metavar="MODULE:CALLABLE", help="what to call for a dataset: my_project.data:train")
    parser.add_argument("--batch-size", type=count, default=1, metavar="N", help="samples in a batch (default: 1)")
    parser.add_argument("--num-workers", type=count_or_0, default=2, metavar="N", help="worker processes (default: 2)")
    parser.add_argument("--batches", type=count, metavar="N", help="compare so many batches (default: at most 100)")
    parser.add_argument("--shuffle", action="store_true", help="in a random order, the same for both")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compare, print, and tell: the exit status."""
    with others_prints_to_stderr(), plain_warnings():
        dataset = load_dataset(options.dataset)
        with users_errors():
            found = compare(
                dataset,
                batches=options.batches,
                batch_size=options.batch_size,
                num_workers=options.num_workers,
                shuffle=options.shuffle or None,
            )
    tell(json.dumps(found.to_dict(), indent=2) if options.json else found)
    return 0 if found.identical else 1
