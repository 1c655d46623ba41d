"""Triton's binary search in ascending numbers, one for each element of a block."""

import triton
import triton.language as tl


@triton.jit
def count_up_to(ptr, size, value, GAPS: tl.constexpr):
    """How many of the ``size`` ascending numbers at ``ptr`` are at most ``value`` (a block of int32).

    GAPS: how many of the numbers less their index. Where the numbers are the members of a set, that is how many of them
    stand before the ``value``-th number that is not a member.
    """
    count = tl.full(value.shape, 0, tl.int32)
    width = size
    while width > 1:
        half = width // 2
        probe = count + half - 1
        entry = tl.load(ptr + probe).to(tl.int32) - (probe if GAPS else 0)
        count += tl.where(entry <= value, half, 0)
        width -= half
    inside = count < size  # but for a size of 0
    entry = tl.load(ptr + count, mask=inside, other=0).to(tl.int32) - (count if GAPS else 0)
    return count + (inside & (entry <= value)).to(tl.int32)
