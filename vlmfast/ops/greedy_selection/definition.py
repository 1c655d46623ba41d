"""Tokens chosen one after the other, each for what those before it have left open.

As PyTorch code a choice of k tokens is a loop of some five small operations a step, which cost the host more than the
tokens that are left out save. Here a choice is one launch for a whole batch, or two where the tokens have to be
compared first. What is chosen is a set, in the order of positions; choosing k + 1 adds one token to those of k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlmfast import checks
from vlmfast.functions import op

R = TypeVar("R", Tensor, "Tensor | None")

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


@dataclass(frozen=True)
class _Images:
    """What is chosen from: the B rows of N tokens, or one row of S images of up to N tokens.

    Attributes:
        there: (B or S, N) bool, the tokens that an image has.
        kept: (B or S, 1), how many are chosen of each.
        place: (S, N) int64, where each token is in the row; behind it where there is none. None for B rows.
        row: the number of tokens of a row.
    """

    there: Tensor
    kept: Tensor
    place: Tensor | None
    row: int

    @classmethod
    def of(cls, rows: Tensor, k: int, cu_seqlens: Tensor | None, cu_kept: Tensor | None, longest: int) -> _Images:
        batch, tokens = rows.shape[:2]
        if cu_seqlens is None or cu_kept is None:
            there = torch.ones(batch, tokens, dtype=torch.bool, device=rows.device)
            return cls(there, there.new_full((batch, 1), k, dtype=torch.int64), None, tokens)
        position = torch.arange(longest, device=rows.device)
        there = position < cu_seqlens.diff()[:, None]
        place = torch.where(there, position + cu_seqlens[:-1, None], tokens)
        return cls(there, cu_kept.diff()[:, None], place, tokens)

    def apart(self, rows: R) -> R:
        """Return the rows of each image, if there are any: (1, T, ...) -> (S, N, ...)."""
        return rows if rows is None or self.place is None else rows[0, self.place.clamp(max=self.row - 1)]

    def steps(self, k: int) -> range:
        """Return a range with a step for each token that is chosen of one image; on a device it may be longer."""
        if self.place is not None and self.kept.numel() and checks.on_host(self.kept):
            k = int(self.kept.max())
        return range(min(k, self.there.shape[1]))

    def take(self, chosen: Tensor, worth: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Choose what is worth most, of the images that have not enough: (B or S, 1), and all that are chosen."""
        best = worth.masked_fill(chosen, -1.0).argmax(1, keepdim=True)
        return best, chosen.scatter(1, best, chosen.gather(1, best) | (step < self.kept))

    def positions(self, chosen: Tensor, k: int) -> Tensor:
        """List the k positions of each row, ascending; tokens that are not there count as chosen."""
        chosen = chosen & self.there
        if self.place is not None:
            row = chosen.new_zeros(1, self.row + 1)
            chosen = row.scatter(1, self.place.view(1, -1), chosen.view(1, -1))[:, : self.row]
        return _positions(chosen, k)


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


def _check_images(
    name: str, rows: Tensor, k: int, cu_seqlens: Tensor | None, cu_kept: Tensor | None, longest: int
) -> int:
    """Check how many tokens are chosen of which images, and return the number of these."""
    batch, tokens = rows.shape[:2]
    checks.within("k", k, tokens, "the tokens of a row")
    checks.within("longest", longest, tokens, "the tokens of a row")
    if cu_seqlens is None and cu_kept is None:
        return batch
    if cu_seqlens is None or cu_kept is None:
        raise TypeError("cu_seqlens and cu_kept must be given together, got one of them")
    checks.bounds("cu_seqlens", cu_seqlens, "images", tokens, f"the tokens of {name}", name, rows)
    checks.bounds("cu_kept", cu_kept, "images", k, "which is k", name, rows)
    checks.same_shape("cu_kept", cu_kept, "cu_seqlens", cu_seqlens)
    if batch != 1:
        raise ValueError(f"{name} must have a batch of 1 with cu_seqlens, the images in a row, got {batch}")
    if checks.on_host(cu_seqlens) and checks.on_host(cu_kept):
        sizes, kept = cu_seqlens.diff(), cu_kept.diff()
        if bool((sizes > longest).any()):
            raise ValueError(f"longest must be the most tokens of an image, {int(sizes.max())}, got {longest}")
        if bool((kept > sizes).any()):
            raise ValueError(
                f"cu_kept must not rise faster than cu_seqlens, {cu_seqlens.tolist()}, got {cu_kept.tolist()}"
            )
    images = cu_seqlens.shape[0] - 1
    if longest * images < tokens:  # all that is known of bounds on a device without waiting for it
        raise ValueError(f"longest must be the most tokens of an image, of {images} with {tokens}, got {longest}")
    return images


