"""Computes the Gram matrix of the tokens of an image, in half precision on tensor cores.

Five crops of 576 tokens of 1024 elements take 3.4 GFLOP. Their matrices are 6.6 MB of float32, which stay in the L2
cache for the choice that reads some rows of them.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

import triton.language as tl

from vlmfast.kernels.common.dot import dot
from vlmfast.kernels.common.kernel import aligned, kernel, limited
from vlmfast.kernels.common.launch import Config
from vlmfast.kernels.greedy_selection.greedy import image_of


@dataclass(frozen=True, kw_only=True)
class GramConfig(Config):
    """A program computes a square of the matrix, from some columns of the tokens at a time."""

    BLOCK_TOKENS: ClassVar[int] = 64
    BLOCK: int
    BLOCK_COLUMNS: int
    STAGES: int

    @staticmethod
    @functools.lru_cache
    def config_for(wide: bool) -> "GramConfig":
        """Return the configuration; float32, which is multiplied in registers, takes fewer columns."""
        block = GramConfig.BLOCK_TOKENS
        return GramConfig(BLOCK=block, BLOCK_COLUMNS=16 if wide else 32, STAGES=3, num_warps=4)


@kernel
@limited("multiplies all tokens with all others: of one sequence there are too few programs")
def gram_kernel(
    x_ptr,
    seqlens_ptr,
    product_ptr,
    batch_stride,
    token_stride,
    tokens,
    size,
    longest,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Store one square of an image's Gram matrix, whose rows are as long as the longest image has tokens."""
    batch_stride, token_stride = aligned(batch_stride, ALIGNED), aligned(token_stride, ALIGNED)
    size = aligned(size, ALIGNED)
    blocks = tl.cdiv(longest, BLOCK)
    square = tl.program_id(0) % (blocks * blocks)
    image = tl.program_id(0) // (blocks * blocks)
    images = tl.num_programs(0) // (blocks * blocks)
    batch, first, count, _, _ = image_of(image, images, seqlens_ptr, seqlens_ptr, tokens, tokens, longest)
    row = square // blocks * BLOCK + tl.arange(0, BLOCK)
    other = square % blocks * BLOCK + tl.arange(0, BLOCK)
    x_ptr += batch * batch_stride + tl.cast(first, tl.int64) * token_stride
    if square // blocks * BLOCK >= count or square % blocks * BLOCK >= count:
        size = 0  # a shorter image has no such square
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in tl.range(0, size, BLOCK_COLUMNS, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        mask = (row < count)[:, None] & (column < size)[None, :]
        own = tl.load(x_ptr + row[:, None].to(tl.int64) * token_stride + column[None, :], mask=mask, other=0.0)
        mask = (other < count)[None, :] & (column < size)[:, None]
        theirs = tl.load(x_ptr + other[None, :].to(tl.int64) * token_stride + column[:, None], mask=mask, other=0.0)
        total = dot(own, theirs, total)
    at = product_ptr + (batch * tokens + first + row[:, None]) * longest + other[None, :]
    tl.store(at, total, mask=(row < count)[:, None] & (other < count)[None, :])
