"""How the attention scores are tested and timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vlmfast.cases import Cases, Samples, Workloads

CHUNK = 64  # rows of the map at a time: the fastest of 16, 32, 64 and 256

# ---- other ways to compute the same ----


def _factor(query: Tensor, scale: float | None) -> float:
    return float(query.shape[-1] ** -0.5 if scale is None else scale)


def cls_row(
    query: Tensor, key: Tensor, scale: float | None = None, cls_index: int = 0, copied: bool = False
) -> Callable[[], Tensor]:
    """Compute only the one row, by a batched matmul, whose logits are rounded to the dtype.

    Keys behind a projection are made contiguous, which some matmuls gain by: always if ``copied``, otherwise only if
    the batch dimensions cannot be viewed as one.
    """
    factor, cls_index = _factor(query, scale), cls_index % key.shape[2]
    batch, heads, tokens, head_dim = key.shape

    def run() -> Tensor:
        keys = (key.contiguous() if copied else key).reshape(batch * heads, tokens, head_dim)
        logits = torch.bmm((query * factor).reshape(batch * heads, 1, head_dim), keys.transpose(1, 2))
        weights = torch.softmax(logits.view(batch, heads, tokens), -1, dtype=torch.float32).sum(1)
        return torch.cat([weights[:, :cls_index], weights[:, cls_index + 1 :]], 1)

    return run


def cls_map(query: Tensor, key: Tensor, scale: float | None = None, cls_index: int = 0) -> Callable[[], Tensor]:
    """Compute all rows, as ``output_attentions`` does, and use one of them."""
    factor, rows, cls_index = _factor(query, scale), torch.randn_like(key), cls_index % key.shape[2]
    rows[:, :, cls_index] = query

    def run() -> Tensor:
        weights = torch.softmax(rows @ key.transpose(-1, -2) * factor, -1, dtype=torch.float32).to(key.dtype)
        row = weights[:, :, cls_index]
        return torch.cat([row[..., :cls_index], row[..., cls_index + 1 :]], -1).sum(1)

    return run


def _received(
    query: Tensor,
    key: Tensor,
    cu_seqlens: Tensor | None = None,
    group: int = 1,
    scale: float | None = None,
    chunk: int | None = None,
) -> Callable[[], Tensor]:
    """Sum the columns of the map, which is computed whole or in ``chunk`` rows at a time, which stay in a cache."""
    factor, bounds = _factor(query, scale), [0, query.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()

    def run() -> Tensor:
        scaled = query * factor  # scaling the map instead would cost more
        received = torch.zeros(query.shape[:2], device=query.device)
        for begin, end in pairwise(bounds):
            columns = key[:, begin:end].transpose(1, 2)
            for rows in torch.split(scaled[:, begin:end], chunk or max(1, end - begin), 1):
                received[:, begin:end] += torch.softmax(rows @ columns, -1, dtype=torch.float32).sum(1)
        return received.mean(0).view(-1, group).mean(1)

    return run


def cls_bytes(query: Tensor, key: Tensor, *_: Any) -> int:
    """Count each head's float32 logits, stored until the row's sum is known; one score per other token out."""
    batch, heads, tokens, _head_dim = key.shape
    return query.nbytes + key.nbytes + 8 * batch * heads * tokens + 4 * batch * (tokens - 1)


def last_row(
    query: Tensor, key: Tensor, valid: Tensor | None = None, scale: float | None = None
) -> Callable[[], Tensor]:
    """Compute only the one row, by a batched matmul, whose logits are rounded to the dtype."""
    factor, groups = _factor(query, scale), query.shape[1] // key.shape[1]

    def run() -> Tensor:
        rows = (query * factor).reshape(len(query), key.shape[1], groups, -1)
        logits = rows @ key.transpose(2, 3)
        if valid is not None:
            logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
        return torch.softmax(logits, -1, dtype=torch.float32).mean((1, 2))

    return run


def last_row_bytes(query: Tensor, key: Tensor, valid: Tensor | None = None, *_: Any) -> int:
    """Count each head's logits, as `cls_bytes` does, one score for each token, and the flags once for each launch."""
    batch, heads, tokens = query.shape[0], query.shape[1], key.shape[2]
    flags = 0 if valid is None else valid.numel()
    return query.nbytes + key.nbytes + flags + 8 * batch * heads * tokens + 4 * batch * tokens


