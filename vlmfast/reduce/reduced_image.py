"""An image or a video of a prompt after its visual tokens were reduced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlmfast.reduce.tokens import Grid, Selection


@dataclass(frozen=True)
class ReducedImage:
    """One image, or one video, of a prompt after its tokens were reduced.

    Attributes:
        features: (n, D), for the language model, in the order of the prompt.
        columns: (n,) int64, ascending: which of the image's placeholders stay, with their positions.
        total: the number of placeholders of the image in the full prompt.
        levels: the DeepStack features, each (n, D), if the model has them.
        grid: (height, width) of the visual tokens of each crop, for `vlmfast.reduce.overlay`.
        kept: for each crop, or frame of a video, the positions of the kept tokens in its grid, in raster order.
        merged: for each of these the positions of the targets that others were merged into. If LLaVA-OneVision makes an
            image smaller, grid, kept and merged describe the overview alone.
        kind: "image" or "video".
    """

    features: Tensor
    columns: Tensor
    total: int
    levels: tuple[Tensor, ...]
    grid: tuple[int, int]
    kept: Sequence[Tensor]
    merged: Sequence[Tensor]
    kind: str = "image"

    def detach(self) -> ReducedImage:
        """Return it without gradients."""
        levels = tuple(level.detach() for level in self.levels)
        return replace(self, features=self.features.detach(), levels=levels)


def cut(
    selection: Selection,
    features: Sequence[Tensor],
    grid: Grid,
    total: int,
    in_raster_order: bool = True,
    kind: str = "image",
) -> list[ReducedImage]:
    """Make `ReducedImage`s from the selected tokens of B images of one size.

    Args:
        selection: the selection of their tokens.
        features: (B, n, D) at each level, DeepStack's after the first, in the order of `Selection.apply`. Without
            ``in_raster_order`` a CLS token may stand in front.
        grid: the grid of each image.
        total: how many placeholders each image has.
        in_raster_order: whether each row takes the placeholder of its token, a merged one that of its target; otherwise
            the rows stay in their order and take the first placeholders.
        kind: "image" or "video".
    """
    positions = selection.positions().to(features[0].device)  # the tower may be on another one
    kept, merged = torch.split(positions, [selection.kept.shape[1], selection.contextual], 1)
    if in_raster_order:
        columns, order = positions.sort(1)
        features = [level.take_along_dim(order[..., None], 1) for level in features]
    else:
        columns = torch.arange(features[0].shape[1], device=positions.device).expand(len(positions), -1)
    return [
        ReducedImage(
            features=rows[0],
            columns=own,
            total=total,
            levels=rows[1:],
            grid=grid[1:],
            kept=_by_frame(kept_positions, grid),
            merged=_by_frame(targets, grid),
            kind=kind,
        )
        for rows, own, kept_positions, targets in zip(zip(*features, strict=True), columns, kept, merged, strict=True)
    ]


def _by_frame(positions: Tensor, grid: Grid) -> Sequence[Tensor]:
    return (positions,) if grid[0] == 1 else ByFrame(positions, grid)


@dataclass(frozen=True)
class ByFrame(Sequence[Tensor]):
    """Positions in a grid, frame by frame; their number in a frame is read from the device when it is first needed."""

    positions: Tensor
    grid: Grid

    def __len__(self) -> int:
        return self.grid[0]

    def __getitem__(self, frame: Any) -> Any:
        if isinstance(frame, slice):
            return tuple(self[number] for number in range(*frame.indices(len(self))))
        area = self.grid[1] * self.grid[2]
        number = range(len(self))[frame]
        return self.positions[self.positions // area == number] % area
