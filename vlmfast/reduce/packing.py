"""The order of an image's tokens, where the image is an overview and a grid of crops: LLaVA-NeXT's and OneVision's.

Both models lay the crops side by side, cut off the padding, and put a learned token after each row (a newline). Which
patch goes where is asked of the model itself: its own packing is run on the numbers of the patches.

LLaVA-OneVision makes the grid of crops smaller where it is too large, by interpolation. A token is not one patch then,
and such an image is reduced as a whole, after its packing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfast.reduce.images import ReducedImage
from vlmfast.reduce.methods import Method, VisualTokens

NEWLINE, MIXED = -1, -2

Packer = Callable[[Tensor, Tensor], Tensor]  # crops (T, patches, C) and a newline (C,) -> one image (L, C)


def packer(pack: Callable[..., Any], size: list[int], **settings: Any) -> Packer:
    """A model's ``pack_image_features`` with its other arguments, for one image of that (height, width)."""
    return lambda crops, newline: pack([crops], [size], image_newline=newline, **settings)[0][0]  # type: ignore[no-any-return]


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
            `NEWLINE`. `MIXED` is none of them.
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


def together(
    pack: Packer, features: Tensor, newline: Tensor, packed: Tensor, crops: VisualTokens, method: Method
) -> ReducedImage:
    """An image that the model makes smaller: its packed tokens are reduced at once, with the budget of all its crops.

    Scores and metric are packed as the features are, in float32. Tokens are merged as they are packed, so after the
    projector. A contextual token takes the place of its target, and all newlines stay.

    Args:
        pack: the model's packing of this image.
        features: (T, side**2, D), the projected patches of its crops.
        newline: (D,).
        packed: (L,) int64 on the CPU, as `pack_numbers` gives it.
        crops: what a method may ask about the T crops.
        method: how they are reduced.

    Returns:
        The image. Its ``grid``, ``kept`` and ``merged`` are about the overview alone, which shows all of the image.
    """
    is_newline = (packed == NEWLINE).to(features.device)
    patches, newlines = (~is_newline).nonzero().flatten(), is_newline.nonzero().flatten()

    def as_packed(channels: Tensor) -> Tensor:
        """(T, side**2, M) -> (1, N, M), without newlines."""
        channels = channels.to(features.device, torch.float32)
        return pack(channels, channels.new_zeros(channels.shape[2]))[None, patches]

    tokens = VisualTokens(
        batch=1,
        count=len(patches),
        device=features.device,
        has_cls=False,
        scores=lambda: as_packed(crops.scores().unsqueeze(2)).squeeze(2),
        metric=lambda: as_packed(crops.metric()),
        crops=len(features),
    )
    selection = method.select(tokens)
    whole = pack(features, newline)
    rows = torch.cat([selection.apply(whole[None, patches])[0], whole[newlines]])
    places = patches[selection.positions()[0]]
    columns, order = torch.cat([places, newlines]).sort()
    area, chosen = features.shape[1], selection.kept.shape[1]
    side = math.isqrt(area)
    kept, merged = (part[part < area] for part in (places[:chosen], places[chosen:]))  # the overview is packed first
    return ReducedImage(rows[order], columns, len(packed), (), (side, side), (kept,), (merged,))


def pack_numbers(pack: Packer, crops: int, patches: int) -> Tensor:
    """Run a model's packing on the numbers of the patches of one image.

    Args:
        pack: the model's packing of this image.
        crops: T, how many crops the image has.
        patches: how many patches a crop has.

    Returns:
        (L,) int64 on the CPU: numbers, `NEWLINE`, and `MIXED` for a token made of several patches, as there are where
        the model makes the image smaller.
    """
    numbers = torch.arange(crops * patches, dtype=torch.float64).view(crops, patches)
    # a mean of numbers may be a number as well, but then it is not the root of the mean of their squares
    channels = torch.stack([numbers, numbers**2], -1)
    newline = torch.tensor([float(NEWLINE), float(NEWLINE) ** 2], dtype=torch.float64)
    first, square = pack(channels, newline).unbind(1)
    return torch.where(first**2 == square, first, MIXED).long()
