"""Matrix multiplication of tiles with float32 accumulation."""

import triton
import triton.language as tl

from vlmfast.kernels.common.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, total):
    """Return ``total`` plus a @ b, accumulated in float32. Float32 operands are not rounded to TF32.

    Triton's interpreter multiplies bfloat16 wrongly, and its BLAS sums the columns of one tile in different orders, so
    that equal columns give unequal sums, which no GPU does. The interpreter therefore multiplies in float64.
    """
    left, right = (a.to(tl.float64), b.to(tl.float64)) if _INTERPRETED else (a, b)
    return total + tl.dot(left, right, input_precision="ieee").to(tl.float32)
