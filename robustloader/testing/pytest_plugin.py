"""A pytest fixture: ``pytest_plugins = ["robustloader.testing.pytest_plugin"]`` in a ``conftest.py`` makes it known."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from robustloader.testing import leaks

__all__ = ["no_leaks"]


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """The test that asks for it fails when it leaves a process, descriptor, thread or shared memory behind."""
    with leaks.no_leaks():
        yield
