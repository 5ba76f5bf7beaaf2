"""A torch that cannot be driven is refused at import, in one sentence; one that is merely newer is not."""

from __future__ import annotations

import json
import subprocess
import sys

PROBE = """
import json, os, sys
import torch

for change in json.load(sys.stdin):
    pid = os.fork()
    if not pid:
        exec(change)
        try:
            import robustloader
            print("imported", flush=True)
        except ImportError as error:
            print(error, flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""
"""Imports torch once, and the package in a fork for each change."""

CHANGES = (
    ("torch.__version__ = '2.5.1+cu124'", "this is torch 2.5.1+cu124, which is too old: upgrade torch"),
    ("torch.__version__ = '1.13.0'", "this is torch 1.13.0, which is too old: upgrade torch"),
    ("torch.__version__ = '2.16.0'", "imported"),
    ("torch.__version__ = '3.0.0a0+git1234'", "imported"),
    (
        "torch.__version__ = '3.0.0'; del torch.utils.data.dataloader._BaseDataLoaderIter",
        "torch 3.0.0 has moved a name it builds on: cannot import name '_BaseDataLoaderIter'",
    ),
    (
        "del torch.utils.data.DataLoader._get_iterator",
        "has moved names it builds on: DataLoader._get_iterator",
    ),
    (
        "from torch.utils.data.dataloader import _BaseDataLoaderIter as kind\n"
        "def other(self, loader): self._sampler_iter = self._num_yielded = 1\n"
        "kind.__init__ = other; del kind._reset",
        "_BaseDataLoaderIter._reset, _BaseDataLoaderIter._base_seed, _BaseDataLoaderIter._collate_fn",
    ),
)


def test_what_an_import_says() -> None:
    """One line each, with the versions that are known to work, the one that is there, and what it lacks."""
    changes = json.dumps([change for change, _ in CHANGES])
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, input=changes, capture_output=True, text=True, timeout=80, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(CHANGES)
    for line, (_, said) in zip(lines, CHANGES, strict=True):
        assert said in line
        assert line == "imported" or line.startswith("robustloader needs torch 2.6 to 2.15; ")
