"""The error bound of ops: the error of the definition in the same dtype, plus one rounding of the output."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.helpers.cases import is_float

Tensors = Sequence[torch.Tensor]


def largest(t: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of each row."""
    return t.abs().amax(-1, keepdim=True) if t.dim() else t.abs()


def assert_within(got: Tensors, reference: Tensors, exact: Tensors, composed: bool = False) -> None:
    """Check that each row's error is at most 1.05 times the reference's in this dtype plus one rounding of the output.

    Where terms cancel almost completely, the result is noise of float32 arithmetic. So one float32 rounding of the
    largest output is allowed as well, or four where a matmul and an activation follow (``composed``). For these the
    largest output counts as at least 1, because GELU shrinks negative numbers to a magnitude of at most 0.17, but not
    their error. Where the exact output is infinite, so must be the result.
    """
    scale = max((float(e[e.isfinite()].abs().max()) for e in exact if is_float(e) and e.isfinite().any()), default=0.0)
    noise = torch.finfo(torch.float32).eps * (4 * max(1.0, scale) if composed else scale)
    for g, r, e in zip(got, reference, exact, strict=True):
        assert g.dtype == r.dtype
        assert g.shape == r.shape
        assert g.is_contiguous()
        assert not g.isnan().any()
        if not g.is_floating_point():
            assert torch.equal(g, e)
        elif g.numel():
            infinite = e.isinf()
            assert torch.equal(g[infinite].double(), e[infinite])
            g, r, e = (t.masked_fill(infinite, 0) for t in (g, r, e))
            info = torch.finfo(g.dtype)
            rounding = info.eps * largest(e).clamp(min=info.smallest_normal)  # subnormals have constant spacing
            budget = 1.05 * largest(r.double() - e) + rounding + noise
            excess = (g.double() - e).abs() - budget
            assert excess.max() <= 0, f"error {excess.max():.3g} over the budget"
