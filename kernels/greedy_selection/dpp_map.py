"""Chooses the most likely tokens of a determinantal point process, out of the products of each two tokens.

A share is the part of a token that it has in common with a chosen one and with none of those before it; what is left of
its square is less by the square of each. A choice reads a row of the products and the shares with all that were chosen
before, of the 64th of 576 tokens 147 KB, which the program that wrote them has in the L2 cache.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from vlmfast.kernels.common.kernel import kernel
from vlmfast.kernels.greedy_selection.farthest import cosine_of, inverse_length
from vlmfast.kernels.greedy_selection.greedy import GreedyConfig, best_of, load_weights, store_taken, usable

_NOTHING_NEW = tl.constexpr(2.0**-14)  # a smaller share of a square is a rounding


@dataclass(frozen=True, kw_only=True)
class DppMapConfig(GreedyConfig):
    """As `GreedyConfig`, by some earlier choices at a time."""


@triton.jit
def shared(
    share_ptr, step, best, position, there, tokens, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr
):
    """Add up the products of the shares of a token and of all tokens with those that are chosen."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, step, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        row_ptr = share_ptr + row.to(tl.int64) * tokens
        theirs = tl.load(row_ptr[:, None] + position[None, :], mask=(row < step)[:, None] & there[None, :], other=0.0)
        own = tl.load(row_ptr + best, mask=row < step, other=0.0)
        total += tl.sum(theirs * own[:, None], 0)
    return total


@kernel
def dpp_map_kernel(
    product_ptr,
    relevance_ptr,
    share_ptr,
    chosen_ptr,
    tokens,
    k,
    relevance_stride,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Store the k tokens of one image, ascending; shares go to memory in between."""
    batch = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, BLOCK)
    there = position < tokens
    product_ptr += batch * tokens * tokens
    share_ptr += batch * k * tokens
    if relevance_ptr is not None:
        relevance_ptr += batch * relevance_stride
    relevance = load_weights(relevance_ptr, position, there)
    tl.device_assert(usable(relevance), "relevance must be finite and not negative")
    diagonal = product_ptr + position.to(tl.int64) * (tokens + 1)
    inverse = inverse_length(tl.load(diagonal, mask=there, other=0.0))
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
        row_ptr = product_ptr + best.to(tl.int64) * tokens
        product = tl.load(row_ptr + position, mask=there, other=0.0)
        cosine = cosine_of(product, inverse_length(tl.load(row_ptr + best)), inverse)
        share = (cosine - shared(share_ptr, step, best, position, there, tokens, BLOCK, ROWS, STAGES)) * scale
        tl.store(new_ptr + position, share, mask=there)
        new_ptr += tokens
        left -= share * share
        left = tl.where(left < _NOTHING_NEW, 0.0, left)
        tl.debug_barrier()  # the shares of all tokens are there
    store_taken(chosen_ptr + batch * k, tl.where(taken == 1, 1, 0), position)
