"""Cases of the candidate: those of `pixel_shuffle_linear`, which is also its peer."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from torch import Tensor

from vlmfast.ops.pixel_shuffle.cases import linear_bytes, pixel_shuffle_linear
from vlmfast.registry import OPS


def gemm_bytes(x: Tensor, weight: Tensor, bias: Tensor | None = None, *others: Any) -> int:
    """Count the bytes of `pixel_shuffle_linear` and of all vectors.

    With a LayerNorm the patches are read a second time, and their means and variances are written and read.
    """
    norm = [vector for vector in others if isinstance(vector, Tensor)]
    moments = x.nbytes + 16 * x.shape[0] * x.shape[1] if norm else 0
    return linear_bytes(x, weight) + sum(v.nbytes for v in (bias, *norm) if v is not None) + moments


pixel_shuffle_gemm = replace(
    pixel_shuffle_linear,
    peers={"pixel_shuffle_linear": lambda *args: functools.partial(OPS["pixel_shuffle_linear"].function, *args)},
    bytes=gemm_bytes,
    launches=2,
    requested=4.0,  # each block of columns reads all patches, and each block of tokens the whole weight
    compute_bound=None,
)
