"""The norm and rotary embedding of heads: a program takes some heads of one row, which share the row's angles."""

import triton
import triton.language as tl

from vlmfast.kernels.common.kernel import aligned, kernel, limited
from vlmfast.kernels.rope.parts import load_angles, load_parts, load_weight, mean_of, round_to, store_parts


@triton.jit
def _turn(
    x_ptr,
    weight_ptr,
    y_ptr,
    x_row_stride,
    x_head_stride,
    heads,
    row,
    first_head,
    cos_first,
    cos_second,
    sin_first,
    sin_second,
    eps,
    weight_offset,
    ANGLE: tl.constexpr,
    ROUNDED: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Normalise and rotate some heads of a row; ANGLE is the dtype that products with the angles are rounded to."""
    SIZE: tl.constexpr = 2 * HALF + REST
    head = (first_head + tl.arange(0, BLOCK_HEADS)[:, None]).to(tl.int64)
    first, second, rest = load_parts(
        x_ptr + row * x_row_stride, x_head_stride, head, heads, HALF, REST, BLOCK_HALF, BLOCK_REST
    )
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if weight_ptr is not None:
        weight_first, weight_second, weight_rest = load_weight(
            weight_ptr, weight_offset, ROUNDED, HALF, REST, BLOCK_HALF, BLOCK_REST
        )
        inverse_rms = tl.rsqrt(mean_of(first * first, second * second, rest * rest, SIZE) + eps)
        first, second, rest = first * inverse_rms, second * inverse_rms, rest * inverse_rms
        if ROUNDED:  # before the weight multiplies it
            first, second, rest = round_to(first, dtype), round_to(second, dtype), round_to(rest, dtype)
        first, second = round_to(first * weight_first, dtype), round_to(second * weight_second, dtype)
        rest = rest * weight_rest
    turned_first = round_to(first * cos_first, ANGLE) - round_to(second * sin_first, ANGLE)
    turned_second = round_to(second * cos_second, ANGLE) + round_to(first * sin_second, ANGLE)
    y_ptr += row * heads * SIZE
    store_parts(y_ptr, turned_first, turned_second, rest, SIZE, head, heads, HALF, REST, BLOCK_HALF, BLOCK_REST)


@kernel
@limited("heads of 128 are normed, rounded where transformers does, and turned: more instructions than those of a norm")
def qk_norm_rope_kernel(
    query_ptr,
    key_ptr,
    query_weight_ptr,
    key_weight_ptr,
    cos_ptr,
    sin_ptr,
    query_output_ptr,
    key_output_ptr,
    query_row_stride,
    query_head_stride,
    query_heads,
    key_row_stride,
    key_head_stride,
    key_heads,
    cos_row_stride,
    sin_row_stride,
    angle_rows,
    first_end,
    second_end,
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
    """Normalise and rotate a block of a row's queries or, in the later programs, of its keys."""
    query_row_stride, query_head_stride = aligned(query_row_stride, ALIGNED), aligned(query_head_stride, ALIGNED)
    key_row_stride, key_head_stride = aligned(key_row_stride, ALIGNED), aligned(key_head_stride, ALIGNED)
    cos_row_stride, sin_row_stride = aligned(cos_row_stride, ALIGNED), aligned(sin_row_stride, ALIGNED)
    row = tl.program_id(0).to(tl.int64)
    cos_first, cos_second = load_angles(
        cos_ptr, row, cos_row_stride, angle_rows, first_end, second_end, SECTIONS, HALF, BLOCK_HALF
    )
    sin_first, sin_second = load_angles(
        sin_ptr, row, sin_row_stride, angle_rows, first_end, second_end, SECTIONS, HALF, BLOCK_HALF
    )
    angle: tl.constexpr = cos_ptr.dtype.element_ty
    block, query_blocks = tl.program_id(1), tl.cdiv(query_heads, BLOCK_HEADS)
    if block < query_blocks:
        # fmt: off
        _turn(
            query_ptr, query_weight_ptr, query_output_ptr, query_row_stride, query_head_stride, query_heads,
            row, block * BLOCK_HEADS, cos_first, cos_second, sin_first, sin_second, eps, weight_offset,
            angle, ROUNDED, HALF, REST, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST,
        )
        # fmt: on
    else:
        # fmt: off
        _turn(
            key_ptr, key_weight_ptr, key_output_ptr, key_row_stride, key_head_stride, key_heads,
            row, (block - query_blocks) * BLOCK_HEADS, cos_first, cos_second, sin_first, sin_second, eps, weight_offset,
            angle, ROUNDED, HALF, REST, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST,
        )
        # fmt: on
