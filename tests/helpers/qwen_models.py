"""Tiny Qwen-VL models whose attention is not uniform, and prompts with images of several sizes."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import tiny_models as parts
from tests.helpers.patches_models import tiny

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
Grid = tuple[int, int, int]
# Grids in patches, of 24, 24, 21 and 15 visual tokens. Windows at the edges of WIDE and TALL are smaller.
SMALL, BROAD, WIDE, TALL = (1, 8, 12), (1, 6, 16), (1, 6, 14), (1, 10, 6)


def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Make a tiny model whose last vision block attends to some patches much more than to others."""
    model, _ = tiny(name)
    if not hasattr(model, "_prepare_position_ids_for_generation"):
        pytest.skip("visual tokens are reduced from transformers 5.17 on")
    with torch.no_grad():
        model.model.visual.blocks[-1].attn.qkv.weight.mul_(20.0)
    return model.to(dtype)


def inputs_of(model: Any, *rows: tuple[Grid, ...], video: Grid | None = None) -> dict[str, Tensor]:
    """Make prompts with images of these grids of patches; a video precedes the images of the first prompt.

    Each text is longer than the one before; shorter prompts are padded on the left.
    """
    prompts = []
    for number, grids in enumerate(rows):
        ids = [1, 10] + [20] * 5 * number
        if video is not None and not number:
            # From Qwen3-VL on, each frame has its own run of placeholders, with a timestamp before it.
            frames, area = (
                (1, math.prod(video)) if "qwen2" in model.config.model_type else (video[0], math.prod(video[1:]))
            )
            for frame in range(frames):
                ids += [30 + frame, parts.VISION_START, *[parts.VIDEO] * (area // 4), parts.VISION_END]
        for grid in grids:
            ids += [parts.VISION_START, *[parts.IMAGE] * (math.prod(grid) // 4), parts.VISION_END, 11]
        prompts.append([*ids, 12 + number, 13])
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    vision = {"": [grid for row in rows for grid in row], "_videos": [] if video is None else [video]}
    for kind, grids in vision.items():
        if grids:
            patches = parts.pixels(sum(map(math.prod, grids)), 3 * 2 * 4 * 4)
            inputs["pixel_values" + kind] = patches.to(next(model.parameters()).dtype)
            inputs["video_grid_thw" if kind else "image_grid_thw"] = torch.tensor(grids)
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (ids == parts.IMAGE).int() + 2 * (ids == parts.VIDEO).int()
    return inputs
