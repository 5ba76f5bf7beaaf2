"""Both ways for a batch to cross, as a fixture for whole folders of tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from robustloader import RobustDataLoader
from robustloader.transport import arena, codec

TRANSPORTS = ("arena", "pipe")


def choose_transport(transport: str, patch: pytest.MonkeyPatch) -> None:
    """Let loaders that name no transport use this one.

    With "arena", under fork, every tensor gets an extent and every pickle too: test batches are small.
    """
    defaults: dict[str, Any] = RobustDataLoader.__init__.__kwdefaults__  # type: ignore[assignment]
    patch.setitem(defaults, "transport", transport)
    if transport == "arena":
        for module in (arena, codec):
            patch.setattr(module, "INLINE_BYTES", 0)
        patch.setattr(arena, "PAYLOAD_BYTES", 1)


def chosen_transport() -> str:
    """The one that loaders use that name none."""
    return str((RobustDataLoader.__init__.__kwdefaults__ or {})["transport"])


@contextlib.contextmanager
def using_transport(transport: str) -> Iterator[None]:
    """The same for a block."""
    with pytest.MonkeyPatch.context() as patch:
        choose_transport(transport, patch)
        yield


@pytest.fixture(params=TRANSPORTS, autouse=True)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test of the folder runs over both."""
    choose_transport(request.param, monkeypatch)
    return str(request.param)
