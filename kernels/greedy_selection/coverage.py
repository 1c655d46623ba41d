"""Chooses tokens that cover all rows.

The gain of a token, how much it adds to the cover, only shrinks, so an earlier gain is an upper bound (lazy greedy
selection). The tokens are in 32 groups. A step recomputes the gain of the token with the highest bound of each group,
all 32 at once, until the best token of all has a gain of this step. Most steps read 32 rows of the similarity once or
twice, 37 KB each time for 576 rows in half precision, instead of all 0.7 MB.
"""

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

from vlmfast.kernels.common.kernel import kernel, limited
from vlmfast.kernels.common.launch import Config
from vlmfast.kernels.greedy_selection.greedy import MAX_TOKENS, image_of, load_weights, store_taken, usable


@dataclass(frozen=True, kw_only=True)
class CoverageConfig(Config):
    """One program holds all tokens of an image, in groups, and takes some rows at a time."""

    MEMBERS: int
    GROUPS: int
    BLOCK_ROWS: int

    @staticmethod
    @functools.lru_cache
    def config_for(tokens: int) -> "CoverageConfig":
        """Return one of two sizes, so that few numbers of tokens compile another kernel."""
        groups = 32
        block, warps = (1024, 8) if tokens <= 1024 else (MAX_TOKENS, 16)
        return CoverageConfig(
            MEMBERS=block // groups, GROUPS=groups, BLOCK_ROWS=256 if warps == 8 else 128, num_warps=warps
        )


@triton.jit
def sound(similarity):
    """Return the similarity as float32, or 0 if it is not finite: then it covers nothing."""
    wide = similarity.to(tl.float32)
    return tl.where(tl.abs(wide) < float("inf"), wide, 0.0)


@triton.jit
def gains_of(similarity_ptr, weight_ptr, covered_ptr, token, there, token_stride, rows, BLOCK_ROWS: tl.constexpr):
    """Add up how much better each of some tokens would cover the rows, times the weights of the rows."""
    gain = tl.zeros(token.shape, tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        within = row < rows
        at = similarity_ptr + token[:, None].to(tl.int64) * token_stride + row[None, :]
        similarity = sound(tl.load(at, mask=there[:, None] & within[None, :], other=0.0))
        covered = tl.load(covered_ptr + row, mask=within, other=0.0)
        better = tl.maximum(similarity - covered[None, :], 0.0) * load_weights(weight_ptr, row, within)[None, :]
        gain += tl.sum(better, 1)
    return gain


@kernel
@limited("a program has a sequence, and each choice waits for the one before it")
def coverage_kernel(
    similarity_ptr,
    weight_ptr,
    quality_ptr,
    seqlens_ptr,
    kept_ptr,
    covered_ptr,
    chosen_ptr,
    batch_stride,
    token_stride,
    weight_stride,
    quality_stride,
    tokens,
    rows,
    k,
    longest,
    MEMBERS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Store the k tokens of one image, ascending. How well each row is covered is kept in memory."""
    image = tl.program_id(0).to(tl.int64)
    batch, first, count, place, k = image_of(
        tl.program_id(0), tl.num_programs(0), seqlens_ptr, kept_ptr, tokens, k, longest
    )
    similarity_ptr += batch * batch_stride + tl.cast(first, tl.int64) * token_stride
    covered_ptr += image * rows
    if weight_ptr is not None:
        weight_ptr += image * weight_stride
    if quality_ptr is not None:
        quality_ptr += batch * quality_stride + first
    member, group = tl.arange(0, MEMBERS)[:, None], tl.arange(0, GROUPS)[None, :]
    position = member * GROUPS + group
    flat = tl.arange(0, MEMBERS * GROUPS)
    tl.device_assert(usable(load_weights(quality_ptr, flat, flat < count)), "quality must be finite and not negative")
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        weight = load_weights(weight_ptr, row, row < rows)
        tl.device_assert(usable(weight), "row_weights must be finite and not negative")
        tl.store(covered_ptr + row, tl.zeros((BLOCK_ROWS,), tl.float32), mask=row < rows)
    tl.debug_barrier()

    bound = tl.where(position < count, float("inf"), -1.0)  # -1: chosen, or no token
    seen = tl.full((MEMBERS, GROUPS), -1, tl.int32)  # the step that computed the gain
    for step in range(k):
        best, is_new = -1, 0
        while is_new == 0:
            index = tl.argmax(bound, 0)
            token = index * GROUPS + tl.arange(0, GROUPS)
            open_ = tl.max(bound, 0) >= 0.0
            quality = load_weights(quality_ptr, token, open_)
            gain = quality * gains_of(
                similarity_ptr, weight_ptr, covered_ptr, token, open_, token_stride, rows, BLOCK_ROWS
            )
            gain = tl.where(gain == gain, gain, 0.0)  # infinity times 0: a NaN would never be found
            looked_at = (member == index[None, :]) & open_[None, :]
            bound = tl.where(looked_at, gain[None, :], bound)
            seen = tl.where(looked_at, step, seen)
            most = tl.max(tl.max(bound, 0), 0)
            best = tl.min(tl.min(tl.where(bound == most, position, MEMBERS * GROUPS), 0), 0)
            is_new = tl.max(tl.max(tl.where((position == best) & (seen == step), 1, 0), 0), 0)
        bound = tl.where(position == best, -1.0, bound)
        tl.debug_barrier()  # all reads of the old cover are done
        for start in range(0, rows, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)
            mask = row < rows
            similarity = sound(tl.load(similarity_ptr + best.to(tl.int64) * token_stride + row, mask=mask, other=0.0))
            covered = tl.load(covered_ptr + row, mask=mask, other=0.0)
            tl.store(covered_ptr + row, tl.maximum(covered, similarity), mask=mask)
        tl.debug_barrier()
    taken = tl.where((bound < 0.0) & (position < count), 1, 0)
    store_taken(chosen_ptr + place, tl.reshape(taken, [MEMBERS * GROUPS]), flat, first)
