"""Pixel shuffle, and the LayerNorm that follows it, in Triton: nothing is read twice.

Programs number the patches token by token, as they lie in the output, and compute the position of each in the map.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfast.kernels.common.kernel import alignment
from vlmfast.kernels.common.launch import (
    MAX_EXTENT,
    ceil_div,
    device_unsupported,
    on_device,
    processors,
    shared_memory,
    stages_for,
    with_contiguous_rows,
)
from vlmfast.kernels.common.partial_sums import sum_partials
from vlmfast.kernels.pixel_shuffle.patch_map import config_for, layout, pixel_shuffle_kernel
from vlmfast.kernels.pixel_shuffle.patch_norm import (
    MAX_BACKWARD,
    MAX_FORWARD,
    NormConfig,
    padded,
    pixel_shuffle_norm_backward_kernel,
    pixel_shuffle_norm_kernel,
)


def pixel_shuffle_unsupported(x: Tensor, grid: Sequence[int], scale: int = 2, *_: Any) -> str | None:
    if x.shape[0] * grid[0] * grid[1] > MAX_EXTENT:
        return f"x has {x.shape[0] * grid[0] * grid[1]} patches, more than {MAX_EXTENT}"
    if scale**2 * x.shape[2] > MAX_EXTENT:
        return f"x has tokens of {scale**2 * x.shape[2]} channels, more than {MAX_EXTENT}"
    return device_unsupported(x)


def pixel_shuffle(
    x: Tensor, grid: Sequence[int], scale: int = 2, order: str = "row", input_scale: float = 1.0
) -> Tensor:
    tokens = x.new_empty(x.shape[0], grid[0] * grid[1] // scale**2, scale**2 * x.shape[2])
    if x.numel():
        _copy(with_contiguous_rows(x), tokens, scale, layout(grid, scale, order, input_scale), unshuffle=False)
    return tokens


def pixel_unshuffle_unsupported(x: Tensor, grid: Sequence[int], *_: Any) -> str | None:
    return pixel_shuffle_unsupported(x, grid, 1)


def pixel_unshuffle(
    x: Tensor, grid: Sequence[int], scale: int = 2, order: str = "row", input_scale: float = 1.0
) -> Tensor:
    patches = x.new_empty(x.shape[0], grid[0] * grid[1], x.shape[2] // scale**2)
    if x.numel():
        _copy(patches, with_contiguous_rows(x), scale, layout(grid, scale, order, input_scale), unshuffle=True)
    return patches


def _copy(patches: Tensor, tokens: Tensor, scale: int, arguments: dict[str, Any], unshuffle: bool) -> None:
    """Copy between a map of patches and its tokens. Patches that are adjacent in both are copied as one wide patch."""
    joined = scale if patches.stride(1) == patches.shape[2] else 1
    channels = joined * patches.shape[2]
    config = config_for(channels)
    count = patches.numel() // channels
    strides = patches.stride(0), joined * patches.stride(1), *tokens.stride()[:2]
    with on_device(patches):
        pixel_shuffle_kernel[(ceil_div(count, config.BLOCK_ROWS) * ceil_div(channels, config.BLOCK_COLUMNS),)](
            *(patches, tokens),
            *(*strides, count),
            channels=channels,
            ALIGNED=alignment(channels, *strides),
            UNSHUFFLE=unshuffle,
            SCALE_Y=scale,
            SCALE_X=scale // joined,
            **arguments,
            **vars(config),
        )


def _norm_unsupported(x: Tensor, norm_weight: Tensor, grid: Sequence[int], scale: int, limit: int) -> str | None:
    channels, size = x.shape[2], norm_weight.shape[0]
    patches = size // channels if size else 0
    if padded(patches, channels) > limit:
        return f"rows of {patches} x {channels} elements, padded to powers of two, have more than {limit}"
    return pixel_shuffle_unsupported(x, grid, scale)


def pixel_shuffle_norm_unsupported(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, grid: Sequence[int], scale: int = 2, *_: Any
) -> str | None:
    return _norm_unsupported(x, norm_weight, grid, scale, MAX_FORWARD)


def pixel_shuffle_norm(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    grid: Sequence[int],
    scale: int = 2,
    order: str = "row",
    input_scale: float = 1.0,
    norm_eps: float = 1e-5,
) -> Tensor:
    y = x.new_empty(x.shape[0], grid[0] * grid[1] // scale**2, scale**2 * x.shape[2])
    if x.numel() == 0:
        return y
    x = with_contiguous_rows(x)
    channels = x.shape[2]
    patches, rows = norm_weight.shape[0] // channels, x.numel() // norm_weight.shape[0]
    config = NormConfig.config_for(patches, channels)
    with on_device(x):
        pixel_shuffle_norm_kernel[(ceil_div(rows, config.BLOCK_ROWS),)](
            *(x, norm_weight.contiguous(), norm_bias.contiguous(), y),
            *(*x.stride()[:2], rows),
            channels=channels,
            ALIGNED=alignment(channels, *x.stride()[:2]),
            eps=norm_eps,
            SCALE=scale,
            PATCHES=patches,
            **layout(grid, scale, order, input_scale),
            **vars(config),
        )
    return y


def pixel_shuffle_norm_backward_unsupported(
    grad_output: Tensor, x: Tensor, norm_weight: Tensor, grid: Sequence[int], scale: int = 2, *_: Any
) -> str | None:
    return _norm_unsupported(x, norm_weight, grid, scale, MAX_BACKWARD)


def pixel_shuffle_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    grid: Sequence[int],
    scale: int = 2,
    order: str = "row",
    input_scale: float = 1.0,
    norm_eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(norm_weight), torch.zeros_like(norm_weight)
    x, grad_output = with_contiguous_rows(x), with_contiguous_rows(grad_output)
    channels, size = x.shape[2], norm_weight.shape[0]
    patches, rows = size // channels, x.numel() // size
    config = NormConfig.config_for(patches, channels, backward=True)
    programs = min(ceil_div(rows, config.BLOCK_ROWS), 2 * processors(x))
    weight_partials, bias_partials = (x.new_empty(programs, size, dtype=torch.float32) for _ in range(2))
    with on_device(x):
        pixel_shuffle_norm_backward_kernel[(programs,)](
            *(grad_output, x, norm_weight.contiguous(), grad_x, weight_partials, bias_partials),
            *(*grad_output.stride()[:2], *x.stride()[:2], rows),
            channels=channels,
            ALIGNED=alignment(channels, *grad_output.stride()[:2], *x.stride()[:2]),
            STAGES=stages_for(2 * x.element_size() * config.BLOCK_ROWS * padded(patches, channels), shared_memory(x)),
            eps=norm_eps,
            SCALE=scale,
            PATCHES=patches,
            **layout(grid, scale, order, input_scale),
            **vars(config),
        )
    return grad_x, sum_partials(weight_partials, norm_weight.dtype), sum_partials(bias_partials, norm_weight.dtype)
