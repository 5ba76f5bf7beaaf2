"""A torch that cannot be driven is refused at import, in one sentence; one that is merely newer is not."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import torch
{change}
try:
    import robustloader
except ImportError as error:
    print(error)
else:
    print("imported")
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
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
    ],
)
def test_what_an_import_says(change: str, said: str) -> None:
    """One line, with the versions that are known to work, the one that is there, and what it lacks."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(change=change)], capture_output=True, text=True, timeout=80, check=True
    )
    (line,) = done.stdout.splitlines()
    assert said in line
    assert line == "imported" or line.startswith("robustloader needs torch 2.6 to 2.15; ")
