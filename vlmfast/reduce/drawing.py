"""A picture that shows which visual tokens were kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

KEPT, MERGED = (0, 158, 115), (230, 159, 0)  # green and orange that colour-blind eyes tell apart
DIMMED = 0.3  # contrast of dropped tokens


def overlay(image: Any, kept: Tensor | Iterable[int], grid: Sequence[int], merged: Tensor | Iterable[int] = ()) -> Any:
    """Draw over an image the visual tokens that were kept, and those that stand for merged ones.

    Kept ones stay as they are, in a green frame; the targets that others were merged into get an orange one; the rest
    is dimmed.

    Args:
        image: a PIL image, all of which the grid covers.
        kept: the positions of the kept tokens in the grid, counted row by row.
        grid: (height, width), the number of visual tokens along each side.
        merged: the positions of the targets in the grid.

    Returns:
        A new PIL image in RGB, of the size of ``image``.

    Raises:
        TypeError: if ``image`` is not a PIL image. ValueError: for a grid that is not two positive numbers, or a
            position outside of it.
    """
    from PIL import Image, ImageChops, ImageDraw

    if not isinstance(image, Image.Image):
        raise TypeError(f"image must be a PIL image, got {type(image).__name__}")
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid must be (height, width), both at least 1, got {tuple(grid)}")
    picture = image.convert("RGB")
    (width, height), (rows, columns) = picture.size, grid

    def corner(row: int, column: int) -> tuple[int, int]:
        """Return (x, y) of the upper left corner of a token: neighbours meet whatever the size of the image."""
        return column * width // columns, row * height // rows

    frames = [
        ((*corner(row, column), *corner(row + 1, column + 1)), colour)
        for colour, positions in ((KEPT, _positions("kept", kept, grid)), (MERGED, _positions("merged", merged, grid)))
        for row, column in (divmod(position, columns) for position in positions)
    ]
    grey = Image.new("RGB", picture.size, (235, 235, 235))
    shown = Image.new("L", picture.size, round(255 * DIMMED))
    for box, _ in frames:
        shown.paste(255, box)
    result = Image.composite(picture, ImageChops.blend(picture.convert("L").convert("RGB"), grey, 0.5), shown)
    draw, line = ImageDraw.Draw(result), max(1, min(width // columns, height // rows) // 12)
    for (left, top, right, bottom), colour in frames:
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=line)
    return result


def _positions(name: str, positions: Tensor | Iterable[int], grid: Sequence[int]) -> list[int]:
    found: list[int] = torch.as_tensor(positions if isinstance(positions, Tensor) else list(positions)).long().tolist()
    outside = [position for position in found if not 0 <= position < grid[0] * grid[1]]
    if outside:
        raise ValueError(f"{name} must be positions within a grid of {grid[0]} x {grid[1]} tokens, got {outside[0]}")
    return found
