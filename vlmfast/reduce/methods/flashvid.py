"""FlashVID: keeps the tokens of a frame that matter and differ, and merges the others along time and within frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast import checks
from vlmfast.functions import accepting
from vlmfast.ops.greedy_selection import farthest
from vlmfast.ops.token_merge.definition import MERGES
from vlmfast.reduce.methods.method import share
from vlmfast.reduce.methods.video_method import VideoMethod, frames_of
from vlmfast.reduce.tokens import Selection, VisualTokens

SAME_SCENE = 0.9  # the cosine of the means of two frames below which a segment ends
LEAST_SEGMENTS = 8  # a shorter video has a segment for each frame
SAME_TOKEN = 0.8  # the cosine above which a token is linked to one of the frame before
NEIGHBOURS = 7  # that tell how dense the tokens are around one


@dataclass(frozen=True)
class FlashVID(VideoMethod, name="flashvid"):
    """FlashVID (ICLR 2026): most of the budget is kept, by attention and diversity, and the rest merges the others.

    Seven tenths of a frame's budget, rounded up, are kept: each time the token that is least like those chosen before,
    times its attention. The video is cut into segments where the means of two frames differ. In a segment, a token that
    is not kept is linked to the one most like it in the frame before, and such chains are merged. The tokens that are
    then left of a frame are clustered around the peaks of their density, and each cluster is merged. A frame whose
    segment has fewer clusters than frames may get none: what is left of it is dropped.

    Args:
        keep: how many tokens are left of each frame, on average over a video: an int, or a float as the share of all
            its tokens. At least one for each frame.
        merge: how a chain is merged: "reference", as published, its sum over one more than the number of tokens that
            are linked to its first, which grows with the length of a chain; or "mean", where each token of a cluster
            counts the same.

    Raises:
        TypeError or ValueError: for an argument that is none of these.

    Source:
        The first stage of FlashVID, which leaves a quarter more than the budget for the second to make up for:
        ``[FlashVID(1.25 * share), FastV(layer=20, keep=0.3)]``. Its numbers of tokens are rounded up frame by frame;
        here the total is exact. Of equal ones the first counts, where it adds noise.
    """

    merge: str = "reference"
    trusted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of("merge", self.merge, MERGES)

    def budget(self, count: int, has_cls: bool, crops: int = 1) -> tuple[int, int]:
        """Keep at least one token of each frame, and equally many of each."""
        total = min(count, max(crops, share(self.keep, count, crops)))
        kept = min(-(-7 * total // (10 * crops)), total // crops) * crops
        return kept, total - kept

    def choose(self, tokens: VisualTokens, k: int) -> Tensor:
        """Choose in each frame by attention and diversity."""
        frames, each = frames_of(tokens).flatten(0, 1), k // tokens.crops
        chosen = accepting(farthest, frames)(frames, each, tokens.scores().reshape(frames.shape[:2]))
        starts = torch.arange(tokens.crops, device=chosen.device)[:, None] * frames.shape[1]
        return (chosen.view(tokens.batch, tokens.crops, each) + starts).flatten(1)

    def select(self, tokens: VisualTokens) -> Selection:
        """Merge what is not chosen."""
        kept, contextual, _ = self.counts(tokens.count, tokens.has_cls, tokens.total, tokens.crops)
        if not contextual:
            return super().select(tokens)
        chosen = self.choose(tokens, kept)
        frames = frames_of(tokens)
        frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
        is_kept = torch.zeros(tokens.batch, tokens.count, dtype=torch.bool, device=tokens.device)
        is_kept.scatter_(1, chosen, torch.ones_like(chosen, dtype=torch.bool))
        free = ~is_kept.view(frames.shape[:3])
        segments = _segments(frames)
        length = _in_group(torch.ones_like(segments), segments)
        budget = _budgets(contextual, length, segments)
        parent = _links(frames, free, segments, length * free[:, :1].sum(2) - budget)
        chains = _Chains(parent, _roots(parent, tokens.crops), self.merge)
        begins = chains.begin() & free.flatten(1)
        quotas = _quotas(begins.view_as(free).sum(2), budget, segments)
        is_peak, nearest = _peaks(chains.rows(frames.flatten(1, 2)).view_as(frames), begins.view_as(free), quotas)
        peak = nearest.gather(1, chains.root)
        number = is_peak.cumsum(1) - 1
        slots = torch.where(is_peak, number, contextual + number.gather(1, peak))
        slots = torch.where(is_peak.gather(1, peak), slots, -kept - 1)  # dropped: a frame may have no peak
        slots = torch.where(is_kept, is_kept.cumsum(1) - 1 - kept, slots)
        weights = chains.weights(peak, begins, ~is_kept, frames.dtype) if self.merge == "reference" else None
        return Selection(chosen, slots.int(), contextual, merge="mean", weights=weights)


@dataclass(frozen=True)
class _Chains:
    """Tokens linked to tokens of the frame before: (B, N) each, what a token is linked to, and where that ends."""

    parent: Tensor
    root: Tensor
    merge: str

    def begin(self) -> Tensor:
        """(B, N) bool: where a chain begins, be it of one token."""
        return self.root == _own(self.root)

    def divisor(self) -> Tensor:
        """(B, N): what the sum of a chain is divided by, at its root."""
        linked = (self.parent != _own(self.parent)).long()
        if self.merge == "mean":
            return torch.zeros_like(self.root).scatter_add(1, self.root, torch.ones_like(linked))
        return 1 + torch.zeros_like(self.root).scatter_add(1, self.parent, linked)

    def rows(self, rows: Tensor) -> Tensor:
        """(B, N, D): what each chain is merged into, at its root."""
        sums = torch.zeros_like(rows).scatter_add(1, self.root[..., None].expand_as(rows), rows)
        return sums / self.divisor()[..., None]

    def weights(self, peak: Tensor, begins: Tensor, free: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, N): what a row is multiplied by so that the mean of a cluster's tokens is that of its merged chains."""
        chains, tokens = (_in_group(are.to(dtype), peak) for are in (begins, free))
        return tokens / (chains.clamp(min=1) * self.divisor().gather(1, self.root))


