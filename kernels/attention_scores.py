"""Triton kernels of vlmfast/ops/attention_scores.py.

`cls_attention`, two launches: the logits of one head and a block of tokens with their maximum and sum, then the weights
summed over the heads. It reads the keys once and writes and reads 4 B H T bytes of logits: for five crops of CLIP
(16 heads x 577 x 64, bfloat16) 5.9 + 0.4 MB at 12 MFLOP, about 2 us of an H100's memory.

`received_attention`, three launches: the normaliser of each row, then for each column the sum over the rows, both as
products of matrices in tiles that never leave the chip, then the means over heads and groups. 4 H T^2 D FLOP and
2 H T^2 exponentials; 12 H T bytes of scratch. For Qwen2.5-VL (16 heads x 4096 x 80, bfloat16) 86 GFLOP and 0.54 G
exponentials in 16-bit tiles, each about 0.15 ms of an H100's units, and 21 MB from its memory.

Exponentials are of the difference to the largest product times the scale, not of the difference of the scaled logits,
so that the scale is rounded into a small number. A negative scale is a scale of the negated query.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfast.kernels.column_sums import (
    LOWEST,
    MAX_SIZE,
    column_sums_kernel,
    mean_kernel,
    normaliser_kernel,
    sweep_of,
)
from vlmfast.kernels.launch import (
    FP_FUSION,
    MAX_EXTENT,
    Tile,
    ceil_div,
    device_unsupported,
    next_power_of_two,
    on_device,
    with_contiguous_rows,
)
from vlmfast.kernels.sorted_search import steps_of


def logits_tile(size: int) -> Tile:
    """32 elements per thread: four 16-byte loads in flight for bfloat16."""
    columns = min(256, next_power_of_two(size))
    return Tile(rows=min(256, 4096 // columns), columns=columns, warps=4)


def scores_tile(heads: int) -> Tile:
    """Tokens in columns: 45 programs for five crops of CLIP, whose 0.4 MB of logits are in the L2 cache."""
    return Tile(rows=min(16, next_power_of_two(heads)), columns=64, warps=4)


@triton.jit
def _cls_logits_kernel(
    query_ptr,
    key_ptr,
    logit_ptr,
    peak_ptr,
    total_ptr,
    query_batch_stride,
    query_head_stride,
    key_batch_stride,
    key_head_stride,
    key_token_stride,
    heads,
    tokens,
    size,
    sign,
    sharpness,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The products of one head's query with a block of its keys, their maximum, and their sum of exponentials."""
    blocks = tl.cdiv(tokens, BLOCK_TOKENS)
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    token = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    query_ptr += batch * query_batch_stride + head * query_head_stride
    key_ptr += batch * key_batch_stride + head * key_head_stride + token[:, None].to(tl.int64) * key_token_stride
    products = tl.zeros((BLOCK_TOKENS, BLOCK_SIZE), tl.float32)
    for start in range(0, size, BLOCK_SIZE):
        column = start + tl.arange(0, BLOCK_SIZE)[None, :]
        query = tl.load(query_ptr + column, mask=column < size, other=0.0).to(tl.float32)
        key = tl.load(key_ptr + column, mask=(token[:, None] < tokens) & (column < size), other=0.0).to(tl.float32)
        products += query * key
    logit = tl.where(token < tokens, tl.sum(products, 1) * sign, LOWEST)
    peak = tl.max(logit, 0)
    total = tl.sum(tl.where(token < tokens, tl.exp2((logit - peak) * sharpness), 0.0), 0)
    tl.store(logit_ptr + row.to(tl.int64) * tokens + token, logit, mask=token < tokens)
    tl.store(peak_ptr + tl.program_id(0), peak)
    tl.store(total_ptr + tl.program_id(0), total)


