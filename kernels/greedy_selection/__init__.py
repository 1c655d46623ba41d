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

# Of a call: the number of images, the most tokens of one, and their bounds, if they are in a row
Images = tuple[int, int, Tensor | None, Tensor | None]


def _images(rows: Tensor, cu_seqlens: Tensor | None = None, cu_kept: Tensor | None = None, longest: int = 0) -> Images:
    if cu_seqlens is None or cu_kept is None:
        return rows.shape[0], rows.shape[1], None, None
    return cu_seqlens.shape[0] - 1, longest, cu_seqlens.contiguous(), cu_kept.contiguous()


def _unsupported(rows: Tensor, images: Images) -> str | None:
    (_, tokens, size), (count, longest, *_) = rows.shape, images
    if longest > MAX_TOKENS:
        return f"an image has {longest} tokens, more than {MAX_TOKENS}"
    if max(tokens, size, count * ceil_div(longest, GramConfig.BLOCK_TOKENS) ** 2) > MAX_EXTENT:
        return f"{count} images of {longest} tokens of {size} elements are more than 32 bits can count"
    return device_unsupported(rows)


def farthest_unsupported(
    features: Tensor, k: int, quality: Tensor | None = None, first_by_quality: bool = True, *bounds: Any
) -> str | None:
    return _unsupported(features, _images(features, *bounds))


def dpp_map_unsupported(features: Tensor, k: int, relevance: Tensor | None = None, *bounds: Any) -> str | None:
    return _unsupported(features, _images(features, *bounds))


def coverage_unsupported(
    similarity: Tensor, k: int, row_weights: Tensor | None = None, quality: Tensor | None = None, *bounds: Any
) -> str | None:
    return _unsupported(similarity, _images(similarity, *bounds))


def _weights(weights: Tensor | None) -> tuple[Tensor | None, int]:
    """Return weights in contiguous rows, and the stride of these."""
    if weights is None:
        return None, 0
    weights = with_contiguous_rows(weights)
    return weights, weights.stride(0)


def gram(features: Tensor, images: Images) -> Tensor:
    """Return the Gram matrices of the images: (B, N, longest) float32, a row for each token."""
    batch, tokens, size = features.shape
    count, longest, cu_seqlens, _ = images
    features = with_contiguous_rows(features)
    products = features.new_empty(batch, tokens, longest, dtype=torch.float32)
    config = GramConfig.config_for(features.dtype == torch.float32)
    gram_kernel[(count * ceil_div(longest, config.BLOCK_TOKENS) ** 2,)](
        *(features, cu_seqlens, products, *features.stride()[:2], tokens, size, longest),
        ALIGNED=alignment(size, *features.stride()[:2]),
        **vars(config),
        **ASSERTING,
    )
    return products


def farthest(
    features: Tensor,
    k: int,
    quality: Tensor | None = None,
    first_by_quality: bool = True,
    cu_seqlens: Tensor | None = None,
    cu_kept: Tensor | None = None,
    longest: int = 0,
) -> Tensor:
    batch, tokens, _ = features.shape
    chosen = features.new_empty(batch, k, dtype=torch.int64)
    if batch * tokens == 0:
        return chosen
    images, (weights, stride) = _images(features, cu_seqlens, cu_kept, longest), _weights(quality)
    count, longest, *ends = images
    with on_device(features):
        farthest_kernel[(count,)](
            *(gram(features, images), weights, *ends, chosen, tokens, k, longest, stride),
            FIRST_BY_QUALITY=first_by_quality,
            **vars(FarthestConfig.config_for(longest)),
            **ASSERTING,
        )
    return chosen


def dpp_map(
    features: Tensor,
    k: int,
    relevance: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_kept: Tensor | None = None,
    longest: int = 0,
) -> Tensor:
    batch, tokens, _ = features.shape
    chosen = features.new_empty(batch, k, dtype=torch.int64)
    if batch * tokens == 0:
        return chosen
    images, (weights, stride) = _images(features, cu_seqlens, cu_kept, longest), _weights(relevance)
    count, longest, *ends = images
    shares = features.new_empty(batch, k, longest, dtype=torch.float32)
    with on_device(features):
        dpp_map_kernel[(count,)](
            *(gram(features, images), weights, *ends, shares, chosen, tokens, k, longest, stride),
            **vars(DppMapConfig.config_for(longest)),
            **ASSERTING,
        )
    return chosen


def coverage(
    similarity: Tensor,
    k: int,
    row_weights: Tensor | None = None,
    quality: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_kept: Tensor | None = None,
    longest: int = 0,
) -> Tensor:
    batch, tokens, rows = similarity.shape
    chosen = similarity.new_empty(batch, k, dtype=torch.int64)
    if batch * tokens == 0:
        return chosen
    count, longest, *ends = _images(similarity, cu_seqlens, cu_kept, longest)
    similarity = with_contiguous_rows(similarity)
    covered = similarity.new_empty(count, rows, dtype=torch.float32)
    (weights, weight_stride), (qualities, quality_stride) = _weights(row_weights), _weights(quality)
    with on_device(similarity):
        coverage_kernel[(count,)](
            *(similarity, weights, qualities, *ends, covered, chosen),
            *(*similarity.stride()[:2], weight_stride, quality_stride, tokens, rows, k, longest),
            **vars(CoverageConfig.config_for(longest)),
            **ASSERTING,
        )
    return chosen
