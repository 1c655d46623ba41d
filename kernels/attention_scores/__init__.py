"""Attention scores of tokens in Triton. The attention map is never stored."""

import math
from typing import Any

import torch
from torch import Tensor

from vlmfast.kernels.attention_scores.received_attention import (
    MAX_HEAD_DIM,
    MEAN_CONFIG,
    ReceivedConfig,
    mean_kernel,
    normaliser_kernel,
    received_kernel,
)
from vlmfast.kernels.attention_scores.row_attention import (
    LogitsConfig,
    ScoresConfig,
    row_logits_kernel,
    row_scores_kernel,
)
from vlmfast.kernels.common.kernel import alignment
from vlmfast.kernels.common.launch import MAX_EXTENT, ceil_div, device_unsupported, on_device, with_contiguous_rows
from vlmfast.kernels.common.sorted_search import steps_of


def _softness(head_dim: int, scale: float | None) -> tuple[float, float]:
    """Split the scale into its sign and the positive factor of logit differences in exponents of two.

    Differences of logits are scaled, not the logits themselves, so that the rounding error is relative to a small
    number. A negative scale is a positive scale of the negated query.
    """
    factor = head_dim**-0.5 if scale is None else scale
    return math.copysign(1.0, factor), abs(factor) * math.log2(math.e)


def _row_unsupported(query: Tensor, key: Tensor) -> str | None:
    (batch, heads, head_dim), tokens = query.shape, key.shape[2]
    if batch * heads * tokens > MAX_EXTENT:
        return f"the row of the token has {batch * heads * tokens} weights, more than {MAX_EXTENT}"
    if head_dim > MAX_EXTENT:
        return f"a head has {head_dim} channels, more than {MAX_EXTENT}"
    return device_unsupported(query)


def _row_attention(
    query: Tensor, key: Tensor, valid: Tensor | None, scale: float | None, left_out: int, parts: int
) -> Tensor:
    """Sum one token's row of attention over the heads, without the column if it is below T, and divide by ``parts``."""
    (batch, heads, head_dim), (key_heads, tokens) = query.shape, key.shape[1:3]
    columns = tokens - (left_out < tokens)
    scores = key.new_empty(batch, columns, dtype=torch.float32)
    if scores.numel() == 0:
        return scores
    query, key = with_contiguous_rows(query), with_contiguous_rows(key)
    valid = None if valid is None else valid.contiguous()
    sign, sharpness = _softness(head_dim, scale)
    config = LogitsConfig.config_for(head_dim)
    blocks = ceil_div(tokens, config.BLOCK_TOKENS)
    logits, peaks, totals = (
        key.new_empty((batch * heads, numbers), dtype=torch.float32) for numbers in (tokens, blocks, blocks)
    )
    with on_device(key):
        row_logits_kernel[(batch * heads * blocks,)](
            *(query, key, valid, logits, peaks, totals),
            *(*query.stride()[:2], *key.stride()[:3], heads, heads // key_heads, tokens, head_dim, sign, sharpness),
            ALIGNED=alignment(head_dim, *query.stride()[:2], *key.stride()[:3]),
            **vars(config),
        )
        config = ScoresConfig.config_for(heads)
        row_scores_kernel[(batch * ceil_div(columns, config.BLOCK_TOKENS),)](
            *(logits, peaks, totals, scores),
            *(heads, tokens, columns, blocks, left_out, float(parts), sharpness),
            MASKED=valid is not None,
            **vars(config),
        )
    return scores


def cls_attention_unsupported(query: Tensor, key: Tensor, *_: Any) -> str | None:
    return _row_unsupported(query, key)


def cls_attention(query: Tensor, key: Tensor, scale: float | None = None, cls_index: int = 0) -> Tensor:
    return _row_attention(query, key, None, scale, cls_index % key.shape[2], 1)


def last_row_attention_unsupported(query: Tensor, key: Tensor, *_: Any) -> str | None:
    return _row_unsupported(query, key)


def last_row_attention(query: Tensor, key: Tensor, valid: Tensor | None = None, scale: float | None = None) -> Tensor:
    return _row_attention(query, key, valid, scale, key.shape[2], query.shape[1])


def received_attention_unsupported(query: Tensor, *_: Any) -> str | None:
    heads, tokens, head_dim = query.shape
    if heads * tokens > MAX_EXTENT:
        return f"the heads have {heads * tokens} tokens together, more than {MAX_EXTENT}"
    if head_dim > MAX_HEAD_DIM:
        return f"a head has {head_dim} channels, more than {MAX_HEAD_DIM}"
    return device_unsupported(query)


def received_attention(
    query: Tensor, key: Tensor, cu_seqlens: Tensor | None = None, group: int = 1, scale: float | None = None
) -> Tensor:
    heads, tokens, head_dim = query.shape
    scores = query.new_empty(tokens // group, dtype=torch.float32)
    if tokens == 0:
        return scores
    query, key = with_contiguous_rows(query), with_contiguous_rows(key)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    strides = *query.stride()[:2], *key.stride()[:2]
    config = ReceivedConfig.config_for(head_dim, query.dtype == torch.float32)
    bounds = 0 if cu_seqlens is None else cu_seqlens.shape[0]
    numbers = *strides, tokens, bounds, *_softness(head_dim, scale)
    peaks, inverses, received = (query.new_empty(heads, tokens, dtype=torch.float32) for _ in range(3))
    operands = query, key, cu_seqlens, peaks, inverses
    sizes = {"ALIGNED": alignment(head_dim, *strides), "HEAD_DIM": head_dim, "STEPS": steps_of(bounds)}
    constants = vars(config) | sizes
    grid = (heads * ceil_div(tokens, config.BLOCK),)
    with on_device(query):
        normaliser_kernel[grid](*operands, *numbers, **constants)
        received_kernel[grid](*operands, received, *numbers, **constants)
        means = tokens // group
        mean_kernel[(ceil_div(means, MEAN_CONFIG.BLOCK_ROWS),)](
            received, scores, means, group, heads * group, tokens, **vars(MEAN_CONFIG)
        )
    return scores
