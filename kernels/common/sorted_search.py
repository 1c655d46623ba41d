"""Binary search in ascending numbers, one for each element of a block."""

import triton
import triton.language as tl


def steps_of(size: int) -> int:
    """Count how often a search halves ``size`` numbers: a constant, so that it is no loop, which would spill.

    It is enough for all sizes of 16 bits, so that the number of images or kept tokens does not ask for another kernel.
    """
    return 16 if size < 1 << 16 else 31


@triton.jit
def count_up_to(ptr, size, value, GAPS: tl.constexpr, STEPS: tl.constexpr):
    """Count how many of the ``size`` ascending numbers at ``ptr`` are at most ``value`` (a block of int32).

    With GAPS, the numbers less their index are counted. Where the numbers are the members of a set, that is how many of
    them stand before the ``value``-th number that is not a member.
    """
    count = tl.full(value.shape, 0, tl.int32)
    for step in tl.static_range(STEPS):
        last = count + (1 << (STEPS - 1 - step)) - 1
        entry = tl.load(ptr + last, mask=last < size, other=0).to(tl.int32) - (last if GAPS else 0)
        count = tl.where((last < size) & (entry <= value), last + 1, count)
    return count