def _check_farthest(
    features: Tensor,
    k: int,
    quality: Tensor | None = None,
    first_by_quality: bool = True,
    cu_seqlens: Tensor | None = None,
    cu_kept: Tensor | None = None,
    longest: int = 0,
) -> None:
    _check_by_features(features, k, "quality", quality, cu_seqlens, cu_kept, longest)


def _check_dpp_map(
    features: Tensor,
    k: int,
    relevance: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_kept: Tensor | None = None,
    longest: int = 0,
) -> None:
    _check_by_features(features, k, "relevance", relevance, cu_seqlens, cu_kept, longest)


def _check_by_features(features: Tensor, k: int, name: str, weights: Tensor | None, *images: Any) -> None:
    checks.tensor("features", features, "BND")
    _check_images("features", features, k, *images)
    if weights is not None:
        checks.tensor(name, weights, "BN")
        checks.same_tokens(name, weights, "features", features)
        _check_weights(name, weights)


def _check_coverage(
    similarity: Tensor,
    k: int,
    row_weights: Tensor | None = None,
    quality: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_kept: Tensor | None = None,
    longest: int = 0,
) -> None:
    checks.tensor("similarity", similarity, "BNR")
    images, rows = _check_images("similarity", similarity, k, cu_seqlens, cu_kept, longest), similarity.shape[2]
    if row_weights is not None:
        checks.tensor("row_weights", row_weights, "BR")
        if row_weights.shape != (images, rows):
            raise ValueError(f"row_weights must have shape ({images}, {rows}), got {tuple(row_weights.shape)}")
        checks.same_device("row_weights", row_weights, "similarity", similarity)
        _check_weights("row_weights", row_weights)
    if quality is not None:
        checks.tensor("quality", quality, "BN")
        checks.same_tokens("quality", quality, "similarity", similarity)
        _check_weights("quality", quality)


# ---- the definitions ----


