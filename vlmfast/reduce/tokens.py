"""What a method may ask about visual tokens, and what it answers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmfast.ops.token_merge import merge_rows, top_tokens

Grid = tuple[int, int, int]  # frames, rows and columns of visual tokens


@dataclass(frozen=True, kw_only=True)
class VisualTokens:
    """The visual tokens of B images, or crops of images, of one size: N each, without a CLS token.

    ``scores``, ``metric`` and ``features`` are functions: what no method asks for is not computed, and what is asked
    for twice is computed once.

    Attributes:
        batch: B.
        count: N.
        device: where they are.
        has_cls: whether the tower has a CLS token, which then stands in front of those that are kept.
        grid: (frames, rows, columns) of the N tokens, in raster order; None for the crops of an image together.
        scores: gives (B, N) float32, the attention that each token gets: from the CLS token, or from all of its image.
        metric: gives (B, N, M), the keys, averaged over the heads: they tell how alike two tokens are.
        features: gives (B, N, D), the tokens as the language model would see them, without a gradient.
        crops: the number of crops whose tokens these are, where the crops of an image are reduced together.
    """

    batch: int
    count: int
    device: torch.device
    has_cls: bool
    grid: Grid | None
    scores: Callable[[], Tensor]
    metric: Callable[[], Tensor]
    features: Callable[[], Tensor]
    crops: int = 1

    def __post_init__(self) -> None:
        for name in ("scores", "metric", "features"):
            object.__setattr__(self, name, functools.cache(getattr(self, name)))

    def part(self, start: int, stop: int) -> VisualTokens:
        """Return the tokens of the images from ``start`` to ``stop``."""
        return replace(
            self,
            batch=stop - start,
            scores=lambda: self.scores()[start:stop],
            metric=lambda: self.metric()[start:stop],
            features=lambda: self.features()[start:stop],
        )


@dataclass(frozen=True)
class Selection:
    """What a method has decided for B images of N tokens; it applies to any tensor with a row for each token.

    Attributes:
        kept: (B, k) int64, the positions of the tokens that are kept, ascending.
        slots: (B, N) int32, where each token goes, as `vlmfast.ops.token_merge.merge_slots` says it.
        contextual: C, the number of tokens that the others are merged into.
        merge: "reference" or "mean", see `vlmfast.merge_tokens`.
        keep_cls: whether the CLS token is kept as well, in front.
    """

    kept: Tensor
    slots: Tensor
    contextual: int
    merge: str = "reference"
    keep_cls: bool = False

    @property
    def rows(self) -> int:
        """The number of rows that come out for each image, without a CLS token."""
        return self.kept.shape[1] + self.contextual

    def apply(self, hidden: Tensor) -> Tensor:
        """(B, N, D) -> (B, k + C, D): the kept rows in the order of their positions, then the merged ones."""
        return merge_rows(hidden, self.kept, self.slots, self.contextual, self.merge)

    def positions(self) -> Tensor:
        """(B, k + C) int64: where the rows that `apply` gives stood, the merged ones at their targets."""
        is_target = (self.slots >= 0) & (self.slots < self.contextual)
        targets = top_tokens(is_target.float(), self.contextual)
        return torch.cat([self.kept, targets], 1)
