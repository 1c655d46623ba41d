"""Prompts of tiny Qwen-VL models with images and videos, and which of their columns a reduction keeps."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.helpers import tiny_models as parts
from vlmfast.reduce import ReducedImage

Grid = tuple[int, int, int]
Part = int | Grid | list[Grid]  # a text token, the grid of an image in patches, or a list with the grid of a video
# Grids in patches: 4 frames of 24 visual tokens, 3 frames of 15, 1 frame of 24.
LONG, TALL, STILL = [(4, 8, 12)], [(3, 10, 6)], [(1, 6, 16)]
IMAGE = (1, 6, 14)
ROWS: tuple[Sequence[Part], ...] = ((10, IMAGE, 11, LONG, 12, 13), (14, TALL, 15, LONG, 16), (17, IMAGE, 18), (19, 20))


def separate(model: Any) -> bool:
    """Tell whether each frame has its own run of placeholders behind a timestamp, as from Qwen3-VL on."""
    return "qwen2" not in model.config.model_type


def ids_of(model: Any, prompt: Sequence[Part]) -> list[int]:
    """Make the ids of a prompt."""
    ids = [1]
    for part in prompt:
        if isinstance(part, int):
            ids.append(part)
        elif isinstance(part, tuple):
            ids += [parts.VISION_START, *[parts.IMAGE] * (math.prod(part) // 4), parts.VISION_END]
        else:
            (grid,) = part
            frames = grid[0] if separate(model) else 1
            for frame in range(frames):
                stamp = [40 + frame] if separate(model) else []
                run = [parts.VIDEO] * (math.prod(grid) // 4 // frames)
                ids += [*stamp, parts.VISION_START, *run, parts.VISION_END]
    return ids


def inputs_of(model: Any, *prompts: Sequence[Part]) -> dict[str, Tensor]:
    """Make the inputs of a batch, padded on the left."""
    rows = [ids_of(model, prompt) for prompt in prompts]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    images = [part for prompt in prompts for part in prompt if isinstance(part, tuple)]
    videos = [part[0] for prompt in prompts for part in prompt if isinstance(part, list)]
    for pixels, name, grids in (
        ("pixel_values", "image_grid_thw", images),
        ("pixel_values_videos", "video_grid_thw", videos),
    ):
        if grids:
            patches = parts.pixels(sum(map(math.prod, grids)), 3 * 2 * 4 * 4)
            inputs[pixels] = patches.to(next(model.parameters()).dtype)
            inputs[name] = torch.tensor(grids)
    names = inspect.signature(model.base_model.get_rope_index).parameters
    if "mm_token_type_ids" in names:
        inputs["mm_token_type_ids"] = (ids == parts.IMAGE).int() + 2 * (ids == parts.VIDEO).int()
    if "second_per_grid_ts" in names and videos:
        inputs["second_per_grid_ts"] = torch.tensor([0.5 + number for number in range(len(videos))])
    return inputs


def axes_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the (3, B, L) positions of the full prompt, by the model's own method."""
    names = inspect.signature(model.base_model.get_rope_index).parameters
    found: Tensor = model.base_model.get_rope_index(**{k: v for k, v in inputs.items() if k in names})[0]
    return found


def left_of(ids: Tensor, images: Sequence[ReducedImage], videos: Sequence[ReducedImage]) -> Tensor:
    """Return a (B, L) bool mask of the columns that remain: all but the removed placeholders; padding remains."""
    waiting = {parts.IMAGE: _flags(images), parts.VIDEO: _flags(videos)}
    rows = [[waiting[token].pop(0) if token in waiting else True for token in row] for row in ids.tolist()]
    assert not any(waiting.values())
    return torch.tensor(rows)


def _flags(images: Sequence[ReducedImage]) -> list[bool]:
    return [column in image.columns.tolist() for image in images for column in range(image.total)]
