"""The token merge in Triton, one launch per op: `visionzip` takes three for a batch."""

from typing import Any

import torch
from torch import Tensor

from vlmfast.kernels.common.kernel import alignment
from vlmfast.kernels.common.launch import (
    ASSERTING,
    MAX_EXTENT,
    ceil_div,
    config_for,
    device_unsupported,
    on_device,
    with_contiguous_rows,
)
from vlmfast.kernels.common.sorted_search import steps_of
from vlmfast.kernels.token_merge.merge_rows import MergeRowsConfig, merge_rows_backward_kernel, merge_rows_kernel
from vlmfast.kernels.token_merge.merge_slots import MergeSlotsConfig, merge_slots_kernel
from vlmfast.kernels.token_merge.top_tokens import MAX_SCORES, TopTokensConfig, top_tokens_kernel


def unsupported(rows: Tensor, *_: Any) -> str | None:
    batch, tokens, hidden = rows.shape
    if batch * tokens > MAX_EXTENT:
        return f"the sequences have {batch * tokens} tokens together, more than {MAX_EXTENT}"
    if hidden > MAX_EXTENT:
        return f"a row has {hidden} elements, more than {MAX_EXTENT}"
    return device_unsupported(rows)


def top_tokens_unsupported(scores: Tensor, *_: Any) -> str | None:
    if scores.shape[1] > MAX_SCORES:
        return f"a row has {scores.shape[1]} scores, more than {MAX_SCORES}"
    return device_unsupported(scores)


def top_tokens(scores: Tensor, k: int) -> Tensor:
    batch, tokens = scores.shape
    top = scores.new_empty(batch, k, dtype=torch.int64)
    if scores.numel() == 0:
        return top
    scores = with_contiguous_rows(scores)
    with on_device(scores):
        top_tokens_kernel[(batch,)](
            scores, top, scores.stride(0), tokens, k, **vars(TopTokensConfig.config_for(tokens)), **ASSERTING
        )
    return top


def merge_slots(metric: Tensor, kept: Tensor, contextual: int) -> Tensor:
    batch, tokens, metric_dim = metric.shape
    kept_count = kept.shape[1]
    slots = metric.new_empty(batch, tokens, dtype=torch.int32)
    if slots.numel() == 0:
        return slots
    metric, kept = with_contiguous_rows(metric), with_contiguous_rows(kept)
    config = MergeSlotsConfig.config_for(contextual, metric_dim, metric.dtype == torch.float32)
    with on_device(metric):
        merge_slots_kernel[(batch * ceil_div(tokens, config.BLOCK_TOKENS),)](
            *(metric, kept, slots),
            *(*metric.stride()[:2], kept.stride(0), tokens, metric_dim, kept_count, contextual),
            step=(tokens - kept_count) // max(contextual, 1),
            STEPS=steps_of(kept_count),
            ALIGNED=alignment(metric_dim, *metric.stride()[:2]),
            **vars(config),
        )
    return slots


def merge_rows(hidden: Tensor, kept: Tensor, slots: Tensor, contextual: int, merge: str = "reference") -> Tensor:
    batch, tokens, hidden_size = hidden.shape
    kept_count = kept.shape[1]
    merged = hidden.new_empty(batch, kept_count + contextual, hidden_size)
    if merged.numel() == 0:
        return merged
    hidden, slots = with_contiguous_rows(hidden), with_contiguous_rows(slots)
    config = MergeRowsConfig.config_for(contextual, hidden.dtype == torch.float32)
    target_blocks = max(1, ceil_div(contextual, config.BLOCK_TARGETS))
    with on_device(hidden):
        merge_rows_kernel[(batch * target_blocks * ceil_div(hidden_size, config.BLOCK_COLUMNS),)](
            *(hidden, slots, merged),
            *(*hidden.stride()[:2], slots.stride(0), tokens, hidden_size, kept_count, contextual),
            MEAN=merge == "mean",
            ALIGNED=alignment(hidden_size, *hidden.stride()[:2]),
            **vars(config),
        )
    return merged


def merge_rows_backward_unsupported(grad_tokens: Tensor, slots: Tensor, *_: Any) -> str | None:
    if slots.numel() > MAX_EXTENT:
        return f"the sequences have {slots.numel()} tokens together, more than {MAX_EXTENT}"
    return unsupported(grad_tokens)


def merge_rows_backward(grad_tokens: Tensor, slots: Tensor, contextual: int, merge: str = "reference") -> Tensor:
    hidden_size = grad_tokens.shape[2]
    grad = grad_tokens.new_empty((*slots.shape, hidden_size))
    if grad.numel() == 0:
        return grad
    grad_tokens, slots = with_contiguous_rows(grad_tokens), with_contiguous_rows(slots)
    config = config_for(hidden_size)
    with on_device(grad):
        merge_rows_backward_kernel[(ceil_div(slots.numel(), config.BLOCK_ROWS),)](
            *(grad_tokens, slots, grad),
            *(*grad_tokens.stride()[:2], slots.stride(0), slots.numel()),
            *(slots.shape[1], hidden_size, grad_tokens.shape[1] - contextual, contextual),
            MEAN=merge == "mean",
            ALIGNED=alignment(hidden_size, *grad_tokens.stride()[:2]),
            BLOCK_TOKENS=max(16, 1024 // config.BLOCK_ROWS),
            **vars(config),
        )
    return grad
