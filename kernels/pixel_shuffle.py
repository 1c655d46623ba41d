"""Triton kernels of vlmfast/ops/pixel_shuffle.py.

Bytes (N = B h w C elements of size s): `pixel_shuffle` and `pixel_unshuffle` move 2 N s, `pixel_shuffle_norm` 2 N s at
9 FLOP per element, its backward 3 N s at 18, plus two float32 rows of gradients of weight and bias per program, of
which there are at most two per multiprocessor. What is normalised stays in registers between its uses, so nothing is
read twice.

Patches are numbered token by token, as they lie in the output; where each is in the map, is arithmetic.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfast.kernels.launch import (
    FP_FUSION,
    MAX_EXTENT,
    Tile,
    ceil_div,
    device_unsupported,
    next_power_of_two,
    on_device,
    processors,
    with_contiguous_rows,
)
from vlmfast.kernels.partial_sums import sum_partials
from vlmfast.kernels.patch_map import layout, load_scaled, locate, offset_of

MAX_FORWARD = 16384  # elements that are normalised together, with padding: twice as many would spill registers
MAX_BACKWARD = 8192  # half of that, for two operands and the gradients of two parameters at once


def copy_tile(channels: int) -> Tile:
    """16 elements per thread: two 16-byte loads in flight for bfloat16. Narrow blocks leave few lanes without work."""
    columns = min(512, next_power_of_two(channels))
    return Tile(rows=min(256, 4096 // columns), columns=columns, warps=8)


def _norm_tile(patches: int, channels: int, elements: int, elements_per_thread: int) -> Tile:
    """Rows of ``patches`` x ``channels`` are normalised; narrow ones share a program."""
    row = _padded(patches, channels)
    warps = min(16, max(4, row // (32 * elements_per_thread)))
    return Tile(rows=min(64, max(1, elements // row)), columns=next_power_of_two(channels), warps=warps)


def forward_tile(patches: int, channels: int) -> Tile:
    """32 elements per thread: four 16-byte loads in flight for bfloat16."""
    return _norm_tile(patches, channels, elements=2048, elements_per_thread=32)


def backward_tile(patches: int, channels: int) -> Tile:
    """Half of that, as the backward holds twice as much and more per element."""
    return _norm_tile(patches, channels, elements=1024, elements_per_thread=16)


def _padded(patches: int, channels: int) -> int:
    """The registers' worth of elements that ``patches`` x ``channels`` take: both are rounded up to powers of two."""
    return next_power_of_two(patches) * next_power_of_two(channels)


