"""Chooses the most likely tokens of a determinantal point process, given the Gram matrix of the tokens.

This is an incremental Cholesky decomposition: the shares of a chosen token are its row of the factor, and the square of
each share is subtracted from what is left of the square of its token. A step reads a row of the Gram matrix and all
earlier shares, 147 KB for the 64th of 576 tokens, which are in the L2 cache because the same program wrote them.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from vlmfast.kernels.common.kernel import kernel, limited
from vlmfast.kernels.greedy_selection.farthest import cosines_to, inverse_lengths
from vlmfast.kernels.greedy_selection.greedy import GreedyConfig, best_of, image_of, load_weights, store_taken, usable

_NOTHING_NEW = tl.constexpr(2.0**-14)  # a smaller rest of a unit square is a rounding error


@dataclass(frozen=True, kw_only=True)
class DppMapConfig(GreedyConfig):
    """As `GreedyConfig`; the rows are the shares of earlier choices."""


@triton.jit
def shared(
    share_ptr, step, best, position, there, pitch, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr
):
    """Return the dot products of the shares of one token and of all tokens, over the earlier choices."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, step, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        row_ptr = share_ptr + row.to(tl.int64) * pitch
        theirs = tl.load(row_ptr[:, None] + position[None, :], mask=(row < step)[:, None] & there[None, :], other=0.0)
        own = tl.load(row_ptr + best, mask=row < step, other=0.0)
        total += tl.sum(theirs * own[:, None], 0)
    return total


@kernel
@limited("a program has a sequence, and each choice waits for the one before it")
def dpp_map_kernel(
    product_ptr,
    relevance_ptr,
    seqlens_ptr,
    kept_ptr,
    share_ptr,
    chosen_ptr,
    tokens,
    k,
    longest,
    relevance_stride,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Store the k tokens of one image, ascending. The shares are kept in memory."""
    batch, first, count, place, k = image_of(
        tl.program_id(0), tl.num_programs(0), seqlens_ptr, kept_ptr, tokens, k, longest
    )
    position = tl.arange(0, BLOCK)
    there = position < count
    product_ptr += (batch * tokens + first) * longest
    share_ptr += place * longest
    if relevance_ptr is not None:
        relevance_ptr += batch * relevance_stride + first
    relevance = load_weights(relevance_ptr, position, there)
    tl.device_assert(usable(relevance), "relevance must be finite and not negative")
    inverse = inverse_lengths(product_ptr, position, there, longest)
    left = tl.where(inverse != 0.0, 1.0, 0.0)
    taken = tl.where(there, 0, 2)  # 2: there is no such token
    new_ptr = share_ptr
    for step in range(k):
        worth = tl.where(taken == 0, relevance * left * relevance, 0.0)
        best = best_of(tl.where(tl.max(worth, 0) > 0.0, worth, relevance), taken)
        is_best = position == best
        taken = tl.where(is_best, 1, taken)
        left_of_best = tl.sum(tl.where(is_best, left, 0.0), 0)
        scale = tl.where(left_of_best > 0.0, tl.div_rn(1.0, tl.sqrt_rn(tl.maximum(left_of_best, _NOTHING_NEW))), 0.0)
        cosine = cosines_to(best, product_ptr, position, there, longest, inverse)
        share = (cosine - shared(share_ptr, step, best, position, there, longest, BLOCK, ROWS, STAGES)) * scale
        tl.store(new_ptr + position, share, mask=there)
        new_ptr += longest
        left -= share * share
        left = tl.where(left < _NOTHING_NEW, 0.0, left)
        tl.debug_barrier()  # the shares of all tokens are written
    store_taken(chosen_ptr + place, tl.where(taken == 1, 1, 0), position, first)
