"""A picture that shows which visual tokens were kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEPT, MERGED = (0, 158, 115), (230, 159, 0)  # green and orange that differ for colour-blind people too
DIMMED = 0.3  # contrast of dropped tokens
PANEL = 480  # pixels of width
CAPTION = 22  # pixels of height
TOUCH = 2  # crops side by side may seem to overlap by so many pixels, because their boxes are measured

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of an image; outside of it where padded


class Crop(NamedTuple):
    """The part of an image that a tower saw, and the tokens that were kept; the arguments are those of `overlay`."""

    kept: Tensor | Iterable[int]
    grid: Sequence[int]
    merged: Tensor | Iterable[int] = ()
    box: Box | None = None


def overlay(
    image: Any,
    kept: Tensor | Iterable[int],
    grid: Sequence[int],
    merged: Tensor | Iterable[int] = (),
    box: Box | None = None,
) -> Any:
    """Draw over an image the visual tokens that were kept, and those that stand for merged ones.

    Kept ones stay as they are, in a green frame; the targets that others were merged into get an orange one; the rest
    is dimmed.

    Args:
        image: a PIL image.
        kept: the positions of the kept tokens in the grid, counted row by row.
        grid: (height, width), the number of visual tokens along each side.
        merged: the positions of the targets in the grid.
        box: (left, top, right, bottom), the part of the image that the grid covers, in pixels, such as the centre that
            a processor cuts out; None where it covers all.

    Returns:
        A new PIL image in RGB, of the size of ``image``.

    Raises:
        TypeError: if ``image`` is not a PIL image. ValueError: for a grid that is not two positive numbers, a position
            outside of it, or a box without an area.
    """
    return _draw_panel(image, [Crop(kept, grid, merged, box)])


def draw(image: Any, crops: Iterable[Crop]) -> Any:
    """Draw crops over an image as `overlay` does; crops that do not overlap share one copy of the image.

    Returns:
        The copies, one below the other, in the order of their first crops.
    """
    from PIL import Image

    panels: list[list[Crop]] = []
    for crop in crops:
        fitting = (panel for panel in panels if not any(_overlap(crop.box, other.box) for other in panel))
        if (panel := next(fitting, None)) is None:
            panels.append(panel := [])
        panel.append(crop)
    drawn = [_draw_panel(image, panel) for panel in panels]
    width, height = image.size
    whole = Image.new("RGB", (width, height * len(drawn)))
    for index, panel_image in enumerate(drawn):
        whole.paste(panel_image, (0, index * height))
    return whole


def sheet(image: Any, panels: Sequence[tuple[str, Sequence[Crop]]], width: int = PANEL, most: int = 3) -> Any:
    """Draw several choices over one image each, as `draw` does, side by side, with a caption below each.

    Args:
        image: a PIL image.
        panels: the caption and the crops of each, at least one.
        width: of each, in pixels.
        most: how many stand side by side.
    """
    from PIL import Image, ImageDraw

    made = []
    for caption, crops in panels:
        drawn = draw(image, crops)
        drawn = drawn.resize((width, max(1, round(drawn.height * width / drawn.width))))
        panel = Image.new("RGB", (width, drawn.height + CAPTION), "white")
        panel.paste(drawn, (0, 0))
        ImageDraw.Draw(panel).text((4, drawn.height + 2), caption, fill="black", font_size=15)
        made.append(panel)
    across = min(len(made), most)
    lines = [made[start : start + across] for start in range(0, len(made), across)]
    heights = [max(panel.height for panel in line) for line in lines]
    result = Image.new("RGB", (across * width, sum(heights)), "white")
    for number, line in enumerate(lines):
        for place, panel in enumerate(line):
            result.paste(panel, (place * width, sum(heights[:number])))
    return result


def _overlap(one: Box | None, other: Box | None) -> bool:
    if one is None or other is None:
        return True
    return all(min(one[axis + 2], other[axis + 2]) - max(one[axis], other[axis]) > TOUCH for axis in (0, 1))


def _draw_panel(image: Any, crops: list[Crop]) -> Any:
    from PIL import Image, ImageChops, ImageDraw

    if not isinstance(image, Image.Image):
        raise TypeError(f"image must be a PIL image, got {type(image).__name__}")
    picture = image.convert("RGB")
    frames = [frame for crop in crops for frame in _frames(crop, picture.size)]
    grey = Image.new("RGB", picture.size, (235, 235, 235))
    shown = Image.new("L", picture.size, round(255 * DIMMED))
    for place, _, _ in frames:
        shown.paste(255, place)
    result = Image.composite(picture, ImageChops.blend(picture.convert("L").convert("RGB"), grey, 0.5), shown)
    pen = ImageDraw.Draw(result)
    for (left, top, right, bottom), colour, line in frames:
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=line)
    return result


def _frames(crop: Crop, size: tuple[int, int]) -> list[tuple[tuple[int, int, int, int], tuple[int, int, int], int]]:
    """Return the place of each token of a crop, the colour of its frame, and how thick that is."""
    if len(crop.grid) != 2 or min(crop.grid) < 1:
        raise ValueError(f"grid must be (height, width), both at least 1, got {tuple(crop.grid)}")
    left, top, right, bottom = crop.box or (0, 0, *size)
    if not (left < right and top < bottom):
        raise ValueError(f"box must be (left, top, right, bottom) with an area, got {crop.box}")
    rows, columns = crop.grid
    # neighbours meet whatever the size of the image
    xs = [round(left + column * (right - left) / columns) for column in range(columns + 1)]
    ys = [round(top + row * (bottom - top) / rows) for row in range(rows + 1)]
    line = max(1, int(min((right - left) / columns, (bottom - top) / rows)) // 12)
    return [
        ((xs[column], ys[row], xs[column + 1], ys[row + 1]), colour, line)
        for name, positions, colour in (("kept", crop.kept, KEPT), ("merged", crop.merged, MERGED))
        for row, column in (divmod(position, columns) for position in _positions(name, positions, crop.grid))
    ]


def _positions(name: str, positions: Tensor | Iterable[int], grid: Sequence[int]) -> list[int]:
    found: list[int] = torch.as_tensor(positions if isinstance(positions, Tensor) else list(positions)).long().tolist()
    outside = [position for position in found if not 0 <= position < grid[0] * grid[1]]
    if outside:
        raise ValueError(f"{name} must be positions within a grid of {grid[0]} x {grid[1]} tokens, got {outside[0]}")
    return found
