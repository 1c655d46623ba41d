"""Numbers the positions of a mask.

A program numbers one chunk of a sequence. It first counts the mask before its chunk, one byte per position from the L2
cache, which is cheaper than a second launch or than programs that wait for each other.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfast.kernels.common.kernel import kernel
from vlmfast.kernels.common.launch import Config, ceil_div, next_power_of_two, on_device


@dataclass(frozen=True, kw_only=True)
class RanksConfig(Config):
    """The number of positions of a chunk, and of those counted per step."""

    CHUNK: int
    BLOCK: int

    @staticmethod
    @functools.lru_cache
    def config_for(positions: int) -> "RanksConfig":
        """Choose about a hundred programs for long masks, and loads of 16 bytes per thread before a chunk."""
        chunk = min(8192, max(512, next_power_of_two(ceil_div(positions, 128))))
        return RanksConfig(CHUNK=chunk, BLOCK=4096, num_warps=8)


@triton.jit
def _flags(mask_ptr, position, positions, TRUE: tl.constexpr):
    """Load int32 flags: 1 where the mask is ``TRUE``, 0 elsewhere and past the end."""
    return (tl.load(mask_ptr + position, mask=position < positions, other=not TRUE) == TRUE).to(tl.int32)


@triton.jit
def _count(mask_ptr, start, stop, TRUE: tl.constexpr, BLOCK: tl.constexpr):
    """Count the positions from ``start`` up to ``stop`` at which the mask is ``TRUE``."""
    counts = tl.zeros((BLOCK,), tl.int32)
    for first in range(start, stop, BLOCK):
        counts += _flags(mask_ptr, first + tl.arange(0, BLOCK), stop, TRUE)
    return tl.sum(counts, 0)


@triton.jit
def index_total(last):
    """Return the number of rows, given the last entry of an index."""
    return tl.maximum(last + 1, ~last)  # last >= 0 is the rank of the last row, last < 0 the complement of the total


@kernel
def row_index_kernel(
    mask_ptr, index_ptr, positions, TRUE: tl.constexpr, SINGLE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Store the index of each sequence of ``positions``: the rank where the mask is ``TRUE``, ~rank elsewhere."""
    chunks = tl.cdiv(positions, CHUNK)
    batch, start = (tl.program_id(0) // chunks).to(tl.int64), (tl.program_id(0) % chunks) * CHUNK
    first = 0 if SINGLE else batch * positions  # a product would hide from the compiler that loads are aligned
    mask_ptr += first
    position = start + tl.arange(0, CHUNK)
    flag = _flags(mask_ptr, position, positions, TRUE)
    rank = _count(mask_ptr, 0, start, TRUE, BLOCK) + tl.cumsum(flag, 0) - flag
    index_ptr += first
    tl.store(index_ptr + position, tl.where(flag != 0, rank, ~rank), mask=position < positions)


@kernel
def order_kernel(
    invalid_ptr, order_ptr, tokens, keep, PAD_LEFT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Store the position of each token that gets one of the ``keep`` slots of its sequence, in the order of slots."""
    chunks = tl.cdiv(tokens, CHUNK)
    batch, start = (tl.program_id(0) // chunks).to(tl.int64), (tl.program_id(0) % chunks) * CHUNK
    invalid_ptr += batch * tokens
    position = start + tl.arange(0, CHUNK)
    valid = _flags(invalid_ptr, position, tokens, False)
    before = _count(invalid_ptr, 0, start, False, BLOCK)
    kept = tl.minimum(before + _count(invalid_ptr, start, tokens, False, BLOCK), keep)
    valid_rank = before + tl.cumsum(valid, 0) - valid
    rank = tl.where(valid != 0, valid_rank, position - valid_rank)
    slots = tl.where(valid != 0, kept, keep - kept)
    first_slot = tl.where(valid != 0, keep - kept, 0) if PAD_LEFT else tl.where(valid != 0, 0, kept)
    order_ptr += batch * keep
    tl.store(order_ptr + first_slot + rank, position.to(tl.int64), mask=(position < tokens) & (rank < slots))


def index_of(mask: Tensor, true: bool) -> Tensor:
    """Make an index of the positions where each row of ``mask`` is ``true``."""
    index = mask.new_empty(mask.shape, dtype=torch.int32)
    if mask.numel() == 0:
        return index
    batch, positions = mask.shape
    config = RanksConfig.config_for(positions)
    with on_device(mask):
        row_index_kernel[(batch * ceil_div(positions, config.CHUNK),)](
            mask.contiguous(), index, positions, TRUE=true, SINGLE=batch == 1, **vars(config)
        )
    return index


def order_of(invalid: Tensor, keep: int, pad_left: bool) -> Tensor:
    """List the positions of the tokens that are kept, in the order in which they are packed."""
    batch, tokens = invalid.shape
    order = invalid.new_empty(batch, keep, dtype=torch.int64)
    if order.numel():
        config = RanksConfig.config_for(tokens)
        with on_device(invalid):
            order_kernel[(batch * ceil_div(tokens, config.CHUNK),)](
                invalid, order, tokens, keep, PAD_LEFT=pad_left, **vars(config)
            )
    return order
