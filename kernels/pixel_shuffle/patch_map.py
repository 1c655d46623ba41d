"""The positions of patches and tokens, computed by the same arithmetic for every kernel of the family."""

import functools
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from vlmfast.kernels.common.kernel import aligned, kernel
from vlmfast.kernels.common.launch import RowsConfig, next_power_of_two


def layout(grid: Sequence[int], scale: int, order: str, input_scale: float) -> dict[str, Any]:
    """Return the keyword arguments of a kernel that describe how a map of patches is shuffled."""
    return {
        "height": grid[0] // scale,
        "width": grid[1] // scale,
        "input_scale": float(input_scale),
        "INPUT_SCALED": input_scale != 1.0,
        "BY_COLUMN": order == "column",
    }


@functools.lru_cache
def config_for(channels: int) -> RowsConfig:
    """Choose a tile for copying patches: 16 elements per thread, two 16-byte loads in flight for bfloat16.

    The number of columns is chosen so that few lanes idle.
    """
    columns = min(512, next_power_of_two(channels))
    return RowsConfig(BLOCK_ROWS=min(256, 4096 // columns), BLOCK_COLUMNS=columns, num_warps=8)


@triton.jit
def locate(patch, height, width, SCALE_Y: tl.constexpr, SCALE_X: tl.constexpr, BY_COLUMN: tl.constexpr):
    """Return the batch, token, index in the token and position in the map of patches that are numbered token by token.

    ``height`` and ``width`` count tokens, each of SCALE_Y x SCALE_X patches.
    """
    place = patch % (SCALE_Y * SCALE_X)
    token = patch // (SCALE_Y * SCALE_X)
    batch = token // (height * width)
    token = token % (height * width)
    y = token % height if BY_COLUMN else token // width
    x = token // height if BY_COLUMN else token % width
    position = (y * SCALE_Y + place // SCALE_X) * (width * SCALE_X) + x * SCALE_X + place % SCALE_X
    return batch, token, place, position


@triton.jit
def offset_of(batch, index, batch_stride, stride):
    """Return the offset of each patch or token of a (B, T, C) tensor."""
    return batch.to(tl.int64) * batch_stride + index.to(tl.int64) * stride


@triton.jit
def load_scaled(ptr, mask, input_scale, INPUT_SCALED: tl.constexpr):
    """Load as float32, times ``input_scale`` and rounded to the dtype, as torch multiplies by a Python number."""
    value = tl.load(ptr, mask=mask, other=0.0)
    scaled = (value.to(tl.float32) * input_scale).to(value.dtype) if INPUT_SCALED else value
    return scaled.to(tl.float32)


@kernel
def pixel_shuffle_kernel(
    map_ptr,
    tokens_ptr,
    map_batch_stride,
    map_stride,
    tokens_batch_stride,
    tokens_stride,
    patches,
    height,
    width,
    channels,
    input_scale,
    INPUT_SCALED: tl.constexpr,
    UNSHUFFLE: tl.constexpr,
    SCALE_Y: tl.constexpr,
    SCALE_X: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Copy the patches of the map to the tokens, or back."""
    map_batch_stride, map_stride = aligned(map_batch_stride, ALIGNED), aligned(map_stride, ALIGNED)
    tokens_batch_stride, tokens_stride = aligned(tokens_batch_stride, ALIGNED), aligned(tokens_stride, ALIGNED)
    channels = aligned(channels, ALIGNED)
    blocks = tl.cdiv(channels, BLOCK_COLUMNS)
    patch = (tl.program_id(0) // blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    channel = (tl.program_id(0) % blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    mask = (patch < patches) & (channel < channels)
    batch, token, place, position = locate(patch, height, width, SCALE_Y, SCALE_X, BY_COLUMN)
    map_ptr += offset_of(batch, position, map_batch_stride, map_stride) + channel
    tokens_ptr += offset_of(batch, token, tokens_batch_stride, tokens_stride) + place * channels + channel
    source_ptr = tokens_ptr if UNSHUFFLE else map_ptr
    target_ptr = map_ptr if UNSHUFFLE else tokens_ptr
    value = load_scaled(source_ptr, mask, input_scale, INPUT_SCALED)
    tl.store(target_ptr, value.to(target_ptr.dtype.element_ty), mask=mask)
