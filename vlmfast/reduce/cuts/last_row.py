"""The attention of one token to all others: a row of the map, without the map."""

from __future__ import annotations

import torch
from torch import Tensor


def last_row_attention(query: Tensor, key: Tensor, valid: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Average over the heads the attention that one token of each sample pays to all tokens.

    ``softmax(scale * query @ key^T)`` over the tokens that are valid, in float32, of a float64 query float64. Heads of
    queries that share keys (GQA) are multiplied with them as they are, not with copies.

    Args:
        query: (B, H, D), of the token.
        key: (B, K, T, D), of all tokens; K divides H.
        valid: (B, T) bool, false where a token is not to be seen; None where all are.
        scale: factor of the logits; None for ``D ** -0.5``.

    Returns:
        (B, T), without a gradient.
    """
    batch, heads, head_dim = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    factor = head_dim**-0.5 if scale is None else scale
    rows = query.detach().to(wide).view(batch, key.shape[1], -1, head_dim)
    logits = torch.matmul(rows, key.detach().to(wide).transpose(2, 3)) * factor
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], torch.finfo(wide).min)  # a sample of padding alone: no NaN
    return logits.softmax(-1).sum((1, 2)) / heads
