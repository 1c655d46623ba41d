"""Greedy choices in Triton: one program per image, after a kernel that computes the Gram matrix where one is needed."""

from typing import Any

import torch
from torch import Tensor

from vlmfast.kernels.common.kernel import alignment
from vlmfast.kernels.common.launch import (
    ASSERTING,
    MAX_EXTENT,
    ceil_div,
    device_unsupported,
    on_device,
    with_contiguous_rows,
)
from vlmfast.kernels.greedy_selection.coverage import CoverageConfig, coverage_kernel
from vlmfast.kernels.greedy_selection.dpp_map import DppMapConfig, dpp_map_kernel
from vlmfast.kernels.greedy_selection.farthest import FarthestConfig, farthest_kernel
from vlmfast.kernels.greedy_selection.gram import GramConfig, gram_kernel
from vlmfast.kernels.greedy_selection.greedy import MAX_TOKENS


def farthest_unsupported(features: Tensor, *_: Any) -> str | None:
    batch, tokens, size = features.shape
    if tokens > MAX_TOKENS:
        return f"an image has {tokens} tokens, more than {MAX_TOKENS}"
    if max(size, batch * ceil_div(tokens, GramConfig.BLOCK_TOKENS) ** 2) > MAX_EXTENT:
        return f"{batch} images of {tokens} tokens of {size} elements are more than 32 bits can count"
    return device_unsupported(features)


dpp_map_unsupported = farthest_unsupported


def coverage_unsupported(similarity: Tensor, *_: Any) -> str | None:
    _, tokens, rows = similarity.shape
    if tokens > MAX_TOKENS:
        return f"an image has {tokens} tokens, more than {MAX_TOKENS}"
    if rows > MAX_EXTENT:
        return f"an image has {rows} rows, more than {MAX_EXTENT}"
    return device_unsupported(similarity)


def _weights(weights: Tensor | None) -> tuple[Tensor | None, int]:
    """Return weights in contiguous rows, and the stride of these."""
    if weights is None:
        return None, 0
    weights = with_contiguous_rows(weights)
    return weights, weights.stride(0)


def gram(features: Tensor) -> Tensor:
    """Return the Gram matrix of each image, (B, N, N) float32."""
    batch, tokens, size = features.shape
    features = with_contiguous_rows(features)
    products = features.new_empty(batch, tokens, tokens, dtype=torch.float32)
    config = GramConfig.config_for(features.dtype == torch.float32)
    gram_kernel[(batch * ceil_div(tokens, config.BLOCK_TOKENS) ** 2,)](
        *(features, products, *features.stride()[:2], tokens, size),
        ALIGNED=alignment(size, *features.stride()[:2]),
        **vars(config),
    )
    return products


def farthest(features: Tensor, k: int, quality: Tensor | None = None, first_by_quality: bool = True) -> Tensor:
    batch, tokens, _ = features.shape
    chosen = features.new_empty(batch, k, dtype=torch.int64)
    if batch * tokens == 0:
        return chosen
    weights, stride = _weights(quality)
    with on_device(features):
        farthest_kernel[(batch,)](
            *(gram(features), weights, chosen, tokens, k, stride),
            FIRST_BY_QUALITY=first_by_quality,
            **vars(FarthestConfig.config_for(tokens)),
            **ASSERTING,
        )
    return chosen


def dpp_map(features: Tensor, k: int, relevance: Tensor | None = None) -> Tensor:
    batch, tokens, _ = features.shape
    chosen = features.new_empty(batch, k, dtype=torch.int64)
    if batch * tokens == 0:
        return chosen
    shares = features.new_empty(batch, k, tokens, dtype=torch.float32)
    weights, stride = _weights(relevance)
    with on_device(features):
        dpp_map_kernel[(batch,)](
            *(gram(features), weights, shares, chosen, tokens, k, stride),
            **vars(DppMapConfig.config_for(tokens)),
            **ASSERTING,
        )
    return chosen


def coverage(similarity: Tensor, k: int, row_weights: Tensor | None = None, quality: Tensor | None = None) -> Tensor:
    batch, tokens, rows = similarity.shape
    chosen = similarity.new_empty(batch, k, dtype=torch.int64)
    if batch * tokens == 0:
        return chosen
    similarity = with_contiguous_rows(similarity)
    covered = similarity.new_empty(batch, rows, dtype=torch.float32)
    (weights, weight_stride), (qualities, quality_stride) = _weights(row_weights), _weights(quality)
    with on_device(similarity):
        coverage_kernel[(batch,)](
            *(similarity, weights, qualities, covered, chosen),
            *(*similarity.stride()[:2], weight_stride, quality_stride, tokens, rows, k),
            **vars(CoverageConfig.config_for(tokens)),
            **ASSERTING,
        )
    return chosen
