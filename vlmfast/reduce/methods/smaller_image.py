"""The picture itself made smaller: the control that a choice of tokens has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.reduce.methods.method import PruningMethod, share
from vlmfast.reduce.tokens import VisualTokens


@dataclass(frozen=True)
class SmallerImage(PruningMethod, name="smaller"):
    """The picture made smaller, until it has so few tokens: the baseline that nobody reports, and spares the tower too.

    Its pixels are resized before the vision tower, in its proportions, to the most tokens that the budget allows. The
    towers of LLaVA-1.5 and InternVL, of a fixed size, then interpolate their positions; of InternVL each tile is made
    smaller. Qwen-VL sees what its processor would make of a smaller picture, at the positions of that.

    Args:
        keep: how many tokens an image has left, or a tile: an int of at least 1, or a float as the share of them.

    Raises:
        TypeError or ValueError: for a ``keep`` that is neither. ValueError, from the patch, for a model whose crops
            depend on the size of a picture (LLaVA-NeXT, LLaVA-OneVision): give its processor a smaller picture.
    """

    takes: ClassVar[tuple[str, ...]] = ("image",)
    trusted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.keep:
            raise ValueError(f"keep must be above 0, as a picture has a token at least, got {self.keep}")

    def grid(self, rows: int, columns: int, square: bool = False) -> tuple[int, int]:
        """Return the rows and columns of tokens of the smaller picture: the coarser side as fine as the budget allows.

        Args:
            rows: of the tokens of the picture as it is.
            columns: of them.
            square: whether it must have as many rows as columns.
        """
        count = share(self.keep, rows * columns, 1, least=1)
        fitting = [
            (height, min(columns, count // height))
            for height in range(1, min(rows, count) + 1)
            if not square or count // height >= height
        ]
        if square:
            return (fitting[-1][0],) * 2
        return max(fitting, key=lambda size: (min(size[0] / rows, size[1] / columns), size[0] * size[1]))

    def budget(self, count: int, has_cls: bool, crops: int = 1) -> tuple[int, int]:
        """Keep all tokens of the smaller picture."""
        return count, 0

    def choose(self, tokens: VisualTokens, k: int) -> Tensor:
        """Choose all."""
        return torch.arange(k).expand(tokens.batch, -1)
