"""Two passes over the block of a token: statistics and logits of its pixels, then their weighted sum, or the gradients.

A block is too large for registers, and the shared memory of a multiprocessor does not hold two of them. The second pass
therefore reads it again, mostly from the L2 cache.
"""

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

from vlmfast.kernels.common.kernel import aligned, kernel, limited
from vlmfast.kernels.common.launch import Config, next_power_of_two

MAX_PIXELS = 1024
_MAXIMUM = tl.constexpr(3.4028234663852886e38)
_LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, kw_only=True)
class MiningConfig(Config):
    """The tile of a program: the pixels of a block, padded to a power of two, and the channels per step."""

    PIXELS: int
    BLOCK_CHANNELS: int

    @staticmethod
    @functools.lru_cache
    def config_for(scale: int, channels: int) -> "MiningConfig":
        """Choose 16 elements per thread, because their three sums take 48 registers."""
        pixels = next_power_of_two(scale * scale)
        block = min(2048 // pixels, max(16, next_power_of_two(channels)), 512)
        return MiningConfig(PIXELS=pixels, BLOCK_CHANNELS=block, num_warps=4)


@triton.jit
def _place(block_ptr, block_stride, tokens, width, SCALE: tl.constexpr):
    """Return the image and token of a program, and the row and column of the map at which the token's block begins."""
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    number = token
    if block_ptr is not None:
        number = tl.load(block_ptr + batch * block_stride + token)
    columns = width // SCALE
    return batch, token, number // columns * SCALE, number % columns * SCALE


@triton.jit
def _measure(
    map_ptr,
    query_ptr,
    grad_ptr,
    channel_stride,
    inside,
    channels,
    eps,
    PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Return each pixel's mean, inverse deviation, logit and dot with the gradient, and the sums of both rows.

    The mean of a sample of channels is subtracted from the pixels first, so that the remaining mean is small.
    """
    lane = tl.arange(0, BLOCK_CHANNELS)[:, None]
    sampled = tl.minimum(lane * tl.cdiv(channels, BLOCK_CHANNELS), channels - 1).to(tl.int64)
    sample = tl.load(map_ptr + sampled * channel_stride, mask=inside, other=0.0).to(tl.float32)
    shift = tl.sum(sample, 0, keep_dims=True) / BLOCK_CHANNELS
    sums = tl.zeros((BLOCK_CHANNELS, PIXELS), tl.float32)
    squares = tl.zeros((BLOCK_CHANNELS, PIXELS), tl.float32)
    logits = tl.zeros((BLOCK_CHANNELS, PIXELS), tl.float32)
    reached = tl.zeros((BLOCK_CHANNELS, PIXELS), tl.float32)
    query_sum = tl.zeros((BLOCK_CHANNELS, 1), tl.float32)
    grad_sum = tl.zeros((BLOCK_CHANNELS, 1), tl.float32)
    for first in range(0, channels, BLOCK_CHANNELS):
        channel = first + lane
        mask = channel < channels
        pixel = tl.load(map_ptr + channel.to(tl.int64) * channel_stride, mask=mask & inside, other=0.0)
        query = tl.load(query_ptr + channel, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask & inside, pixel.to(tl.float32) - shift, 0.0)
        sums += centred
        squares += centred * centred
        logits += centred * query
        query_sum += query
        if grad_ptr is not None:
            grad = tl.load(grad_ptr + channel, mask=mask, other=0.0).to(tl.float32)
            reached += centred * grad
            grad_sum += grad
    rest = tl.sum(sums, 0, keep_dims=True) / channels
    deviation = tl.sqrt(tl.maximum(tl.sum(squares, 0, keep_dims=True) / channels - rest * rest, 0.0) + eps)
    inverse = 1.0 / deviation
    of_query, of_grad = tl.sum(query_sum, 0, keep_dims=True), tl.sum(grad_sum, 0, keep_dims=True)
    logit = (tl.sum(logits, 0, keep_dims=True) - rest * of_query) * inverse
    return (
        shift + rest,
        inverse,
        logit,
        # divided, because an FMA of a product and the average would keep its unrounded tail: no 0 for a single pixel
        (tl.sum(reached, 0, keep_dims=True) - rest * of_grad) / deviation,
        of_query,
        of_grad,
    )


@triton.jit
def _softmax(logit, inside):
    """Return the softmax weights of the pixels."""
    logit = tl.where(logit == logit, logit, 0.0)
    logit = tl.minimum(tl.maximum(logit, -_MAXIMUM), _MAXIMUM)
    largest = tl.max(tl.where(inside, logit, -_MAXIMUM), 1, keep_dims=True)
    weight = tl.where(inside, tl.exp2((logit - largest) * _LOG2E), 0.0)
    return weight / tl.sum(weight, 1, keep_dims=True)


@kernel
@limited("a program has a token: of a few there are too few, and pixels are widened and read once more, from a cache")
def mine_kernel(
    query_ptr,
    map_ptr,
    block_ptr,
    y_ptr,
    query_batch_stride,
    query_token_stride,
    map_batch_stride,
    channel_stride,
    row_stride,
    block_stride,
    tokens,
    channels,
    width,
    eps,
    ALIGNED: tl.constexpr,
    SCALE: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Store the mined features of one token."""
    map_batch_stride, channel_stride = aligned(map_batch_stride, ALIGNED), aligned(channel_stride, ALIGNED)
    row_stride = aligned(row_stride, ALIGNED)
    batch, token, row, column = _place(block_ptr, block_stride, tokens, width, SCALE)
    place = tl.arange(0, PIXELS)[None, :]
    inside = place < SCALE * SCALE
    query_ptr += batch * query_batch_stride + token * query_token_stride
    map_ptr += batch * map_batch_stride + row * row_stride + column
    map_ptr += (place // SCALE).to(tl.int64) * row_stride + place % SCALE
    mean, inverse, logit, _, _, _ = _measure(
        map_ptr, query_ptr, None, channel_stride, inside, channels, eps, PIXELS, BLOCK_CHANNELS
    )
    weight = tl.where(inside, _softmax(logit, inside) * inverse, 0.0)
    y_ptr += tl.program_id(0).to(tl.int64) * channels
    for first in range(0, channels, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS)[:, None]
        mask = channel < channels
        pixel = tl.load(map_ptr + channel.to(tl.int64) * channel_stride, mask=mask & inside, other=0.0).to(tl.float32)
        mined = tl.sum(tl.where(inside, (pixel - mean) * weight, 0.0), 1, keep_dims=True)
        tl.store(y_ptr + channel, mined.to(y_ptr.dtype.element_ty), mask=mask)


@kernel
@limited("a program has a token: of a few there are too few, and pixels are widened and read once more, from a cache")
def mine_backward_kernel(
    grad_ptr,
    query_ptr,
    map_ptr,
    block_ptr,
    grad_query_ptr,
    grad_map_ptr,
    grad_batch_stride,
    grad_token_stride,
    query_batch_stride,
    query_token_stride,
    map_batch_stride,
    channel_stride,
    row_stride,
    block_stride,
    tokens,
    channels,
    width,
    eps,
    height,
    GRAD_ALIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALE: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Store the gradients of one token's query and of its block."""
    map_batch_stride, channel_stride = aligned(map_batch_stride, ALIGNED), aligned(channel_stride, ALIGNED)
    row_stride, width = aligned(row_stride, ALIGNED), aligned(width, GRAD_ALIGNED)
    batch, token, row, column = _place(block_ptr, block_stride, tokens, width, SCALE)
    place = tl.arange(0, PIXELS)[None, :]
    inside = place < SCALE * SCALE
    query_ptr += batch * query_batch_stride + token * query_token_stride
    grad_ptr += batch * grad_batch_stride + token * grad_token_stride
    map_ptr += batch * map_batch_stride + row * row_stride + column
    map_ptr += (place // SCALE).to(tl.int64) * row_stride + place % SCALE
    mean, inverse, logit, reached, query_sum, grad_sum = _measure(
        map_ptr, query_ptr, grad_ptr, channel_stride, inside, channels, eps, PIXELS, BLOCK_CHANNELS
    )
    weight = _softmax(logit, inside)
    average = tl.sum(tl.where(inside, weight * reached, 0.0), 1, keep_dims=True)
    finite = (logit >= -_MAXIMUM) & (logit <= _MAXIMUM)
    slope = tl.where(finite, weight * (reached - average), 0.0)
    along = weight * reached + slope * tl.where(finite, logit, 0.0)
    weight, slope = tl.where(inside, weight * inverse, 0.0), tl.where(inside, slope * inverse, 0.0)
    constant = (weight * grad_sum + slope * query_sum) / channels
    along = along * inverse * inverse / channels
    plane = height.to(tl.int64) * width
    grad_map_ptr += batch * channels * plane + row * width + column
    grad_map_ptr += (place // SCALE).to(tl.int64) * width + place % SCALE
    grad_query_ptr += tl.program_id(0).to(tl.int64) * channels
    for first in range(0, channels, BLOCK_CHANNELS):
        channel = first + tl.arange(0, BLOCK_CHANNELS)[:, None]
        mask = channel < channels
        offset = channel.to(tl.int64)
        pixel = tl.load(map_ptr + offset * channel_stride, mask=mask & inside, other=0.0).to(tl.float32)
        query = tl.load(query_ptr + channel, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + channel, mask=mask, other=0.0).to(tl.float32)
        centred = pixel - mean
        grad_query = tl.sum(tl.where(inside, centred * slope, 0.0), 1, keep_dims=True)
        tl.store(grad_query_ptr + channel, grad_query.to(grad_query_ptr.dtype.element_ty), mask=mask)
        gradient = weight * grad + slope * query - constant - centred * along
        tl.store(grad_map_ptr + offset * plane, gradient.to(grad_map_ptr.dtype.element_ty), mask=mask & inside)
