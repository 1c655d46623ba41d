"""The backends in turn, for the tests of one family: each module of them lists its ``FAMILY``."""

from __future__ import annotations

import pytest

import vlmfast
from tests.helpers.cases import BACKENDS, require


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    for op in request.module.FAMILY:
        require(op, request.param)
    with vlmfast.use(request.param):
        yield request.param
