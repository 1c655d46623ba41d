"""Scores of tokens from attention in Triton: never a matrix of tokens by tokens."""

import math
from typing import Any

import torch
from torch import Tensor

from vlmfast.kernels.attention_scores.cls_attention import (
    LogitsConfig,
    ScoresConfig,
    cls_logits_kernel,
    cls_scores_kernel,
)
from vlmfast.kernels.attention_scores.received_attention import (
    MAX_HEAD_DIM,
    MEAN_CONFIG,
    ReceivedConfig,
    mean_kernel,
    normaliser_kernel,
    received_kernel,
)
from vlmfast.kernels.common.kernel import alignment
from vlmfast.kernels.common.launch import MAX_EXTENT, ceil_div, device_unsupported, on_device, with_contiguous_rows
from vlmfast.kernels.common.sorted_search import steps_of


def _softness(head_dim: int, scale: float | None) -> tuple[float, float]:
    """Split the scale into its sign and what a difference of logits is multiplied by in a power of two.

    The difference is multiplied and not each logit, so that the scale is rounded into a small number. A negative scale
    is a scale of the negated query.
    """
    factor = head_dim**-0.5 if scale is None else scale
    return math.copysign(1.0, factor), abs(factor) * math.log2(math.e)


def cls_attention_unsupported(query: Tensor, key: Tensor, *_: Any) -> str | None:
    batch, heads, tokens, head_dim = key.shape
    if batch * heads * tokens > MAX_EXTENT:
        return f"the row of the CLS token has {batch * heads * tokens} weights, more than {MAX_EXTENT}"
    if head_dim > MAX_EXTENT:
        return f"a head has {head_dim} channels, more than {MAX_EXTENT}"
    return device_unsupported(query)


def cls_attention(query: Tensor, key: Tensor, scale: float | None = None, cls_index: int = 0) -> Tensor:
    batch, heads, tokens, head_dim = key.shape
    scores = key.new_empty(batch, tokens - 1, dtype=torch.float32)
    if scores.numel() == 0:
        return scores
    query, key = with_contiguous_rows(query), with_contiguous_rows(key)
    sign, sharpness = _softness(head_dim, scale)
    config = LogitsConfig.config_for(head_dim)
    blocks = ceil_div(tokens, config.BLOCK_TOKENS)
    logits, peaks, totals = (
        key.new_empty((batch * heads, columns), dtype=torch.float32) for columns in (tokens, blocks, blocks)
    )
    with on_device(key):
        cls_logits_kernel[(batch * heads * blocks,)](
            *(query, key, logits, peaks, totals),
            *(*query.stride()[:2], *key.stride()[:3], heads, tokens, head_dim, sign, sharpness),
            ALIGNED=alignment(head_dim, *query.stride()[:2], *key.stride()[:3]),
            **vars(config),
        )
        config = ScoresConfig.config_for(heads)
        cls_scores_kernel[(batch * ceil_div(tokens - 1, config.BLOCK_TOKENS),)](
            *(logits, peaks, totals, scores),
            *(heads, tokens, blocks, cls_index % tokens, sharpness),
            **vars(config),
        )
    return scores


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
