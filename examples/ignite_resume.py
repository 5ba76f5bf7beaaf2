"""ignite: an engine over damaged data, stopped in the middle of an epoch and gone on with.

Run it with ``python examples/ignite_resume.py``. The loader's state lies beside the engine's in the checkpoint; the
plain ``Engine`` counts on from its own, the loader gives it what is left of the epoch.
"""

import tempfile
import warnings

import torch
from torch.utils.data import Dataset

from robustloader import RobustDataLoader

warnings.simplefilter("ignore")

from ignite.engine import Engine, Events  # noqa: E402
from ignite.handlers import Checkpoint, DiskSaver  # noqa: E402


class Numbers(Dataset):
    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 13:
            raise ValueError("this file is damaged")
        return torch.tensor([float(index)])


def train(folder: str, *, stop: int | None = None, resume: bool = False) -> list[float]:
    seen: list[float] = []

    def step(engine: Engine, batch: torch.Tensor) -> None:
        seen.extend(batch.flatten().tolist())
        if engine.state.iteration == stop:
            engine.terminate()

    engine = Engine(step)
    loader = RobustDataLoader(Numbers(), batch_size=6, shuffle=True, num_workers=2, faults="skip")
    objects = {"engine": engine, "loader": loader}
    saver = Checkpoint(objects, DiskSaver(folder, require_empty=False), filename_pattern="saved.pt")
    engine.add_event_handler(Events.ITERATION_COMPLETED, saver)
    if resume:
        Checkpoint.load_objects(objects, torch.load(f"{folder}/saved.pt"))
    engine.run(loader, max_epochs=None if resume else 1)
    if not stop:
        print(loader.summary())
    return seen


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        seen = train(folder, stop=4) + train(folder, resume=True)
    assert sorted(seen) == [number for number in range(60) if number != 13], "each sample once"
