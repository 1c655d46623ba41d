"""How visual tokens are reduced. A method scores the tokens, chooses some, and says what becomes of the others."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast import checks
from vlmfast.ops.token_merge import merge_rows, merge_slots, top_tokens
from vlmfast.ops.token_merge.definition import MERGES


@dataclass(frozen=True)
class VisualTokens:
    """What a method may ask about the visual tokens of ``batch`` images, or crops of images, of one size.

    Attributes:
        batch: how many images.
        count: N, the visual tokens of each, without a CLS token.
        device: where they are.
        has_cls: whether the tower has a CLS token, which then stands in front of those that are kept.
        scores: gives (B, N) float32, the attention that each token gets: from the CLS token, or from all of its image.
        metric: gives (B, N, M), what tells how alike two tokens are: their keys, averaged over the heads.
        crops: of how many crops these are the tokens, where the crops of an image are reduced together.
    """

    batch: int
    count: int
    device: torch.device
    has_cls: bool
    scores: Callable[[], Tensor]
    metric: Callable[[], Tensor]
    crops: int = 1

    def part(self, start: int, stop: int) -> VisualTokens:
        """Those of the images from ``start`` to ``stop``."""
        return replace(
            self,
            batch=stop - start,
            scores=lambda: self.scores()[start:stop],
            metric=lambda: self.metric()[start:stop],
        )


@dataclass(frozen=True)
class Selection:
    """What a method has decided for B images of N tokens; it applies to any tensor with a row for each token.

    Attributes:
        kept: (B, k) int64, the positions of the tokens that are kept, ascending.
        slots: (B, N) int32, where each token goes, as `vlmfast.ops.token_merge.merge_slots` says it.
        contextual: C, the number of tokens that the others are merged into.
        merge: "reference" or "mean".
        keep_cls: whether the CLS token is kept as well, in front.
    """

    kept: Tensor
    slots: Tensor
    contextual: int
    merge: str
    keep_cls: bool

    @property
    def rows(self) -> int:
        """How many rows come out for each image, without a CLS token."""
        return self.kept.shape[1] + self.contextual

    def apply(self, hidden: Tensor) -> Tensor:
        """(B, N, D) -> (B, k + C, D): the kept rows in the order of their positions, then the merged ones."""
        return merge_rows(hidden, self.kept, self.slots, self.contextual, self.merge)

    def positions(self) -> Tensor:
        """(B, k + C) int64: where the rows that `apply` gives stood, the merged ones at their targets."""
        is_target = (self.slots >= 0) & (self.slots < self.contextual)
        targets = top_tokens(is_target.float(), self.contextual)
        return torch.cat([self.kept, targets], 1)


class Method(abc.ABC):
    """A way to reduce visual tokens. A new one is a subclass with `budget` and `score`, and perhaps `choose`."""

    keeps_cls: ClassVar[bool] = False  # whether a CLS token is kept as well, in front
    merge: str = "reference"
    packing: str = "model"  # how LLaVA-NeXT's crops are arranged, see `VisionZip`

    @abc.abstractmethod
    def budget(self, count: int, has_cls: bool, crops: int = 1) -> tuple[int, int]:
        """Of ``count`` tokens, how many are kept, and how many the others are merged into; a CLS token aside.

        Where they are the tokens of several crops together, a number of tokens counts for each, see `share`.
        """

    @abc.abstractmethod
    def score(self, tokens: VisualTokens) -> Tensor:
        """(B, N): how much each token is worth."""

    def choose(self, scores: Tensor, k: int) -> Tensor:
        """(B, N) -> (B, k) int64, ascending: which tokens are kept."""
        return top_tokens(scores, k)

    def checked_budget(self, tokens: VisualTokens) -> tuple[int, int]:
        """The budget for these tokens.

        Crops that were made smaller together may have fewer tokens than their budgets add up to: all of them, then.

        Raises:
            ValueError: if it does not fit the tokens.
        """
        kept, contextual = self.budget(tokens.count, tokens.has_cls, tokens.crops)
        if tokens.crops > 1:
            kept = min(kept, tokens.count)
            contextual = min(contextual, tokens.count - kept)
        if kept < 0 or contextual < 0 or kept + contextual > tokens.count:
            raise ValueError(f"{self} asks for {kept} + {contextual} of {tokens.count} visual tokens")
        return kept, contextual

    def select(self, tokens: VisualTokens) -> Selection:
        """Decide for all images at once.

        Raises:
            ValueError: if the budget does not fit the tokens.
        """
        kept, contextual = self.checked_budget(tokens)
        chosen = self.choose(self.score(tokens), kept)
        metric = tokens.metric() if contextual else chosen.new_zeros(tokens.batch, tokens.count, 1).float()
        slots = merge_slots(metric, chosen, contextual)
        return Selection(chosen, slots, contextual, self.merge, self.keeps_cls and tokens.has_cls)


def share(value: float, count: int, crops: int) -> int:
    """A number of tokens: an int for each crop, a float as a share of ``count``, rounded down as published."""
    return value * crops if isinstance(value, int) else int(value * count)


def check_share(name: str, value: object) -> None:
    """Raise unless ``value`` is a number of tokens, or a share of them from 0.0 to 1.0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of tokens (int) or a share of them (float), got {value!r}")
    if value < 0 or (isinstance(value, float) and not value <= 1.0):
        raise ValueError(f"{name} must be an int of at least 0 or a float within 0.0 and 1.0, got {value!r}")


