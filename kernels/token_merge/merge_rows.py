"""Merges the rows of tokens into the slots of `merge_slots`, and moves gradients back.

Rows are added up by a matmul with a matrix of zeros and ones, on tensor cores if they have 16 bits. The products are
exact, the sums are in float32, and the result is deterministic.
"""

import functools
from dataclasses import dataclass

import triton.language as tl

from vlmfast.kernels.common.dot import dot
from vlmfast.kernels.common.kernel import aligned, kernel, limited
from vlmfast.kernels.common.launch import Config
from vlmfast.kernels.token_merge.merge_slots import at


@dataclass(frozen=True, kw_only=True)
class MergeRowsConfig(Config):
    """The tile of sums in registers, targets x columns, and the number of tokens per step."""

    BLOCK_TARGETS: int
    BLOCK_COLUMNS: int
    BLOCK_TOKENS: int
    num_stages: int

    @staticmethod
    @functools.lru_cache
    def config_for(contextual: int, wide: bool) -> "MergeRowsConfig":
        """Choose only two sectors (64 bytes) of columns, because more would leave half of a GPU idle.

        With 64 targets Triton 3.9 would emit a wgmma and its pipeline would overwrite the operand tile, which is used a
        second time. With two warps Triton 3.9 would spill registers, with four 3.6 spills some.
        """
        return MergeRowsConfig(
            BLOCK_TARGETS=16 if wide or contextual <= 16 else 32,
            BLOCK_COLUMNS=32,
            BLOCK_TOKENS=32,
            num_warps=4,
            num_stages=3,
        )


@kernel
@limited("a program has few columns and steps of 32 tokens: more of them, and sums behind the loop, spill registers")
def merge_rows_kernel(
    x_ptr,
    slot_ptr,
    y_ptr,
    x_batch_stride,
    x_token_stride,
    slot_stride,
    tokens,
    hidden,
    kept_count,
    contextual,
    MEAN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_TARGETS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Compute some columns of a block of contextual rows, and copy the kept rows among the tokens that pass by."""
    x_batch_stride, x_token_stride = aligned(x_batch_stride, ALIGNED), aligned(x_token_stride, ALIGNED)
    hidden = aligned(hidden, ALIGNED)
    column_blocks = tl.cdiv(hidden, BLOCK_COLUMNS)
    target_blocks = tl.maximum(tl.cdiv(contextual, BLOCK_TARGETS), 1)
    target_block = tl.program_id(0) // column_blocks % target_blocks
    batch = (tl.program_id(0) // column_blocks // target_blocks).to(tl.int64)
    column = (tl.program_id(0) % column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    target = target_block * BLOCK_TARGETS + tl.arange(0, BLOCK_TARGETS)
    x_ptr += batch * x_batch_stride + column
    slot_ptr += batch * slot_stride
    y_ptr += batch * (kept_count + contextual) * hidden + column
    copied = tl.where(target_block == 0, kept_count, 0)
    sums = tl.zeros((BLOCK_TARGETS, BLOCK_COLUMNS), tl.float32)
    count = tl.zeros((BLOCK_TARGETS,), tl.int32)
    place = tl.zeros((BLOCK_TARGETS,), tl.int32)
    for start in range(0, tokens, BLOCK_TOKENS):
        position = start + tl.arange(0, BLOCK_TOKENS)
        slot = tl.load(slot_ptr + position, mask=position < tokens, other=-2147483648)
        kept = (slot < 0) & (slot >= -copied)
        merged = slot >= contextual
        x = tl.load(
            at(x_ptr, position[:, None], x_token_stride), mask=(kept | merged)[:, None] & (column < hidden), other=0.0
        )
        tl.store(at(y_ptr, (slot + kept_count)[:, None], hidden), x, mask=kept[:, None] & (column < hidden))
        joins = slot[None, :] == (contextual + target)[:, None]
        sums = dot(joins.to(tl.float32).to(x.dtype), x, sums)
        count += tl.sum(joins.to(tl.int32), 1)
        place += tl.sum(tl.where(slot[None, :] == target[:, None], position[None, :], 0), 1)
    if tl.sum(tl.sum((sums != sums).to(tl.int32), 1), 0) > 0:  # 0 times inf or NaN is NaN: add row by row instead
        sums = tl.zeros((BLOCK_TARGETS, BLOCK_COLUMNS), tl.float32)
        for token in range(tokens):
            each = token + tl.zeros((1, 1), tl.int32)
            owner = tl.load(slot_ptr + each)
            mask = column < hidden
            if x_ptr.dtype.element_ty == tl.float32:  # rows of 16 bits are read in vain: sm_80 has no register for more
                mask = mask & (owner >= contextual)
            row = tl.load(at(x_ptr, each, x_token_stride), mask=mask, other=0.0)
            sums += tl.where((contextual + target)[:, None] == owner, row.to(tl.float32), 0.0)
    mask = (target < contextual)[:, None] & (column < hidden)
    own = tl.load(at(x_ptr, place[:, None], x_token_stride), mask=mask & (place < tokens)[:, None], other=0.0)
    own = own.to(tl.float32)
    if MEAN:
        y = (own + sums) * (1.0 / (1 + count).to(tl.float32))[:, None]
    else:
        y = own + sums * (1.0 / tl.maximum(count, 1).to(tl.float32))[:, None]
    tl.store(at(y_ptr, (kept_count + target)[:, None], hidden), y.to(y_ptr.dtype.element_ty), mask=mask)


@kernel
@limited("every program counts in all slots of a sequence how many tokens share the targets of its own")
def merge_rows_backward_kernel(
    grad_tokens_ptr,
    slot_ptr,
    grad_ptr,
    batch_stride,
    row_stride,
    slot_stride,
    positions,
    tokens,
    hidden,
    kept_count,
    contextual,
    MEAN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Store the gradient of the row that a token went to, divided by the number of tokens that share the row.

    A program counts that number for its own tokens, by reading all slots of their sequence.
    """
    batch_stride, row_stride = aligned(batch_stride, ALIGNED), aligned(row_stride, ALIGNED)
    hidden = aligned(hidden, ALIGNED)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    batch = (tl.minimum(row, positions - 1) // tokens).to(tl.int64)
    slot_ptr += batch * slot_stride
    slot = tl.load(slot_ptr + row % tokens, mask=row < positions, other=-2147483648)
    merged = (slot >= contextual) & (slot < 2 * contextual)
    joined = tl.where(merged, slot, slot + contextual)
    counts = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.int32)
    for start in range(0, tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)[None, :]
        other = tl.load(slot_ptr + token, mask=token < tokens, other=-2147483648)
        counts += (other == joined).to(tl.int32)
    count = tl.sum(counts, 1, keep_dims=True)
    shares = tl.where(slot >= 0, 1 + count, 1) if MEAN else tl.where(merged, tl.maximum(count, 1), 1)
    share = 1.0 / shares.to(tl.float32)
    source = tl.where(merged, slot - contextual, slot) + kept_count
    exists = (slot >= -kept_count) & (slot < 2 * contextual)
    grad_tokens_ptr += batch * batch_stride + source.to(tl.int64) * row_stride
    grad_ptr += row.to(tl.int64) * hidden
    for start in range(0, hidden, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
        inside = column < hidden
        grad = tl.load(grad_tokens_ptr + column, mask=exists & inside, other=0.0).to(tl.float32)
        tl.store(grad_ptr + column, (grad * share).to(grad_ptr.dtype.element_ty), mask=(row < positions) & inside)
