"""Triton kernels that number the positions of a mask, for kernels/masked_rows.py.

A program numbers one chunk of a sequence. It counts what comes before its chunk again: a byte per position out of the
L2 cache, cheaper than a second launch or programs that wait for each other.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfast.kernels.launch import FP_FUSION, ceil_div, next_power_of_two, on_device


@dataclass(frozen=True)
class Scan:
    """How a mask is scanned: the positions that one program numbers, those that it counts at a time, its warps."""

    chunk: int
    block: int
    warps: int


def scan_of(positions: int) -> Scan:
    """About a hundred programs for long masks; the positions before a chunk are counted 16 bytes per thread."""
    chunk = min(8192, max(512, next_power_of_two(ceil_div(positions, 128))))
    return Scan(chunk, block=4096, warps=8)


@triton.jit
def _flags(mask_ptr, position, positions, TRUE: tl.constexpr):
    """1 where the mask is ``TRUE``, 0 elsewhere and behind the end (int32)."""
    return (tl.load(mask_ptr + position, mask=position < positions, other=not TRUE) == TRUE).to(tl.int32)


@triton.jit
def _count(mask_ptr, start, stop, TRUE: tl.constexpr, BLOCK: tl.constexpr):
    """At how many positions from ``start`` up to ``stop`` the mask is ``TRUE``."""
    counts = tl.zeros((BLOCK,), tl.int32)
    for first in range(start, stop, BLOCK):
        counts += _flags(mask_ptr, first + tl.arange(0, BLOCK), stop, TRUE)
    return tl.sum(counts, 0)


@triton.jit
def index_total(last):
    """The number of rows that the last entry of an index tells."""
    return tl.maximum(last + 1, ~last)  # last >= 0 is the rank of the last row, last < 0 the complement of the total


@triton.jit
def _row_index_kernel(mask_ptr, index_ptr, positions, TRUE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """For each sequence of ``positions``, its index: the rank where the mask is ``TRUE``, ~rank elsewhere."""
    chunks = tl.cdiv(positions, CHUNK)
    sequence, start = tl.program_id(0) // chunks, (tl.program_id(0) % chunks) * CHUNK
    mask_ptr += sequence.to(tl.int64) * positions
    position = start + tl.arange(0, CHUNK)
    flag = _flags(mask_ptr, position, positions, TRUE)
    rank = _count(mask_ptr, 0, start, TRUE, BLOCK) + tl.cumsum(flag, 0) - flag
    index_ptr += sequence.to(tl.int64) * positions
    tl.store(index_ptr + position, tl.where(flag != 0, rank, ~rank), mask=position < positions)


@triton.jit
def _order_kernel(
    invalid_ptr, order_ptr, tokens, keep, PAD_LEFT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """order[slot] = position, for the tokens of one sequence that get one of its ``keep`` slots."""
    chunks = tl.cdiv(tokens, CHUNK)
    sequence, start = tl.program_id(0) // chunks, (tl.program_id(0) % chunks) * CHUNK
    invalid_ptr += sequence.to(tl.int64) * tokens
    position = start + tl.arange(0, CHUNK)
    valid = _flags(invalid_ptr, position, tokens, False)
    before = _count(invalid_ptr, 0, start, False, BLOCK)
    kept = tl.minimum(before + _count(invalid_ptr, start, tokens, False, BLOCK), keep)
    valid_rank = before + tl.cumsum(valid, 0) - valid
    rank = tl.where(valid != 0, valid_rank, position - valid_rank)
    slots = tl.where(valid != 0, kept, keep - kept)
    first_slot = tl.where(valid != 0, keep - kept, 0) if PAD_LEFT else tl.where(valid != 0, 0, kept)
    order_ptr += sequence.to(tl.int64) * keep
    tl.store(order_ptr + first_slot + rank, position.to(tl.int64), mask=(position < tokens) & (rank < slots))


def index_of(mask: Tensor, true: bool) -> Tensor:
    """The index of each row of ``mask``, of the positions where it is ``true``."""
    index = torch.empty(mask.shape, dtype=torch.int32, device=mask.device)
    if mask.numel() == 0:
        return index
    sequences, positions = mask.shape
    scan = scan_of(positions)
    with on_device(mask):
        _row_index_kernel[(sequences * ceil_div(positions, scan.chunk),)](
            mask.contiguous(),
            index,
            positions,
            TRUE=true,
            CHUNK=scan.chunk,
            BLOCK=scan.block,
            num_warps=scan.warps,
            **FP_FUSION,
        )
    return index


def order_of(invalid: Tensor, keep: int, pad_left: bool) -> Tensor:
    """The positions of the tokens that are kept, in the order in which they are packed."""
    batch, length = invalid.shape
    order = torch.empty((batch, keep), dtype=torch.int64, device=invalid.device)
    if order.numel():
        scan = scan_of(length)
        with on_device(invalid):
            _order_kernel[(batch * ceil_div(length, scan.chunk),)](
                invalid,
                order,
                length,
                keep,
                PAD_LEFT=pad_left,
                CHUNK=scan.chunk,
                BLOCK=scan.block,
                num_warps=scan.warps,
                **FP_FUSION,
            )
    return order
