"""What a family tells the rewriting of prompts about each image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ReducedImage:
    """One image of a prompt after its tokens were reduced.

    Attributes:
        features: (n, D), what the language model gets, in the order of the prompt.
        columns: (n,) int64, ascending: which of the image's placeholders in the prompt stay, so also whose positions.
        total: how many placeholders the image has in the prompt that the processor made.
        levels: the DeepStack features, each (n, D), where the model has them.
        grid: (height, width) of the visual tokens of each crop, for `vlmfast.reduce.overlay`.
        kept: for each crop the positions of the kept tokens in its grid, in raster order.
        merged: for each crop the positions of the targets of the merged ones. Where LLaVA-OneVision makes an image
            smaller, its tokens are those of no crop but the overview's: these three are about that alone.
    """

    features: Tensor
    columns: Tensor
    total: int
    levels: tuple[Tensor, ...]
    grid: tuple[int, int]
    kept: tuple[Tensor, ...]
    merged: tuple[Tensor, ...]
