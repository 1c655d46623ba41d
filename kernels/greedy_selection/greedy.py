"""Shared by the greedy choices, which hold the tokens of an image in the registers of one program."""

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

from vlmfast.kernels.common.launch import Config

MAX_TOKENS = 4096  # that fit in the registers of one program


@dataclass(frozen=True, kw_only=True)
class GreedyConfig(Config):
    """One program holds all tokens of an image, and takes some rows at a time."""

    BLOCK: int
    ROWS: int
    STAGES: int

    @classmethod
    @functools.lru_cache
    def config_for(cls, tokens: int) -> "GreedyConfig":
        """Return one of two sizes, so that few numbers of tokens compile another kernel.

        More rows or stages would spill registers on AMD.
        """
        block, warps = (1024, 8) if tokens <= 1024 else (MAX_TOKENS, 16)
        return cls(BLOCK=block, ROWS=2 if warps == 8 else 1, STAGES=3, num_warps=warps)


@triton.jit
def image_of(number, images, seqlens_ptr, kept_ptr, tokens, k, longest):
    """Return where an image is: its row, its first token there, how many it has, the first one chosen, and how many.

    Without pointers, each row is an image.
    """
    if seqlens_ptr is None:
        row, first, count, place = number.to(tl.int64), 0, tokens, number.to(tl.int64) * k
    else:
        first, place = tl.load(seqlens_ptr + number), tl.load(kept_ptr + number)
        end, end_place = tl.load(seqlens_ptr + number + 1), tl.load(kept_ptr + number + 1)
        count, kept, is_later, goes_on = end - first, end_place - place, number > 0, number + 1 < images
        is_within = (first >= 0) & (count >= 0) & (count <= longest) & (end <= tokens)
        is_within &= ((first == 0) | is_later) & ((end == tokens) | goes_on)
        tl.device_assert(is_within, "cu_seqlens must rise from 0 to the tokens, by at most longest")
        is_within = (place >= 0) & (kept >= 0) & (kept <= count) & (end_place <= k)
        is_within &= ((place == 0) | is_later) & ((end_place == k) | goes_on)
        tl.device_assert(is_within, "cu_kept must rise from 0 to k, no faster than cu_seqlens")
        row, place, k = tl.full((), 0, tl.int64), place.to(tl.int64), kept
    return row, first, count, place, k


@triton.jit
def load_weights(ptr, position, there):
    """Load the weights of tokens as float32, 0 where there is no token; without a pointer, all weights are 1."""
    return tl.where(there, 1.0, 0.0) if ptr is None else tl.load(ptr + position, mask=there, other=0.0).to(tl.float32)


@triton.jit
def usable(weight):
    """Tell whether all weights are finite and none is below 0."""
    return tl.min(((weight >= 0.0) & (weight < float("inf"))).to(tl.int32), 0) == 1


@triton.jit
def best_of(worth, taken):
    """Return the position of the largest number among the tokens that are not taken, the first of equal ones."""
    return tl.argmax(tl.where(taken != 0, -1.0, worth), 0)


@triton.jit
def store_taken(ptr, taken, position, first):
    """Store the positions of the tokens that are taken, ascending; ``first`` is that of the first token."""
    tl.store(ptr + tl.cumsum(taken, 0) - 1, (first + position).to(tl.int64), mask=taken == 1)
