"""The calls of attention_scores.py's ops: what a good one looks like, which to test, to refuse and to time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vlmfast import checks
from vlmfast.registry import BadCall

# ---- what a call must look like ----


def _check_pair(query: Tensor, key: Tensor) -> None:
    checks.float_tensor("query", query)
    checks.float_tensor("key", key)
    if query.dtype != key.dtype:
        raise TypeError(f"key must have the dtype of query, {query.dtype}, got {key.dtype}")
    checks.same_device("key", key, "query", query)


def _check_scale(scale: float | None) -> None:
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if not abs(scale) < math.inf:  # not math.isfinite, which torch.compile cannot trace
        raise ValueError(f"scale must be finite, got {scale}")


def check_cls_attention(query: Tensor, key: Tensor, scale: float | None = None, cls_index: int = 0) -> None:
    _check_pair(query, key)
    if query.dim() != 3 or min(query.shape[1:]) < 1:
        raise ValueError(f"query must have shape (B, H, D) with a head and a channel, got {tuple(query.shape)}")
    if key.dim() != 4 or (*key.shape[:2], key.shape[3]) != tuple(query.shape) or key.shape[2] < 1:
        batch, heads, size = query.shape
        raise ValueError(f"key must have shape ({batch}, {heads}, T, {size}) with T >= 1, got {tuple(key.shape)}")
    _check_scale(scale)
    checks.integer("cls_index", cls_index)
    if not -key.shape[2] <= cls_index < key.shape[2]:
        raise ValueError(f"cls_index must be within -T and T - 1 of {key.shape[2]} tokens, got {cls_index}")


def check_received_attention(
    query: Tensor, key: Tensor, cu_seqlens: Tensor | None = None, group: int = 1, scale: float | None = None
) -> None:
    _check_pair(query, key)
    if query.dim() != 3 or query.shape[0] < 1 or query.shape[2] < 1:
        raise ValueError(f"query must have shape (H, T, D) with a head and a channel, got {tuple(query.shape)}")
    checks.same_shape("key", key, "query", query)
    _check_scale(scale)
    checks.integer("group", group)
    tokens = query.shape[1]
    if group < 1 or tokens % group:
        raise ValueError(f"group must divide the {tokens} tokens, got {group}")
    if cu_seqlens is None:
        return
    checks.integers("cu_seqlens", cu_seqlens, torch.int32)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (segments + 1,), got {tuple(cu_seqlens.shape)}")
    checks.same_device("cu_seqlens", cu_seqlens, "query", query)
    if checks.on_host(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
            raise ValueError(f"cu_seqlens must rise from 0 to {tokens}, the tokens of query, got {bounds}")


# ---- other ways to compute the same ----


def _factor(query: Tensor, scale: float | None) -> float:
    return float(query.shape[-1] ** -0.5 if scale is None else scale)


def cls_row(query: Tensor, key: Tensor, scale: float | None = None, cls_index: int = 0) -> Callable[[], Tensor]:
    """The row alone, as one would write it; its products are rounded to the dtype."""
    factor, row, cls_index = _factor(query, scale), query[:, :, None], cls_index % key.shape[2]

    def run() -> Tensor:
        weights = torch.softmax(row @ key.transpose(-1, -2) * factor, -1, dtype=torch.float32).sum(1)[:, 0]
        return torch.cat([weights[:, :cls_index], weights[:, cls_index + 1 :]], 1)

    return run


def cls_map(query: Tensor, key: Tensor, scale: float | None = None, cls_index: int = 0) -> Callable[[], Tensor]:
    """All rows, as ``output_attentions`` gives them, of which one is used."""
    factor, rows, cls_index = _factor(query, scale), torch.randn_like(key), cls_index % key.shape[2]
    rows[:, :, cls_index] = query

    def run() -> Tensor:
        weights = torch.softmax(rows @ key.transpose(-1, -2) * factor, -1, dtype=torch.float32).to(key.dtype)
        row = weights[:, :, cls_index]
        return torch.cat([row[..., :cls_index], row[..., cls_index + 1 :]], -1).sum(1)

    return run


def _segments(query: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    bounds = [0, query.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    return list(pairwise(bounds))


def _received(
    query: Tensor, key: Tensor, cu_seqlens: Tensor | None, group: int, scale: float | None, chunk: int | None
) -> Callable[[], Tensor]:
    factor, segments = _factor(query, scale), _segments(query, cu_seqlens)

    def run() -> Tensor:
        received = torch.zeros(query.shape[:2], device=query.device)
        for begin, end in segments:
            columns = key[:, begin:end].transpose(1, 2)
            for start in range(begin, end, chunk or max(1, end - begin)):
                rows = query[:, start : min(end, start + chunk) if chunk else end]
                received[:, begin:end] += torch.softmax(rows @ columns * factor, -1, dtype=torch.float32).sum(1)
        return received.mean(0).view(-1, group).mean(1)

    return run


def received_chunks(
    query: Tensor, key: Tensor, cu_seqlens: Tensor | None = None, group: int = 1, scale: float | None = None
) -> Callable[[], Tensor]:
    return _received(query, key, cu_seqlens, group, scale, chunk=256)


def received_map(
    query: Tensor, key: Tensor, cu_seqlens: Tensor | None = None, group: int = 1, scale: float | None = None
) -> Callable[[], Tensor]:
    return _received(query, key, cu_seqlens, group, scale, chunk=None)


def received_flops(query: Tensor, key: Tensor, cu_seqlens: Tensor | None = None, *_: Any) -> int:
    """Of the products of queries and keys, once; the kernels compute them twice rather than keep the map."""
    heads, tokens, size = query.shape
    lengths = [tokens] if cu_seqlens is None else cu_seqlens.diff().tolist()
    return 2 * heads * size * sum(length * length for length in lengths)


# ---- calls to test, to refuse and to time ----


def cls_samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    shapes = [
        (1, 1, 1, 8),
        (2, 3, 17, 64),
        (1, 2, 70, 80),
        (3, 2, 5, 7),
        (2, 1, 577, 32),
        (0, 2, 5, 16),
        (1, 2, 33, 128),
    ]
    for position, (batch, heads, tokens, size) in enumerate(shapes):
        query = torch.randn(batch, heads, size, device=device, dtype=dtype)
        key = torch.randn(batch, heads, tokens, size, device=device, dtype=dtype)
        yield query, key, *((), (0.5,), (None, -1), (None, tokens // 2))[position % 4]
    # One token gets nearly everything, and without the maximum taken off it is infinite. The products are exact: of two
    # large ones that are nearly equal, their rounding would decide.
    yield 30 * query.sign(), key.sign()


def received_samples(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    shapes = [
        ((1, 1, 8), None, 1),
        ((2, 24, 64), [0, 8, 24], 4),
        ((3, 70, 80), None, 1),
        ((1, 129, 72), [0, 1, 1, 65, 129], 1),
        ((2, 0, 16), None, 1),
        ((2, 12, 7), [0, 12], 2),
        ((2, 200, 32), [0, 63, 128, 200], 4),
        ((1, 36, 128), [0, 4, 8, 12, 16, 20, 24, 28, 32, 36], 4),
    ]
    for position, (shape, bounds, group) in enumerate(shapes):
        query, key = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device)
        yield query, key, cu_seqlens, group, *((), (0.5,))[position % 2]
    yield 30 * query.sign(), key.sign(), cu_seqlens, 1  # see cls_samples


def _pair_bad_calls(query: Tensor, key: Tensor) -> Iterator[BadCall]:
    yield BadCall(([1.0], key), TypeError, "query must be a torch.Tensor, got list")
    yield BadCall((query, 1.0), TypeError, "key must be a torch.Tensor, got float")
    yield BadCall((query.double(), key), TypeError, "query must be float32, float16 or bfloat16, got torch.float64")
    yield BadCall((query, key.half()), TypeError, "key must have the dtype of query, torch.float32, got torch.float16")
    yield BadCall((query, key.to("meta")), ValueError, "key must be on the device of query, cpu, got meta")


def cls_bad_calls() -> Iterator[BadCall]:
    query, key = torch.ones(2, 3, 8), torch.ones(2, 3, 5, 8)
    yield from _pair_bad_calls(query, key)
    yield BadCall((query[0], key), ValueError, r"query must have shape \(B, H, D\) .*, got \(3, 8\)")
    yield BadCall((query, key[:1]), ValueError, r"key must have shape \(2, 3, T, 8\) with T >= 1, got \(1, 3, 5, 8\)")
    yield BadCall((query, key[:, :, :0]), ValueError, r"key must have shape .*, got \(2, 3, 0, 8\)")
    yield BadCall((query, key, "1"), TypeError, "scale must be a number or None, got str")
    yield BadCall((query, key, math.nan), ValueError, "scale must be finite, got nan")
    yield BadCall((query, key, None, 5), ValueError, "cls_index must be within -T and T - 1 of 5 tokens, got 5")
    yield BadCall((query, key, None, 0.5), TypeError, "cls_index must be an int, got float")


def received_bad_calls() -> Iterator[BadCall]:
    query = key = torch.ones(2, 8, 4)
    bounds = torch.tensor([0, 4, 8], dtype=torch.int32)
    yield from _pair_bad_calls(query, key)
    yield BadCall((query[0], key[0]), ValueError, r"query must have shape \(H, T, D\) .*, got \(8, 4\)")
    yield BadCall((query, key[:1]), ValueError, r"key must have the shape of query, \(2, 8, 4\), got \(1, 8, 4\)")
    yield BadCall((query, key, None, 3), ValueError, "group must divide the 8 tokens, got 3")
    yield BadCall((query, key, None, True), TypeError, "group must be an int, got bool")
    yield BadCall((query, key, bounds.long()), TypeError, "cu_seqlens must be int32, got torch.int64")
    yield BadCall(
        (query, key, bounds[None]), ValueError, r"cu_seqlens must have shape \(segments \+ 1,\), got \(1, 3\)"
    )
    yield BadCall((query, key, bounds[:2]), ValueError, r"cu_seqlens must rise from 0 to 8.* got \[0, 4\]")
    yield BadCall(
        (query, key, bounds[[0, 2, 1, 2]]), ValueError, r"cu_seqlens must rise from 0 to 8.* got \[0, 8, 4, 8\]"
    )
    yield BadCall((query, key, bounds.to("meta")), ValueError, "cu_seqlens must be on the device of query")
    yield BadCall((query, key, None, 1, math.inf), ValueError, "scale must be finite, got inf")


def cls_workloads(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """CLIP-L/14-336 on one image, and on the five crops of LLaVA-NeXT."""
    for batch in (1, 5):
        key = torch.randn(batch, 577, 16, 64, device=device, dtype=dtype).transpose(1, 2)
        yield f"{batch}x16x577x64", (key[:, :, 0], key)


def received_workloads(device: str, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """An image of 1024 visual tokens in Qwen2.5-VL, and five crops of SigLIP-so400m."""
    query, key = (torch.randn(4096, 16, 80, device=device, dtype=dtype).transpose(0, 1) for _ in range(2))
    yield "16x4096x80", (query, key, None, 4)
    query, key = (torch.randn(5 * 729, 16, 72, device=device, dtype=dtype).transpose(0, 1) for _ in range(2))
    yield "16x(5x729)x72", (query, key, torch.arange(0, 5 * 729 + 1, 729, dtype=torch.int32, device=device))
