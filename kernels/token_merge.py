"""Triton kernels of vlmfast/ops/token_merge.py, one launch each: `visionzip` is three for a batch.

For the five crops of LLaVA-NeXT (5 x 576 x 1024, metric 64, 26 + 5 tokens, bfloat16) and an image in Qwen2.5-VL
(1024 x 3584, metric 80, 460 + 51 tokens):

                 reads and writes (s = element size)       crops              image
    top_tokens   B N 4 + B k 8                             13 kB              8 kB          32 counts of N in registers
    merge_slots  B N (M s + 4) + B k 8                     0.4 MB, 2 MFLOP    0.2 MB, 5 MFLOP
    merge_rows   B (N + k + C) D s + B N 4                 6.2 MB, 29 MFLOP   11 MB, 374 MFLOP

and as much for `merge_rows_backward` without the products. The FLOP of `merge_rows` are of a matrix of zeros and ones,
on the tensor cores for 16-bit rows: exact but for the order of the sum, and the same on every run.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfast.kernels.launch import (
    ASSERTING,
    FP_FUSION,
    MAX_EXTENT,
    ceil_div,
    device_unsupported,
    next_power_of_two,
    on_device,
    row_tile,
    with_contiguous_rows,
)
from vlmfast.kernels.products import dot
from vlmfast.kernels.sorted_search import steps_of
from vlmfast.kernels.token_choice import at, slots_kernel, top_kernel

MAX_SCORES = 8192  # per row, all in the registers of one program; twice as many would spill


@dataclass(frozen=True)
class Match:
    """How `merge_slots` compares: ``tokens`` with ``targets`` at a time, by ``columns`` of the metric."""

    tokens: int
    targets: int
    columns: int
    warps: int


def match_of(contextual: int, size: int, wide: bool) -> Match:
    """Small blocks of tokens: 45 programs for five crops, each of which reads all targets out of the L2 cache.

    Float32 is multiplied element by element, out of registers that larger blocks would not leave.
    """
    targets = min(32, max(16, next_power_of_two(contextual)))
    columns = 16 if wide else min(32, max(16, next_power_of_two(size)))
    return Match(32 if wide else 64, targets, columns, warps=4)


@dataclass(frozen=True)
class Gathering:
    """How `merge_rows` adds up: ``targets`` by ``columns`` sums in registers, ``tokens`` rows read at a time."""

    targets: int
    columns: int
    tokens: int
    warps: int
    stages: int


def gathering_of(batch: int, contextual: int, hidden: int, wide: bool) -> Gathering:
    """Columns of a cache line at least, of half as many rather than leave half of a GPU idle."""
    targets = min(32 if wide else 64, max(16, next_power_of_two(contextual)))
    columns = 64 if batch * ceil_div(hidden, 64) >= 128 else 32
    return Gathering(targets, columns, tokens=32, warps=4, stages=3)


@triton.jit
def _merge_kernel(
    x_ptr,
    slot_ptr,
    y_ptr,
    x_batch_stride,
    x_token_stride,
    slot_stride,
    tokens,
    hidden,
    chosen,
    contextual,
    MEAN: tl.constexpr,
    BLOCK_TARGETS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """The kept rows, copied as they are passed, and a block of contextual ones, of some columns."""
    column_blocks = tl.cdiv(hidden, BLOCK_COLUMNS)
    target_blocks = tl.maximum(tl.cdiv(contextual, BLOCK_TARGETS), 1)
    target_block = tl.program_id(0) // column_blocks % target_blocks
    batch = (tl.program_id(0) // column_blocks // target_blocks).to(tl.int64)
    column = (tl.program_id(0) % column_blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    target = target_block * BLOCK_TARGETS + tl.arange(0, BLOCK_TARGETS)
    x_ptr += batch * x_batch_stride + column
    slot_ptr += batch * slot_stride
    y_ptr += batch * (chosen + contextual) * hidden + column
    copied = tl.where(target_block == 0, chosen, 0)
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
        tl.store(at(y_ptr, (slot + chosen)[:, None], hidden), x, mask=kept[:, None] & (column < hidden))
        joins = slot[None, :] == (contextual + target)[:, None]
        sums = dot(joins.to(tl.float32).to(x.dtype), x, sums)
        count += tl.sum(joins.to(tl.int32), 1)
        place += tl.sum(tl.where(slot[None, :] == target[:, None], position[None, :], 0), 1)
    mask = (target < contextual)[:, None] & (column < hidden)
    own = tl.load(at(x_ptr, place[:, None], x_token_stride), mask=mask & (place < tokens)[:, None], other=0.0)
    own = own.to(tl.float32)
    if MEAN:
        y = (own + sums) * (1.0 / (1 + count).to(tl.float32))[:, None]
    else:
        y = own + sums * (1.0 / tl.maximum(count, 1).to(tl.float32))[:, None]
    tl.store(at(y_ptr, (chosen + target)[:, None], hidden), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _spread_kernel(
    grad_tokens_ptr,
    slot_ptr,
    grad_ptr,
    batch_stride,
    row_stride,
    slot_stride,
    positions,
    tokens,
    hidden,
    chosen,
    contextual,
    MEAN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Grad = the gradient of the row that a token went to, divided by the number of those that share it.

    A program counts them for its own tokens alone, in the slots of their sequence.
    """
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
    source = tl.where(merged, slot - contextual, slot) + chosen
    exists = (slot >= -chosen) & (slot < 2 * contextual)
    grad_tokens_ptr += batch * batch_stride + source.to(tl.int64) * row_stride
    grad_ptr += row.to(tl.int64) * hidden
    for start in range(0, hidden, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
        inside = column < hidden
        grad = tl.load(grad_tokens_ptr + column, mask=exists & inside, other=0.0).to(tl.float32)
        tl.store(grad_ptr + column, (grad * share).to(grad_ptr.dtype.element_ty), mask=(row < positions) & inside)


# ---- launchers ----


def _unsupported(rows: Tensor) -> str | None:
    batch, tokens, size = rows.shape
    if batch * tokens > MAX_EXTENT:
        return f"the sequences have {batch * tokens} tokens together, more than {MAX_EXTENT}"
    if size > MAX_EXTENT:
        return f"a row has {size} elements, more than {MAX_EXTENT}"
    return device_unsupported(rows)


def top_tokens_unsupported(scores: Tensor, k: int) -> str | None:
    if scores.shape[1] > MAX_SCORES:
        return f"a row has {scores.shape[1]} scores, more than {MAX_SCORES}"
    return device_unsupported(scores)


def top_tokens(scores: Tensor, k: int) -> Tensor:
    batch, tokens = scores.shape
    top = torch.empty((batch, k), dtype=torch.int64, device=scores.device)
    if scores.numel() == 0:
        return top
    scores = with_contiguous_rows(scores)
    block = next_power_of_two(tokens)
    with on_device(scores):
        top_kernel[(batch,)](
            scores,
            top,
            scores.stride(0),
            tokens,
            k,
            BLOCK=block,
            num_warps=max(4, block // 1024),
            **FP_FUSION,
            **ASSERTING,
        )
    return top


def merge_slots_unsupported(metric: Tensor, kept: Tensor, contextual: int) -> str | None:
    return _unsupported(metric)


def merge_slots(metric: Tensor, kept: Tensor, contextual: int) -> Tensor:
    batch, tokens, size = metric.shape
    chosen = kept.shape[1]
    slots = torch.empty((batch, tokens), dtype=torch.int32, device=metric.device)
    if slots.numel() == 0:
        return slots
    metric, kept = with_contiguous_rows(metric), with_contiguous_rows(kept)
    match = match_of(contextual, size, metric.dtype == torch.float32)
    with on_device(metric):
        slots_kernel[(batch * ceil_div(tokens, match.tokens),)](
            metric,
            kept,
            slots,
            *metric.stride()[:2],
            kept.stride(0),
            tokens,
            size,
            chosen,
            contextual,
            step=(tokens - chosen) // max(contextual, 1),
            BLOCK_TOKENS=match.tokens,
            BLOCK_TARGETS=match.targets,
            BLOCK_SIZE=match.columns,
            STEPS=steps_of(chosen),
            num_warps=match.warps,
            **FP_FUSION,
        )
    return slots


def merge_rows_unsupported(
    hidden: Tensor, kept: Tensor, slots: Tensor, contextual: int, merge: str = "reference"
) -> str | None:
    return _unsupported(hidden)


def merge_rows(hidden: Tensor, kept: Tensor, slots: Tensor, contextual: int, merge: str = "reference") -> Tensor:
    batch, tokens, size = hidden.shape
    chosen = kept.shape[1]
    merged = torch.empty((batch, chosen + contextual, size), dtype=hidden.dtype, device=hidden.device)
    if merged.numel() == 0:
        return merged
    hidden, slots = with_contiguous_rows(hidden), with_contiguous_rows(slots)
    gathering = gathering_of(batch, contextual, size, hidden.dtype == torch.float32)
    target_blocks = max(1, ceil_div(contextual, gathering.targets))
    with on_device(hidden):
        _merge_kernel[(batch * target_blocks * ceil_div(size, gathering.columns),)](
            hidden,
            slots,
            merged,
            *hidden.stride()[:2],
            slots.stride(0),
            tokens,
            size,
            chosen,
            contextual,
            MEAN=merge == "mean",
            BLOCK_TARGETS=gathering.targets,
            BLOCK_COLUMNS=gathering.columns,
            BLOCK_TOKENS=gathering.tokens,
            num_warps=gathering.warps,
            num_stages=gathering.stages,
            **FP_FUSION,
        )
    return merged


def merge_rows_backward_unsupported(
    grad_tokens: Tensor, slots: Tensor, contextual: int, merge: str = "reference"
) -> str | None:
    if slots.numel() > MAX_EXTENT:
        return f"the sequences have {slots.numel()} tokens together, more than {MAX_EXTENT}"
    return _unsupported(grad_tokens)


def merge_rows_backward(grad_tokens: Tensor, slots: Tensor, contextual: int, merge: str = "reference") -> Tensor:
    size = grad_tokens.shape[2]
    grad = torch.empty((*slots.shape, size), dtype=grad_tokens.dtype, device=grad_tokens.device)
    if grad.numel() == 0:
        return grad
    grad_tokens, slots = with_contiguous_rows(grad_tokens), with_contiguous_rows(slots)
    tile = row_tile(size)
    with on_device(grad):
        _spread_kernel[(ceil_div(slots.numel(), tile.rows),)](
            grad_tokens,
            slots,
            grad,
            *grad_tokens.stride()[:2],
            slots.stride(0),
            slots.numel(),
            slots.shape[1],
            size,
            grad_tokens.shape[1] - contextual,
            contextual,
            MEAN=merge == "mean",
            BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            BLOCK_TOKENS=max(16, 1024 // tile.rows),
            num_warps=tile.warps,
            **FP_FUSION,
        )
    return grad
