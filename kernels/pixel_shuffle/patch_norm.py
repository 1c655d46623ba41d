"""LayerNorm of tokens that are read from the map of patches and stay in registers between their uses."""

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

from vlmfast.kernels.common.kernel import aligned, kernel, limited
from vlmfast.kernels.common.launch import Config, next_power_of_two, norm_config_for
from vlmfast.kernels.pixel_shuffle.patch_map import load_scaled, locate, offset_of

MAX_FORWARD = 16384  # padded elements that are normalised together: twice as many would spill
MAX_BACKWARD = 8192  # less, for two operands and two parameter gradients in registers


def padded(patches: int, channels: int) -> int:
    """Return the elements in registers for ``patches`` x ``channels``, with both rounded up to powers of two."""
    return next_power_of_two(patches) * next_power_of_two(channels)


@dataclass(frozen=True, kw_only=True)
class NormConfig(Config):
    """The tile of a program: rows x patches x channels."""

    BLOCK_ROWS: int
    BLOCK_PATCHES: int
    BLOCK_CHANNELS: int

    @staticmethod
    @functools.lru_cache
    def config_for(patches: int, channels: int, backward: bool = False) -> "NormConfig":
        """Choose rows and warps as for a norm of contiguous rows."""
        config = norm_config_for(padded(patches, channels), backward)
        return NormConfig(
            BLOCK_ROWS=config.BLOCK_ROWS,
            BLOCK_PATCHES=next_power_of_two(patches),
            BLOCK_CHANNELS=next_power_of_two(channels),
            num_warps=config.num_warps,
        )


@triton.jit
def _row_sum(x):
    """Add up the patches and channels of each row."""
    return tl.sum(tl.sum(x, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def centre(x, mask, size):
    """Compute (x - mean, mean, variance) of each row in two passes, because the mean may be far from zero.

    The pass that sums the squares also sums the centred values, which corrects the rounding error of the first mean.
    """
    mean = _row_sum(x) / size
    centred = tl.where(mask, x - mean, 0.0)
    error = _row_sum(centred) / size
    return centred - error, mean + error, _row_sum(centred * centred) / size - error * error


@kernel
@limited("the mean is taken twice, to be exact where it is far from zero: four sums over patches and channels")
def pixel_shuffle_norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    x_batch_stride,
    x_stride,
    rows,
    height,
    width,
    channels,
    input_scale,
    eps,
    INPUT_SCALED: tl.constexpr,
    SCALE: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    PATCHES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Store weight * (x - mean) * rsqrt(variance + eps) + bias over rows of PATCHES patches."""
    x_batch_stride, x_stride = aligned(x_batch_stride, ALIGNED), aligned(x_stride, ALIGNED)
    channels = aligned(channels, ALIGNED)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None, None]
    part = tl.arange(0, BLOCK_PATCHES)[None, :, None]
    channel = tl.arange(0, BLOCK_CHANNELS)[None, None, :]
    patch = row * PATCHES + part
    inside = (part < PATCHES) & (channel < channels)
    mask = (row < rows) & inside
    batch, _, _, position = locate(patch, height, width, SCALE, SCALE, BY_COLUMN)
    x = load_scaled(
        x_ptr + offset_of(batch, position, x_batch_stride, x_stride) + channel, mask, input_scale, INPUT_SCALED
    )
    size = PATCHES * channels
    centred, _, variance = centre(x, mask, size)
    normed = centred * tl.rsqrt(variance + eps)
    weight = tl.load(weight_ptr + part * channels + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + part * channels + channel, mask=inside, other=0.0).to(tl.float32)
    y_ptr += patch.to(tl.int64) * channels + channel
    tl.store(y_ptr, (normed * weight + bias).to(y_ptr.dtype.element_ty), mask=mask)


@kernel
@limited("six sums over patches and channels, and a program has but one step in an image: all is in flight at once")
def pixel_shuffle_norm_backward_kernel(
    grad_output_ptr,
    x_ptr,
    weight_ptr,
    grad_x_ptr,
    weight_partial_ptr,
    bias_partial_ptr,
    grad_output_batch_stride,
    grad_output_stride,
    x_batch_stride,
    x_stride,
    rows,
    height,
    width,
    channels,
    input_scale,
    eps,
    INPUT_SCALED: tl.constexpr,
    SCALE: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    PATCHES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Store input_scale * r * (g - mean(g) - n * mean(g * n)) with n = (x - mean) * r, g = grad_output * weight.

    A program loops over blocks of rows and accumulates its share of the parameters' gradients in registers.
    """
    grad_output_batch_stride = aligned(grad_output_batch_stride, ALIGNED)
    grad_output_stride, channels = aligned(grad_output_stride, ALIGNED), aligned(channels, ALIGNED)
    x_batch_stride, x_stride = aligned(x_batch_stride, ALIGNED), aligned(x_stride, ALIGNED)
    part = tl.arange(0, BLOCK_PATCHES)[None, :, None]
    channel = tl.arange(0, BLOCK_CHANNELS)[None, None, :]
    inside = (part < PATCHES) & (channel < channels)
    size = PATCHES * channels
    weight = tl.load(weight_ptr + part * channels + channel, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK_ROWS, BLOCK_PATCHES, BLOCK_CHANNELS), tl.float32)
    grad_bias = tl.zeros((BLOCK_ROWS, BLOCK_PATCHES, BLOCK_CHANNELS), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None, None]
        mask = (row < rows) & inside
        batch, token, place, position = locate(row * PATCHES + part, height, width, SCALE, SCALE, BY_COLUMN)
        x = load_scaled(
            x_ptr + offset_of(batch, position, x_batch_stride, x_stride) + channel, mask, input_scale, INPUT_SCALED
        )
        token_offset = offset_of(batch, token, grad_output_batch_stride, grad_output_stride) + place * channels
        grad = tl.load(grad_output_ptr + token_offset + channel, mask=mask, other=0.0).to(tl.float32)
        centred, _, variance = centre(x, mask, size)
        inverse = tl.rsqrt(variance + eps)
        normed = centred * inverse
        weighted = grad * weight
        grad_x = inverse * (weighted - _row_sum(weighted) / size - normed * (_row_sum(weighted * normed) / size))
        if INPUT_SCALED:
            grad_x *= input_scale
        grad_x_row = (batch * (SCALE * SCALE * height * width) + position).to(tl.int64) * channels
        tl.store(grad_x_ptr + grad_x_row + channel, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        grad_weight += grad * normed
        grad_bias += grad
    partial = tl.program_id(0).to(tl.int64) * size + part * channels + channel
    tl.store(weight_partial_ptr + partial, tl.sum(grad_weight, 0, keep_dims=True), mask=inside)
    tl.store(bias_partial_ptr + partial, tl.sum(grad_bias, 0, keep_dims=True), mask=inside)
