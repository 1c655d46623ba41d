"""Triton kernels that choose tokens and their slots, for kernels/token_merge.py."""

import triton
import triton.language as tl

from vlmfast.kernels.products import dot
from vlmfast.kernels.sorted_search import count_up_to


@triton.jit
def top_kernel(score_ptr, top_ptr, row_stride, tokens, k, BLOCK: tl.constexpr):
    """The positions of the k largest scores of a row, ascending.

    The k-th largest is found bit by bit, from the top, by counting what is at least as large: no sort.
    """
    row = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, BLOCK)
    # behind the end -inf, which loses every tie
    score = tl.load(score_ptr + row * row_stride + position, mask=position < tokens, other=float("-inf")).to(tl.float32)
    tl.device_assert(tl.sum((score != score).to(tl.int32), 0) == 0, "scores must not be NaN")
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    # in the order of the scores: of a negative one all bits are turned, of another one the sign
    key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    least = tl.full((1,), 0, tl.uint32)
    bit = tl.full((1,), 2147483648, tl.uint32)
    for _ in range(32):
        higher = least | bit
        least = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= k, higher, least)
        bit = bit >> 1
    above, equal = (key > least).to(tl.int32), (key == least).to(tl.int32)
    spare = k - tl.sum(above, 0)  # places for those that equal the k-th: the first ones get them
    chosen = above + equal * (tl.cumsum(equal, 0) <= spare).to(tl.int32)
    rank = tl.cumsum(chosen, 0) - 1
    tl.store(top_ptr + row * k + rank, position.to(tl.int64), mask=chosen != 0)


@triton.jit
def at(ptr, row, stride):
    """Where each row begins, behind ``ptr``."""
    return ptr + row.to(tl.int64) * stride


@triton.jit
def slots_kernel(
    metric_ptr,
    kept_ptr,
    slot_ptr,
    batch_stride,
    token_stride,
    kept_stride,
    tokens,
    size,
    chosen,
    contextual,
    step,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_TARGETS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The slots of a block of tokens; see `merge_slots`.

    The length of a token's own metric changes no argmax, and one of zeros has the same product with all. So only the
    targets are divided by their lengths, after the multiplication: of 16-bit metrics each product is exact.
    """
    blocks = tl.cdiv(tokens, BLOCK_TOKENS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    position = (tl.program_id(0) % blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    metric_ptr += batch * batch_stride
    kept_ptr += batch * kept_stride
    rank = count_up_to(kept_ptr, chosen, position, False, STEPS)  # of the last kept token up to this one, from 1 on
    is_kept = (tl.load(kept_ptr + rank - 1, mask=rank > 0, other=-1) == position).to(tl.int32)
    left = position - rank
    wanted = (position < tokens) & (is_kept == 0)  # nothing is read of a kept token's metric
    best = tl.full((BLOCK_TOKENS,), float("-inf"), tl.float32)
    owner = tl.zeros((BLOCK_TOKENS,), tl.int32)
    for first in range(0, contextual, BLOCK_TARGETS):
        target = first + tl.arange(0, BLOCK_TARGETS)
        place = target * step + count_up_to(kept_ptr, chosen, target * step, True, STEPS)
        products = tl.zeros((BLOCK_TOKENS, BLOCK_TARGETS), tl.float32)
        square = tl.zeros((BLOCK_TARGETS,), tl.float32)
        for start in range(0, size, BLOCK_SIZE):
            column = start + tl.arange(0, BLOCK_SIZE)
            mask = wanted[:, None] & (column[None, :] < size)
            own = tl.load(at(metric_ptr, position[:, None], token_stride) + column[None, :], mask=mask, other=0.0)
            mask = (target < contextual)[None, :] & (column[:, None] < size)
            theirs = tl.load(at(metric_ptr, place[None, :], token_stride) + column[:, None], mask=mask, other=0.0)
            products = dot(own, theirs, products)
            square += tl.sum(theirs.to(tl.float32) * theirs.to(tl.float32), 0)
        inverse = tl.where(square > 0.0, tl.rsqrt(tl.where(square > 0.0, square, 1.0)), 0.0)
        cosine = tl.where((target < contextual)[None, :], products * inverse[None, :], float("-inf"))
        highest, index = tl.max(cosine, 1, return_indices=True)
        owner = tl.where(highest > best, first + index, owner)
        best = tl.maximum(best, highest)
    slot = contextual + owner
    if contextual == 0:
        slot = tl.zeros_like(position) - chosen - 1
    else:
        is_target = (left % step == 0) & (left // step < contextual)
        slot = tl.where(is_target, left // step, slot)
    slot = tl.where(is_kept != 0, rank - 1 - chosen, slot)
    tl.store(slot_ptr + batch * tokens + position, slot, mask=position < tokens)
