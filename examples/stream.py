"""An iterable dataset that keeps its place: lines of a file, shared out among workers, one of which is killed.

Run it with ``python examples/stream.py``. A stream cannot be asked for a sample again. After a death it goes on from
its own ``state_dict()``, taken in the worker after each batch; without one it would be read from the start.
"""

import tempfile
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from robustloader import RobustDataLoader
from robustloader.testing import WorkerKiller


class Lines(IterableDataset):
    """The numbers in a text file, one a line: worker ``w`` of ``n`` yields every ``n``-th from the ``w``-th on."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.taken = 0

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        with open(self.path) as file:
            for number, line in enumerate(file):
                if number % workers == worker and number // workers >= self.taken:
                    self.taken += 1  # before the yield: what was yielded has been taken
                    yield int(line)
        self.taken = 0

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


def main() -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(f"{number}\n" for number in range(4000))
        file.flush()
        loader = RobustDataLoader(Lines(file.name), batch_size=16, num_workers=2)
        batches = iter(loader)
        seen = []
        for number, batch in enumerate(batches):
            seen += batch.tolist()
            if number == 50:
                WorkerKiller(batches, seed=0).strike()
        print(loader.summary())
    assert sorted(seen) == list(range(4000)), "every line once"


if __name__ == "__main__":
    main()
