"""How patch-info mining is tested and timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfast.cases import Cases, Samples, Workloads, derived
from vlmfast.ops.patch_mining.definition import block_pixels

# ---- calls to test, to refuse and to time ----

# (B, C), the grid of blocks, the scale, and how many blocks of each image have a token: None for all
_MAPS = [
    ((1, 64), (2, 3), 2, None),
    ((2, 40), (2, 4), 4, 3),
    ((1, 7), (3, 2), 3, None),
    ((2, 100), (1, 5), 8, 2),
    ((1, 272), (2, 2), 8, None),
    ((0, 8), (2, 2), 2, None),
    ((2, 16), (2, 2), 2, 0),
    ((1, 33), (4, 6), 1, 5),
    ((1, 5), (2, 2), 5, None),
    ((1, 520), (1, 2), 6, 1),
]


def _call(device: str, dtype: torch.dtype, sizes: tuple[int, int], grid: tuple[int, int], scale: int) -> Any:
    batch, channels = sizes
    feature_map = torch.randn(batch, channels, grid[0] * scale, grid[1] * scale, device=device, dtype=dtype)
    return torch.randn(batch, grid[0] * grid[1], channels, device=device, dtype=dtype), feature_map, scale


def _blocks(batch: int, tokens: int, kept_count: int, device: str) -> Tensor:
    """Choose as many blocks for each image, but different ones."""
    return torch.rand(batch, tokens, device=device).argsort(1)[:, :kept_count].sort(1).values


def samples(device: str, dtype: torch.dtype) -> Samples:
    for index, (sizes, grid, scale, kept_count) in enumerate(_MAPS):
        query, feature_map, scale = _call(device, dtype, sizes, grid, scale)
        query *= (1.0, 0.2)[index % 2] * sizes[1] ** -0.5
        feature_map += 3.0 * (index % 3)  # pixels whose mean is far from zero
        if kept_count is None:
            yield query, feature_map, scale, *((), (None, 1e-6))[index % 2]
        else:
            blocks = _blocks(sizes[0], grid[0] * grid[1], kept_count, device)
            yield query[:, :kept_count], feature_map, scale, blocks, (1e-5, 1e-6)[index % 2]
    # The last pixel gets all the weight, and its exponential overflows unless the maximum is subtracted. No two large
    # logits are nearly equal, or their rounding would decide between them.
    _, feature_map, scale = _call(device, dtype, (1, 24), (2, 2), 2)
    yield 30 * block_pixels(feature_map, scale, None)[:, :, -1], feature_map, scale


def _with_gradient(query: Tensor, *rest: Any) -> tuple[Any, ...]:
    return torch.randn_like(query), query, *rest


def backward_samples(device: str, dtype: torch.dtype) -> Samples:
    """Leave out the last sample, whose gradients are only rounding noise."""
    return (_with_gradient(*args) for args in list(samples(device, dtype))[:-1])


def workloads(device: str, dtype: torch.dtype) -> Workloads:
    """Yield maps of Mini-Gemini with ConvNeXt-L: part of a row, an image, a reduced one; on a GPU the crops of HD."""
    sizes, grid, scale = (1, 2880), (24, 24), 8
    query, feature_map, scale = _call(device, dtype, sizes, (1, 8), scale)
    yield "8 tokens", (query * sizes[1] ** -0.5, feature_map, scale)
    query, feature_map, scale = _call(device, dtype, sizes, grid, scale)
    query *= sizes[1] ** -0.5
    yield "1 picture", (query, feature_map, scale)
    yield "64 tokens of it", (query[:, :64], feature_map, scale, _blocks(1, 576, 64, device))
    if device != "cpu":
        crops = [x.expand(4, *x.shape[1:]).contiguous() for x in (query, feature_map)]
        yield "4 crops", (*crops, scale)


def _map_bytes(query: Tensor, feature_map: Tensor, scale: int) -> int:
    """Count the pixels of the blocks that have a token."""
    return query.numel() * scale**2 * feature_map.element_size()


def forward_bytes(query: Tensor, feature_map: Tensor, scale: int, blocks: Tensor | None = None, *_: Any) -> int:
    return 2 * query.nbytes + _map_bytes(query, feature_map, scale) + (0 if blocks is None else blocks.nbytes)


def backward_bytes(_: Tensor, query: Tensor, feature_map: Tensor, scale: int, *rest: Any) -> int:
    """Count the gradient of the whole map, zeros included."""
    return forward_bytes(query, feature_map, scale, *rest) + query.nbytes + feature_map.nbytes


# ---- the cases of each op ----

_QUERY, _MAP, _BLOCKS = torch.ones(2, 2, 8), torch.ones(2, 8, 4, 6), torch.tensor([[0, 2], [1, 5]])

_BAD_CALLS = (
    ("query", _QUERY[0], ValueError, r"query must have shape \(B, T, C\), got \(2, 8\)"),
    ("query", _QUERY[..., :7], ValueError, r"query must have shape \(2, T, 8\) for a map of .*, got \(2, 2, 7\)"),
    ("blocks", None, ValueError, r"query must have shape \(2, 6, 8\) .* scale of 2, got \(2, 2, 8\)"),
    ("feature_map", _MAP.half(), TypeError, "feature_map must have the dtype of query, torch.float32, got torch.float"),
    ("feature_map", _MAP[..., :5], ValueError, r"sides divisible by scale, 2, got \(2, 8, 4, 5\)"),
    ("feature_map", _MAP[0], ValueError, r"feature_map must have shape \(B, C, height, width\), got \(8, 4, 6\)"),
    ("scale", 0, ValueError, "scale must be an int of at least 1, got 0"),
    ("blocks", _BLOCKS.int(), TypeError, "blocks must be int64, got torch.int32"),
    ("blocks", _BLOCKS[:1], ValueError, r"blocks must have shape \(2, 2\), got \(1, 2\)"),
    ("blocks", _BLOCKS.flip(1), ValueError, "blocks must be ascending within 0 and 5"),
    ("blocks", _BLOCKS + 1, ValueError, "blocks must be ascending within 0 and 5"),
    ("norm_eps", -1.0, ValueError, "norm_eps must be finite and not negative, got -1"),
)

mine_patches = Cases(
    samples=samples,
    good_call={"query": _QUERY, "feature_map": _MAP, "scale": 2, "blocks": _BLOCKS},
    bad_calls=_BAD_CALLS,
    workloads=workloads,
    bytes=forward_bytes,
    flops=lambda query, feature_map, scale, *_: 8 * query.numel() * scale**2,
    requested=2.3,  # the second pass over the map, and a query for each lane of a pixel row
)

mine_patches_backward = derived(
    mine_patches,
    _with_gradient,
    samples=backward_samples,
    good_call={**mine_patches.good_call, "grad_output": _QUERY},
    bad_calls=(
        *_BAD_CALLS,
        ("grad_output", _QUERY[:1], ValueError, r"grad_output must have the shape of query, \(2, 2, 8\), got"),
        ("grad_output", _QUERY.half(), TypeError, "grad_output must have the dtype of query, torch.float32, got"),
    ),
    bytes=backward_bytes,
    requested=2.7,  # two rows of channels for each lane
    flops=lambda grad_output, query, feature_map, scale, *_: 20 * query.numel() * scale**2,
)
