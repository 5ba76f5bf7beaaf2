"""One epoch over a dataset in which some samples raise and one kills its worker.

Run it with ``python docs/examples/first_epoch.py``; its output is the one shown in README.md.
"""

import os
import signal
import time

import torch
from torch.utils.data import Dataset

from robustloader import RobustDataLoader as DataLoader


class Photos(Dataset):
    """3,200 pretended photographs: every 400th is damaged, and one crashes its decoder."""

    def __len__(self):
        return 3200

    def __getitem__(self, index):
        if index % 400 == 13:
            raise OSError(f"photo-{index:04d}.jpg is truncated")
        if index == 1777:
            os.kill(os.getpid(), signal.SIGSEGV)  # what a bug in a native decoder does
        time.sleep(0.002)  # read and decode
        return torch.full((3, 64, 64), float(index)), index % 10


def main():
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(Photos(), batch_size=32, shuffle=True, num_workers=2, generator=generator)
    for _images, _labels in loader:
        time.sleep(0.06)  # the training step
    print(loader.summary())
    print()
    print(loader.fault_log)


if __name__ == "__main__":
    main()
