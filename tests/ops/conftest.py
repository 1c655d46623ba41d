"""A fixture that runs each test on every backend of a family; the test module names its ``FAMILY``."""

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
