"""A Triton kernel whose traffic is known, for tests/ops/test_traffic.py."""

import triton
import triton.language as tl


@triton.jit
def kernel(x_ptr, flag_ptr, y_ptr, total_ptr, count, BLOCK: tl.constexpr):
    """Store y = x where the flag is true, loading x twice, and count the programs in ``total_ptr``."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = position < count
    flag = tl.load(flag_ptr + position, mask=mask, other=False)
    x = tl.load(x_ptr + position, mask=mask, other=0.0) + 0 * tl.load(x_ptr + position, mask=mask, other=0.0)
    tl.store(y_ptr + position, tl.where(flag != 0, x, 0.0), mask=mask)
    tl.atomic_add(total_ptr, 1.0)