def received_bytes(query: Tensor, key: Tensor, cu_seqlens: Tensor | None = None, group: int = 1, *_: Any) -> int:
    return 2 * query.nbytes + 4 * query.shape[1] // group


def received_flops(query: Tensor, key: Tensor, cu_seqlens: Tensor | None = None, *_: Any) -> int:
    """Count the dots of queries and keys once; the kernels compute them twice so as not to store the map."""
    heads, tokens, head_dim = query.shape
    lengths = [tokens] if cu_seqlens is None else cu_seqlens.diff().tolist()
    return 2 * heads * head_dim * sum(length * length for length in lengths)


# ---- calls to test, to refuse and to time ----


def cls_samples(device: str, dtype: torch.dtype) -> Samples:
    shapes = [
        (1, 1, 1, 8),
        (2, 3, 17, 64),
        (1, 2, 70, 80),
        (3, 2, 5, 7),
        (2, 1, 577, 32),
        (0, 2, 5, 16),
        (1, 2, 33, 128),
        (1, 16, 1100, 64),  # more blocks of tokens than are added up at once
        (2, 20, 60, 64),  # one block of tokens, and more heads than one of heads
    ]
    for index, (batch, heads, tokens, head_dim) in enumerate(shapes):
        query = torch.randn(batch, heads, head_dim, device=device, dtype=dtype)
        key = torch.randn(batch, heads, tokens, head_dim, device=device, dtype=dtype)
        yield query, key, *((), (0.5,), (None, -1), (None, tokens // 2))[index % 4]
    # One token gets nearly all the weight, and its exponential overflows unless the maximum is subtracted. The logits
    # are exact, or the rounding of two large ones that are nearly equal would decide between them.
    yield 30 * query.sign(), key.sign()


def last_row_samples(device: str, dtype: torch.dtype) -> Samples:
    shapes = [
        (1, 1, 1, 1, 8),
        (2, 6, 3, 17, 64),
        (2, 6, 2, 70, 80),
        (3, 2, 1, 5, 7),
        (2, 7, 1, 577, 32),
        (0, 2, 2, 5, 16),
        (2, 4, 4, 33, 128),
        (1, 16, 2, 1100, 64),  # more blocks of tokens than are added up at once
        (2, 20, 4, 60, 64),  # see cls_samples
    ]
    for index, (batch, heads, key_heads, tokens, head_dim) in enumerate(shapes):
        query = torch.randn(batch, heads, head_dim, device=device, dtype=dtype)
        key = torch.randn(batch, key_heads, tokens, head_dim, device=device, dtype=dtype)
        valid = torch.rand(batch, tokens, device=device) < 0.7
        yield query, key, *((), (valid,), (None, -0.5), (valid, 0.3))[index % 4]
    seen = torch.ones(2, 300, dtype=torch.bool, device=device)
    seen[0, :290], seen[1] = False, False  # padding of whole blocks; a sequence without valid tokens
    key = torch.randn(2, 1, 300, 64, device=device, dtype=dtype)
    yield torch.randn(2, 3, 64, device=device, dtype=dtype), key, seen
    query = torch.randn(2, 3, 64, device=device, dtype=dtype)
    yield 30 * query.sign(), key.sign(), seen  # see cls_samples


def received_samples(device: str, dtype: torch.dtype) -> Samples:
    shapes = [  # all but the smallest have a segment that fills a block of 64 tokens, which then needs no mask
        ((1, 1, 8), None, 1),
        ((2, 200, 64), [0, 8, 200], 4),  # as many blocks as are copied ahead, and one more
        ((3, 70, 80), None, 1),
        ((2, 129, 72), [0, 1, 1, 65, 129], 1),
        ((2, 0, 16), None, 1),
        ((2, 66, 7), [0, 66], 2),
        ((2, 200, 32), [0, 63, 128, 200], 4),
        ((2, 100, 128), [0, 4, 8, 12, 16, 20, 24, 28, 32, 100], 4),
    ]
    for index, (shape, bounds, group) in enumerate(shapes):
        query, key = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device)
        yield query, key, cu_seqlens, group, *((), (0.5,))[index % 2]
    yield 30 * query.sign(), key.sign(), cu_seqlens, 1  # see cls_samples


def cls_workloads(device: str, dtype: torch.dtype) -> Workloads:
    """Yield CLIP-L/14-336 on one image, and on the five crops of LLaVA-NeXT: keys as projected, and contiguous.

    Also EVA-CLIP-g/14, which has heads of 88 channels.
    """
    for batch, tokens, head_dim in ((1, 577, 64), (1, 257, 88), (5, 577, 64)):
        key = torch.randn(batch, tokens, 16, head_dim, device=device, dtype=dtype).transpose(1, 2)
        for layout, keys in (("projected", key), ("contiguous", key.contiguous())):
            yield f"{batch}x16x{tokens}x{head_dim} {layout}", (keys[:, :, 0], keys)


def last_row_workloads(device: str, dtype: torch.dtype) -> Workloads:
    """Yield LLaVA-1.5-7B with one image, and Qwen2.5-VL-7B with 1296 visual tokens: keys as projected, and rotated.

    Also four padded prompts of the latter, in a cache that is longer.
    """
    for batch, heads, key_heads, tokens in ((1, 32, 32, 640), (1, 28, 4, 1344)):
        query = torch.randn(batch, heads, 128, device=device, dtype=dtype)
        key = torch.randn(batch, key_heads, tokens, 128, device=device, dtype=dtype)
        yield f"{batch}x{heads}:{key_heads}x{tokens}x128", (query, key)
    cache = torch.randn(4, 4, 2048, 128, device=device, dtype=dtype)
    valid = torch.arange(1344, device=device) >= torch.tensor([[0], [100], [700], [1000]], device=device)
    yield "4x28:4x1344x128 padded", (torch.randn(4, 28, 128, device=device, dtype=dtype), cache[:, :, :1344], valid)


def received_workloads(device: str, dtype: torch.dtype) -> Workloads:
    """Yield an image of 1024 visual tokens in Qwen2.5-VL, and five crops of SigLIP, both in two layouts."""

    def pair(tokens: int, head_dim: int) -> list[Tensor]:
        return [torch.randn(tokens, 16, head_dim, device=device, dtype=dtype).transpose(0, 1) for _ in range(2)]

    rows = pair(4096, 80)
    yield "16x4096x80 projected", (*rows, None, 4)
    yield "16x4096x80 contiguous", (*(row.contiguous() for row in rows), None, 4)
    crops = torch.arange(0, 5 * 729 + 1, 729, dtype=torch.int32, device=device)
    rows = pair(5 * 729, 72)
    yield "16x(5x729)x72 projected", (*rows, crops)
    yield "16x(5x729)x72 contiguous", (*(row.contiguous() for row in rows), crops)


# ---- the cases of each op ----

_CLS_QUERY, _CLS_KEY = torch.ones(2, 3, 8), torch.ones(2, 3, 5, 8)

cls_attention = Cases(
    samples=cls_samples,
    good_call={"query": _CLS_QUERY, "key": _CLS_KEY},
    bad_calls=(
        ("key", _CLS_KEY.half(), TypeError, "key must have the dtype of query, torch.float32, got torch.float16"),
        ("query", _CLS_QUERY[0], ValueError, r"query must have shape \(B, H, D\) .*, got \(3, 8\)"),
        ("key", _CLS_KEY[:1], ValueError, r"key must have shape \(2, 3, T, 8\) with T >= 1, got \(1, 3, 5, 8\)"),
        ("key", _CLS_KEY[:, :, :0], ValueError, r"key must have shape .*, got \(2, 3, 0, 8\)"),
        ("scale", "1", TypeError, "scale must be a number or None, got str"),
        ("scale", math.nan, ValueError, "scale must be finite, got nan"),
        ("cls_index", 5, ValueError, "cls_index must be within -T and T - 1 of 5 tokens, got 5"),
        ("cls_index", 0.5, TypeError, "cls_index must be an int, got float"),
    ),
    workloads=cls_workloads,
    bytes=cls_bytes,
    flops=lambda query, key, *_: 2 * key.numel(),
    peers={"torch.bmm": cls_row, "torch.bmm of a copy": partial(cls_row, copied=True), "the whole map": cls_map},
    launches=2,
    requested=1.25,  # the parts of the normaliser are read for each block of tokens
)

_ROW, _KEYS, _VALID = torch.ones(2, 6, 8), torch.ones(2, 3, 5, 8), torch.ones(2, 5, dtype=torch.bool)

last_row_attention = Cases(
    samples=last_row_samples,
    good_call={"query": _ROW, "key": _KEYS, "valid": _VALID},
    bad_calls=(
        ("key", _KEYS.half(), TypeError, "key must have the dtype of query, torch.float32, got torch.float16"),
        ("query", _ROW[0], ValueError, r"query must have shape \(B, H, D\) .*, got \(6, 8\)"),
        ("key", _KEYS[:1], ValueError, r"key must have shape \(2, K, T, 8\) .*, got \(1, 3, 5, 8\)"),
        ("key", _KEYS[:, :, :0], ValueError, r"key must have shape .*, got \(2, 3, 0, 8\)"),
        ("query", _ROW[:, :5], ValueError, "key must have a number of heads that divides the 5 of query, got 3"),
        ("valid", _VALID[:, :4], ValueError, r"valid must have shape \(2, 5\), got \(2, 4\)"),
        ("valid", _VALID.int(), TypeError, "valid must be bool, got torch.int32"),
        ("scale", "1", TypeError, "scale must be a number or None, got str"),
        ("scale", math.nan, ValueError, "scale must be finite, got nan"),
    ),
    workloads=last_row_workloads,
    bytes=last_row_bytes,
    flops=lambda query, key, *_: 2 * query.numel() * key.shape[2],
    peers={"torch.matmul": last_row},
    launches=2,
    requested=7.5,  # every query head reads the keys that it shares with others, from a cache
)

_QUERY, _BOUNDS = torch.ones(2, 8, 4), torch.tensor([0, 4, 8], dtype=torch.int32)

received_attention = Cases(
    samples=received_samples,
    good_call={"query": _QUERY, "key": _QUERY, "cu_seqlens": _BOUNDS},
    bad_calls=(
        ("key", _QUERY.half(), TypeError, "key must have the dtype of query, torch.float32, got torch.float16"),
        ("query", _QUERY[0], ValueError, r"query must have shape \(H, T, D\) .*, got \(8, 4\)"),
        ("key", _QUERY[:1], ValueError, r"key must have the shape of query, \(2, 8, 4\), got \(1, 8, 4\)"),
        ("group", 3, ValueError, "group must divide the 8 tokens, got 3"),
        ("group", True, TypeError, "group must be an int, got bool"),
        ("cu_seqlens", _BOUNDS.long(), TypeError, "cu_seqlens must be int32, got torch.int64"),
        ("cu_seqlens", _BOUNDS[None], ValueError, r"cu_seqlens must have shape \(segments \+ 1,\), got \(1, 3\)"),
        ("cu_seqlens", _BOUNDS[:2], ValueError, r"cu_seqlens must rise from 0 to 8.* got \[0, 4\]"),
        ("cu_seqlens", _BOUNDS[[0, 2, 1, 2]], ValueError, r"cu_seqlens must rise .* got \[0, 8, 4, 8\]"),
        ("scale", math.inf, ValueError, "scale must be finite, got inf"),
    ),
    workloads=received_workloads,
    bytes=received_bytes,
    flops=received_flops,
    peers={"PyTorch by chunks": partial(_received, chunk=CHUNK), "the whole map": _received},
    compute_bound="multiplies each query with all keys of its segment",
)
