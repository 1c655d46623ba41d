"""Smaller pictures for `vlmfast.SmallerImage`: changes the vision inputs of each family before the tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.host import on_host
from vlmfast.reduce.methods.smaller_image import SmallerImage
from vlmfast.reduce.towers import sizes_in


@dataclass(frozen=True)
class Shrunk:
    """The vision inputs of smaller pictures, and the number of tokens that each loses."""

    inputs: dict[str, Any]
    fewer: list[int]


def of_fixed_size(base: Any, inputs: Mapping[str, Any], method: SmallerImage) -> Shrunk:
    """Make the pictures of LLaVA-1.5, or the tiles of InternVL, smaller; the tower interpolates its positions."""
    pixels: Tensor = inputs["pixel_values"]
    patch = base.config.vision_config.patch_size
    patch = patch if isinstance(patch, int) else patch[0]
    # in InternVL a token is a square of patches
    side = patch * round(1 / getattr(base.config, "downsample_ratio", 1))
    rows, columns = pixels.shape[2] // side, pixels.shape[3] // side
    height, width = method.grid(rows, columns, square=True)
    smaller = _resized(pixels, (height * side, width * side))
    fewer = rows * columns - height * width
    return Shrunk({**inputs, "pixel_values": smaller, "interpolate_pos_encoding": True}, [fewer] * len(pixels))


def of_qwen(base: Any, inputs: Mapping[str, Any], method: SmallerImage) -> Shrunk:
    """Make the pictures of Qwen-VL smaller, which are rows of patches, and change the grids accordingly."""
    vision = base.visual
    merge, patch = vision.spatial_merge_size, vision.config.patch_size
    pixels: Tensor = inputs["pixel_values"]
    grid_thw = sizes_in(inputs, "image_grid_thw", "pixel_values")
    sizes: list[list[int]] = on_host(grid_thw).tolist()
    smaller, fewer = [], []
    for rows, (_, height, width) in zip(torch.split(pixels, [t * h * w for t, h, w in sizes]), sizes, strict=True):
        grid = height // merge, width // merge
        small = method.grid(*grid)
        picture = _resized(_picture(rows, grid, merge, patch), (small[0] * merge * patch, small[1] * merge * patch))
        smaller.append(_patches(picture, small, merge, patch))
        fewer.append(grid[0] * grid[1] - small[0] * small[1])
    grids = smaller_grids(base, grid_thw, method)
    return Shrunk({**inputs, "pixel_values": torch.cat(smaller), "image_grid_thw": grids}, fewer)


def smaller_grids(base: Any, grid_thw: Tensor, method: SmallerImage) -> Tensor:
    """Return the ``image_grid_thw`` of the smaller pictures, (images, 3)."""
    merge: int = base.visual.spatial_merge_size
    sizes = [
        (t, *(merge * side for side in method.grid(h // merge, w // merge))) for t, h, w in on_host(grid_thw).tolist()
    ]
    return torch.tensor(sizes, dtype=grid_thw.dtype, device=grid_thw.device)


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, C, H, W) -> (B, C, height, width), as processors do."""
    if size == tuple(pixels.shape[2:]):
        return pixels
    return F.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True).to(pixels.dtype)


def _picture(rows: Tensor, grid: tuple[int, int], merge: int, patch: int) -> Tensor:
    """Undo what the processor of Qwen-VL does with a picture, (patches, C * times * patch**2) -> (times, C, H, W).

    A picture is repeated as ``times`` equal frames. Patches are in the order of tokens, merge**2 in each.
    """
    cells = rows.view(*grid, merge, merge, 3, -1, patch, patch)
    return cells.permute(5, 4, 0, 2, 6, 1, 3, 7).reshape(
        cells.shape[5], 3, grid[0] * merge * patch, grid[1] * merge * patch
    )


def _patches(picture: Tensor, grid: tuple[int, int], merge: int, patch: int) -> Tensor:
    """Cut a picture, (times, C, H, W) -> (patches, C * times * patch**2), as the processor of Qwen-VL does."""
    cells = picture.view(len(picture), 3, grid[0], merge, patch, grid[1], merge, patch)
    return cells.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(grid[0] * grid[1] * merge**2, -1)
