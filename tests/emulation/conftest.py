"""The emulation needs a compiler."""

from __future__ import annotations

import pytest

from tests.emulation import build


@pytest.fixture(autouse=True, scope="session")
def compiler() -> None:
    """Skip every test here, with the reason, where nothing can be compiled."""
    if reason := build.missing():
        pytest.skip(reason)
