"""A trainer whose telemetry goes to a file that may not be writable: ``python -m tests.support.sinking FOLDER``."""

from __future__ import annotations

import sys
import warnings

from robustloader import JsonlSink, RobustDataLoader, RobustLoaderWarning, TelemetryPolicy
from tests.support.datasets import Numbers
from tests.support.telemetry import EVERY_BATCH_S


def main(folder: str) -> None:
    """Print how many samples were delivered, and how many warnings there were."""
    policy = TelemetryPolicy(sinks=(JsonlSink(f"{folder}/run.jsonl"),), progress_s=EVERY_BATCH_S)
    loader: RobustDataLoader[int] = RobustDataLoader(Numbers(500), batch_size=5, num_workers=2, telemetry=policy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        samples = sum(len(batch) for _ in range(2) for batch in loader)
    print(samples, "warnings", sum(issubclass(warning.category, RobustLoaderWarning) for warning in caught))


if __name__ == "__main__":
    main(sys.argv[1])
