"""The order of an image's tokens, where the image is an overview and a grid of crops: LLaVA-NeXT's and OneVision's.

Both models lay the crops side by side, cut off the padding, and put a learned token after each row (a newline). Which
patch goes where is asked of the model itself: its own packing is run on the numbers of the patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfast.reduce.images import ReducedImage

NEWLINE = -1


@dataclass(frozen=True)
class Crops:
    """One image after its crops, T of them, the overview first, were reduced to r rows each.

    Attributes:
        rows: (T, r, D), projected: the CLS token where it is kept, the kept patches, the contextual tokens.
        places: (T, k + C) int64, where the patches stood in their crop; of a contextual token where its target did.
        contextual: C.
        grid: (height, width) of the other crops.
        side: patches along a side of a crop.
        packed: (L,) int64 on the CPU, what the model's packing makes of the T * side**2 patches: their numbers, and
            `NEWLINE`.
        newline: (D,).
    """

    rows: Tensor
    places: Tensor
    contextual: int
    grid: tuple[int, int]
    side: int
    packed: Tensor
    newline: Tensor

    def image(self, order: Tensor, columns: Tensor, shown: Tensor) -> ReducedImage:
        """The image of these rows, counted over all crops and after them the newline; `shown` (T, k + C) bool."""
        table = torch.cat([self.rows.flatten(0, 1), self.newline[None].to(self.rows)])
        cut = self.places.shape[1] - self.contextual
        pairs = [(row[:cut][seen[:cut]], row[cut:][seen[cut:]]) for row, seen in zip(self.places, shown, strict=True)]
        return ReducedImage(
            features=table[order],
            columns=columns,
            total=len(self.packed),
            levels=(),
            grid=(self.side, self.side),
            kept=tuple(kept for kept, _ in pairs),
            merged=tuple(targets for _, targets in pairs),
        )


def published(crops: Crops) -> ReducedImage:
    """VisionZip's order: the overview's rows; of the other crops the kept patches in raster order over the whole grid,
    then their CLS tokens crop by crop, then their contextual tokens crop by crop.

    There are no newlines, and padding counts as image. The placeholders are all alike: the first ones stay.

    Raises:
        ValueError: if the image has fewer placeholders than tokens are left.
    """
    count, rows, _ = crops.rows.shape
    chosen = crops.places.shape[1] - crops.contextual
    numbers = torch.arange(count * rows, device=crops.places.device).view(count, rows)
    overview, others = numbers[0], numbers[1:]
    cls, kept, merged = torch.split(others, [rows - chosen - crops.contextual, chosen, crops.contextual], 1)
    _, width = crops.grid
    crop = torch.arange(count - 1, device=numbers.device)[:, None]
    patch = crops.places[1:, :chosen]
    y = crop // width * crops.side + patch // crops.side
    x = crop % width * crops.side + patch % crops.side
    raster = (y * width * crops.side + x).flatten().argsort()
    order = torch.cat([overview, kept.flatten()[raster], cls.flatten(), merged.flatten()])
    if len(order) > len(crops.packed):
        raise ValueError(
            f"{len(order)} visual tokens are left of an image of {count} crops, which has {len(crops.packed)} "
            f'placeholders in the prompt: choose smaller budgets, or packing="model"'
        )
    columns = torch.arange(len(order), device=order.device)
    return crops.image(order, columns, torch.ones_like(crops.places, dtype=torch.bool))


def in_model_order(crops: Crops) -> ReducedImage:
    """The model's own order, cut by position: each row stays where the model's packing puts its patch, a contextual
    token where it puts its target. All newlines stay.

    What the model cuts off as padding is left out, be it a kept patch or a contextual token whose target is padding:
    such a token stands for patches that look like padding.
    """
    count, rows, _ = crops.rows.shape
    number = torch.arange(count, device=crops.places.device)[:, None]
    row_of = crops.places.new_full((count * crops.side**2,), -1)
    row_of[number * crops.side**2 + crops.places] = number * rows + torch.arange(rows, device=row_of.device)
    packed = crops.packed.to(row_of.device)
    order = torch.where(packed == NEWLINE, count * rows, row_of[packed.clamp(min=0)])
    columns = (order >= 0).nonzero().flatten()
    used = torch.zeros(count * rows + 1, dtype=torch.bool, device=order.device)
    used[order[columns]] = True
    return crops.image(order[columns], columns, used[:-1].view(count, rows))


def pack_numbers(pack: Callable[..., Any], crops: int, patches: int, size: list[int], **settings: Any) -> Tensor | None:
    """Run a model's ``pack_image_features`` on the numbers of the patches of one image.

    Args:
        pack: the method.
        crops: T, how many crops the image has.
        patches: how many patches a crop has.
        size: (height, width) of the image.
        settings: the method's other arguments.

    Returns:
        (L,) int64 on the CPU, as `Crops` has it; None if the model mixes patches, because it makes the image smaller.
    """
    numbers = torch.arange(crops * patches, dtype=torch.float64).view(crops, patches)
    # a mean of numbers may be a number as well, but then it is not the root of the mean of their squares
    channels = torch.stack([numbers, numbers**2], -1)
    newline = torch.tensor([float(NEWLINE), float(NEWLINE) ** 2], dtype=torch.float64)
    packed, _ = pack([channels], [size], image_newline=newline, **settings)
    first, square = packed[0].unbind(1)
    return first.long() if torch.equal(first**2, square) else None
