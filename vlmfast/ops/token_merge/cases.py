"""How the choice and the merging of tokens are tested and timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmfast.cases import Cases, Samples, Workloads, derived, row_bytes
from vlmfast.ops.token_merge import definition
from vlmfast.ops.token_merge.definition import MERGES

# ---- other ways to compute the same ----


def topk(scores: Tensor, k: int) -> Callable[[], Tensor]:
    return lambda: scores.topk(k, dim=1).indices.sort(1).values


def merge_plain(
    hidden: Tensor, metric: Tensor, kept: Tensor, contextual: int, merge: str = "reference"
) -> Callable[[], Tensor]:
    """Merge a whole batch without a loop or a copy of the rows, in the dtype of the model.

    Each joining token is added to the row of its most similar target, and each other token to a spare row.
    """

    def run() -> Tensor:
        batch, tokens, size = hidden.shape
        free = torch.ones(batch, tokens, dtype=torch.bool, device=hidden.device).scatter_(1, kept, False)
        others = free.nonzero()[:, 1].view(batch, -1)
        step = others.shape[1] // contextual
        targets = others[:, : contextual * step : step]
        unit = torch.nn.functional.normalize(metric, dim=2)
        to = unit.gather(1, targets[..., None].expand(-1, -1, unit.shape[2]))
        owner = (unit @ to.transpose(1, 2)).argmax(2)
        slots = torch.where(free.scatter(1, targets, False), owner, contextual)
        slots = (slots + (contextual + 1) * torch.arange(batch, device=hidden.device)[:, None]).flatten()
        room = batch * (contextual + 1)
        sums = hidden.new_zeros(room, size).index_add_(0, slots, hidden.reshape(-1, size))
        sums = sums.view(batch, contextual + 1, size)[:, :-1]
        count = hidden.new_zeros(room).index_add_(0, slots, hidden.new_ones(batch * tokens))
        count = count.view(batch, contextual + 1)[:, :-1]
        target = hidden.gather(1, targets[..., None].expand(-1, -1, size))
        if merge == "mean":
            return (target + sums) / (1 + count)[..., None]
        return target + sums / count.clamp(min=1)[..., None]

    return run


def visionzip_plain(
    hidden: Tensor, metric: Tensor, scores: Tensor, dominant: int, contextual: int, merge: str = "reference"
) -> Callable[[], tuple[Tensor, Tensor]]:
    def run() -> tuple[Tensor, Tensor]:
        kept = scores.topk(dominant, dim=1).indices.sort(1).values
        rows = hidden.gather(1, kept[..., None].expand(-1, -1, hidden.shape[2]))
        return torch.cat([rows, merge_plain(hidden, metric, kept, contextual, merge)()], 1), kept

    return run


# ---- calls to test, to refuse and to time ----

# B, N, D, M, kept, contextual
_SIZES = [
    (1, 1, 8, 16, 0, 1),
    (2, 17, 64, 16, 5, 3),
    (3, 40, 7, 33, 0, 40),
    (2, 64, 96, 64, 54, 10),
    (1, 12, 32, 16, 12, 0),
    (2, 9, 16, 16, 4, 0),
    (0, 9, 16, 16, 4, 2),
    (2, 0, 16, 16, 0, 0),
    (1, 577, 40, 80, 27, 5),
    (2, 300, 0, 16, 20, 7),
    (2, 368, 48, 80, 300, 34),  # this and the next but one compile to the same kernel as a real shape
    (2, 64, 48, 32, 6, 16),
    (2, 48, 528, 20, 10, 11),
    (2, 48, 2064, 20, 10, 11),
    (1, 150, 264, 128, 10, 70),
]


def _chosen(batch: int, tokens: int, kept: int, device: str) -> Tensor:
    return torch.rand(batch, tokens, device=device).argsort(1)[:, :kept].sort(1).values


def top_samples(device: str, dtype: torch.dtype) -> Samples:
    for batch, tokens, *_, kept, _ in _SIZES:
        yield torch.randn(batch, tokens, device=device, dtype=dtype), kept
    yield torch.zeros(2, 33, device=device, dtype=dtype), 7  # ties
    yield torch.tensor([[0.0, -0.0, 1.0, -0.0, 0.0]], device=device, dtype=dtype), 3
    yield torch.randint(-2, 3, (3, 1000), device=device).to(dtype), 590  # ties in each part of a row
    yield torch.tensor([[-torch.inf, torch.inf, -torch.inf, 0.0]], device=device, dtype=dtype), 3
    yield torch.rand(1, 4500, device=device).to(dtype), 2000
    yield torch.rand(2, 800, device=device).to(dtype), 300


def merge_samples(device: str, dtype: torch.dtype) -> Samples:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    for index, (batch, tokens, hidden, size, kept, contextual) in enumerate(_SIZES):
        metric, merge = randn(batch, tokens, size), ((), ("mean",))[index % 2]
        yield randn(batch, tokens, hidden), metric, _chosen(batch, tokens, kept, device), contextual, *merge
    same = metric[:, :5].repeat(1, 30, 1)  # each target occurs several times, so there are ties
    yield randn(1, 150, 8), same, _chosen(1, 150, 10, device), 30, "mean"
    zeros = metric.clone()
    zeros[:, ::3] = 0
    yield randn(1, 150, 64), zeros, _chosen(1, 150, 10, device), 20


def visionzip_samples(device: str, dtype: torch.dtype) -> Samples:
    for hidden, metric, kept, contextual, *merge in merge_samples(device, dtype):
        scores = torch.randn(hidden.shape[:2], device=device).to(dtype)
        yield hidden, metric, scores, kept.shape[1], contextual, *merge
    yield hidden, metric, scores.float(), kept.shape[1], contextual  # as the attention ops give them


def rows_samples(device: str, dtype: torch.dtype) -> Samples:
    for index, (hidden, metric, kept, contextual, *_) in enumerate(merge_samples(device, dtype)):
        slots = definition.merge_slots.op.reference(metric, kept, contextual)
        kept = kept[:, :0] if index % 3 == 2 else kept
        read = torch.cat([(slots >= contextual).nonzero(), (slots < 0).nonzero()])
        for image, token in read[:1].tolist() if hidden.numel() else []:
            hidden[image, token, 0] = torch.inf  # it joins one row at most; 0 times it is NaN
        yield hidden, kept, slots, contextual, MERGES[index % 2]
    one = torch.full_like(slots, contextual)  # everything joins the first target, and nothing the others
    one[:, :contextual] = torch.arange(contextual, device=device)
    yield hidden, kept[:, :0], one, contextual


# (label, B, N, D, M, kept, contextual): the crops of LLaVA-NeXT without their CLS tokens, an image of SigLIP, which has
# heads of 72 channels, and an image in Qwen2.5-VL
_WORKLOADS = [
    ("5x576x1024", 5, 576, 1024, 64, 26, 5),
    ("1x729x1152", 1, 729, 1152, 72, 54, 10),
    ("1x1024x3584", 1, 1024, 3584, 80, 460, 51),
]


def top_workloads(device: str, dtype: torch.dtype) -> Workloads:
    for _, batch, tokens, *_, kept, _ in _WORKLOADS:
        yield f"{batch}x{tokens}", (torch.rand(batch, tokens, device=device), kept)


def merge_workloads(device: str, dtype: torch.dtype) -> Workloads:
    for label, batch, tokens, size, metric_size, kept, contextual in _WORKLOADS:
        hidden, metric = (torch.randn(batch, tokens, s, device=device, dtype=dtype) for s in (size, metric_size))
        yield label, (hidden, metric, _chosen(batch, tokens, kept, device), contextual)


# ---- the bytes of calls ----


def top_bytes(scores: Tensor, k: int) -> int:
    """Count scores in, positions out."""
    return scores.nbytes + 8 * scores.shape[0] * k


def slots_bytes(metric: Tensor, kept: Tensor, contextual: int) -> int:
    """Count kept and metric in, slots out; the metric of kept tokens is not read."""
    compared = metric.shape[0] * (metric.shape[1] - kept.shape[1]) if contextual else 0
    return row_bytes(metric) * compared + kept.nbytes + 4 * metric.shape[0] * metric.shape[1]


def rows_bytes(hidden: Tensor, kept: Tensor, slots: Tensor, contextual: int, *_: Any) -> int:
    """Count tokens with a slot in, kept and contextual rows out."""
    read = kept.numel() + int((slots >= 0).sum())
    return row_bytes(hidden) * (read + kept.numel() + kept.shape[0] * contextual) + kept.nbytes + slots.nbytes


def rows_backward_bytes(grad_tokens: Tensor, slots: Tensor, *_: Any) -> int:
    """Count each row once in, and out once for every token merged into it."""
    return grad_tokens.nbytes + slots.nbytes + slots.numel() * row_bytes(grad_tokens)


def merge_bytes(hidden: Tensor, metric: Tensor, kept: Tensor, contextual: int, *_: Any) -> int:
    """Add the slots that `merge_rows` reads to `merge_slots`."""
    batch, tokens = hidden.shape[:2]
    read = tokens - kept.shape[1] if contextual else 0
    return batch * (row_bytes(hidden) * (read + contextual) + 4 * tokens) + slots_bytes(metric, kept, contextual)


def visionzip_bytes(hidden: Tensor, metric: Tensor, scores: Tensor, dominant: int, contextual: int, *_: Any) -> int:
    """Add up `top_tokens`, whose choice both others read, `merge_slots` and `merge_rows`."""
    batch, tokens = hidden.shape[:2]
    kept = scores.new_empty(batch, dominant, dtype=torch.int64, device="meta")
    read = tokens if contextual else dominant
    merged = batch * (row_bytes(hidden) * (read + dominant + contextual) + 4 * tokens) + kept.nbytes
    return top_bytes(scores, dominant) + slots_bytes(metric, kept, contextual) + merged


# ---- the cases of each op ----

_HIDDEN, _METRIC, _SCORES = torch.ones(2, 5, 8), torch.ones(2, 5, 4), torch.ones(2, 5)
_KEPT, _SLOTS = torch.tensor([[0, 3], [1, 2]]), torch.zeros(2, 5, dtype=torch.int32)

_BAD_KEPT = (
    ("kept", _KEPT.int(), TypeError, "kept must be int64, got torch.int32"),
    ("kept", _KEPT[:1], ValueError, r"kept must have shape \(2, k\) with k <= 5, got \(1, 2\)"),
    *(
        ("kept", kept, ValueError, "kept must be ascending within 0 and 4")
        for kept in (_KEPT.flip(1), _KEPT[:, [0, 0]], _KEPT + 2, _KEPT - 1)
    ),
)
_LEFT = "contextual must be within 0 and 3, the tokens that are left of 5 when 2 are kept, got 4"
_BAD_CONTEXTUAL = (
    ("contextual", 4, ValueError, _LEFT),
    ("contextual", -1, ValueError, "contextual must be within 0 and 3"),
    ("contextual", True, TypeError, "contextual must be an int, got bool"),
)
_BAD_MERGE = ("merge", "sum", ValueError, "merge must be one of 'reference', 'mean', got 'sum'")

top_tokens = Cases(
    samples=top_samples,
    good_call={"scores": _SCORES, "k": 1},
    bad_calls=(
        ("scores", _SCORES[0], ValueError, r"scores must have shape \(B, N\), got \(5,\)"),
        ("scores", _SCORES * torch.nan, ValueError, "scores must not be NaN"),
        ("k", 6, ValueError, "k must be within 0 and 5, the tokens of a row, got 6"),
        ("k", -1, ValueError, "k must be within 0 and 5, the tokens of a row, got -1"),
        ("k", 1.0, TypeError, "k must be an int, got float"),
    ),
    workloads=top_workloads,
    bytes=top_bytes,
    peers={"torch.topk": topk},
)

merge_tokens = Cases(
    samples=merge_samples,
    good_call={"hidden": _HIDDEN, "metric": _METRIC, "kept": _KEPT, "contextual": 1},
    bad_calls=(
        ("metric", _METRIC[:, :4], ValueError, r"metric must have the first two sizes of hidden, \(2, 5\)"),
        *(*_BAD_KEPT, *_BAD_CONTEXTUAL, _BAD_MERGE),
    ),
    workloads=merge_workloads,
    bytes=merge_bytes,
    flops=lambda hidden, metric, kept, contextual, *_: hidden.numel() + 2 * metric.numel() * contextual,
    peers={"index_add_": merge_plain},
    launches=2,
)

visionzip = derived(
    merge_tokens,
    lambda hidden, metric, kept, contextual: (
        *(hidden, metric, torch.rand(hidden.shape[:2], device=hidden.device)),
        *(kept.shape[1], contextual),
    ),
    samples=visionzip_samples,
    good_call={"hidden": _HIDDEN, "metric": _METRIC, "scores": _SCORES, "dominant": 2, "contextual": 1},
    bad_calls=(
        ("scores", _SCORES[:, :4], ValueError, "scores must have the first two sizes of hidden"),
        ("scores", _SCORES * torch.nan, ValueError, "scores must not be NaN"),
        ("dominant", 6, ValueError, "dominant must be within 0 and 5, the tokens of a row, got 6"),
        *(*_BAD_CONTEXTUAL, _BAD_MERGE),
    ),
    bytes=visionzip_bytes,
    flops=lambda hidden, metric, scores, dominant, contextual, *_: hidden.numel() + 2 * metric.numel() * contextual,
    peers={"topk and index_add_": visionzip_plain},
    launches=3,
)

merge_slots = derived(
    merge_tokens,
    lambda hidden, metric, kept, contextual, *_: (metric, kept, contextual),
    good_call={"metric": _METRIC, "kept": _KEPT, "contextual": 1},
    bad_calls=(
        ("metric", _METRIC[0], ValueError, r"metric must have shape \(B, N, M\), got \(5, 4\)"),
        *(*_BAD_KEPT, *_BAD_CONTEXTUAL),
    ),
    bytes=slots_bytes,
    flops=lambda metric, kept, contextual: 2 * metric.numel() * contextual,
    requested=4.8,  # every block of tokens reads all targets
)

merge_rows = derived(
    merge_tokens,
    lambda hidden, metric, kept, contextual: (
        *(hidden, kept, definition.merge_slots.op.reference(metric, kept, contextual)),
        contextual,
    ),
    samples=rows_samples,
    good_call={"hidden": _HIDDEN, "kept": _KEPT, "slots": _SLOTS, "contextual": 1},
    bad_calls=(
        ("slots", _SLOTS.long(), TypeError, "slots must be int32, got torch.int64"),
        ("slots", _SLOTS[0], ValueError, r"slots must have shape \(B, N\), got \(5,\)"),
        ("slots", _SLOTS[:, :4], ValueError, r"slots must have the first two sizes of hidden, \(2, 5\)"),
        *(*_BAD_CONTEXTUAL, _BAD_MERGE),
    ),
    bytes=rows_bytes,
    flops=lambda hidden, *_: hidden.numel(),
)

merge_rows_backward = derived(
    merge_rows,
    lambda hidden, kept, slots, contextual, *merge: (
        hidden.new_empty(hidden.shape[0], kept.shape[1] + contextual, hidden.shape[2]).normal_(),
        *(slots, contextual, *merge),
    ),
    good_call={"grad_tokens": _HIDDEN[:, :3], "slots": _SLOTS, "contextual": 1},
    bad_calls=(
        ("grad_tokens", _HIDDEN[:1], ValueError, r"grad_tokens must have shape \(2, k \+ C, D\) with k \+ C <= 5"),
        ("contextual", 4, ValueError, "contextual must be within 0 and 3, the rows of grad_tokens, got 4"),
        _BAD_MERGE,
    ),
    bytes=rows_backward_bytes,
    flops=lambda grad_tokens, *_: grad_tokens.numel(),
    requested=3.0,  # a row is read for every token merged into it, and each block counts the slots
)
