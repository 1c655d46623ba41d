"""The novelty of tokens in Triton: frame_novelty makes two passes over the features, frame_change one."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfast.kernels.common.kernel import aligned, alignment, kernel, limited
from vlmfast.kernels.common.launch import (
    MAX_EXTENT,
    RowsConfig,
    ceil_div,
    device_unsupported,
    next_power_of_two,
    on_device,
    with_contiguous_rows,
)

MEAN_CONFIG = RowsConfig(BLOCK_ROWS=16, BLOCK_COLUMNS=256, num_warps=8)  # two loads of 16 bytes in flight for bfloat16


@functools.lru_cache
def config_for(hidden: int, together: int) -> RowsConfig:
    """Choose 16 elements per thread and step, in several rows, because the mean is read once for all rows of a tile."""
    columns = min(2048 // together, next_power_of_two(max(hidden, 1)))
    return RowsConfig(BLOCK_ROWS=min(64, 2048 // columns), BLOCK_COLUMNS=columns, num_warps=4)


@triton.jit
def _novelty(dots, squares, other_squares):
    """Return one minus the cosine, and the length, from partial sums over columns."""
    dot, square, other_square = tl.sum(dots, 1), tl.sum(squares, 1), tl.sum(other_squares, 1)
    length = tl.sqrt_rn(square)
    both = tl.where(square == other_square, square, length * tl.sqrt_rn(other_square))
    return 1 - tl.where(both == 0, 0.0, tl.div_rn(dot, tl.where(both == 0, 1.0, both))), length


@kernel
@limited("a program adds up the columns of a whole frame: of a few small frames there are too few programs")
def frame_mean_kernel(
    rows_ptr,
    mean_ptr,
    batch_stride,
    frame_stride,
    token_stride,
    frames,
    tokens,
    hidden,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Store the means of some columns of one frame."""
    batch_stride, frame_stride = aligned(batch_stride, ALIGNED), aligned(frame_stride, ALIGNED)
    token_stride, hidden = aligned(token_stride, ALIGNED), aligned(hidden, ALIGNED)
    blocks = tl.cdiv(hidden, BLOCK_COLUMNS)
    frame = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    rows_ptr += frame // frames * batch_stride + frame % frames * frame_stride + column[None, :]
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, tokens, BLOCK_ROWS):
        token = first + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (token < tokens) & (column[None, :] < hidden)
        sums += tl.load(rows_ptr + token.to(tl.int64) * token_stride, mask=mask, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(sums, 0), tokens.to(tl.float32))
    tl.store(mean_ptr + frame * hidden + column, mean, mask=column < hidden)


@kernel
@limited("four rows share what is read of the mean: of a few small frames there are too few programs")
def frame_novelty_kernel(
    rows_ptr,
    mean_ptr,
    novelty_ptr,
    length_ptr,
    batch_stride,
    frame_stride,
    token_stride,
    frames,
    tokens,
    hidden,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Store, for some tokens of a frame, one minus the cosine with the frame's mean, and their lengths."""
    batch_stride, frame_stride = aligned(batch_stride, ALIGNED), aligned(frame_stride, ALIGNED)
    token_stride, hidden = aligned(token_stride, ALIGNED), aligned(hidden, ALIGNED)
    blocks = tl.cdiv(tokens, BLOCK_ROWS)
    frame = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    rows_ptr += frame // frames * batch_stride + frame % frames * frame_stride + token[:, None] * token_stride
    mean_ptr += frame * hidden
    dots = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    mean_squares = tl.zeros((1, BLOCK_COLUMNS), tl.float32)
    for first in range(0, hidden, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)[None, :]
        mask = (token < tokens)[:, None] & (column < hidden)
        x = tl.load(rows_ptr + column, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + column, mask=column < hidden, other=0.0)
        dots += x * mean
        squares += x * x
        mean_squares += mean * mean
    novelty, length = _novelty(dots, squares, mean_squares)
    tl.store(novelty_ptr + frame * tokens + token, novelty, mask=token < tokens)
    tl.store(length_ptr + frame * tokens + token, length, mask=token < tokens)


@kernel
@limited("a token is the one before as well: each is widened and multiplied twice, and read from a cache again")
def frame_change_kernel(
    rows_ptr,
    change_ptr,
    batch_stride,
    frame_stride,
    token_stride,
    changes,
    tokens,
    hidden,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Store, for some tokens, one minus the cosine with the same token of the frame before."""
    batch_stride, frame_stride = aligned(batch_stride, ALIGNED), aligned(frame_stride, ALIGNED)
    token_stride, hidden = aligned(token_stride, ALIGNED), aligned(hidden, ALIGNED)
    blocks = tl.cdiv(tokens, BLOCK_ROWS)
    frame = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    rows_ptr += frame // changes * batch_stride + frame % changes * frame_stride + token[:, None] * token_stride
    dots = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    squares_before = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, hidden, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)[None, :]
        mask = (token < tokens)[:, None] & (column < hidden)
        before = tl.load(rows_ptr + column, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(rows_ptr + frame_stride + column, mask=mask, other=0.0).to(tl.float32)
        dots += x * before
        squares += x * x
        squares_before += before * before
    novelty, _ = _novelty(dots, squares, squares_before)
    tl.store(change_ptr + frame * tokens + token, novelty, mask=token < tokens)


# ---- launchers ----


def unsupported(frames: Tensor) -> str | None:
    batch, count, tokens, hidden = frames.shape
    if batch * count * max(tokens, ceil_div(hidden, 64)) > MAX_EXTENT or hidden > MAX_EXTENT:
        return f"a tensor of shape {tuple(frames.shape)} takes more programs than there are"
    return device_unsupported(frames)


def frame_novelty(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, count, tokens, hidden = frames.shape
    mean = frames.new_empty(batch, count, hidden, dtype=torch.float32)
    novelty, length = (frames.new_empty(batch, count, tokens, dtype=torch.float32) for _ in range(2))
    if novelty.numel() == 0:
        return mean, novelty, length
    frames = with_contiguous_rows(frames)
    strides = frames.stride()[:3]
    sizes = {"ALIGNED": alignment(hidden, *strides)}
    config = config_for(hidden, 4)
    with on_device(frames):
        frame_mean_kernel[(batch * count * ceil_div(hidden, MEAN_CONFIG.BLOCK_COLUMNS),)](
            *(frames, mean, *strides, count, tokens, hidden), **sizes, **vars(MEAN_CONFIG)
        )
        frame_novelty_kernel[(batch * count * ceil_div(tokens, config.BLOCK_ROWS),)](
            *(frames, mean, novelty, length, *strides, count, tokens, hidden), **sizes, **vars(config)
        )
    return mean, novelty, length


def frame_change(frames: Tensor) -> Tensor:
    batch, count, tokens, hidden = frames.shape
    changes = max(0, count - 1)
    change = frames.new_empty(batch, changes, tokens, dtype=torch.float32)
    if change.numel() == 0:
        return change
    frames = with_contiguous_rows(frames)
    strides = frames.stride()[:3]
    config = config_for(hidden, 2)
    with on_device(frames):
        frame_change_kernel[(batch * changes * ceil_div(tokens, config.BLOCK_ROWS),)](
            *(frames, change, *strides, changes, tokens, hidden),
            ALIGNED=alignment(hidden, *strides),
            **vars(config),
        )
    return change
