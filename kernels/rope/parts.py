"""Loads and stores of heads in three parts: the two rotated halves and the rest; and of their angles and weights."""

import triton
import triton.language as tl


@triton.jit
def load_parts(
    ptr,
    head_stride,
    head,
    heads,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Load the two rotated halves and the rest of some heads."""
    column, rest_column = tl.arange(0, BLOCK_HALF)[None, :], tl.arange(0, BLOCK_REST)[None, :]
    mask, rest_mask = (head < heads) & (column < HALF), (head < heads) & (rest_column < REST)
    ptr += head * head_stride
    first = tl.load(ptr + column, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(ptr + HALF + column, mask=mask, other=0.0).to(tl.float32)
    rest = tl.load(ptr + 2 * HALF + rest_column, mask=rest_mask, other=0.0).to(tl.float32)
    return first, second, rest


@triton.jit
def store_parts(
    ptr,
    first,
    second,
    rest,
    head_stride,
    head,
    heads,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Store the parts that `load_parts` loads."""
    column, rest_column = tl.arange(0, BLOCK_HALF)[None, :], tl.arange(0, BLOCK_REST)[None, :]
    mask, rest_mask = (head < heads) & (column < HALF), (head < heads) & (rest_column < REST)
    dtype = ptr.dtype.element_ty
    ptr += head * head_stride
    tl.store(ptr + column, first.to(dtype), mask=mask)
    tl.store(ptr + HALF + column, second.to(dtype), mask=mask)
    tl.store(ptr + 2 * HALF + rest_column, rest.to(dtype), mask=rest_mask)


@triton.jit
def load_angles(
    ptr,
    row,
    row_stride,
    angle_rows,
    first_end,
    second_end,
    SECTIONS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Load the cosines or sines of both halves, with each section of the frequencies from its axis."""
    column = tl.arange(0, BLOCK_HALF)[None, :]
    ptr += (row % angle_rows) * row_stride + column
    if SECTIONS:
        axis = (column >= first_end).to(tl.int64) + (column >= second_end).to(tl.int64)
        ptr += axis * angle_rows * row_stride
    first = tl.load(ptr, mask=column < HALF, other=0.0).to(tl.float32)
    second = tl.load(ptr + HALF, mask=column < HALF, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def load_weight(
    ptr,
    weight_offset,
    ROUNDED: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Load the factors of the parts of a normalised head: the weight plus its offset. ROUNDED implies no offset."""
    first, second, rest = load_parts(ptr, 0, tl.zeros((1, 1), tl.int32), 1, HALF, REST, BLOCK_HALF, BLOCK_REST)
    if not ROUNDED:
        first, second, rest = first + weight_offset, second + weight_offset, rest + weight_offset
    return first, second, rest


@triton.jit
def mean_of(first, second, rest, SIZE: tl.constexpr):
    return (
        tl.sum(first, 1, keep_dims=True) + tl.sum(second, 1, keep_dims=True) + tl.sum(rest, 1, keep_dims=True)
    ) / SIZE


@triton.jit
def round_to(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)