@dataclass(frozen=True)
class VisionZip(Method):
    """VisionZip (CVPR 2025): the tokens with the most attention are kept, the others merged by similarity.

    Args:
        dominant: how many tokens are kept for each image, or for each crop where a model cuts images into crops: an
            int, or a float as the share of its visual tokens. A CLS token is kept and counts as one, as published.
        contextual: how many tokens the others are merged into, likewise.
        merge: "reference", as published, or "mean"; see `vlmfast.merge_tokens`.
        packing: how the tokens of LLaVA-NeXT's crops are arranged: "published", without row ends, or "model", in the
            model's own packing, with its row ends and without its padding, cut by position. That has no place for a
            CLS token, and padding that was chosen is left out.

    Raises:
        TypeError or ValueError: for an argument that is none of these.

    Source:
        VisionZip, and its port to Qwen2.5-VL.
    """

    dominant: int | float
    contextual: int | float
    merge: str = "reference"
    packing: str = "published"
    keeps_cls: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("dominant", self.dominant)
        check_share("contextual", self.contextual)
        checks.one_of("merge", self.merge, MERGES)
        checks.one_of("packing", self.packing, ("published", "model"))

    def budget(self, count: int, has_cls: bool, crops: int = 1) -> tuple[int, int]:
        """The CLS token is one of the dominant ones."""
        dominant = share(self.dominant, count, crops)
        if has_cls and not dominant:
            raise ValueError(
                f"dominant must be at least 1 of {count} visual tokens where the tower has a CLS token, which counts "
                f"as one, got {self.dominant}"
            )
        return dominant - has_cls, share(self.contextual, count, crops)

    def score(self, tokens: VisualTokens) -> Tensor:
        """The attention that each token gets."""
        return tokens.scores()


@dataclass(frozen=True)
class RandomTokens(Method):
    """A random choice: the baseline that a method has to beat.

    Args:
        keep: how many tokens are kept for each image: an int, or a float as the share of its visual tokens.
        seed: the same seed chooses the same tokens at every call.

    Raises:
        TypeError or ValueError: for a ``keep`` that is neither.
    """

    keep: int | float
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("keep", self.keep)

    def budget(self, count: int, has_cls: bool, crops: int = 1) -> tuple[int, int]:
        """Nothing is merged."""
        return share(self.keep, count, crops), 0

    def score(self, tokens: VisualTokens) -> Tensor:
        """Random numbers, drawn on the CPU so that every device has the same."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(tokens.batch, tokens.count, generator=generator).to(tokens.device)


@dataclass(frozen=True)
class EvenTokens(Method):
    """Tokens at even distances in raster order.

    Args:
        keep: how many tokens are kept for each image: an int, or a float as the share of its visual tokens.

    Raises:
        TypeError or ValueError: for a ``keep`` that is neither.
    """

    keep: int | float

    def __post_init__(self) -> None:
        check_share("keep", self.keep)

    def budget(self, count: int, has_cls: bool, crops: int = 1) -> tuple[int, int]:
        """Nothing is merged."""
        return share(self.keep, count, crops), 0

    def score(self, tokens: VisualTokens) -> Tensor:
        """All alike."""
        return torch.zeros(tokens.batch, tokens.count, device=tokens.device)

    def choose(self, scores: Tensor, k: int) -> Tensor:
        """Position ``i * N // k`` for each i."""
        positions = torch.arange(k, device=scores.device) * scores.shape[1] // max(k, 1)
        return positions.expand(scores.shape[0], -1)
