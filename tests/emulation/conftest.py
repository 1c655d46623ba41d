"""Skips the tests of the emulation where there is no compiler."""

from __future__ import annotations

import pytest

from tests.emulation import build


@pytest.fixture(autouse=True, scope="session")
def compiler() -> None:
    """Skip every test of this folder, with the reason, if the emulation cannot be compiled."""
    if reason := build.missing():
        pytest.skip(reason)
