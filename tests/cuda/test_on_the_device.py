"""Samples on the device, and options that name one: batches are torch's, or the error is."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from robustloader import FaultBudgetError, RobustDataLoader
from tests.support.devices import Shaped, told
from tests.support.parity_run import MODES, STRICT

pytestmark = pytest.mark.filterwarnings(
    "ignore::robustloader.RobustLoaderWarning", "ignore:.*pin_memory_device:DeprecationWarning"
)


class There(Dataset[torch.Tensor]):
    """Samples that are on the device."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((3,), float(index), device="cuda")


@pytest.mark.deadline(240)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", [None, "spawn", "forkserver"], ids=["no worker", "spawn", "forkserver"])
def test_a_dataset_on_the_device(method: str | None, mode: str) -> None:
    """Batches stay where they are made, in workers as well."""
    arguments: dict[str, Any] = {"batch_size": 4}
    if method is not None:
        arguments |= {"num_workers": 1, "multiprocessing_context": method}
    for kind, more in ((DataLoader, {}), (RobustDataLoader, MODES[mode])):
        batches = list(kind(There(), **arguments, **more))
        assert [batch.device.type for batch in batches] == ["cuda"] * 3
        assert torch.cat(batches).tolist() == [[float(index)] * 3 for index in range(12)]
        del batches
        gc.collect()


def test_a_forked_worker_cannot_use_the_device() -> None:
    """torch's error with ``faults="raise"``; otherwise it is each sample's fault, until the budget is used up, and the
    error says what torch says."""
    said = []
    for kind, options in ((DataLoader, {}), (RobustDataLoader, STRICT)):
        with pytest.raises(RuntimeError, match="must use the 'spawn' start method") as raised:
            list(kind(There(), batch_size=4, num_workers=1, multiprocessing_context="fork", **options))
        said.append((raised.type, str(raised.value).splitlines()[0], str(raised.value).splitlines()[-1]))
        del raised
        gc.collect()
    assert said[1] == said[0]
    with pytest.raises(FaultBudgetError, match="must use the 'spawn' start method"):
        list(RobustDataLoader(There(), batch_size=4, num_workers=1, multiprocessing_context="fork"))
    gc.collect()


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_device_to_pin_for(num_workers: int, name: str) -> None:
    """``pin_memory_device``."""
    arguments: dict[str, Any] = {
        "batch_size": 4, "num_workers": num_workers, "pin_memory": True, "pin_memory_device": name
    }  # fmt: skip
    torchs = [told(batch) for batch in DataLoader(Shaped("pair"), **arguments)]
    assert [told(batch) for batch in RobustDataLoader(Shaped("pair"), **arguments)] == torchs


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
def test_a_default_device(shuffle: bool) -> None:
    """In the training process, samples are made on it; the order is drawn as torch draws it there."""
    seen = []
    for kind in (DataLoader, RobustDataLoader):
        with torch.device("cuda"):
            torch.manual_seed(3)
            generator = torch.Generator("cuda").manual_seed(2) if shuffle else None
            batches = list(kind(Shaped("tensor"), batch_size=4, shuffle=shuffle, generator=generator))
        assert {batch.device.type for batch in batches} == {"cuda"}
        seen.append(torch.cat(batches).tolist())
    assert seen[1] == seen[0]
