"""How the candidate is tested and timed: as `pixel_shuffle_linear`, and against it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from torch import Tensor

from vlmfast.ops.pixel_shuffle.cases import linear_bytes, pixel_shuffle_linear
from vlmfast.registry import OPS


def gemm_bytes(x: Tensor, weight: Tensor, bias: Tensor | None = None, *others: Any) -> int:
    """Count all vectors too; for a LayerNorm the patches again, and their means and variances out and in."""
    norm = [vector for vector in others if isinstance(vector, Tensor)]
    moments = x.nbytes + 16 * x.shape[0] * x.shape[1] if norm else 0
    return linear_bytes(x, weight) + sum(v.nbytes for v in (bias, *norm) if v is not None) + moments


pixel_shuffle_gemm = replace(
    pixel_shuffle_linear,
    peers={"pixel_shuffle_linear": lambda *args: functools.partial(OPS["pixel_shuffle_linear"].function, *args)},
    bytes=gemm_bytes,
    launches=2,
    requested=4.0,  # each block of columns reads all patches, each of tokens all of the weight
    compute_bound=None,
)
