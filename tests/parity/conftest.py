"""What torch's own loader leaves open is put away before anyone counts; both transports are torch's equals."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import resource_sharer

import pytest

from tests.support.transports import transport

__all__ = ["sharer_stopped", "transport"]


@pytest.fixture(autouse=True)
def sharer_stopped(leaves_nothing: None) -> Iterator[None]:
    """torch passes tensors to workers through a listening socket that multiprocessing then keeps."""
    yield
    resource_sharer.stop()
