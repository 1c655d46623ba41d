"""Chooses the tokens with the largest scores."""

import functools
from dataclasses import dataclass

import triton.language as tl

from vlmfast.kernels.common.kernel import kernel
from vlmfast.kernels.common.launch import Config

MAX_SCORES = 8192  # per row: they are all in the registers of one program, and twice as many would spill


@dataclass(frozen=True, kw_only=True)
class TopTokensConfig(Config):
    """The tile of a program: all scores of a row."""

    BLOCK: int

    @staticmethod
    @functools.lru_cache
    def config_for(tokens: int) -> "TopTokensConfig":
        """Choose one of two sizes, so that few kernels are compiled whatever the number of tokens.

        More warps for the larger size would leave each thread too few registers on sm_80.
        """
        block, warps = (1024, 4) if tokens <= 1024 else (MAX_SCORES, 8)
        return TopTokensConfig(BLOCK=block, num_warps=warps)


@kernel
def top_tokens_kernel(score_ptr, top_ptr, row_stride, tokens, k, BLOCK: tl.constexpr):
    """Store the positions of the k largest scores of a row, ascending.

    The k-th largest score is found without a sort: bit by bit from the top, by counting the scores at least as large.
    """
    row = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, BLOCK)
    # Padding is -inf and lies behind all scores, so it loses every tie.
    score = tl.load(score_ptr + row * row_stride + position, mask=position < tokens, other=float("-inf")).to(tl.float32)
    tl.device_assert(tl.sum((score != score).to(tl.int32), 0) == 0, "scores must not be NaN")
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    # Integers in the order of the scores: negative scores have all bits inverted, others the sign bit.
    key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    least = tl.full((1,), 0, tl.uint32)
    bit = tl.full((1,), 2147483648, tl.uint32)
    for _ in range(32):
        higher = least | bit
        least = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= k, higher, least)
        bit = bit >> 1
    above, equal = (key > least).to(tl.int32), (key == least).to(tl.int32)
    spare = k - tl.sum(above, 0)  # how many of the scores equal to the k-th are kept: the first ones
    kept = above + equal * (tl.cumsum(equal, 0) <= spare).to(tl.int32)
    rank = tl.cumsum(kept, 0) - 1
    tl.store(top_ptr + row * k + rank, position.to(tl.int64), mask=kept != 0)
