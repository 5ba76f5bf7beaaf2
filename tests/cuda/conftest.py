"""What needs a CUDA device. Where there is none, each test here is skipped, and says so: this is the only place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def why_not() -> str:
    """Why these tests cannot run here; empty where they can."""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    return "" if torch.cuda.is_available() else "there is no CUDA device"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder, and skip them where there is no device."""
    reason = why_not()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def context() -> None:
    """CUDA is initialised before the first test, and so before any fork: as in a trainer whose model is on the device.

    What CUDA, its allocators and cuBLAS open and start when they are first used is no leak of a loader's.
    """
    if why_not():
        return
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        square = torch.ones(512, 512).pin_memory().to("cuda", non_blocking=True)
        (square @ square).sum().item()
    torch.cuda.synchronize()
