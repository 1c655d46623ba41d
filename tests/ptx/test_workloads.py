"""Compiled kernels at real shapes, which have other specialisations than the samples, and full tiles."""

from __future__ import annotations

import pytest
import torch

import vlmfast
from tests.helpers import traffic
from tests.helpers.cases import outputs, require, widened
from tests.helpers.rounding import assert_within
from tests.ptx.backend import MULTIPROCESSORS, PLACES, TENSOR_MEMORY, executed, multiprocessors
from tests.ptx.parse import PtxError
from vlmfast.registry import OPS, Op


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


@pytest.mark.ptx
@pytest.mark.parametrize("name", TENSOR_MEMORY)
def test_tensor_memory_is_why_an_op_does_not_run_on_sm_100(name: str) -> None:
    """The table is true: a sample's kernel has an instruction of tensor memory."""
    op = OPS[name]
    require(op, "ptx_sm_90")
    backend = executed("sm_100", name, op.family, op.reference)

    def run_samples() -> None:
        for args in op.cases.samples("cpu", torch.bfloat16):
            if backend.unsupported(*args) is None:
                backend.run(*args)

    with pytest.raises(PtxError, match="tcgen05"):
        run_samples()
