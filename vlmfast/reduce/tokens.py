"""The input and the result of a method: visual tokens, and a selection of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlmfast.functions import accepting
from vlmfast.ops.token_merge import merge_rows, top_tokens
from vlmfast.reduce.text import Text, unknown

Grid = tuple[int, int, int]  # frames, rows and columns of visual tokens


LAZY = ("scores", "metric", "features", "pixels", "text")


@dataclass(frozen=True, kw_only=True)
class VisualTokens:
    """The visual tokens of B images, or crops of images, of one size: N each, without a CLS token.

    ``scores``, ``metric``, ``features``, ``pixels`` and ``text`` are functions, computed when a method first asks and
    then kept.

    Attributes:
        hidden: (B, N, C), the rows to keep and merge: before the projector, in Qwen-VL after the merger.
        grid: (frames, rows, columns) of the N tokens, in raster order; None for the crops of an image together.
        scores: gives (B, N) float32, of a float64 model float64, the attention that each token gets: from the CLS
            token, or from all of its image.
        metric: gives (B, N, M), the keys, averaged over the heads: they tell how alike two tokens are.
        features: gives (B, N, D), the tokens as the language model gets them, without a gradient.
        pixels: gives (B, ...), the tower's input for each image: the same alone and in any batch.
        text: gives the `Text` that asks about each, in the embeddings of the language model: what follows the last
            image of its sample, or what ``text_mask`` of the call says. Raises ValueError where there is none.
        has_cls: whether the tower has a CLS token, which then stands in front of those that are kept.
        crops: the number of crops whose tokens these are, where the crops of an image are reduced together; of a video
            its frames.
        total: how many tokens the model itself makes of each, so that no more may be left: N, unless it uses the CLS
            token too, or cuts off padding that is among the N.
    """

    hidden: Tensor
    grid: Grid | None
    scores: Callable[[], Tensor]
    metric: Callable[[], Tensor]
    features: Callable[[], Tensor]
    pixels: Callable[[], Tensor]
    text: Callable[[], Text] = unknown
    has_cls: bool = False
    crops: int = 1
    total: int = -1

    def __post_init__(self) -> None:
        for name in LAZY:
            object.__setattr__(self, name, functools.cache(getattr(self, name)))
        if self.total < 0:
            object.__setattr__(self, "total", self.count)

    def take(self, images: list[int], total: int) -> VisualTokens:
        """Return the tokens of these images, given as ascending numbers; the model makes ``total`` of each."""
        if len(images) == self.batch:
            return replace(self, total=total)
        rows: dict[str, Any] = {name: functools.partial(_taken, getattr(self, name), images) for name in LAZY}
        return replace(self, hidden=self.hidden[images], total=total, **rows)

    def by_frame(self) -> VisualTokens:
        """Return the frames of B videos of T frames as B * T images."""
        frames = self.crops
        rows: dict[str, Any] = {
            name: functools.partial(_framed, getattr(self, name), frames) for name in LAZY if name != "text"
        }
        return replace(
            self,
            hidden=_framed(lambda: self.hidden, frames),
            grid=self.grid and (1, *self.grid[1:]),
            crops=1,
            total=self.total // frames,
            text=lambda: self.text().repeat(frames),
            **rows,
        )

    @property
    def batch(self) -> int:
        """Return B, the number of images."""
        return self.hidden.shape[0]

    @property
    def count(self) -> int:
        """Return N, the number of tokens of each."""
        return self.hidden.shape[1]

    @property
    def device(self) -> torch.device:
        """Return the device of the tokens."""
        return self.hidden.device


def _taken(rows: Callable[[], Any], images: list[int]) -> Any:
    return rows()[images]


def _framed(rows: Callable[[], Tensor], frames: int) -> Tensor:
    """(B, T * n, ...) -> (B * T, n, ...)."""
    whole = rows()
    return whole.reshape(len(whole) * frames, -1, *whole.shape[2:])


@dataclass(frozen=True)
class Selection:
    """The choice of a method for B images of N tokens, which applies to any tensor with a row for each token.

    Attributes:
        kept: (B, k) int64, the positions of the tokens that are kept, ascending.
        slots: (B, N) int32, where each token goes, see `vlmfast.ops.token_merge.merge_slots`.
        contextual: C, the number of tokens that the others are merged into.
        merge: "reference" or "mean", see `vlmfast.merge_tokens`.
        keep_cls: whether the CLS token is kept as well, in front.
        weights: (B, N), the factor of each token that is merged, or None for 1.
    """

    kept: Tensor
    slots: Tensor
    contextual: int
    merge: str = "reference"
    keep_cls: bool = False
    weights: Tensor | None = None

    def apply(self, hidden: Tensor) -> Tensor:
        """(B, N, D) -> (B, k + C, D): the kept rows in the order of their positions, then the merged ones."""
        if self.weights is not None:
            weights = torch.where(self.slots < 0, 1, self.weights)  # the kept ones stay as they are
            hidden = (hidden * weights[..., None]).to(hidden.dtype)
        return accepting(merge_rows, hidden)(hidden, self.kept, self.slots, self.contextual, self.merge)

    def positions(self) -> Tensor:
        """(B, k + C) int64: the positions of the rows of `apply`; a merged row has that of its target."""
        is_target = (self.slots >= 0) & (self.slots < self.contextual)
        targets = top_tokens(is_target.float(), self.contextual)
        return torch.cat([self.kept, targets], 1)

    def of_videos(self, frames: int) -> Selection:
        """Return this selection of B * T frames of n tokens as one of B videos of T * n tokens."""
        tokens, contextual, each = self.slots.shape[1], self.contextual, self.kept.shape[1]
        frame = torch.arange(len(self.kept), device=self.kept.device)[:, None] % frames
        # the slots of all targets come first, then those of the tokens assigned to them
        moved = self.slots + torch.where(self.slots < contextual, frame, frame + frames - 1) * contextual
        kept = torch.where(self.slots < -each, -frames * each - 1, self.slots + (1 + frame - frames) * each)
        return replace(
            self,
            kept=(self.kept + frame * tokens).view(len(self.kept) // frames, frames * each),
            slots=torch.where(self.slots < 0, kept, moved).int().view(len(self.kept) // frames, frames * tokens),
            contextual=frames * contextual,
            weights=None if self.weights is None else self.weights.view(-1, frames * tokens),
        )