@triton.jit
def _cls_scores_kernel(
    logit_ptr,
    peak_ptr,
    total_ptr,
    score_ptr,
    heads,
    tokens,
    blocks,
    cls_index,
    sharpness,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_BLOCKS: tl.constexpr,
):
    """Scores = the sum over the heads of exp(logit - maximum) / sum, without the column of the CLS token."""
    programs = tl.cdiv(tokens - 1, BLOCK_TOKENS)
    batch = (tl.program_id(0) // programs).to(tl.int64)
    place = (tl.program_id(0) % programs) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[None, :]
    token = place + (place >= cls_index).to(tl.int32)
    score = tl.zeros((1, BLOCK_TOKENS), tl.float32)
    for first in range(0, heads, BLOCK_HEADS):
        head = first + tl.arange(0, BLOCK_HEADS)[:, None]
        row = batch * heads + tl.minimum(head, heads - 1)
        peak = tl.full((BLOCK_HEADS, 1), LOWEST, tl.float32)
        total = tl.zeros((BLOCK_HEADS, 1), tl.float32)
        for start in range(0, blocks, BLOCK_BLOCKS):
            block = start + tl.arange(0, BLOCK_BLOCKS)[None, :]
            peaks = tl.load(peak_ptr + row * blocks + block, mask=block < blocks, other=LOWEST)
            totals = tl.load(total_ptr + row * blocks + block, mask=block < blocks, other=0.0)
            higher = tl.maximum(peak, tl.max(peaks, 1, keep_dims=True))
            totals *= tl.exp2((peaks - higher) * sharpness)
            total = total * tl.exp2((peak - higher) * sharpness) + tl.sum(totals, 1, keep_dims=True)
            peak = higher
        mask = (head < heads) & (place < tokens - 1)
        logit = tl.load(logit_ptr + row * tokens + token, mask=mask, other=LOWEST)
        weight = tl.exp2((logit - peak) * sharpness) / total
        score += tl.sum(tl.where(mask, weight, 0.0), 0, keep_dims=True)
    tl.store(score_ptr + batch * (tokens - 1) + place, score, mask=place < tokens - 1)


# ---- launchers ----


def _softness(size: int, scale: float | None) -> tuple[float, float]:
    """The sign of the scale, and what a difference of products is multiplied with in a power of two."""
    factor = size**-0.5 if scale is None else scale
    return math.copysign(1.0, factor), abs(factor) * math.log2(math.e)


def cls_attention_unsupported(query: Tensor, key: Tensor, scale: float | None = None, cls_index: int = 0) -> str | None:
    batch, heads, tokens, size = key.shape
    if batch * heads * tokens > MAX_EXTENT:
        return f"the row of the CLS token has {batch * heads * tokens} weights, more than {MAX_EXTENT}"
    if size > MAX_EXTENT:
        return f"a head has {size} channels, more than {MAX_EXTENT}"
    return device_unsupported(query)


def cls_attention(query: Tensor, key: Tensor, scale: float | None = None, cls_index: int = 0) -> Tensor:
    batch, heads, tokens, size = key.shape
    scores = torch.empty((batch, tokens - 1), dtype=torch.float32, device=key.device)
    if scores.numel() == 0:
        return scores
    query, key = with_contiguous_rows(query), with_contiguous_rows(key)
    sign, sharpness = _softness(size, scale)
    tile = logits_tile(size)
    blocks = ceil_div(tokens, tile.rows)
    logits, peaks, totals = (
        torch.empty((batch * heads, columns), dtype=torch.float32, device=key.device)
        for columns in (tokens, blocks, blocks)
    )
    with on_device(key):
        _cls_logits_kernel[(batch * heads * blocks,)](
            query,
            key,
            logits,
            peaks,
            totals,
            *query.stride()[:2],
            *key.stride()[:3],
            heads,
            tokens,
            size,
            sign,
            sharpness,
            BLOCK_TOKENS=tile.rows,
            BLOCK_SIZE=tile.columns,
            num_warps=tile.warps,
            **FP_FUSION,
        )
        tile = scores_tile(heads)
        _cls_scores_kernel[(batch * ceil_div(tokens - 1, tile.columns),)](
            logits,
            peaks,
            totals,
            scores,
            heads,
            tokens,
            blocks,
            cls_index % tokens,
            sharpness,
            BLOCK_HEADS=tile.rows,
            BLOCK_TOKENS=tile.columns,
            BLOCK_BLOCKS=16,
            num_warps=tile.warps,
            **FP_FUSION,
        )
    return scores


def received_attention_unsupported(
    query: Tensor, key: Tensor, cu_seqlens: Tensor | None = None, group: int = 1, scale: float | None = None
) -> str | None:
    heads, tokens, size = query.shape
    if heads * tokens > MAX_EXTENT:
        return f"the heads have {heads * tokens} tokens together, more than {MAX_EXTENT}"
    if size > MAX_SIZE:
        return f"a head has {size} channels, more than {MAX_SIZE}"
    return device_unsupported(query)


def received_attention(
    query: Tensor, key: Tensor, cu_seqlens: Tensor | None = None, group: int = 1, scale: float | None = None
) -> Tensor:
    heads, tokens, size = query.shape
    scores = torch.empty(tokens // group, dtype=torch.float32, device=query.device)
    if tokens == 0:
        return scores
    query, key = with_contiguous_rows(query), with_contiguous_rows(key)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    strides = *query.stride()[:2], *key.stride()[:2]
    sign, sharpness = _softness(size, scale)
    sweep = sweep_of(size, query.dtype == torch.float32)
    bounds = 0 if cu_seqlens is None else cu_seqlens.shape[0]
    peaks, inverses, received = (
        torch.empty((heads, tokens), dtype=torch.float32, device=query.device) for _ in range(3)
    )
    options = {
        "ALIGNED": math.gcd(*strides[::2], 16),
        "SIZE": size,
        "COLUMNS": sweep.columns,
        "REST": sweep.rest,
        "BLOCK": sweep.block,
        "STEPS": steps_of(bounds),
        "num_warps": sweep.warps,
        "num_stages": sweep.stages,
        **FP_FUSION,
    }
    grid = (heads * ceil_div(tokens, sweep.block),)
    with on_device(query):
        normaliser_kernel[grid](
            query, key, cu_seqlens, peaks, inverses, *strides, tokens, bounds, sign, sharpness, **options
        )
        column_sums_kernel[grid](
            query, key, cu_seqlens, peaks, inverses, received, *strides, tokens, bounds, sign, sharpness, **options
        )
        mean_kernel[(ceil_div(tokens // group, 32),)](
            received,
            scores,
            tokens // group,
            group,
            heads * group,
            tokens,
            BLOCK_MEANS=32,
            BLOCK_COUNT=16,
            num_warps=4,
            **FP_FUSION,
        )
    return scores
