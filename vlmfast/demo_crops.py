"""Finds the parts of a picture that a processor's crops show, by processing pictures with known pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmfast.reduce.drawing import Box


def find_boxes(process: Callable[[Any], Any], size: tuple[int, int]) -> list[Box | None] | None:
    """Find the boxes of a processor's crops in a picture of that size.

    The processor may resize, cut, tile, pad and normalise, as long as each pixel of a crop comes from the pixels of one
    place.

    Args:
        process: maps a picture to a mapping with ``pixel_values``.
        size: (width, height) of the picture.

    Returns:
        The box of each crop, None for one that is all padding; or None if there are no crops but patches of the whole
        picture, as in Qwen-VL.
    """
    from PIL import Image

    width, height = size
    black, white = torch.zeros(1, 1), torch.full((1, 1), 255)
    across, down = torch.linspace(0, 255, width), torch.linspace(0, 255, height)[:, None]
    # rounded up or down at random, so that the mean of many pixels has more than 8 bits
    chance = torch.rand(height, width, generator=torch.Generator().manual_seed(0))
    seen = []
    for channels in ((black,) * 3, (white,) * 3, (across, down, down)):
        picture = torch.stack([(level + chance).to(torch.uint8) for level in channels], 2)
        pixels: Tensor = process(Image.fromarray(picture.numpy()))["pixel_values"]
        if pixels.dim() < 4:
            return None
        seen.append(pixels.flatten(0, -4).double())
    black, white, known = seen
    span = white - black
    shown = span.abs() > span.abs().amax() / 2  # padding is equal in all pictures
    place = (known - black) / torch.where(shown, span, 1)
    boxes: list[Box | None] = []
    for crop, mask in zip(place, shown, strict=True):
        left_right = _ends(crop[0].T, mask[0].T, width)
        top_bottom = _ends(crop[1], mask[1], height)
        if left_right is None or top_bottom is None:
            boxes.append(None)
        else:
            boxes.append((left_right[0], top_bottom[0], left_right[1], top_bottom[1]))
    return boxes


def _ends(place: Tensor, shown: Tensor, length: int) -> tuple[float, float] | None:
    """Fit a line to the places of a crop's rows, as shares of a picture's length: where the crop begins and ends.

    The first and last rows are left out, because they are not interpolated. One row determines no line.
    """
    if length == 1:  # no place differs from another
        return (0.0, 1.0) if bool(shown.any()) else None
    rows = shown.any(1).nonzero().flatten()
    rows = rows[len(rows) // 4 : len(rows) - len(rows) // 4]
    if len(rows) < 2:
        return None
    values = (place * shown)[rows].sum(1) / shown[rows].sum(1) * (length - 1) + 0.5  # centres of pixels
    centres = rows + 0.5
    slope = ((centres - centres.mean()) * (values - values.mean())).sum() / ((centres - centres.mean()) ** 2).sum()
    start = values.mean() - slope * centres.mean()
    return round(float(start), 2), round(float(start + slope * len(place)), 2)
