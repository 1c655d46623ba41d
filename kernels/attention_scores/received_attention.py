"""The attention that tokens receive: the normaliser of each row, then the sum of each column, then the means.

The first pass over the logits keeps a block of queries and streams the keys; the second keeps a block of keys and
streams the queries. Both multiply tiles of the same shape with the queries on the left, so that their logits are
bit-identical. Otherwise a logit would not match the normaliser of its row, which matters where one key gets nearly all
attention.

A block may overlap several segments. It streams from the begin of the first to the end of the last, and masks for each
token what is outside its own.
"""

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

from vlmfast.kernels.common.dot import dot
from vlmfast.kernels.common.kernel import aligned, kernel
from vlmfast.kernels.common.launch import Config, RowsConfig, next_power_of_two
from vlmfast.kernels.common.sorted_search import count_up_to

MAX_HEAD_DIM = 256  # tiles of heads twice as long would not fit into shared memory
LOWEST = tl.constexpr(-3.4028234663852886e38)  # not -inf, because -inf - -inf is NaN


@dataclass(frozen=True, kw_only=True)
class ReceivedConfig(Config):
    """The tiles of BLOCK queries and BLOCK keys, whose channels are multiplied in two parts, COLUMNS and REST.

    Two parts let a head of 80 channels take 64 + 16 columns on the tensor cores rather than 128.
    """

    BLOCK: int
    COLUMNS: int
    REST: int
    num_stages: int

    @staticmethod
    @functools.lru_cache
    def config_for(head_dim: int, wide: bool) -> "ReceivedConfig":
        """Choose 16 logits of a tile per thread, and three stages if they fit into the 99 KiB of an RTX 4090.

        With four warps the compiler would spill in order to fit a fourth program on a multiprocessor. Float32 tiles are
        smaller, because they are multiplied by FMAs out of registers.
        """
        columns = max(16, next_power_of_two(head_dim + 1) // 2)
        rest = max(16, next_power_of_two(head_dim - columns)) if head_dim > columns else 0
        block, warps, stages = 64, 8, 3 if columns + rest <= 128 else 2
        if wide:
            block, warps, stages = 32 if columns + rest <= 96 else 16, 4 if columns + rest <= 32 else 8, 2
        return ReceivedConfig(BLOCK=block, COLUMNS=columns, REST=rest, num_warps=warps, num_stages=stages)


MEAN_CONFIG = RowsConfig(BLOCK_ROWS=32, BLOCK_COLUMNS=16, num_warps=4)


@triton.jit
def _load(ptr, token, stride, tokens, first, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, AXIS: tl.constexpr):
    token, channel = tl.expand_dims(token, 1 - AXIS), tl.expand_dims(first + tl.arange(0, COUNT), AXIS)
    mask = (token < tokens) & (channel < HEAD_DIM)
    return tl.load(ptr + token.to(tl.int64) * stride + channel, mask=mask, other=0.0)


@triton.jit
def _tile(
    ptr, token, stride, tokens, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, REST: tl.constexpr, AXIS: tl.constexpr
):
    """Load the channels of a block of tokens in two parts; AXIS is the tile's axis of tokens."""
    part = _load(ptr, token, stride, tokens, 0, COLUMNS, HEAD_DIM, AXIS)
    rest = part
    if REST:
        rest = _load(ptr, token, stride, tokens, COLUMNS, REST, HEAD_DIM, AXIS)
    return part, rest


@triton.jit
def _times(x, sign):
    return (x.to(tl.float32) * sign).to(x.dtype)


@triton.jit
def _logits(query, query_rest, key, key_rest, REST: tl.constexpr):
    logits = dot(query, key, tl.zeros((query.shape[0], key.shape[1]), tl.float32))
    if REST:
        logits = dot(query_rest, key_rest, logits)
    return logits


@triton.jit
def _segments(bounds_ptr, bounds, token, tokens, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Return the segment of each token of a block and the range of tokens to stream: (begin, end, first, full, stop).

    Tokens from ``first`` to ``full`` are in the segments of all tokens of the block; those from ``full`` to ``stop``
    may not be and need a mask.
    """
    token = tl.minimum(token, tokens - 1)
    if bounds_ptr is None:
        begin, end = tl.zeros_like(token), tl.zeros_like(token) + tokens
    else:
        number = count_up_to(bounds_ptr, bounds, token, False, STEPS)
        begin = tl.maximum(tl.load(bounds_ptr + number - 1, mask=number > 0, other=0), 0)
        end = tl.minimum(tl.load(bounds_ptr + number, mask=number < bounds, other=tokens), tokens)
    first, stop = tl.min(begin, 0), tl.max(end, 0)
    full = tl.where(tl.max(begin, 0) == first, first + (stop - first) // BLOCK * BLOCK, first)
    return begin, end, first, full, stop


@triton.jit
def _add_exponentials(peak, total, logit, inside, sharpness, MASKED: tl.constexpr):
    """Update the running maximum of each row and its sum of exponentials with a tile of logits."""
    if MASKED:
        logit = tl.where(inside, logit, LOWEST)
    higher = tl.maximum(peak, tl.max(logit, 1))
    weights = tl.exp2((logit - higher[:, None]) * sharpness)
    if MASKED:  # in a row without any token of its segment yet, masked logits would count as exp(0)
        weights = tl.where(inside, weights, 0.0)
    return higher, total * tl.exp2((peak - higher) * sharpness) + tl.sum(weights, 1)


@kernel
def normaliser_kernel(
    query_ptr,
    key_ptr,
    bounds_ptr,
    peak_ptr,
    inverse_ptr,
    query_head_stride,
    query_stride,
    key_head_stride,
    key_stride,
    tokens,
    bounds,
    sign,
    sharpness,
    ALIGNED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Store, for each query, the maximum of its logits in its segment and 1 / the sum of their exponentials."""
    blocks = tl.cdiv(tokens, BLOCK)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    query_ptr += head * aligned(query_head_stride, ALIGNED)
    key_ptr += head * aligned(key_head_stride, ALIGNED)
    query_stride, key_stride = aligned(query_stride, ALIGNED), aligned(key_stride, ALIGNED)
    query, query_rest = _tile(query_ptr, row, query_stride, tokens, HEAD_DIM, COLUMNS, REST, 0)
    query, query_rest = _times(query, sign), _times(query_rest, sign)
    begin, end, first, full, stop = _segments(bounds_ptr, bounds, row, tokens, BLOCK, STEPS)
    peak = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for masked in tl.static_range(2):
        for start in range(full if masked else first, stop if masked else full, BLOCK):
            column = start + tl.arange(0, BLOCK)
            key, key_rest = _tile(key_ptr, column, key_stride, tokens, HEAD_DIM, COLUMNS, REST, 1)
            logit = _logits(query, query_rest, key, key_rest, REST)
            inside = (column[None, :] >= begin[:, None]) & (column[None, :] < end[:, None])
            peak, total = _add_exponentials(peak, total, logit, inside, sharpness, masked)
    tl.store(peak_ptr + head * tokens + row, peak, mask=row < tokens)
    tl.store(inverse_ptr + head * tokens + row, 1.0 / total, mask=row < tokens)


@kernel
def received_kernel(
    query_ptr,
    key_ptr,
    bounds_ptr,
    peak_ptr,
    inverse_ptr,
    received_ptr,
    query_head_stride,
    query_stride,
    key_head_stride,
    key_stride,
    tokens,
    bounds,
    sign,
    sharpness,
    ALIGNED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Store the sum of the attention that each key receives from the queries of its segment."""
    blocks = tl.cdiv(tokens, BLOCK)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    query_ptr += head * aligned(query_head_stride, ALIGNED)
    key_ptr += head * aligned(key_head_stride, ALIGNED)
    query_stride, key_stride = aligned(query_stride, ALIGNED), aligned(key_stride, ALIGNED)
    key, key_rest = _tile(key_ptr, column, key_stride, tokens, HEAD_DIM, COLUMNS, REST, 1)
    key, key_rest = _times(key, sign), _times(key_rest, sign)
    begin, end, first, full, stop = _segments(bounds_ptr, bounds, column, tokens, BLOCK, STEPS)
    peak_ptr += head * tokens
    inverse_ptr += head * tokens
    received = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(first, full, BLOCK):
        row = start + tl.arange(0, BLOCK)
        query, query_rest = _tile(query_ptr, row, query_stride, tokens, HEAD_DIM, COLUMNS, REST, 0)
        logit = _logits(query, query_rest, key, key_rest, REST)
        peak, inverse = tl.load(peak_ptr + row), tl.load(inverse_ptr + row)
        received += tl.exp2((logit - peak[:, None]) * sharpness) * inverse[:, None]
    for start in range(full, stop, BLOCK):
        row = start + tl.arange(0, BLOCK)
        query, query_rest = _tile(query_ptr, row, query_stride, tokens, HEAD_DIM, COLUMNS, REST, 0)
        logit = _logits(query, query_rest, key, key_rest, REST)
        peak = tl.load(peak_ptr + row, mask=row < tokens, other=0.0)
        inverse = tl.load(inverse_ptr + row, mask=row < tokens, other=0.0)
        difference = tl.minimum(logit - peak[:, None], 0.0)  # may be > 0 in another segment
        weights = tl.exp2(difference * sharpness) * inverse[:, None]
        received += tl.where((row[:, None] >= begin[None, :]) & (row[:, None] < end[None, :]), weights, 0.0)
    tl.store(received_ptr + head * tokens + column, tl.sum(received, 0), mask=column < tokens)


@kernel
def mean_kernel(
    received_ptr, mean_ptr, means, group, count, tokens, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Store the mean over the heads and over each group of tokens, which is a mean of ``count`` numbers."""
    mean = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, count, BLOCK_COLUMNS):
        number = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
        place = (number // group).to(tl.int64) * tokens + mean * group + number % group
        total += tl.load(received_ptr + place, mask=(mean < means) & (number < count), other=0.0)
    tl.store(mean_ptr + mean, tl.sum(total, 1, keep_dims=True) / count, mask=mean < means)
