"""Scores of visual tokens by the attention that they receive, by which token reduction chooses.

Upstream asks the tower for its attention maps, which disables flash attention and stores H x T x T numbers. Here the
queries and keys of one layer suffice. With a CLS token only its row of the map is computed. Without one, the sums of
the columns are needed, which take the normalisers of the rows (H x T numbers) but no stored map.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlmfast import checks
from vlmfast.functions import op

ROW_CHUNKS = 16  # the definition computes the map in this many parts, one at a time


# ---- what a call must look like ----


def _check_pair(query: Tensor, key: Tensor) -> None:
    checks.tensor("query", query)
    checks.tensor("key", key)
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


def _check_cls_attention(query: Tensor, key: Tensor, scale: float | None = None, cls_index: int = 0) -> None:
    _check_pair(query, key)
    if query.dim() != 3 or min(query.shape[1:]) < 1:
        raise ValueError(f"query must have shape (B, H, D) with a head and a channel, got {tuple(query.shape)}")
    if key.dim() != 4 or (*key.shape[:2], key.shape[3]) != tuple(query.shape) or key.shape[2] < 1:
        batch, heads, head_dim = query.shape
        raise ValueError(f"key must have shape ({batch}, {heads}, T, {head_dim}) with T >= 1, got {tuple(key.shape)}")
    _check_scale(scale)
    checks.integer("cls_index", cls_index)
    if not -key.shape[2] <= cls_index < key.shape[2]:
        raise ValueError(f"cls_index must be within -T and T - 1 of {key.shape[2]} tokens, got {cls_index}")


def _check_last_row_attention(
    query: Tensor, key: Tensor, valid: Tensor | None = None, scale: float | None = None
) -> None:
    _check_pair(query, key)
    if query.dim() != 3 or min(query.shape[1:]) < 1:
        raise ValueError(f"query must have shape (B, H, D) with a head and a channel, got {tuple(query.shape)}")
    batch, heads, head_dim = query.shape
    if key.dim() != 4 or (key.shape[0], key.shape[3]) != (batch, head_dim) or min(key.shape[1:3]) < 1:
        raise ValueError(
            f"key must have shape ({batch}, K, T, {head_dim}) with K >= 1 and T >= 1, got {tuple(key.shape)}"
        )
    if heads % key.shape[1]:
        raise ValueError(f"key must have a number of heads that divides the {heads} of query, got {key.shape[1]}")
    _check_scale(scale)
    if valid is None:
        return
    checks.tensor("valid", valid, dtypes=(torch.bool,))
    if valid.shape != (batch, key.shape[2]):
        raise ValueError(f"valid must have shape ({batch}, {key.shape[2]}), got {tuple(valid.shape)}")
    checks.same_device("valid", valid, "query", query)


def _check_received_attention(
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
    if cu_seqlens is not None:
        checks.bounds("cu_seqlens", cu_seqlens, "segments", tokens, "the tokens of query", "query", query)


@op(check=_check_cls_attention, detached=True)
def cls_attention(query: Tensor, key: Tensor, scale: float | None = None, cls_index: int = 0) -> Tensor:
    """Sum over the heads the attention that the CLS token gives to each other token.

    ``softmax(scale * query @ key^T)`` over all T tokens, in float32; the CLS token's own column is left out afterwards.

    Args:
        query: (B, H, D) float32, float16 or bfloat16, of the CLS token; any strides.
        key: (B, H, T, D) of all tokens, of the dtype of ``query``; any strides, such as those of a transposed
            projection.
        scale: factor of the logits; None for ``D ** -0.5``.
        cls_index: the position of the CLS token, -T to T - 1.

    Returns:
        (B, T - 1) float32 without a gradient.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes or devices that do not fit, a scale that is not
            finite, or an index out of range.

    Source:
        ``attn_weights[:, :, 0, 1:].sum(1)`` of VisionZip's CLIP tower.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.matmul(key.to(wide), query.to(wide).unsqueeze(-1)).squeeze(-1) * factor
    scores = logits.softmax(-1).sum(1)
    index = cls_index % key.shape[2]
    return torch.cat([scores[:, :index], scores[:, index + 1 :]], 1)


