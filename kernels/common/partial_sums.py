"""The second step of every norm's weight gradient: adds up the float32 partial sums of the programs.

The rows are added in a fixed order, so the result is deterministic, which it would not be with atomics.
"""

import functools

import torch
import triton.language as tl
from torch import Tensor

from vlmfast.kernels.common.kernel import aligned, alignment, kernel
from vlmfast.kernels.common.launch import RowsConfig, ceil_div, next_power_of_two, on_device

STAGES = 5  # prefetches four steps, which are at least 16 KiB in flight


@functools.lru_cache
def config_for(hidden: int) -> RowsConfig:
    """Choose at least two sectors (64 bytes) per row, and more if there are still programs for most multiprocessors."""
    return RowsConfig(BLOCK_ROWS=64, BLOCK_COLUMNS=min(64, max(16, next_power_of_two(hidden // 128))), num_warps=4)


@kernel
def sum_partials_kernel(
    partial_ptr,
    sum_ptr,
    partials,
    hidden,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add up the rows of ``partial``."""
    hidden = aligned(hidden, ALIGNED)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in tl.range(0, partials, BLOCK_ROWS, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None]
        total += tl.load(
            partial_ptr + row.to(tl.int64) * hidden + column, mask=(row < partials) & (column < hidden), other=0.0
        )
    tl.store(sum_ptr + column, tl.sum(total, 0, keep_dims=True).to(sum_ptr.dtype.element_ty), mask=column < hidden)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Add up the rows of ``partials``, a contiguous float32 (rows, hidden), and round once to ``dtype``: (hidden,)."""
    rows, hidden = partials.shape
    total = partials.new_empty(hidden, dtype=dtype)
    config = config_for(hidden)
    with on_device(partials):
        sum_partials_kernel[(ceil_div(hidden, config.BLOCK_COLUMNS),)](
            partials, total, rows, hidden, ALIGNED=alignment(hidden), STAGES=STAGES, **vars(config)
        )
    return total
