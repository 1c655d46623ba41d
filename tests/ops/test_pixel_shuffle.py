"""Calls of the pixel shuffle that are large enough for several threads, unlike those of the generated tests."""

from __future__ import annotations

import pytest
import torch

import vlmfast
from tests.helpers.cases import require
from vlmfast.registry import OPS


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("patches", [1, 4], ids=["patch", "token"])
def test_native_gradients_on_several_threads(patches: int):
    """Each thread has its own partial sums of the gradients of weight and bias."""
    op = OPS["pixel_shuffle_norm_backward"]
    require(op, "native")
    x, grad, weight = torch.randn(2, 1024, 64), torch.randn(2, 256, 256), torch.randn(64 * patches)
    with vlmfast.use("native"):
        got = op.function(grad, x, weight, (32, 32))
    for g, e in zip(got, op.reference(grad.double(), x.double(), weight.double(), (32, 32)), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=1e-5 * float(e.abs().max()))
