"""The backward of rotary embedding and head norms: a program loops over blocks of heads and sums weight gradients."""

import triton
import triton.language as tl

from vlmfast.kernels.common.kernel import aligned, kernel, limited
from vlmfast.kernels.rope.parts import load_angles, load_parts, load_weight, mean_of, round_to, store_parts


@triton.jit
def _weighted(normed, dtype: tl.constexpr, ROUNDED: tl.constexpr):
    """Return what the forward multiplied by the weight: the normalised head, rounded if ROUNDED."""
    return round_to(normed, dtype) if ROUNDED else normed


# fmt: off
@triton.jit
def _turn_back(
    grad_ptr, x_ptr, weight_ptr, grad_x_ptr, partial_ptr,
    grad_row_stride, grad_head_stride, x_row_stride, x_head_stride,
    cos_ptr, sin_ptr, cos_row_stride, sin_row_stride, angle_rows, first_end, second_end,
    rows, heads, eps, weight_offset,
    SECTIONS: tl.constexpr, ROUNDED: tl.constexpr, ALIGNED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):
    """Rotate the gradients of all heads of some rows back, and compute those of the norm."""
    grad_row_stride, grad_head_stride = aligned(grad_row_stride, ALIGNED), aligned(grad_head_stride, ALIGNED)
    x_row_stride, x_head_stride = aligned(x_row_stride, ALIGNED), aligned(x_head_stride, ALIGNED)
    cos_row_stride, sin_row_stride = aligned(cos_row_stride, ALIGNED), aligned(sin_row_stride, ALIGNED)
    SIZE: tl.constexpr = 2 * HALF + REST
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    sum_first = tl.zeros((BLOCK_HEADS, BLOCK_HALF), tl.float32)
    sum_second = tl.zeros((BLOCK_HEADS, BLOCK_HALF), tl.float32)
    sum_rest = tl.zeros((BLOCK_HEADS, BLOCK_REST), tl.float32)
    if weight_ptr is not None:
        weight_first, weight_second, weight_rest = load_weight(
            weight_ptr, weight_offset, ROUNDED, HALF, REST, BLOCK_HALF, BLOCK_REST
        )
    blocks = tl.cdiv(heads, BLOCK_HEADS)
    for block in range(tl.program_id(0), rows * blocks, tl.num_programs(0)):
        row = (block // blocks).to(tl.int64)
        head = (block % blocks * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]).to(tl.int64)
        cos_first, cos_second = load_angles(
            cos_ptr, row, cos_row_stride, angle_rows, first_end, second_end, SECTIONS, HALF, BLOCK_HALF
        )
        sin_first, sin_second = load_angles(
            sin_ptr, row, sin_row_stride, angle_rows, first_end, second_end, SECTIONS, HALF, BLOCK_HALF
        )
        first, second, rest = load_parts(
            grad_ptr + row * grad_row_stride, grad_head_stride, head, heads, HALF, REST, BLOCK_HALF, BLOCK_REST
        )
        first, second = first * cos_first + second * sin_second, second * cos_second - first * sin_first
        if weight_ptr is not None:
            x_first, x_second, x_rest = load_parts(
                x_ptr + row * x_row_stride, x_head_stride, head, heads, HALF, REST, BLOCK_HALF, BLOCK_REST
            )
            inverse_rms = tl.rsqrt(mean_of(x_first * x_first, x_second * x_second, x_rest * x_rest, SIZE) + eps)
            x_first, x_second, x_rest = x_first * inverse_rms, x_second * inverse_rms, x_rest * inverse_rms
            if partial_ptr is not None:
                sum_first += first * _weighted(x_first, dtype, ROUNDED)
                sum_second += second * _weighted(x_second, dtype, ROUNDED)
                sum_rest += rest * _weighted(x_rest, dtype, ROUNDED)
            first, second, rest = first * weight_first, second * weight_second, rest * weight_rest
            projection = mean_of(first * x_first, second * x_second, rest * x_rest, SIZE)
            first, second = (first - x_first * projection) * inverse_rms, (second - x_second * projection) * inverse_rms
            rest = (rest - x_rest * projection) * inverse_rms
        to_ptr = grad_x_ptr + row * heads * SIZE
        store_parts(to_ptr, first, second, rest, SIZE, head, heads, HALF, REST, BLOCK_HALF, BLOCK_REST)
    if partial_ptr is not None:
        store_parts(
            partial_ptr + tl.program_id(0).to(tl.int64) * SIZE,
            tl.sum(sum_first, 0, keep_dims=True),
            tl.sum(sum_second, 0, keep_dims=True),
            tl.sum(sum_rest, 0, keep_dims=True),
            0,
            tl.zeros((1, 1), tl.int32),
            1,
            HALF,
            REST,
            BLOCK_HALF,
            BLOCK_REST,
        )


# fmt: on


@kernel
@limited("heads of 128 are turned back, normed again and differentiated: more instructions than those of a norm")
def qk_norm_rope_backward_kernel(
    grad_query_ptr,
    grad_key_ptr,
    query_ptr,
    key_ptr,
    query_weight_ptr,
    key_weight_ptr,
    cos_ptr,
    sin_ptr,
    query_output_ptr,
    key_output_ptr,
    query_partial_ptr,
    key_partial_ptr,
    grad_query_row_stride,
    grad_query_head_stride,
    query_row_stride,
    query_head_stride,
    query_heads,
    grad_key_row_stride,
    grad_key_head_stride,
    key_row_stride,
    key_head_stride,
    key_heads,
    cos_row_stride,
    sin_row_stride,
    angle_rows,
    first_end,
    second_end,
    rows,
    eps,
    weight_offset,
    SECTIONS: tl.constexpr,
    ROUNDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Compute the gradients of the queries or, in the second half of the grid, of the keys."""
    if tl.program_id(1) == 0:
        # fmt: off
        _turn_back(
            grad_query_ptr, query_ptr, query_weight_ptr, query_output_ptr, query_partial_ptr,
            grad_query_row_stride, grad_query_head_stride, query_row_stride, query_head_stride,
            cos_ptr, sin_ptr, cos_row_stride, sin_row_stride, angle_rows, first_end, second_end,
            rows, query_heads, eps, weight_offset,
            SECTIONS, ROUNDED, ALIGNED, HALF, REST, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST,
        )
        # fmt: on
    else:
        # fmt: off
        _turn_back(
            grad_key_ptr, key_ptr, key_weight_ptr, key_output_ptr, key_partial_ptr,
            grad_key_row_stride, grad_key_head_stride, key_row_stride, key_head_stride,
            cos_ptr, sin_ptr, cos_row_stride, sin_row_stride, angle_rows, first_end, second_end,
            rows, key_heads, eps, weight_offset,
            SECTIONS, ROUNDED, ALIGNED, HALF, REST, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST,
        )
        # fmt: on