@op(check=_check_last_row_attention, detached=True)
def last_row_attention(query: Tensor, key: Tensor, valid: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Average over the heads the attention that one token of each sequence gives to all tokens.

    ``softmax(scale * query @ key^T)`` over the valid tokens, in float32: one row of the map, whose other rows are not
    computed. Query heads may share key heads (GQA), which are not repeated in memory.

    Args:
        query: (B, H, D) float32, float16 or bfloat16, of the token; any strides.
        key: (B, K, T, D) of all tokens, of the dtype of ``query``, K a divisor of H: head h of the queries has head
            ``h // (H / K)`` of the keys. Any strides, such as those of a cache that is longer.
        valid: (B, T) bool, false at masked tokens such as padding; None if there are none.
        scale: factor of the logits; None for ``D ** -0.5``.

    Returns:
        (B, T) float32 without a gradient, 0 at masked tokens.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes or devices that do not fit, or a scale that is
            not finite.

    Source:
        ``attn_weights.mean(1)[:, -1]`` of FastV.
    """
    batch, heads, head_dim = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    factor = head_dim**-0.5 if scale is None else scale
    rows = query.to(wide).reshape(batch, key.shape[1], heads // key.shape[1], head_dim)
    logits = torch.matmul(rows, key.to(wide).transpose(2, 3)) * factor
    if valid is None:
        return logits.softmax(-1).sum((1, 2)) / heads
    unseen = ~valid[:, None, None]
    return logits.masked_fill(unseen, -torch.inf).softmax(-1).masked_fill(unseen, 0).sum((1, 2)) / heads


@op(check=_check_received_attention, detached=True)
def received_attention(
    query: Tensor, key: Tensor, cu_seqlens: Tensor | None = None, group: int = 1, scale: float | None = None
) -> Tensor:
    """Average over the heads the attention that each token gets from all tokens of its segment.

    ``softmax(scale * query @ key^T)`` within each segment, in float32, summed over the queries; then the mean over the
    heads and over each ``group`` of consecutive tokens. A T x T map is never stored.

    Args:
        query: (H, T, D) float32, float16 or bfloat16; any strides. A batch is a sequence of segments.
        key: (H, T, D), of the dtype of ``query``; any strides.
        cu_seqlens: (S + 1,) int32, where each segment begins and, last, T; None for one segment.
        group: tokens per score; Qwen-VL merges 4 patches into one visual token.
        scale: factor of the logits; None for ``D ** -0.5``.

    Returns:
        (T / group,) float32 without a gradient.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes or devices that do not fit, a group that does
            not divide T, or on a CPU a ``cu_seqlens`` that does not rise from 0 to T; on a GPU that is not checked.

    Source:
        ``attn_weights.mean(heads).sum(queries)`` of VisionZip for Qwen2.5-VL, within each image.
    """
    heads, tokens, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    columns = key.to(wide).transpose(1, 2)
    position = torch.arange(tokens, device=query.device)
    segment = position if cu_seqlens is None else torch.bucketize(position, cu_seqlens, right=True)
    received = torch.zeros(heads, tokens, dtype=wide, device=query.device)
    parts = (query.tensor_split(ROW_CHUNKS, 1), segment.tensor_split(ROW_CHUNKS))
    for rows, row_segment in zip(*parts, strict=True):
        logits = torch.matmul(rows.to(wide), columns) * factor
        if cu_seqlens is None:
            received += logits.softmax(-1).sum(1)
            continue
        elsewhere = row_segment[:, None] != segment
        attention = logits.masked_fill(elsewhere, -torch.inf).softmax(-1)
        received += attention.masked_fill_(elsewhere, 0).sum(1)  # a row with a NaN in its segment is NaN elsewhere too
    return received.mean(0).view(tokens // group, group).mean(1)
