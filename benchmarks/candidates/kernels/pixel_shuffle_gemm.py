"""One matmul whose tiles are read through the pixel shuffle.

It saves the pass over the patches that precedes the vendor's matmul, or half of that pass with a LayerNorm: the
shuffled tokens are never written. By the bytes and FLOP of an H100 (calculated, not measured), it wins if its matmul
reaches 0.69 of the vendor's speed for 16 images of nanoVLM, and 0.94 for one image: the kernel does not split the
channels, and 64 tokens are only 15 programs. On a CPU there is nothing to save: the pass takes at most 1/57 of the op.

Each row of a tile of x is one offset (image, row and column of the token). Each step adds one number to all of them
(the patch within the token and its block of channels), so that no tile is gathered before the matmul.

LayerNorm: one launch stores the mean and the variance of each patch. The variance is computed from centred values,
because means of features can be ten deviations and more. Those of a token are combined from its patches'. The matmul
normalises its tile of x between shared memory and the tensor core, and rounds it there as Hugging Face does before the
matmul. This takes 0.28 of the tensor cores' time, on units that would otherwise be idle. Folding the norm behind the
matmul would skip that rounding, and 36 % of the outputs would differ from Hugging Face's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfast.kernels.common.dot import dot
from vlmfast.kernels.common.launch import (
    MAX_EXTENT,
    Config,
    ceil_div,
    device_unsupported,
    on_device,
    processors,
    shared_memory,
    with_contiguous_rows,
)
from vlmfast.kernels.pixel_shuffle.patch_map import layout, load_scaled, locate, offset_of
from vlmfast.kernels.pixel_shuffle.patch_norm import MAX_FORWARD, NormConfig, centre
from vlmfast.ops.pixel_shuffle.definition import square


@dataclass(frozen=True, kw_only=True)
class GemmConfig(Config):
    """The tile that one program multiplies in a step, and the number of steps that are loaded ahead."""

    BLOCK_TOKENS: int
    BLOCK_COLUMNS: int
    BLOCK_CHANNELS: int
    num_stages: int
    num_warps: int = 8
    GROUP: int = 8  # blocks of tokens that share columns of the weight while these are in the second-level cache

    def programs(self, tokens: int, out: int) -> int:
        """Count the programs for an output of shape (tokens, out)."""
        return ceil_div(tokens, self.BLOCK_TOKENS) * ceil_div(out, self.BLOCK_COLUMNS)

    def shared(self, element: int) -> int:
        """Count the bytes of shared memory for the operands of all stages."""
        return self.num_stages * (self.BLOCK_TOKENS + self.BLOCK_COLUMNS) * self.BLOCK_CHANNELS * element


# Calculated: per clock of an H100's tensor cores they read 48, 64, 96 and 128 bytes from the second-level cache. An
# A100 has too little shared memory for the first; a GPU with 64 KiB has enough only for the last. The last has few
# channels, so that unaligned elements, each of which needs its own address, do not spill registers.
HALF = (
    GemmConfig(BLOCK_TOKENS=128, BLOCK_COLUMNS=256, BLOCK_CHANNELS=64, num_stages=4),
    GemmConfig(BLOCK_TOKENS=128, BLOCK_COLUMNS=128, BLOCK_CHANNELS=64, num_stages=3),
    GemmConfig(BLOCK_TOKENS=64, BLOCK_COLUMNS=128, BLOCK_CHANNELS=64, num_stages=3),
    GemmConfig(BLOCK_TOKENS=64, BLOCK_COLUMNS=64, BLOCK_CHANNELS=32, num_stages=4),
)
# Float32 is multiplied element by element in registers, of which larger tiles would need too many.
WIDE = (GemmConfig(BLOCK_TOKENS=64, BLOCK_COLUMNS=64, BLOCK_CHANNELS=16, num_stages=3),)


def config_for(tokens: int, out: int, element: int, multiprocessors: int, shared: int) -> GemmConfig:
    """Choose the largest tile that fits the shared memory and occupies 0.9 of the multiprocessors, or the smallest."""
    tiles = HALF if element == 2 else WIDE
    fitting = (tile for tile in tiles if tile.shared(element) <= shared)
    return next((tile for tile in fitting if tile.programs(tokens, out) >= 0.9 * multiprocessors), tiles[-1])


@triton.jit
def moments_kernel(
    x_ptr,
    mean_ptr,
    variance_ptr,
    x_batch_stride,
    x_stride,
    patches,
    patches_per_batch,
    channels,
    input_scale,
    INPUT_SCALED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Store the mean and the variance of each patch, in raster order of the map."""
    patch = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None, None]  # BLOCK_PATCHES is 1
    channel = tl.arange(0, BLOCK_CHANNELS)[None, None, :]
    mask = (patch < patches) & (channel < channels)
    start = offset_of(patch // patches_per_batch, patch % patches_per_batch, x_batch_stride, x_stride)
    _, mean, variance = centre(load_scaled(x_ptr + start + channel, mask, input_scale, INPUT_SCALED), mask, channels)
    tl.store(mean_ptr + patch, mean, mask=patch < patches)
    tl.store(variance_ptr + patch, variance, mask=patch < patches)


@triton.jit
def _token_moments(mean_ptr, variance_ptr, patch, width, SCALE: tl.constexpr):
    """Compute the mean and the variance of the tokens that begin at ``patch`` from those of their patches."""
    mean = tl.zeros(patch.shape, tl.float32)
    for place in range(SCALE * SCALE):
        mean += tl.load(mean_ptr + patch + _beside(place, width, SCALE))
    mean /= SCALE * SCALE
    variance = tl.zeros(patch.shape, tl.float32)
    for place in range(SCALE * SCALE):
        apart = tl.load(mean_ptr + patch + _beside(place, width, SCALE)) - mean
        variance += tl.load(variance_ptr + patch + _beside(place, width, SCALE)) + apart * apart
    return mean, variance / (SCALE * SCALE)


@triton.jit
def _beside(place, width, SCALE: tl.constexpr):
    """Return the distance in the map from a token's first patch to its patch at ``place``."""
    return place // SCALE * (width * SCALE) + place % SCALE


@triton.jit
def _load(ptr, mask, MASKED: tl.constexpr):
    return tl.load(ptr, mask=mask, other=0.0) if MASKED else tl.load(ptr)


@triton.jit
def _gelu(x, TANH: tl.constexpr):
    if TANH:  # x * (1 + tanh(z)) / 2 = x * sigmoid(2 z)
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))