def _own(index: Tensor) -> Tensor:
    return torch.arange(index.shape[1], device=index.device).expand_as(index)


def _in_group(values: Tensor, groups: Tensor) -> Tensor:
    """(B, M): the sum of the values of each one's group."""
    return torch.zeros_like(values).scatter_add(1, groups, values).gather(1, groups)


def _ranks(values: Tensor, groups: Tensor) -> Tensor:
    """(B, M) int64: how many of its group are before each, by falling value; of equal ones, the first is."""
    order = values.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, groups.gather(1, order).argsort(dim=1, stable=True))
    by_group = groups.gather(1, order)
    place = _own(order) - torch.searchsorted(by_group, by_group)
    return torch.empty_like(order).scatter(1, order, place)


def _dealt(total: Tensor, part: Tensor, whole: Tensor, groups: Tensor) -> Tensor:
    """(B, M) int64: ``total * part / whole`` of each, rounded so that a group gets its total: largest remainder.

    Integers, of which ``total`` and ``whole`` are those of the group.
    """
    whole = whole.clamp(min=1)
    rounded = total * part // whole
    left = total - _in_group(rounded, groups)
    return rounded + (_ranks((total * part % whole).double() / whole, groups) < left)


def _budgets(total: int, length: Tensor, segments: Tensor) -> Tensor:
    """(B, T): how many of the clusters of a video each frame's segment has, by its length in frames."""
    first = segments.diff(dim=1, prepend=segments.new_full((len(segments), 1), -1)) > 0
    alone = torch.zeros_like(segments)
    dealt = _dealt(alone + total, torch.where(first, length, 0), alone + segments.shape[1], alone)
    return _in_group(torch.where(first, dealt, 0), segments)


def _segments(frames: Tensor) -> Tensor:
    """(B, T) int64 of (B, T, n, D): the number of the segment that each frame is in."""
    means = F.normalize(frames.mean(2), dim=2)
    alike = (means[:, 1:] * means[:, :-1]).sum(2).nan_to_num(-1.0)
    least = min(LEAST_SEGMENTS, frames.shape[1]) - 1
    ends = (alike < SAME_SCENE) | (_ranks(-alike, torch.zeros_like(alike, dtype=torch.int64)) < least)
    return F.pad(ends.long().cumsum(1), (1, 0))


