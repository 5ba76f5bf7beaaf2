"""What needs a CUDA device. Where there is none, each test here is skipped, and says so: this is the only place."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from robustloader.testing import Leaks, no_leaks

HERE = Path(__file__).parent


def why_not() -> str:
    """Why these tests cannot run here; empty where they can."""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    with warnings.catch_warnings(record=True) as said:  # such as of a driver that is too old
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return ""
    return "; ".join(["there is no CUDA device", *(str(warning.message) for warning in said)])


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


@pytest.fixture(autouse=True)
def leaves_nothing(no_hang: None, context: None) -> Iterator[None]:
    """As in all other tests, but for the descriptors of the devices: the driver opens more of them when a test is the
    first to need more streams, or more pinned memory, and keeps them; no loader has any of its own."""
    look = Leaks.now

    def without_devices() -> Leaks:
        seen = look()
        ours = {fd: name for fd, name in seen.descriptors.items() if not name.startswith("/dev/nvidia")}
        return dataclasses.replace(seen, descriptors=ours)

    with mock.patch.object(Leaks, "now", without_devices), no_leaks():
        yield
