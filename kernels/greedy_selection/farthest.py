"""Chooses tokens that are far from each other, given the Gram matrix of the tokens.

The first choice reads the whole matrix, 1.3 MB for 576 tokens. Each further one reads a row of it, 2.3 KB, and takes
the time of two reductions over a program.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from vlmfast.kernels.common.kernel import kernel, limited
from vlmfast.kernels.greedy_selection.greedy import GreedyConfig, best_of, image_of, load_weights, store_taken, usable

_SAME = tl.constexpr(2.0**-20)  # a smaller distance is a rounding error


@dataclass(frozen=True, kw_only=True)
class FarthestConfig(GreedyConfig):
    """As `GreedyConfig`."""


@triton.jit
def inverse_length(square):
    """Return the inverse of the length, given its square; 0 for a token without a direction."""
    sound = (square > 0.0) & (square < float("inf"))
    return tl.where(sound, tl.div_rn(1.0, tl.sqrt_rn(tl.where(sound, square, 1.0))), 0.0)


@triton.jit
def cosine_of(product, inverse, other_inverse):
    """Return the cosine of two tokens, or 0 where one of them has no direction."""
    both = inverse * other_inverse
    return tl.where(both != 0.0, product * both, 0.0)


@triton.jit
def inverse_lengths(product_ptr, position, there, pitch):
    """Return the inverse lengths of all tokens, from the diagonal of their Gram matrix."""
    diagonal = product_ptr + position.to(tl.int64) * (pitch + 1)
    return inverse_length(tl.load(diagonal, mask=there, other=0.0))


@triton.jit
def cosines_to(best, product_ptr, position, there, pitch, inverse):
    """Return the cosines of one token and all tokens."""
    row_ptr = product_ptr + best.to(tl.int64) * pitch
    product = tl.load(row_ptr + position, mask=there, other=0.0)
    return cosine_of(product, inverse_length(tl.load(row_ptr + best)), inverse)


@triton.jit
def distance_of(cosine):
    """Return one minus the cosine, or 0 for tokens that are alike."""
    distance = 1.0 - cosine
    return tl.where(distance < _SAME, 0.0, distance)


@kernel
@limited("a program has a sequence, and each choice waits for the one before it")
def farthest_kernel(
    product_ptr,
    quality_ptr,
    seqlens_ptr,
    kept_ptr,
    chosen_ptr,
    tokens,
    k,
    longest,
    quality_stride,
    FIRST_BY_QUALITY: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Store the k tokens of one image, ascending."""
    batch, first, count, place, k = image_of(
        tl.program_id(0), tl.num_programs(0), seqlens_ptr, kept_ptr, tokens, k, longest
    )
    position = tl.arange(0, BLOCK)
    there = position < count
    product_ptr += (batch * tokens + first) * longest
    if quality_ptr is not None:
        quality_ptr += batch * quality_stride + first
    quality = load_weights(quality_ptr, position, there)
    tl.device_assert(usable(quality), "quality must be finite and not negative")
    inverse = inverse_lengths(product_ptr, position, there, longest)

    largest = tl.full((BLOCK,), -1.0, tl.float32)  # cosine to another token
    for start in tl.range(0, count, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        other = row.to(tl.int64)
        mask = (row < count)[:, None] & there[None, :]
        product = tl.load(product_ptr + other[:, None] * longest + position[None, :], mask=mask, other=0.0)
        square = tl.load(product_ptr + other * (longest + 1), mask=row < count, other=0.0)
        cosine = cosine_of(product, inverse_length(square)[:, None], inverse[None, :])
        itself = row[:, None] == position[None, :]
        largest = tl.maximum(largest, tl.max(tl.where(mask & (itself == 0), cosine, -1.0), 0))
    nearest = distance_of(largest)
    worth = nearest * quality if FIRST_BY_QUALITY else nearest

    taken = tl.where(there, 0, 2)  # 2: there is no such token
    nearest = tl.full((BLOCK,), 2.0, tl.float32)
    for _ in range(k):
        best = best_of(worth, taken)
        taken = tl.where(position == best, 1, taken)
        to_best = cosines_to(best, product_ptr, position, there, longest, inverse)
        nearest = tl.minimum(nearest, distance_of(to_best))
        worth = nearest * quality
    store_taken(chosen_ptr + place, tl.where(taken == 1, 1, 0), position, first)