def _links(frames: Tensor, free: Tensor, segments: Tensor, most: Tensor) -> Tensor:
    """(B, N) int64: the token of the frame before that each token is linked to, or itself.

    Args:
        frames: (B, T, n, D).
        free: (B, T, n) bool, which tokens are not kept: these alone are linked.
        segments: (B, T).
        most: (B, T), how many tokens of each frame's segment may be linked: those most like their targets.
    """
    batch, count, n, _ = frames.shape
    unit = F.normalize(frames, dim=3).nan_to_num(0.0)
    alike = unit[:, 1:] @ unit[:, :-1].mT
    alike.masked_fill_(~free[:, :-1, None, :], -1.0)
    best, target = (F.pad(found, (0, 0, 1, 0)) for found in alike.max(3))
    may = free & (best > SAME_TOKEN) & F.pad(segments.diff(dim=1) == 0, (1, 0))[..., None]
    groups = segments.repeat_interleave(n, 1)
    ranks = _ranks(torch.where(may, best, -1.0).flatten(1), groups)
    linked = may.flatten(1) & (ranks < most.repeat_interleave(n, 1))
    starts = torch.arange(-1, count - 1, device=frames.device)[:, None] * n
    return torch.where(linked, (starts + target).view(batch, -1), _own(groups))


def _roots(parent: Tensor, frames: int) -> Tensor:
    """(B, N): where the chain of each token begins, at most ``frames - 1`` links away: each step doubles the way."""
    for _ in range((frames - 1).bit_length()):
        parent = parent.gather(1, parent)
    return parent


def _quotas(roots: Tensor, budget: Tensor, segments: Tensor) -> Tensor:
    """(B, T) int64: how many clusters each frame has, by the chains that begin in it: one, where there are enough."""
    least = ((roots > 0) & (_in_group((roots > 0).long(), segments) <= budget)).long()
    all_least, all_roots = _in_group(least, segments), _in_group(roots, segments)
    return least + _dealt(budget - all_least, roots - least, all_roots - all_least, segments)


def _peaks(rows: Tensor, begins: Tensor, quotas: Tensor) -> tuple[Tensor, Tensor]:
    """Find the densest places among the chains of each frame that are apart from each other.

    Args:
        rows: (B, T, n, D), the merged chains, each in the place where it begins.
        begins: (B, T, n) bool, where a chain begins.
        quotas: (B, T), how many to find.

    Returns:
        (B, N) bool, which tokens are peaks; and (B, N) int64, the peak of its frame that is nearest to each chain.
    """
    _, count, n, size = rows.shape
    squares = rows.square().sum(3)
    apart = squares[..., None] + squares[:, :, None] - 2 * (rows @ rows.mT)
    apart = (apart.clamp_(min=0) / size).nan_to_num(torch.finfo(rows.dtype).max)
    apart.diagonal(dim1=2, dim2=3).zero_()
    is_other = begins[:, :, None, :]
    close = apart.masked_fill(~is_other, torch.inf).topk(min(NEIGHBOURS, n), dim=3, largest=False).values
    neighbours = quotas.clamp(1, NEIGHBOURS)[..., None, None]
    counted = torch.arange(close.shape[3], device=rows.device) < neighbours
    density = torch.exp(-torch.where(counted, close, 0).sum(3) / neighbours[..., 0])
    token = torch.arange(n, device=rows.device)
    before = token < token[:, None]
    mine, other = density[..., None], density[..., None, :]
    denser = ((other > mine) | ((other == mine) & before)) & is_other
    distance = apart.sqrt()
    farthest_apart = distance.masked_fill(~(is_other & begins[..., None]), 0).amax((2, 3), keepdim=True)
    height = density * torch.where(denser, distance, farthest_apart).amin(3)
    order = height.masked_fill(~begins, -1.0).argsort(dim=2, descending=True, stable=True)
    is_peak = order.argsort(dim=2) < quotas[..., None]
    nearest = apart.masked_fill(~is_peak[:, :, None, :], torch.inf).argmin(3)
    nearest = torch.where(is_peak, token, nearest)
    starts = torch.arange(count, device=rows.device)[:, None] * n
    return is_peak.flatten(1), (nearest + starts).flatten(1)