@triton.jit
def _finish(total, bias_ptr, y_ptr, token, column, tokens, out, ACTIVATION: tl.constexpr):
    """Store activation(total + bias), rounded before the activation, as between two modules, and after it."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=column < out, other=0.0).to(tl.float32)[None, :]
    y = total.to(dtype)
    if ACTIVATION is not None:
        y = _gelu(y.to(tl.float32), ACTIVATION == "gelu_tanh").to(dtype)
    y_ptr += token[:, None].to(tl.int64) * out + column[None, :]
    tl.store(y_ptr, y, mask=(token[:, None] < tokens) & (column[None, :] < out))


@triton.jit
def gemm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    mean_ptr,
    variance_ptr,
    y_ptr,
    x_batch_stride,
    x_stride,
    weight_stride,
    tokens,
    out,
    height,
    width,
    channels,
    input_scale,
    eps,
    INPUT_SCALED: tl.constexpr,
    SCALE: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    EACH_PATCH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Store activation(norm(shuffled x) @ weight^T + bias); a step adds a block of channels of one patch per token."""
    column_blocks = tl.cdiv(out, BLOCK_COLUMNS)
    first = tl.program_id(0) // (GROUP * column_blocks) * GROUP
    turn = tl.program_id(0) % (GROUP * column_blocks)
    group = tl.minimum(tl.cdiv(tokens, BLOCK_TOKENS) - first, GROUP)
    token = (first + turn % group) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    # Past the end the last row is read again, so that the loop needs no masks.
    row = tl.minimum(token, tokens - 1)
    weight_row = tl.minimum(turn // group * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS), out - 1)
    batch, _, _, position = locate(row * (SCALE * SCALE), height, width, SCALE, SCALE, BY_COLUMN)
    x_ptr += offset_of(batch, position, x_batch_stride, x_stride)[:, None]
    weight_ptr += (weight_row.to(tl.int64) * weight_stride)[None, :]
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    patch = batch * (SCALE * SCALE * height * width) + position
    if norm_weight_ptr is not None and not EACH_PATCH:
        mean, variance = _token_moments(mean_ptr, variance_ptr, patch, width, SCALE)
        inverse = tl.rsqrt(variance + eps)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_COLUMNS), tl.float32)
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    for step in range(SCALE * SCALE * blocks):
        place = step // blocks
        beside = _beside(place, width, SCALE)
        channel = step % blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
        inside = channel < channels
        x = _load(x_ptr + (beside.to(tl.int64) * x_stride + channel)[None, :], inside[None, :], MASKED)
        weight = _load(weight_ptr + (place * channels + channel)[:, None], inside[:, None], MASKED)
        if INPUT_SCALED:
            x = (x.to(tl.float32) * input_scale).to(dtype)
        if norm_weight_ptr is not None:
            if EACH_PATCH:
                mean = tl.load(mean_ptr + patch + beside)
                inverse = tl.rsqrt(tl.load(variance_ptr + patch + beside) + eps)
                number = channel
            else:
                number = place * channels + channel
            normed = (x.to(tl.float32) - mean[:, None]) * inverse[:, None]
            normed *= _load(norm_weight_ptr + number, inside, MASKED).to(tl.float32)[None, :]
            if norm_bias_ptr is not None:
                normed += _load(norm_bias_ptr + number, inside, MASKED).to(tl.float32)[None, :]
            x = normed.to(dtype)
        total = dot(x, weight, total)
    # One half of the columns after the other: exact GELUs of 256 columns at once would spill registers.
    half: tl.constexpr = BLOCK_COLUMNS // 2
    column = turn // group * BLOCK_COLUMNS + tl.arange(0, half)
    left, right = tl.split(tl.permute(tl.reshape(total, (BLOCK_TOKENS, 2, half)), (0, 2, 1)))
    _finish(left, bias_ptr, y_ptr, token, column, tokens, out, ACTIVATION)
    _finish(right, bias_ptr, y_ptr, token, column + half, tokens, out, ACTIVATION)