@op(check=_check_farthest, exact=True, detached=True)
def farthest(
    features: Tensor,
    k: int,
    quality: Tensor | None = None,
    first_by_quality: bool = True,
    cu_seqlens: Tensor | None = None,
    cu_kept: Tensor | None = None,
    longest: int = 0,
) -> Tensor:
    """Choose ``k`` tokens that are unlike each other: each time the one whose nearest chosen token is farthest.

    The distance of two tokens is 1 less the cosine of their features. The first token is the one whose nearest other
    one is farthest. With a ``quality`` the distances of a token to its nearest are multiplied by it. Of equal ones the
    lower position wins. Sums are in float32, whatever the dtype; a distance below 2 ** -20 is one of their roundings
    and counts as 0. Features of zeros, and those that are not finite, have a cosine of 0 with all.

    Args:
        features: (B, N, D) float32, float16 or bfloat16; any strides. Their lengths are of no account.
        k: how many of each image, 0 to N; with ``cu_seqlens`` of all together.
        quality: (B, N) float32, float16 or bfloat16, what each token is worth, 0 or more; all the same if it is None.
        first_by_quality: whether the quality counts for the first token too.
        cu_seqlens: (S + 1,) int32, the first token of each of S images that stand in one row, and N at the end; B is
            then 1. None for B images of one size.
        cu_kept: (S + 1,) int32, the same for the chosen tokens, with ``k`` at the end.
        longest: with ``cu_seqlens``, the number of tokens of the largest image.

    Returns:
        (B, k) int64, ascending. Those of k are among those of k + 1.

    Raises:
        TypeError: for a tensor of another dtype, or one of ``cu_seqlens`` and ``cu_kept`` alone. ValueError: for shapes
            or devices that do not fit, or a ``k`` or ``longest`` out of range; on a CPU also for images that do not
            add up, or a quality that is negative or not finite. On a GPU these two trip a device-side assertion.

    Source:
        The selection of DivPrune; with a quality that of Cen-Prune, and of FlashVID's attention and diversity.
    """
    images = _Images.of(features, k, cu_seqlens, cu_kept, longest)
    weight = _weights("quality", images.apart(quality))
    distance = _distances(images.apart(features))
    tokens, chosen = distance.shape[2], ~images.there
    if k == 0:
        return images.positions(chosen, k)
    itself = torch.eye(tokens, dtype=torch.bool, device=features.device)
    nearest = distance.masked_fill(itself | chosen[:, None], 2.0).amin(2)  # 2: no distance is larger
    for step in images.steps(k):
        worth = nearest if weight is None or (step == 0 and not first_by_quality) else nearest * weight
        best, chosen = images.take(chosen, worth, step)
        row = distance.gather(1, best[..., None].expand(-1, -1, tokens))[:, 0]
        nearest = torch.minimum(nearest, row) if step else row
    return images.positions(chosen, k)


@op(check=_check_coverage, exact=True, detached=True)
def coverage(
    similarity: Tensor,
    k: int,
    row_weights: Tensor | None = None,
    quality: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_kept: Tensor | None = None,
    longest: int = 0,
) -> Tensor:
    """Choose ``k`` tokens that cover all rows: each time the one that adds most to what those before it cover.

    A row is covered as well as the chosen token that is most similar to it covers it, and at least by 0. What a token
    adds is the sum over all rows, times their weights, of how much better they would be covered; and that times the
    quality of the token. Of equal ones the lower position wins. Sums are in float32, whatever the dtype. A similarity
    that is not finite covers nothing.

    Args:
        similarity: (B, N, R) float32, float16 or bfloat16; any strides. How well each token covers each row: of tokens
            that stand for each other, the cosines of each two of them.
        k: how many of each image, 0 to N; with ``cu_seqlens`` of all together.
        row_weights: (B, R), with ``cu_seqlens`` (S, R), float32, float16 or bfloat16, how much each row counts, 0 or
            more; all the same if it is None.
        quality: (B, N) float32, float16 or bfloat16, what each token is worth, 0 or more; all the same if it is None.
        cu_seqlens: (S + 1,) int32, the first token of each of S images that stand in one row, and N at the end; B is
            then 1. None for B images of one size.
        cu_kept: (S + 1,) int32, the same for the chosen tokens, with ``k`` at the end.
        longest: with ``cu_seqlens``, the number of tokens of the largest image.

    Returns:
        (B, k) int64, ascending. Those of k are among those of k + 1.

    Raises:
        TypeError: for a tensor of another dtype, or one of ``cu_seqlens`` and ``cu_kept`` alone. ValueError: for shapes
            or devices that do not fit, or a ``k`` or ``longest`` out of range; on a CPU also for images that do not
            add up, or a weight or quality that is negative or not finite. On a GPU these two trip a device-side
            assertion.

    Source:
        The greedy rule of facility location, which SCOPE uses with the attention of tokens as their quality, EADP with
        the importance of rows, and MMTok with rows of text.
    """
    images = _Images.of(similarity, k, cu_seqlens, cu_kept, longest)
    wide = images.apart(similarity.to(torch.promote_types(similarity.dtype, torch.float32)))
    wide = wide.where(wide.isfinite(), 0.0)
    weight, importance = _weights("quality", images.apart(quality)), _weights("row_weights", row_weights)
    count, _, rows = wide.shape
    covered = wide.new_zeros(count, 1, rows)
    chosen = ~images.there
    for step in images.steps(k):
        gains = (wide - covered).clamp(min=0)
        gain = (gains if importance is None else gains * importance[:, None]).sum(2)
        gain = gain if weight is None else gain * weight
        best, chosen = images.take(chosen, gain, step)
        covered = torch.maximum(covered, wide.gather(1, best[..., None].expand(-1, -1, rows)))
    return images.positions(chosen, k)