@triton.jit
def _row_sum(x):
    """The sum over the patches and channels of each row."""
    return tl.sum(tl.sum(x, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def centre(x, mask, size):
    """(x - mean, mean, variance) of each row, not from its sum of squares: the mean may be far from zero.

    What is left after a first mean says how far its rounding was off, in the pass that sums the squares.
    """
    mean = _row_sum(x) / size
    centred = tl.where(mask, x - mean, 0.0)
    error = _row_sum(centred) / size
    return centred - error, mean + error, _row_sum(centred * centred) / size - error * error


@triton.jit
def _copy_kernel(
    map_ptr,
    tokens_ptr,
    map_image_stride,
    map_stride,
    tokens_image_stride,
    tokens_stride,
    patches,
    height,
    width,
    channels,
    scale,
    SCALED: tl.constexpr,
    UNSHUFFLE: tl.constexpr,
    SCALE_Y: tl.constexpr,
    SCALE_X: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Tokens = the map's patches, or the map = the tokens' patches."""
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    patch = (tl.program_id(0) // blocks) * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)[:, None]
    channel = (tl.program_id(0) % blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    mask = (patch < patches) & (channel < channels)
    image, token, place, position = locate(patch, height, width, SCALE_Y, SCALE_X, BY_COLUMN)
    map_ptr += offset_of(image, position, map_image_stride, map_stride) + channel
    tokens_ptr += offset_of(image, token, tokens_image_stride, tokens_stride) + place * channels + channel
    source_ptr = tokens_ptr if UNSHUFFLE else map_ptr
    target_ptr = map_ptr if UNSHUFFLE else tokens_ptr
    value = load_scaled(source_ptr, mask, scale, SCALED)
    tl.store(target_ptr, value.to(target_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    x_image_stride,
    x_stride,
    rows,
    height,
    width,
    channels,
    scale,
    eps,
    SCALED: tl.constexpr,
    SCALE: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Y = weight * (x - mean) * rsqrt(variance + eps) + bias over rows of PATCHES patches."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None, None]
    part = tl.arange(0, BLOCK_PATCHES)[None, :, None]
    channel = tl.arange(0, BLOCK_CHANNELS)[None, None, :]
    patch = row * PATCHES + part
    inside = (part < PATCHES) & (channel < channels)
    mask = (row < rows) & inside
    image, _, _, position = locate(patch, height, width, SCALE, SCALE, BY_COLUMN)
    x = load_scaled(x_ptr + offset_of(image, position, x_image_stride, x_stride) + channel, mask, scale, SCALED)
    size = PATCHES * channels
    centred, _, variance = centre(x, mask, size)
    normed = centred * tl.rsqrt(variance + eps)
    weight = tl.load(weight_ptr + part * channels + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + part * channels + channel, mask=inside, other=0.0).to(tl.float32)
    y_ptr += patch.to(tl.int64) * channels + channel
    tl.store(y_ptr, (normed * weight + bias).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_backward_kernel(
    grad_output_ptr,
    x_ptr,
    weight_ptr,
    grad_x_ptr,
    weight_partial_ptr,
    bias_partial_ptr,
    grad_output_image_stride,
    grad_output_stride,
    x_image_stride,
    x_stride,
    rows,
    height,
    width,
    channels,
    scale,
    eps,
    SCALED: tl.constexpr,
    SCALE: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """grad_x = scale * r * (g - mean(g) - n * mean(g * n)) with n = (x - mean) * r, g = grad_output * weight.

    A program walks over blocks of rows and keeps its share of the parameters' gradients in registers.
    """
    part = tl.arange(0, BLOCK_PATCHES)[None, :, None]
    channel = tl.arange(0, BLOCK_CHANNELS)[None, None, :]
    inside = (part < PATCHES) & (channel < channels)
    size = PATCHES * channels
    weight = tl.load(weight_ptr + part * channels + channel, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK_ROWS, BLOCK_PATCHES, BLOCK_CHANNELS), tl.float32)
    grad_bias = tl.zeros((BLOCK_ROWS, BLOCK_PATCHES, BLOCK_CHANNELS), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None, None]
        mask = (row < rows) & inside
        image, token, place, position = locate(row * PATCHES + part, height, width, SCALE, SCALE, BY_COLUMN)
        x = load_scaled(x_ptr + offset_of(image, position, x_image_stride, x_stride) + channel, mask, scale, SCALED)
        token_offset = offset_of(image, token, grad_output_image_stride, grad_output_stride) + place * channels
        grad = tl.load(grad_output_ptr + token_offset + channel, mask=mask, other=0.0).to(tl.float32)
        centred, _, variance = centre(x, mask, size)
        inverse = tl.rsqrt(variance + eps)
        normed = centred * inverse
        weighted = grad * weight
        grad_x = inverse * (weighted - _row_sum(weighted) / size - normed * (_row_sum(weighted * normed) / size))
        if SCALED:
            grad_x *= scale
        grad_x_row = (image * (SCALE * SCALE * height * width) + position).to(tl.int64) * channels
        tl.store(grad_x_ptr + grad_x_row + channel, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        grad_weight += grad * normed
        grad_bias += grad
    partial = tl.program_id(0).to(tl.int64) * size + part * channels + channel
    tl.store(weight_partial_ptr + partial, tl.sum(grad_weight, 0, keep_dims=True), mask=inside)
    tl.store(bias_partial_ptr + partial, tl.sum(grad_bias, 0, keep_dims=True), mask=inside)


# ---- launchers ----


def pixel_shuffle_unsupported(
    x: Tensor, grid: Sequence[int], scale: int = 2, order: str = "row", input_scale: float = 1.0
) -> str | None:
    if x.shape[0] * grid[0] * grid[1] > MAX_EXTENT:
        return f"x has {x.shape[0] * grid[0] * grid[1]} patches, more than {MAX_EXTENT}"
    if scale**2 * x.shape[2] > MAX_EXTENT:
        return f"x has tokens of {scale**2 * x.shape[2]} channels, more than {MAX_EXTENT}"
    return device_unsupported(x)


def pixel_shuffle(
    x: Tensor, grid: Sequence[int], scale: int = 2, order: str = "row", input_scale: float = 1.0
) -> Tensor:
    shape = x.shape[0], grid[0] * grid[1] // scale**2, scale**2 * x.shape[2]
    tokens = torch.empty(shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _copy(with_contiguous_rows(x), tokens, scale, layout(grid, scale, order, input_scale), unshuffle=False)
    return tokens


def pixel_unshuffle_unsupported(
    x: Tensor, grid: Sequence[int], scale: int = 2, order: str = "row", input_scale: float = 1.0
) -> str | None:
    return pixel_shuffle_unsupported(x, grid, 1)


def pixel_unshuffle(
    x: Tensor, grid: Sequence[int], scale: int = 2, order: str = "row", input_scale: float = 1.0
) -> Tensor:
    shape = x.shape[0], grid[0] * grid[1], x.shape[2] // scale**2
    patches = torch.empty(shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _copy(patches, with_contiguous_rows(x), scale, layout(grid, scale, order, input_scale), unshuffle=True)
    return patches


def _copy(patches: Tensor, tokens: Tensor, scale: int, arguments: dict[str, Any], unshuffle: bool) -> None:
    """Copy between a map of patches and its tokens. Neighbours in memory are copied as one wide patch."""
    joined = scale if patches.stride(1) == patches.shape[2] else 1
    channels = joined * patches.shape[2]
    tile = copy_tile(channels)
    count = patches.numel() // channels
    with on_device(patches):
        _copy_kernel[(ceil_div(count, tile.rows) * ceil_div(channels, tile.columns),)](
            patches,
            tokens,
            patches.stride(0),
            joined * patches.stride(1),
            *tokens.stride()[:2],
            count,
            channels=channels,
            UNSHUFFLE=unshuffle,
            SCALE_Y=scale,
            SCALE_X=scale // joined,
            BLOCK_PATCHES=tile.rows,
            BLOCK_CHANNELS=tile.columns,
            num_warps=tile.warps,
            **arguments,
            **FP_FUSION,
        )


def _norm_unsupported(x: Tensor, norm_weight: Tensor, grid: Sequence[int], scale: int, limit: int) -> str | None:
    channels, size = x.shape[2], norm_weight.shape[0]
    if size and _padded(size // channels, channels) > limit:
        patches = size // channels
        return f"rows of {patches} x {channels} elements, padded to powers of two, have more than {limit}"
    return pixel_shuffle_unsupported(x, grid, scale)


def pixel_shuffle_norm_unsupported(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    grid: Sequence[int],
    scale: int = 2,
    order: str = "row",
    input_scale: float = 1.0,
    norm_eps: float = 1e-5,
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
    shape = x.shape[0], grid[0] * grid[1] // scale**2, scale**2 * x.shape[2]
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    x = with_contiguous_rows(x)
    channels = x.shape[2]
    patches, rows = norm_weight.shape[0] // channels, x.numel() // norm_weight.shape[0]
    tile = forward_tile(patches, channels)
    with on_device(x):
        _norm_kernel[(ceil_div(rows, tile.rows),)](
            x,
            norm_weight.contiguous(),
            norm_bias.contiguous(),
            y,
            *x.stride()[:2],
            rows,
            channels=channels,
            eps=norm_eps,
            SCALE=scale,
            PATCHES=patches,
            BLOCK_ROWS=tile.rows,
            BLOCK_PATCHES=next_power_of_two(patches),
            BLOCK_CHANNELS=tile.columns,
            num_warps=tile.warps,
            **layout(grid, scale, order, input_scale),
            **FP_FUSION,
        )
    return y


def pixel_shuffle_norm_backward_unsupported(
    grad_output: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    grid: Sequence[int],
    scale: int = 2,
    order: str = "row",
    input_scale: float = 1.0,
    norm_eps: float = 1e-5,
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
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(norm_weight), torch.zeros_like(norm_weight)
    x, grad_output = with_contiguous_rows(x), with_contiguous_rows(grad_output)
    channels, size = x.shape[2], norm_weight.shape[0]
    patches, rows = size // channels, x.numel() // size
    tile = backward_tile(patches, channels)
    programs = min(ceil_div(rows, tile.rows), 2 * processors(x))
    weight_partials, bias_partials = (
        torch.empty((programs, size), dtype=torch.float32, device=x.device) for _ in range(2)
    )
    with on_device(x):
        _norm_backward_kernel[(programs,)](
            grad_output,
            x,
            norm_weight.contiguous(),
            grad_x,
            weight_partials,
            bias_partials,
            *grad_output.stride()[:2],
            *x.stride()[:2],
            rows,
            channels=channels,
            eps=norm_eps,
            SCALE=scale,
            PATCHES=patches,
            BLOCK_ROWS=tile.rows,
            BLOCK_PATCHES=next_power_of_two(patches),
            BLOCK_CHANNELS=tile.columns,
            num_warps=tile.warps,
            **layout(grid, scale, order, input_scale),
            **FP_FUSION,
        )
    return grad_x, sum_partials(weight_partials, norm_weight.dtype), sum_partials(bias_partials, norm_weight.dtype)