# ---- launchers ----


def pixel_shuffle_gemm_unsupported(x: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any) -> str | None:
    for other in (weight, bias):
        if other is not None and other.dtype != x.dtype:
            return f"the factors are of several dtypes ({x.dtype} and {other.dtype})"
    if max(x.shape[0] * x.shape[1], *weight.shape) > MAX_EXTENT:
        return f"x has {x.shape[0] * x.shape[1]} patches, weight is {tuple(weight.shape)}: more than {MAX_EXTENT}"
    if not 0 < x.shape[2] <= MAX_FORWARD:
        return f"a patch has {x.shape[2]} channels: none, or more than {MAX_FORWARD}"
    return device_unsupported(x)


def pixel_shuffle_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    grid: Sequence[int] | None = None,
    scale: int = 2,
    order: str = "row",
    input_scale: float = 1.0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    activation: str | None = None,
) -> Tensor:
    grid = square(x) if grid is None else grid
    out, channels = weight.shape[0], x.shape[2]
    y = x.new_empty((x.shape[0], x.shape[1] // scale**2, out))
    if y.numel() == 0:
        return y
    x, weight = with_contiguous_rows(x), with_contiguous_rows(weight)
    bias, norm_weight, norm_bias = (
        vector if vector is None else vector.contiguous() for vector in (bias, norm_weight, norm_bias)
    )
    tokens = x.shape[0] * y.shape[1]
    config = config_for(tokens, out, x.element_size(), processors(x), shared_memory(x))
    with on_device(x):
        means, variances = (None, None) if norm_weight is None else _moments(x, input_scale)
        gemm_kernel[(config.programs(tokens, out),)](
            *(x, weight, bias, norm_weight, norm_bias, means, variances, y),
            *(*x.stride()[:2], weight.stride(0), tokens, out),
            channels=channels,
            eps=norm_eps,
            SCALE=scale,
            EACH_PATCH=norm_weight is not None and norm_weight.shape[0] == channels,
            ACTIVATION=activation,
            MASKED=channels % config.BLOCK_CHANNELS != 0,
            **layout(grid, scale, order, input_scale),
            **vars(config),
        )
    return y


def _moments(x: Tensor, input_scale: float) -> tuple[Tensor, Tensor]:
    """Compute the mean and the variance of each patch."""
    means, variances = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    config = NormConfig.config_for(1, x.shape[2])
    moments_kernel[(ceil_div(means.numel(), config.BLOCK_ROWS),)](
        *(x, means, variances),
        *(*x.stride()[:2], means.numel(), x.shape[1], x.shape[2], float(input_scale)),
        INPUT_SCALED=input_scale != 1.0,
        **vars(config),
    )
    return means, variances
