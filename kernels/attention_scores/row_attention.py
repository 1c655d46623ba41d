"""One token's row of attention: first the logits of each head and block of tokens, then the sums over heads."""

import functools
from dataclasses import dataclass

import triton.language as tl

from vlmfast.kernels.attention_scores.received_attention import LOWEST
from vlmfast.kernels.common.kernel import aligned, kernel, limited
from vlmfast.kernels.common.launch import Config, next_power_of_two


@dataclass(frozen=True, kw_only=True)
class LogitsConfig(Config):
    """The tokens of a program, and the channels that it multiplies per step."""

    BLOCK_TOKENS: int
    BLOCK_COLUMNS: int

    @staticmethod
    @functools.lru_cache
    def config_for(head_dim: int) -> "LogitsConfig":
        """Choose 16 elements per thread: of four 16-byte loads ptxas would issue two only after the others return."""
        columns = min(256, next_power_of_two(head_dim))
        return LogitsConfig(BLOCK_TOKENS=min(256, 4096 // columns), BLOCK_COLUMNS=columns, num_warps=8)


@dataclass(frozen=True, kw_only=True)
class ScoresConfig(Config):
    """The tokens of a program, and the heads and partial sums that it reads per step."""

    BLOCK_TOKENS: int
    BLOCK_HEADS: int
    BLOCK_PARTS: int

    @staticmethod
    @functools.lru_cache
    def config_for(heads: int) -> "ScoresConfig":
        """Choose 45 programs for five crops of CLIP, whose 0.4 MB of logits are in the L2 cache."""
        return ScoresConfig(BLOCK_TOKENS=64, BLOCK_HEADS=min(16, next_power_of_two(heads)), BLOCK_PARTS=16, num_warps=4)


@kernel
@limited("each key is read once, and reduced over its few channels for each query of its head")
def row_logits_kernel(
    query_ptr,
    key_ptr,
    valid_ptr,
    logit_ptr,
    peak_ptr,
    total_ptr,
    query_batch_stride,
    query_head_stride,
    key_batch_stride,
    key_head_stride,
    key_token_stride,
    heads,
    group,
    tokens,
    head_dim,
    sign,
    sharpness,
    ALIGNED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Store the logits of one head's query with a block of keys, their maximum, and their sum of exponentials.

    ``group`` query heads share a key head. Invalid tokens get the lowest logit and are not part of the sum.
    """
    query_batch_stride, query_head_stride = aligned(query_batch_stride, ALIGNED), aligned(query_head_stride, ALIGNED)
    key_batch_stride, key_head_stride = aligned(key_batch_stride, ALIGNED), aligned(key_head_stride, ALIGNED)
    key_token_stride, head_dim = aligned(key_token_stride, ALIGNED), aligned(head_dim, ALIGNED)
    blocks = tl.cdiv(tokens, BLOCK_TOKENS)
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    token = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    query_ptr += batch * query_batch_stride + head * query_head_stride
    key_ptr += batch * key_batch_stride + head // group * key_head_stride
    key_ptr += token[:, None].to(tl.int64) * key_token_stride
    seen = token < tokens
    if valid_ptr is not None:
        seen = tl.load(valid_ptr + batch * tokens + token, mask=seen, other=0) != 0
    partial = tl.zeros((BLOCK_TOKENS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, head_dim, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
        query = tl.load(query_ptr + column, mask=column < head_dim, other=0.0).to(tl.float32)
        key = tl.load(key_ptr + column, mask=(token[:, None] < tokens) & (column < head_dim), other=0.0).to(tl.float32)
        partial += query * key
    logit = tl.where(seen, tl.sum(partial, 1) * sign, LOWEST)
    peak = tl.max(logit, 0)
    total = tl.sum(tl.where(seen, tl.exp2((logit - peak) * sharpness), 0.0), 0)
    tl.store(logit_ptr + row.to(tl.int64) * tokens + token, logit, mask=token < tokens)
    tl.store(peak_ptr + tl.program_id(0), peak)
    tl.store(total_ptr + tl.program_id(0), total)


@kernel
@limited("a program adds up the heads of some keys: of a few rows there are too few programs")
def row_scores_kernel(
    logit_ptr,
    peak_ptr,
    total_ptr,
    score_ptr,
    heads,
    tokens,
    columns,
    blocks,
    left_out,
    parts,
    sharpness,
    MASKED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Add up exp(logit - maximum) / sum over the heads, without the column that is left out, and divide by ``parts``.

    The column left out is that of the CLS token; a column past the last one leaves none out. ``columns`` are stored.
    """
    programs = tl.cdiv(columns, BLOCK_TOKENS)
    batch = (tl.program_id(0) // programs).to(tl.int64)
    place = (tl.program_id(0) % programs) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[None, :]
    token = place + (place >= left_out).to(tl.int32)
    score = tl.zeros((1, BLOCK_TOKENS), tl.float32)
    for first in range(0, heads, BLOCK_HEADS):
        head = first + tl.arange(0, BLOCK_HEADS)[:, None]
        row = batch * heads + tl.minimum(head, heads - 1)
        peak = tl.full((BLOCK_HEADS, 1), LOWEST, tl.float32)
        total = tl.zeros((BLOCK_HEADS, 1), tl.float32)
        for start in range(0, blocks, BLOCK_PARTS):
            block = start + tl.arange(0, BLOCK_PARTS)[None, :]
            peaks = tl.load(peak_ptr + row * blocks + block, mask=block < blocks, other=LOWEST)
            totals = tl.load(total_ptr + row * blocks + block, mask=block < blocks, other=0.0)
            higher = tl.maximum(peak, tl.max(peaks, 1, keep_dims=True))
            totals *= tl.exp2((peaks - higher) * sharpness)
            total = total * tl.exp2((peak - higher) * sharpness) + tl.sum(totals, 1, keep_dims=True)
            peak = higher
        mask = (head < heads) & (place < columns)
        logit = tl.load(logit_ptr + row * tokens + token, mask=mask, other=LOWEST)
        weight = tl.exp2((logit - peak) * sharpness) / total
        if MASKED:  # without any valid token the total is 0
            mask &= logit != LOWEST
        score += tl.sum(tl.where(mask, weight, 0.0), 0, keep_dims=True)
    tl.store(score_ptr + batch * columns + place, score / parts, mask=place < columns)
