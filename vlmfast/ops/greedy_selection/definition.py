"""Tokens chosen one after the other, each for what those before it have left open.

As PyTorch code a choice of k tokens is a loop of some five small operations a step, which cost the host more than the
tokens that are left out save. Here a choice is one launch for a whole batch, or two where the tokens have to be
compared first. What is chosen is a set, in the order of positions; choosing k + 1 adds one token to those of k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfast import checks
from vlmfast.functions import op

SAME = 2.0**-20  # a smaller distance is what float32 makes of a token and its double: it counts as 0
NOTHING_NEW = 2.0**-14  # a smaller share of a token's square is what float32 makes of nothing


def _cosines(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine of each two tokens, (B, N, N) float32, and which tokens have a direction, (B, N)."""
    # float64, then rounded: a matmul may give equal rows cosines that differ in the last bit
    wide = features.to(torch.float32 if features.device.type == "mps" else torch.float64)
    square = wide.square().sum(2, keepdim=True)
    usable = (square.float() > 0) & square.float().isfinite()
    unit = torch.where(usable, wide / square.sqrt(), 0.0)
    return (unit @ unit.transpose(1, 2)).float(), usable[..., 0]


def _distances(features: Tensor) -> Tensor:
    """Return 1 less the cosine of each two tokens, (B, N, N) float32."""
    distance = 1 - _cosines(features)[0]
    return torch.where(distance < SAME, 0.0, distance)


def _positions(chosen: Tensor, k: int) -> Tensor:
    """List the k positions of each row of (B, N) that are true, ascending."""
    return torch.argsort(chosen.to(torch.uint8), dim=1, descending=True, stable=True)[:, :k]


def _weights(name: str, value: Tensor | None) -> Tensor | None:
    """Return weights in float32 at least, or none; what they must be is seen on any device."""
    if value is not None:
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        checks.expect(((value >= 0) & value.isfinite()).all(), f"{name} must be finite and not negative")
    return value


# ---- what a call must look like ----


def _check_weights(name: str, value: Tensor | None) -> None:
    if value is not None and checks.on_host(value) and not bool(((value >= 0) & value.isfinite()).all()):
        raise ValueError(f"{name} must be finite and not negative, got one that is not")


def _check_farthest(features: Tensor, k: int, quality: Tensor | None = None, first_by_quality: bool = True) -> None:
    checks.tensor("features", features, "BND")
    checks.within("k", k, features.shape[1], "the tokens of a row")
    if quality is not None:
        checks.tensor("quality", quality, "BN")
        checks.same_tokens("quality", quality, "features", features)
        _check_weights("quality", quality)


def _check_dpp_map(features: Tensor, k: int, relevance: Tensor | None = None) -> None:
    checks.tensor("features", features, "BND")
    checks.within("k", k, features.shape[1], "the tokens of a row")
    if relevance is not None:
        checks.tensor("relevance", relevance, "BN")
        checks.same_tokens("relevance", relevance, "features", features)
        _check_weights("relevance", relevance)


def _check_coverage(
    similarity: Tensor, k: int, row_weights: Tensor | None = None, quality: Tensor | None = None
) -> None:
    checks.tensor("similarity", similarity, "BNR")
    batch, tokens, rows = similarity.shape
    checks.within("k", k, tokens, "the tokens of a row")
    if row_weights is not None:
        checks.tensor("row_weights", row_weights, "BR")
        if row_weights.shape != (batch, rows):
            raise ValueError(f"row_weights must have shape ({batch}, {rows}), got {tuple(row_weights.shape)}")
        checks.same_device("row_weights", row_weights, "similarity", similarity)
        _check_weights("row_weights", row_weights)
    if quality is not None:
        checks.tensor("quality", quality, "BN")
        checks.same_tokens("quality", quality, "similarity", similarity)
        _check_weights("quality", quality)


# ---- the definitions ----


@op(check=_check_farthest, exact=True, detached=True)
def farthest(features: Tensor, k: int, quality: Tensor | None = None, first_by_quality: bool = True) -> Tensor:
    """Choose ``k`` tokens that are unlike each other: each time the one whose nearest chosen token is farthest.

    The distance of two tokens is 1 less the cosine of their features. The first token is the one whose nearest other
    one is farthest. With a ``quality`` the distances of a token to its nearest are multiplied by it. Of equal ones the
    lower position wins. Sums are in float32, whatever the dtype; a distance below 2 ** -20 is one of their roundings
    and counts as 0. Features of zeros, and those that are not finite, have a cosine of 0 with all.

    Args:
        features: (B, N, D) float32, float16 or bfloat16; any strides. Their lengths are of no account.
        k: how many, 0 to N.
        quality: (B, N) float32, float16 or bfloat16, what each token is worth, 0 or more; all the same if it is None.
        first_by_quality: whether the quality counts for the first token too.

    Returns:
        (B, k) int64, ascending. Those of k are among those of k + 1.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes or devices that do not fit, a ``k`` out of
            range, or on a CPU a quality that is negative or not finite; on a GPU that trips a device-side assertion.

    Source:
        The selection of DivPrune; with a quality that of Cen-Prune, and of FlashVID's attention and diversity.
    """
    batch, tokens, _ = features.shape
    weight = _weights("quality", quality)
    distance = _distances(features)
    chosen = torch.zeros(batch, tokens, dtype=torch.bool, device=features.device)
    if k == 0:
        return _positions(chosen, k)
    itself = torch.eye(tokens, dtype=torch.bool, device=features.device)
    nearest = distance.masked_fill(itself, 2.0).amin(2)  # 2: no distance is larger
    for step in range(k):
        worth = nearest if weight is None or (step == 0 and not first_by_quality) else nearest * weight
        best = worth.masked_fill(chosen, -1.0).argmax(1, keepdim=True)
        chosen = chosen.scatter(1, best, torch.ones_like(best, dtype=torch.bool))
        row = distance.gather(1, best[..., None].expand(-1, -1, tokens))[:, 0]
        nearest = torch.minimum(nearest, row) if step else row
    return _positions(chosen, k)


