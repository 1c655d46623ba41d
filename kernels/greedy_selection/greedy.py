"""What the greedy choices share: an image's tokens in the registers of one program."""

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

from vlmfast.kernels.common.launch import Config

MAX_TOKENS = 4096  # all in the registers of one program


@dataclass(frozen=True, kw_only=True)
class GreedyConfig(Config):
    """All tokens of an image for one program, by some rows at a time."""

    BLOCK: int
    ROWS: int
    STAGES: int

    @classmethod
    @functools.lru_cache
    def config_for(cls, tokens: int) -> "GreedyConfig":
        """Take one of two sizes, so that the tokens of an image do not ask for another kernel.

        More rows at a step, or more steps in flight, would spill registers on AMD.
        """
        block, warps = (1024, 8) if tokens <= 1024 else (MAX_TOKENS, 16)
        return cls(BLOCK=block, ROWS=2 if warps == 8 else 1, STAGES=3, num_warps=warps)


@triton.jit
def load_weights(ptr, position, there):
    """Load what each token of an image is worth, 0 where there is none; 1 for each where nothing says it."""
    return tl.where(there, 1.0, 0.0) if ptr is None else tl.load(ptr + position, mask=there, other=0.0).to(tl.float32)


@triton.jit
def usable(weight):
    """Tell whether a choice can be made by these weights: finite, and none below 0."""
    return tl.min(((weight >= 0.0) & (weight < float("inf"))).to(tl.int32), 0) == 1


@triton.jit
def best_of(worth, taken):
    """Find the position of the largest number of those that are not taken, of equal ones the first."""
    return tl.argmax(tl.where(taken != 0, -1.0, worth), 0)


@triton.jit
def store_taken(ptr, taken, position):
    """Store the positions of the tokens that are taken, ascending."""
    tl.store(ptr + tl.cumsum(taken, 0) - 1, position.to(tl.int64), mask=taken == 1)
