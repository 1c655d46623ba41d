"""Token reduction by VisionZip: the best tokens are kept, and the others are merged into a few by similarity.

Upstream runs about forty small operations per image. Here a whole batch takes three passes: which tokens are kept,
where each other token goes, and the merge of the rows. The second gives one number per token, its slot, so that one
choice serves several tensors (DeepStack's levels) and the backward moves gradients without a search.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfast import checks
from vlmfast.functions import op

MERGES = ("reference", "mean")


def _sums(rows: Tensor, slots: Tensor, contextual: int) -> Tensor:
    """Add up the rows of the tokens assigned to each contextual token: (B, C, D). Other rows are ignored."""
    batch, _, size = rows.shape
    assigned = (slots >= contextual) & (slots < 2 * contextual)
    owner = torch.where(assigned, slots - contextual, contextual).long()
    owner = owner + torch.arange(batch, device=slots.device)[:, None] * (contextual + 1)
    sums = rows.new_zeros(batch * (contextual + 1), size).index_add(0, owner.flatten(), rows.flatten(0, 1))
    return sums.view(batch, contextual + 1, size)[:, :contextual]


def _counts(slots: Tensor, contextual: int, dtype: torch.dtype) -> Tensor:
    """Count the tokens assigned to each contextual token: (B, C, 1)."""
    return _sums(torch.ones_like(slots, dtype=dtype)[..., None], slots, contextual)


# ---- what a call must look like ----


def _check_choice(kept: Tensor, contextual: int, name: str, rows: Tensor, merge: str = MERGES[0]) -> None:
    """Raise unless the tokens of ``rows`` can be divided so."""
    checks.tensor("kept", kept, dtypes=(torch.int64,))
    batch, tokens = rows.shape[:2]
    if kept.dim() != 2 or kept.shape[0] != batch or kept.shape[1] > tokens:
        raise ValueError(f"kept must have shape ({batch}, k) with k <= {tokens}, got {tuple(kept.shape)}")
    checks.same_device("kept", kept, name, rows)
    if checks.on_host(kept) and kept.numel():
        rises = bool((kept[:, 1:] > kept[:, :-1]).all())
        if not rises or int(kept[:, 0].min()) < 0 or int(kept[:, -1].max()) >= tokens:
            raise ValueError(f"kept must be ascending within 0 and {tokens - 1} in each row")
    _check_contextual(contextual, tokens, kept.shape[1], merge)


def _check_contextual(contextual: int, tokens: int, kept: int, merge: str) -> None:
    checks.within(
        "contextual", contextual, tokens - kept, "the tokens that are left of {} when {} are kept", tokens, kept
    )
    checks.one_of("merge", merge, MERGES)


def _check_top_tokens(scores: Tensor, k: int) -> None:
    checks.tensor("scores", scores, "BN")
    checks.within("k", k, scores.shape[1], "the tokens of a row")
    if checks.on_host(scores) and bool(scores.isnan().any()):
        raise ValueError("scores must not be NaN, got one that is")


def _check_merge_slots(metric: Tensor, kept: Tensor, contextual: int) -> None:
    checks.tensor("metric", metric, "BNM")
    _check_choice(kept, contextual, "metric", metric)


def _check_merge_rows(hidden: Tensor, kept: Tensor, slots: Tensor, contextual: int, merge: str = "reference") -> None:
    checks.tensor("hidden", hidden, "BND")
    checks.tensor("slots", slots, "BN", (torch.int32,))
    checks.same_tokens("slots", slots, "hidden", hidden)
    _check_choice(kept, contextual, "hidden", hidden, merge)


def _check_merge_rows_backward(grad_tokens: Tensor, slots: Tensor, contextual: int, merge: str = "reference") -> None:
    checks.tensor("grad_tokens", grad_tokens, "BND")
    checks.tensor("slots", slots, "BN", (torch.int32,))
    batch, tokens = slots.shape
    if grad_tokens.shape[0] != batch or grad_tokens.shape[1] > tokens:
        raise ValueError(
            f"grad_tokens must have shape ({batch}, k + C, D) with k + C <= {tokens}, got {tuple(grad_tokens.shape)}"
        )
    checks.same_device("slots", slots, "grad_tokens", grad_tokens)
    checks.within("contextual", contextual, grad_tokens.shape[1], "the rows of grad_tokens")
    checks.one_of("merge", merge, MERGES)


def _check_merge_tokens(
    hidden: Tensor, metric: Tensor, kept: Tensor, contextual: int, merge: str = "reference"
) -> None:
    checks.tensor("hidden", hidden, "BND")
    checks.tensor("metric", metric, "BNM")
    checks.same_tokens("metric", metric, "hidden", hidden)
    _check_choice(kept, contextual, "hidden", hidden, merge)


def _check_visionzip(
    hidden: Tensor, metric: Tensor, scores: Tensor, dominant: int, contextual: int, merge: str = "reference"
) -> None:
    checks.tensor("hidden", hidden, "BND")
    checks.tensor("metric", metric, "BNM")
    checks.same_tokens("metric", metric, "hidden", hidden)
    _check_top_tokens(scores, 0)
    checks.same_tokens("scores", scores, "hidden", hidden)
    checks.within("dominant", dominant, hidden.shape[1], "the tokens of a row")
    _check_contextual(contextual, hidden.shape[1], dominant, merge)


# ---- gradients ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, slots, ctx.contextual, ctx.merge = inputs
    ctx.save_for_backward(slots)


def _backward(ctx: Any, grad_tokens: Tensor) -> tuple[Tensor]:
    (slots,) = ctx.saved_tensors
    return (merge_rows_backward(grad_tokens, slots, ctx.contextual, ctx.merge),)


# ---- the definitions ----


@op(check=_check_top_tokens, exact=True, detached=True)
def top_tokens(scores: Tensor, k: int) -> Tensor:
    """Find the ``k`` tokens with the largest scores of each row, in the order of their positions.

    Of equal scores the lower position wins, so that the choice is the same on every device.

    Args:
        scores: (B, N) float32, float16 or bfloat16; any strides.
        k: how many, 0 to N.

    Returns:
        (B, k) int64, ascending.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for another shape, a ``k`` out of range, or on a CPU a
            score that is NaN; on a GPU that trips a device-side assertion.

    Source:
        ``topk`` and the boolean mask made of it, in VisionZip's CLIP tower.
    """
    checks.expect(~scores.isnan().any(), "scores must not be NaN")
    best = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :k]
    return best.sort(1).values


@op(check=_check_merge_slots, exact=True, detached=True)
def merge_slots(metric: Tensor, kept: Tensor, contextual: int) -> Tensor:
    """Decide where each token goes: it is kept, it becomes a contextual token, or it is merged into one.

    Of the R = N - k tokens that are not kept, in the order of their positions, every ``R // contextual``-th, from the
    first one on, becomes the target of a contextual token. Each other one goes to the target whose ``metric`` has the
    largest cosine with its own, of equal ones to the first. A metric of zeros has a cosine of 0 with all.

    Args:
        metric: (B, N, M) float32, float16 or bfloat16; any strides.
        kept: (B, k) int64, ascending, as `top_tokens` gives it.
        contextual: C, how many tokens the others are merged into, 0 to N - k.

    Returns:
        (B, N) int32, for each token its slot: ``r - k`` for the r-th kept one, ``c`` for the target of contextual token
        c, ``C + c`` for a token merged into it, and ``-k - 1`` for all that are not kept where C is 0.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes or devices that do not fit, more contextual
            tokens than there are left, or on a CPU a ``kept`` that is not ascending within 0 and N - 1; on a GPU that
            is not checked.

    Source:
        The targets, the similarity and its ``argmax`` in VisionZip's CLIP tower, where a key of zeros gives NaN.
    """
    batch, tokens, _ = metric.shape
    kept_count = kept.shape[1]
    left = tokens - kept_count
    is_kept = torch.zeros(batch, tokens, dtype=torch.uint8, device=metric.device).scatter(1, kept, 1)
    others = is_kept.argsort(dim=1, stable=True)[:, :left]
    if contextual:
        step = left // contextual
        # In float64, then rounded: in float32 a matmul may give equal targets cosines that differ in the last bit.
        wide = metric.to(torch.float32 if metric.device.type == "mps" else torch.float64)
        length = wide.norm(dim=2, keepdim=True)
        unit = torch.where(length == 0, 0.0, wide / length).gather(1, others[..., None].expand(-1, -1, wide.shape[2]))
        target = torch.arange(contextual, device=metric.device)
        similarity = (unit @ unit[:, target * step].transpose(1, 2)).float()
        slot = similarity.masked_fill(similarity.isnan(), -torch.inf).argmax(2) + contextual
        slot[:, target * step] = target
    else:
        slot = torch.full_like(others, -kept_count - 1)
    ranks = torch.arange(-kept_count, 0, device=metric.device).expand(batch, -1)
    return torch.empty_like(is_kept, dtype=torch.int64).scatter(1, kept, ranks).scatter(1, others, slot).int()


@op(check=_check_merge_rows, gradients=(_setup_context, _backward))
def merge_rows(hidden: Tensor, kept: Tensor, slots: Tensor, contextual: int, merge: str = "reference") -> Tensor:
    """Move and merge rows as `merge_slots` has decided: first the kept rows, then the contextual ones.

    Sums are accumulated in float32 and rounded once.

    Args:
        hidden: (B, N, D) float32, float16 or bfloat16; any strides.
        kept: (B, k) int64, as given to `merge_slots`, or (B, 0) for the contextual rows alone.
        slots: (B, N) int32, the result of `merge_slots`.
        contextual: C, as given to `merge_slots`.
        merge: "reference" (the target plus the mean of the tokens merged into it) or "mean" (the mean of them all).

    Returns:
        (B, k + C, D) contiguous, of the dtype of ``hidden``.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes, devices or a ``merge`` that do not fit.

    Source:
        ``target_hidden + aggregated_hidden`` in VisionZip's CLIP tower.
    """
    batch, tokens, size = hidden.shape
    wide = torch.promote_types(hidden.dtype, torch.float32)
    count = _counts(slots, contextual, wide)
    spare = torch.where((slots >= 0) & (slots < contextual), slots, contextual).long()
    position = torch.arange(tokens, device=hidden.device).expand(batch, -1)
    target = position.new_zeros(batch, contextual + 1).scatter(1, spare, position)[:, :contextual]
    taken = hidden.gather(1, torch.cat([kept, target], 1)[..., None].expand(-1, -1, size))
    first, added = taken[:, kept.shape[1] :].to(wide), _sums(hidden.to(wide), slots, contextual)
    merged = (first + added) / (1 + count) if merge == "mean" else first + added / count.clamp(min=1)
    return torch.cat([taken[:, : kept.shape[1]], merged.to(hidden.dtype)], 1)


@op(check=_check_merge_rows_backward)
def merge_rows_backward(grad_tokens: Tensor, slots: Tensor, contextual: int, merge: str = "reference") -> Tensor:
    """Give each token its share of the gradient of the row that it went to: the gradient of `merge_rows`.

    Args:
        grad_tokens: (B, k + C, D) float32, float16 or bfloat16; any strides. C rows, where `merge_rows` was given no
            kept ones.
        slots: (B, N) int32, as in the forward.
        contextual: C, as in the forward.
        merge: as in the forward.

    Returns:
        (B, N, D) contiguous; zero for tokens that were dropped.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes, devices or a ``merge`` that do not fit.

    Source:
        The derivative of `merge_rows`.
    """
    batch, rows, hidden = grad_tokens.shape
    kept_count = rows - contextual
    wide = torch.promote_types(grad_tokens.dtype, torch.float32)
    grad = grad_tokens.to(wide)
    count = _counts(slots, contextual, wide)
    ours = grad[:, kept_count:]
    if merge == "mean":
        ours = shared = ours / (1 + count)
    else:
        shared = ours / count.clamp(min=1)
    table = torch.cat([grad[:, :kept_count], ours, shared, grad.new_zeros(batch, 1, hidden)], 1)
    index = slots.long() + kept_count
    index = torch.where(index < 0, rows + contextual, index)
    return table.gather(1, index[..., None].expand(-1, -1, hidden)).to(grad_tokens.dtype)


def _merge_tokens(hidden: Tensor, metric: Tensor, kept: Tensor, contextual: int, merge: str) -> Tensor:
    return merge_rows(hidden, kept[:, :0], merge_slots(metric, kept, contextual), contextual, merge)


@op(check=_check_merge_tokens, compose=_merge_tokens, parts=("merge_slots", "merge_rows"))
def merge_tokens(hidden: Tensor, metric: Tensor, kept: Tensor, contextual: int, merge: str = "reference") -> Tensor:
    """Merge the tokens that are not kept into ``contextual`` ones, by the similarity of their metric (VisionZip).

    Of the R = N - k others, every ``R // contextual``-th, from the first one on, is a target. Each of the rest joins
    the target whose metric has the largest cosine with its own; of equal ones the first.

    Args:
        hidden: (B, N, D) float32, float16 or bfloat16; any strides.
        metric: (B, N, M) float32, float16 or bfloat16: the keys of the layer, averaged over the heads. A metric of
            zeros, which upstream makes NaN of, joins the first target.
        kept: (B, k) int64, ascending: which rows of ``hidden`` are kept elsewhere, such as `top_tokens` gives.
        contextual: C, 0 to N - k.
        merge: "reference", as published: the target plus the mean of what joins it, about twice the norm of a token; or
            "mean": the mean of both.

    Returns:
        (B, contextual, D) contiguous, in the order of the targets. Gradients flow to ``hidden`` alone.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes, devices or a ``merge`` that do not fit, more
            contextual tokens than there are left, or on a CPU a ``kept`` that is not ascending within 0 and N - 1.

    Source:
        The contextual tokens of VisionZip's CLIP tower.
    """
    slots = merge_slots.op.reference(metric.detach(), kept, contextual)
    return merge_rows.op.reference(hidden, kept[:, :0], slots, contextual, merge)  # type: ignore[no-any-return]


def _visionzip(
    hidden: Tensor, metric: Tensor, scores: Tensor, dominant: int, contextual: int, merge: str
) -> tuple[Tensor, Tensor]:
    kept = top_tokens(scores, dominant)
    return merge_rows(hidden, kept, merge_slots(metric, kept, contextual), contextual, merge), kept


@op(check=_check_visionzip, compose=_visionzip, parts=("top_tokens", "merge_slots", "merge_rows"))
def visionzip(
    hidden: Tensor, metric: Tensor, scores: Tensor, dominant: int, contextual: int, merge: str = "reference"
) -> tuple[Tensor, Tensor]:
    """Keep the ``dominant`` tokens with the largest scores and merge the others into ``contextual`` ones (VisionZip).

    `top_tokens`, then `merge_tokens` of the others, for a whole batch in three launches.

    Args:
        hidden: (B, N, D) float32, float16 or bfloat16; any strides. N counts patches, without a CLS token.
        metric: (B, N, M) float32, float16 or bfloat16: the keys of the layer, averaged over the heads.
        scores: (B, N) float32, float16 or bfloat16, such as `cls_attention` or `received_attention` give.
        dominant: k, how many tokens are kept.
        contextual: C, how many tokens the others are merged into; together with ``dominant`` at most N.
        merge: "reference" or "mean", as in `merge_tokens`.

    Returns:
        ``(tokens, kept)``: (B, dominant + contextual, D), the kept tokens in the order of their positions and then the
        contextual ones in that of their targets, and (B, dominant) int64, where the kept ones stood. Gradients flow
        from ``tokens`` to ``hidden`` alone.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes, devices or a ``merge`` that do not fit, more
            tokens than N, or on a CPU a score that is NaN; on a GPU that trips a device-side assertion.

    Source:
        VisionZip's CLIP tower, for the tokens behind the CLS token.
    """
    kept = top_tokens.op.reference(scores.detach(), dominant)
    slots = merge_slots.op.reference(metric.detach(), kept, contextual)
    return merge_rows.op.reference(hidden, kept, slots, contextual, merge), kept