@op(check=_check_dpp_map, exact=True, detached=True)
def dpp_map(
    features: Tensor,
    k: int,
    relevance: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_kept: Tensor | None = None,
    longest: int = 0,
) -> Tensor:
    """Choose ``k`` tokens that are relevant and unlike each other: those that a determinantal point process favours.

    Its kernel is the cosine of each two tokens times the relevance of both. Each time the token is chosen that makes
    the determinant of the chosen ones largest: that whose relevance, squared, times what of its square those before it
    do not add up to, is most. That is found row by row of the kernel, of which only the rows of chosen tokens are
    needed. Of equal ones the lower position wins. Sums are in float32, whatever the dtype; less than 2 ** -14 of a
    token is one of their roundings and counts as nothing. Where nothing new is left, as with more tokens than
    dimensions, the most relevant ones follow. Features of zeros, and those that are not finite, have nothing new.

    Args:
        features: (B, N, D) float32, float16 or bfloat16; any strides. Their lengths are of no account.
        k: how many of each image, 0 to N; with ``cu_seqlens`` of all together.
        relevance: (B, N) float32, float16 or bfloat16, what each token is worth, 0 or more; all the same if it is None.
        cu_seqlens: (S + 1,) int32, the first token of each of S images that stand in one row, and N at the end; B is
            then 1. None for B images of one size.
        cu_kept: (S + 1,) int32, the same for the chosen tokens, with ``k`` at the end.
        longest: with ``cu_seqlens``, the number of tokens of the largest image.

    Returns:
        (B, k) int64, ascending. Those of k are among those of k + 1.

    Raises:
        TypeError: for a tensor of another dtype, or one of ``cu_seqlens`` and ``cu_kept`` alone. ValueError: for shapes
            or devices that do not fit, or a ``k`` or ``longest`` out of range; on a CPU also for images that do not
            add up, or a relevance that is negative or not finite. On a GPU these two trip a device-side assertion.

    Source:
        The fast greedy inference of Chen, Zhang and Zhou (NeurIPS 2018), as CDPruner uses it. That chooses a token
        twice, or gives NaN, where nothing new is left.
    """
    images = _Images.of(features, k, cu_seqlens, cu_kept, longest)
    cosine, usable = _cosines(images.apart(features))
    left = usable.to(torch.float32 if features.device.type == "mps" else torch.float64)
    weight = _weights("relevance", images.apart(relevance))
    weight = torch.ones_like(left) if weight is None else weight.to(left.dtype)
    chosen = ~images.there
    shares = left.new_zeros(*left.shape[:1], 0, left.shape[1])  # of each token, with each that is chosen
    for step in images.steps(k):
        worth = (weight * left * weight).masked_fill(chosen, 0.0)
        worth = torch.where(worth.amax(1, keepdim=True) > 0, worth, weight)
        best, chosen = images.take(chosen, worth, step)
        row, own = cosine.take_along_dim(best[..., None], 1)[:, 0], left.gather(1, best)
        row = row - (shares.take_along_dim(best[:, None], 2) * shares).sum(1)
        share = torch.where(own > 0, row / own.sqrt(), 0.0)
        left = left - share.square()
        left = torch.where(left < NOTHING_NEW, 0.0, left)
        shares = torch.cat([shares, share[:, None]], 1)
    return images.positions(chosen, k)


# ---- calls with several dtypes ----


def _weights_may_differ(device: str, *_: Any) -> bool:
    """Return whether the compiled kernels take a call with several dtypes; only those of weights differ."""
    return True


farthest_mixed = dpp_map_mixed = coverage_mixed = _weights_may_differ