@op(check=_check_coverage, exact=True, detached=True)
def coverage(similarity: Tensor, k: int, row_weights: Tensor | None = None, quality: Tensor | None = None) -> Tensor:
    """Choose ``k`` tokens that cover all rows: each time the one that adds most to what those before it cover.

    A row is covered as well as the chosen token that is most similar to it covers it, and at least by 0. What a token
    adds is the sum over all rows, times their weights, of how much better they would be covered; and that times the
    quality of the token. Of equal ones the lower position wins. Sums are in float32, whatever the dtype. A similarity
    that is not finite covers nothing.

    Args:
        similarity: (B, N, R) float32, float16 or bfloat16; any strides. How well each token covers each row: of tokens
            that stand for each other, the cosines of each two of them.
        k: how many, 0 to N.
        row_weights: (B, R) float32, float16 or bfloat16, how much each row counts, 0 or more; all the same if None.
        quality: (B, N) float32, float16 or bfloat16, what each token is worth, 0 or more; all the same if it is None.

    Returns:
        (B, k) int64, ascending. Those of k are among those of k + 1.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes or devices that do not fit, a ``k`` out of
            range, or on a CPU a weight or quality that is negative or not finite; on a GPU that trips a device-side
            assertion.

    Source:
        The greedy rule of facility location, which SCOPE uses with the attention of tokens as their quality, EADP with
        the importance of rows, and MMTok with rows of text.
    """
    batch, tokens, rows = similarity.shape
    wide = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    wide = wide.where(wide.isfinite(), 0.0)
    weight, importance = _weights("quality", quality), _weights("row_weights", row_weights)
    covered = wide.new_zeros(batch, 1, rows)
    chosen = torch.zeros(batch, tokens, dtype=torch.bool, device=similarity.device)
    for _ in range(k):
        gains = (wide - covered).clamp(min=0)
        gain = (gains if importance is None else gains * importance[:, None]).sum(2)
        gain = gain if weight is None else gain * weight
        best = gain.masked_fill(chosen, -1.0).argmax(1, keepdim=True)
        chosen = chosen.scatter(1, best, torch.ones_like(best, dtype=torch.bool))
        covered = torch.maximum(covered, wide.gather(1, best[..., None].expand(-1, -1, rows)))
    return _positions(chosen, k)


@op(check=_check_dpp_map, exact=True, detached=True)
def dpp_map(features: Tensor, k: int, relevance: Tensor | None = None) -> Tensor:
    """Choose ``k`` tokens that are relevant and unlike each other: those that a determinantal point process favours.

    Its kernel is the cosine of each two tokens times the relevance of both. Each time the token is chosen that makes
    the determinant of the chosen ones largest: that whose relevance, squared, times what of its square those before it
    do not add up to, is most. That is found row by row of the kernel, of which only the rows of chosen tokens are
    needed. Of equal ones the lower position wins. Sums are in float32, whatever the dtype; less than 2 ** -14 of a
    token is one of their roundings and counts as nothing. Where nothing new is left, as with more tokens than
    dimensions, the most relevant ones follow. Features of zeros, and those that are not finite, have nothing new.

    Args:
        features: (B, N, D) float32, float16 or bfloat16; any strides. Their lengths are of no account.
        k: how many, 0 to N.
        relevance: (B, N) float32, float16 or bfloat16, what each token is worth, 0 or more; all the same if it is None.

    Returns:
        (B, k) int64, ascending. Those of k are among those of k + 1.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes or devices that do not fit, a ``k`` out of
            range, or on a CPU a relevance that is negative or not finite; on a GPU that trips a device-side assertion.

    Source:
        The fast greedy inference of Chen, Zhang and Zhou (NeurIPS 2018), as CDPruner uses it. That chooses a token
        twice, or gives NaN, where nothing new is left.
    """
    cosine, usable = _cosines(features)
    left = usable.to(torch.float32 if features.device.type == "mps" else torch.float64)
    weight = _weights("relevance", relevance)
    weight = torch.ones_like(left) if weight is None else weight.to(left.dtype)
    chosen = torch.zeros_like(usable)
    shares = left.new_zeros(*left.shape[:1], 0, left.shape[1])  # of each token, with each that is chosen
    for _ in range(k):
        worth = (weight * left * weight).masked_fill(chosen, 0.0)
        worth = torch.where(worth.amax(1, keepdim=True) > 0, worth, weight)
        best = worth.masked_fill(chosen, -1.0).argmax(1, keepdim=True)
        chosen = chosen.scatter(1, best, torch.ones_like(best, dtype=torch.bool))
        row, own = cosine.take_along_dim(best[..., None], 1)[:, 0], left.gather(1, best)
        row = row - (shares.take_along_dim(best[:, None], 2) * shares).sum(1)
        share = torch.where(own > 0, row / own.sqrt(), 0.0)
        left = left - share.square()
        left = torch.where(left < NOTHING_NEW, 0.0, left)
        shares = torch.cat([shares, share[:, None]], 1)
    return _positions(chosen, k)
