"""Compiled kernels at real shapes, which have other specialisations than the samples, and full tiles."""

from __future__ import annotations

import pytest

import vlmfast
from tests.helpers import traffic
from tests.helpers.cases import outputs, require, widened
from tests.helpers.rounding import assert_within
from tests.ptx.backend import MULTIPROCESSORS, PLACES, multiprocessors
from vlmfast.registry import Op


def parameters() -> list:
    """Make parameters of each memory-bound op with kernels of its own; `make test` runs those of one target."""
    found = []
    for op in (op for op in traffic.BOUND_BY_MEMORY if op.compose is None):
        for place in PLACES:
            marks = [] if place == "ptx_sm_90" else [pytest.mark.ptx]
            found.append(pytest.param(op, place, marks=marks, id=f"{op.name}-{place}"))
    return found


@pytest.mark.parametrize(("op", "place"), parameters())
def test_real_shapes(op: Op, place: str) -> None:
    require(op, place)
    _, args = traffic.workload(op)
    with vlmfast.use(place), multiprocessors(op, MULTIPROCESSORS):
        got = outputs(op.function(*args))
    assert_within(got, outputs(op.reference(*args)), outputs(op.reference(*widened(args))))
