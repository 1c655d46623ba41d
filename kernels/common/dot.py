"""Matrix multiplication of tiles, summed in float32."""

import triton
import triton.language as tl

from vlmfast.kernels.common.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, total):
    """Add a @ b to ``total`` in float32. Float32 operands are multiplied as such, two 16-bit ones without rounding.

    Triton's interpreter multiplies bfloat16 wrongly and leaves the sums to a BLAS that adds up the columns of one tile
    in several orders, so that equal columns give unequal sums, as no GPU does. There, it is done in float64.
    """
    left, right = (a.to(tl.float64), b.to(tl.float64)) if _INTERPRETED else (a, b)
    return total + tl.dot(left, right, input_precision="ieee").to(tl.float32)
