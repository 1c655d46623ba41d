"""Binary search in ascending numbers, one for each element of a block."""

import triton
import triton.language as tl


def steps_of(size: int) -> int:
    """Return the number of steps of a binary search in ``size`` numbers: a constant, because a loop would spill.

    All sizes below 2**16 share one result, so that the number of images or kept tokens compiles no further kernel.
    """
    return 16 if size < 1 << 16 else 31


@triton.jit
def count_up_to(ptr, size, value, GAPS: tl.constexpr, STEPS: tl.constexpr):
    """Count how many of the ``size`` ascending numbers at ``ptr`` are at most ``value`` (a block of int32).

    With GAPS, each number minus its index is compared instead. If the numbers are the members of a set, the result is
    the number of members below the ``value``-th non-member.
    """
    count = tl.full(value.shape, 0, tl.int32)
    for step in tl.static_range(STEPS):
        last = count + (1 << (STEPS - 1 - step)) - 1
        entry = tl.load(ptr + last, mask=last < size, other=0).to(tl.int32) - (last if GAPS else 0)
        count = tl.where((last < size) & (entry <= value), last + 1, count)
    return count
