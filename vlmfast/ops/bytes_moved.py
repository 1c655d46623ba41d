"""The least memory traffic of a call of each op that takes more than one line to say, in bytes: `Op.bytes`.

Each operand is read once and each result written once. Where an op takes two launches, what the first one leaves for
the second (indexes, orders, slots, products, partial sums of a weight's gradient) is written and read.
tests/ops/test_traffic.py holds what the kernels really move against these numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_bytes(x: Tensor) -> int:
    """Of one row of the last dimension."""
    return x.shape[-1] * x.element_size()


def partial_sums_bytes(x: Tensor, columns: int, rows: int) -> int:
    """Of the float32 row that each block of a persistent kernel leaves: two blocks per multiprocessor, or two."""
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    return 8 * columns * min(rows, 2 * multiprocessors)


# ---- RMSNorm and pixel shuffle ----


def rms_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    variant: str = "llama",
    grad_residual: Tensor | None = None,
    weight_grad: bool = True,
) -> int:
    """Two operands in and one out; the residual's gradient, if any; the weight's, with its partial sums."""
    rows = 3 * x.nbytes + (0 if grad_residual is None else grad_residual.nbytes) + weight.nbytes
    size = weight.shape[0]
    return rows + (weight.nbytes + partial_sums_bytes(x, size, x.numel() // max(size, 1)) if weight_grad else 0)


def norm_backward(grad_output: Tensor, x: Tensor, weight: Tensor, *_: object) -> int:
    """The same for LayerNorm, which has the gradients of two parameters."""
    size = weight.shape[0]
    return 3 * x.nbytes + 3 * weight.nbytes + 2 * partial_sums_bytes(x, size, x.numel() // max(size, 1))


def linear(x: Tensor, weight: Tensor, *_: object) -> int:
    """Patches and weight in, tokens out: what is between the shuffle and the product is not counted."""
    return x.nbytes + weight.nbytes + x.numel() // weight.shape[1] * weight.shape[0] * x.element_size()


def gemm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *others: object) -> int:
    """`linear` with all its vectors; for a LayerNorm the patches again, and their means and variances out and in."""
    norm = [vector for vector in others if isinstance(vector, Tensor)]
    moments = x.nbytes + 16 * x.shape[0] * x.shape[1] if norm else 0
    return linear(x, weight) + sum(v.nbytes for v in (bias, *norm) if v is not None) + moments


# ---- masked rows ----


def _index(mask: Tensor, index: Tensor | None) -> int:
    """An index given is read; one made of the mask is written before."""
    return 4 * mask.numel() + (5 * mask.numel() if index is None else 0)


def deepstack_add(hidden_states: Tensor, mask: Tensor, embeds: Tensor, index: Tensor | None = None) -> int:
    """All hidden states in and out, the embeddings in."""
    return 2 * hidden_states.nbytes + embeds.nbytes + _index(mask, index)


def place_embeddings(inputs_embeds: Tensor, mask: Tensor, image_embeds: Tensor, index: Tensor | None = None) -> int:
    """Each row comes from one tensor or the other."""
    return 2 * inputs_embeds.nbytes + _index(mask, index)


def split_rows(x: Tensor, mask: Tensor, rows: int, index: Tensor | None = None, rest: bool = True) -> int:
    """``x`` in, its masked rows and the rest out; without the rest, nothing else is read."""
    taken = rows * row_bytes(x)
    return _index(mask, index) + (2 * x.nbytes + taken if rest else 2 * taken)


def _packed(invalid: Tensor, keep: int) -> int:
    """How many valid tokens get one of the ``keep`` places of their sequence."""
    return int((~invalid).sum(1).clamp(max=keep).sum())


def compact_tokens(tokens: Tensor, invalid: Tensor, keep: int, order: Tensor | None = None, *_: object) -> int:
    """Only valid rows are read. The order is written (made, or a copy of a given one) and read."""
    places = tokens.shape[0] * keep
    read = _packed(invalid, keep) if order is None else int((~invalid.gather(1, order)).sum())
    numbers = 8 * places + (invalid.nbytes if order is None else 8 * places)
    return row_bytes(tokens) * (read + places) + numbers + 10 * places


def compact_tokens_backward(grad_tokens: Tensor, invalid: Tensor, *_: object) -> int:
    """Only what valid tokens were packed into is read."""
    return row_bytes(grad_tokens) * (_packed(invalid, grad_tokens.shape[1]) + invalid.numel()) + _index(invalid, None)


# ---- scores and the token merge ----


def cls_attention(query: Tensor, key: Tensor, *_: object) -> int:
    """The products of each head wait, in float32, for the sums of the whole row; one score for each other token out."""
    batch, heads, tokens, _size = key.shape
    return query.nbytes + key.nbytes + 8 * batch * heads * tokens + 4 * batch * (tokens - 1)


def top_tokens(scores: Tensor, k: int) -> int:
    """Scores in, positions out."""
    return scores.nbytes + 8 * scores.shape[0] * k


def merge_slots(metric: Tensor, kept: Tensor, contextual: int) -> int:
    """Nobody asks for the metric of a token that is kept."""
    compared = metric.shape[0] * (metric.shape[1] - kept.shape[1]) if contextual else 0
    return row_bytes(metric) * compared + kept.nbytes + 4 * metric.shape[0] * metric.shape[1]


def merge_rows(hidden: Tensor, kept: Tensor, slots: Tensor, contextual: int, *_: object) -> int:
    """Tokens with a slot in, kept and contextual rows out."""
    read = kept.numel() + int((slots >= 0).sum())
    return row_bytes(hidden) * (read + kept.numel() + kept.shape[0] * contextual) + kept.nbytes + slots.nbytes


def merge_rows_backward(grad_tokens: Tensor, slots: Tensor, *_: object) -> int:
    """A row goes to every token that it was made of."""
    return grad_tokens.nbytes + slots.nbytes + slots.numel() * row_bytes(grad_tokens)


def merge_tokens(hidden: Tensor, metric: Tensor, kept: Tensor, contextual: int, *_: object) -> int:
    """`merge_slots`, whose slots `merge_rows` reads."""
    batch, tokens = hidden.shape[:2]
    read = tokens - kept.shape[1] if contextual else 0
    return batch * (row_bytes(hidden) * (read + contextual) + 4 * tokens) + merge_slots(metric, kept, contextual)


def visionzip(hidden: Tensor, metric: Tensor, scores: Tensor, dominant: int, contextual: int, *_: object) -> int:
    """`top_tokens`, whose choice both others read, `merge_slots` and `merge_rows`."""
    batch, tokens = hidden.shape[:2]
    kept = scores.new_empty(batch, dominant, dtype=torch.int64, device="meta")
    read = tokens if contextual else dominant
    merged = batch * (row_bytes(hidden) * (read + dominant + contextual) + 4 * tokens) + kept.nbytes
    return top_tokens(scores, dominant) + merge_slots(metric, kept, contextual) + merged
