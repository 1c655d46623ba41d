"""Decides where each token goes: it is kept, is the target of a contextual token, or joins the most similar target."""

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

from vlmfast.kernels.common.dot import dot
from vlmfast.kernels.common.kernel import aligned, kernel
from vlmfast.kernels.common.launch import Config, next_power_of_two
from vlmfast.kernels.common.sorted_search import count_up_to


@dataclass(frozen=True, kw_only=True)
class MergeSlotsConfig(Config):
    """The tile of similarities, tokens x targets, and the number of columns of the metric per step."""

    BLOCK_TOKENS: int
    BLOCK_TARGETS: int
    BLOCK_COLUMNS: int
    STAGES: int

    @staticmethod
    @functools.lru_cache
    def config_for(contextual: int, metric_dim: int, wide: bool) -> "MergeSlotsConfig":
        """Choose few tokens per program: 90 programs for five crops, each of which reads all targets from the L2 cache.

        Float32 tiles are smaller, because they are multiplied by FMAs out of registers. 16-bit dtypes have one stage:
        if a tile that a wgmma reads has a second use, the pipeline of Triton 3.9 has one buffer too few, and copies the
        next targets over those that are still being multiplied.
        Triton 3.6 spills 16 bytes in bfloat16; with 8 warps it would not, but two thirds as much would be in flight.
        """
        small = wide or contextual <= 16
        return MergeSlotsConfig(
            BLOCK_TOKENS=32 if small else 64,
            BLOCK_TARGETS=16 if small else 32,
            BLOCK_COLUMNS=16 if wide else min(32, max(16, next_power_of_two(metric_dim))),
            STAGES=3 if wide else 1,
            num_warps=4,
        )


@triton.jit
def at(ptr, row, stride):
    """Return the address of each row, behind ``ptr``."""
    return ptr + row.to(tl.int64) * stride


@kernel
def merge_slots_kernel(
    metric_ptr,
    kept_ptr,
    slot_ptr,
    batch_stride,
    token_stride,
    kept_stride,
    tokens,
    metric_dim,
    kept_count,
    contextual,
    step,
    ALIGNED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_TARGETS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Store the slots of a block of tokens; see `merge_slots`.

    The length of a token's own metric does not change its argmax, so only the targets are divided by their lengths.
    That happens after the multiplication, whose products are exact for 16-bit metrics.
    """
    batch_stride, token_stride = aligned(batch_stride, ALIGNED), aligned(token_stride, ALIGNED)
    metric_dim = aligned(metric_dim, ALIGNED)
    blocks = tl.cdiv(tokens, BLOCK_TOKENS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    position = (tl.program_id(0) % blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    metric_ptr += batch * batch_stride
    kept_ptr += batch * kept_stride
    rank = count_up_to(kept_ptr, kept_count, position, False, STEPS)  # of the last kept token up to this one, from 1 on
    is_kept = (tl.load(kept_ptr + rank - 1, mask=rank > 0, other=-1) == position).to(tl.int32)
    left = position - rank
    wanted = (position < tokens) & (is_kept == 0)  # the metric of a kept token is not read
    best = tl.full((BLOCK_TOKENS,), float("-inf"), tl.float32)
    owner = tl.zeros((BLOCK_TOKENS,), tl.int32)
    for first in range(0, contextual, BLOCK_TARGETS):
        target = first + tl.arange(0, BLOCK_TARGETS)
        place = target * step + count_up_to(kept_ptr, kept_count, target * step, True, STEPS)
        similarity = tl.zeros((BLOCK_TOKENS, BLOCK_TARGETS), tl.float32)
        square = tl.zeros((BLOCK_TARGETS,), tl.float32)
        for start in tl.range(0, metric_dim, BLOCK_COLUMNS, num_stages=STAGES):
            column = start + tl.arange(0, BLOCK_COLUMNS)
            mask = wanted[:, None] & (column[None, :] < metric_dim)
            own = tl.load(at(metric_ptr, position[:, None], token_stride) + column[None, :], mask=mask, other=0.0)
            mask = (target < contextual)[None, :] & (column[:, None] < metric_dim)
            theirs = tl.load(at(metric_ptr, place[None, :], token_stride) + column[:, None], mask=mask, other=0.0)
            similarity = dot(own, theirs, similarity)
            square += tl.sum(theirs.to(tl.float32) * theirs.to(tl.float32), 0)
        inverse = tl.where(square > 0.0, tl.rsqrt(tl.where(square > 0.0, square, 1.0)), 0.0)
        cosine = similarity * inverse[None, :]
        # A non-finite metric has no cosine, and `max` of NaNs would return an arbitrary index.
        cosine = tl.where((target < contextual)[None, :] & (tl.abs(cosine) < float("inf")), cosine, float("-inf"))
        highest, index = tl.max(cosine, 1, return_indices=True)
        owner = tl.where(highest > best, first + index, owner)
        best = tl.maximum(best, highest)
    slot = contextual + owner
    if contextual == 0:
        slot = tl.zeros_like(position) - kept_count - 1
    else:
        is_target = (left % step == 0) & (left // step < contextual)
        slot = tl.where(is_target, left // step, slot)
    slot = tl.where(is_kept != 0, rank - 1 - kept_count, slot)
    tl.store(slot_ptr + batch * tokens + position, slot, mask=position < tokens)
