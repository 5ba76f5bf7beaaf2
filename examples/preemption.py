"""A job is told to stop in the middle of an epoch, saves where it is, and goes on as if nothing had been.

Run it with ``python examples/preemption.py``: it starts itself as a job, sends that job and its workers SIGTERM, starts
it again, and compares the samples, each with a random augmentation, with those of a job that nobody stopped."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.data import Dataset

from robustloader import RobustDataLoader


class Noisy(Dataset):
    def __len__(self) -> int:
        return 300

    def __getitem__(self, index: int) -> torch.Tensor:
        return index + torch.rand(())


def job(checkpoint: Path) -> None:  # two epochs; ``seen`` stands for the model
    loader = RobustDataLoader(Noisy(), 10, shuffle=True, num_workers=2, seeding="batch", generator=torch.Generator())
    epoch, seen, told = 0, [], []
    if checkpoint.exists():
        epoch, seen, state = torch.load(checkpoint)
        loader.load_state_dict(state)
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))  # workers do nothing on it
    while epoch < 2 and not told:
        for batch in loader:
            seen += batch.tolist()
            print(len(seen), flush=True)
            if told:
                break
        else:
            epoch += 1
    torch.save((epoch, seen, loader.state_dict()), checkpoint)


if __name__ == "__main__" and len(sys.argv) > 1:
    job(Path(sys.argv[1]))
elif __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        one, other = [[sys.executable, __file__, f"{folder}/{name}.pt"] for name in ("stopped", "unbroken")]
        with subprocess.Popen(one, stdout=subprocess.PIPE, process_group=0, text=True) as process:
            while process.stdout.readline() != "420\n":  # in the second epoch
                pass
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate()
        print("told to stop: saved after", len(torch.load(one[-1])[1]), "samples")
        for command in (one, other):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        assert torch.load(one[-1])[1] == torch.load(other[-1])[1]
        print("stopped and gone on: the same 600 samples, in the same order, with the same noise")
