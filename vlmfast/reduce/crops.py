"""Token reduction of LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision, which see an image as an overview and crops.

Each crop is reduced by itself, with a budget of its own, before the projector. An image whose crops LLaVA-OneVision
makes smaller once they are encoded, such as a large photograph, is reduced as a whole. Videos stay as they are.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.reduce.images import ReducedImage
from vlmfast.reduce.methods import Method
from vlmfast.reduce.packing import MIXED, Crops, in_model_order, pack_numbers, packer, published, together
from vlmfast.reduce.towers import EncodedImages, encode, setting


def reduce_next(model: nn.Module, inputs: Mapping[str, Any], method: Method) -> list[ReducedImage]:
    """The images of LLaVA-NeXT and LLaVA-NeXT-Video, packed as the method says.

    In the model's own packing there is no place for a CLS token: it is left out, and all of the budget are patches.
    """
    strategy = setting(model, inputs, "vision_feature_select_strategy")
    return _reduce(model, inputs, method, method.packing, vision_feature_select_strategy=strategy)


def reduce_onevision(model: nn.Module, inputs: Mapping[str, Any], method: Method) -> list[ReducedImage]:
    """The images of LLaVA-OneVision, always in the model's own packing.

    With ``vision_aspect_ratio="anyres_max_9"`` the model makes a grid of more than about 9 crops smaller, so that a
    token is made of several patches: `vlmfast.reduce.packing.together` reduces such an image after the projector, with
    the budget of all its crops.
    """
    ratio = setting(model, inputs, "vision_aspect_ratio")
    return _reduce(model, inputs, method, "model", vision_aspect_ratio=ratio)


def _reduce(
    model: nn.Module, inputs: Mapping[str, Any], method: Method, packing: str, **settings: Any
) -> list[ReducedImage]:
    sizes: list[list[int]] = torch.as_tensor(inputs["image_sizes"]).tolist()
    counts = _crop_counts(model, sizes, inputs.get("batch_num_images"))
    config: Any = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    packs = [packer(model.pack_image_features, size, **settings) for size in sizes]  # type: ignore[arg-type]
    packed = [pack_numbers(pack, count, side**2) for pack, count in zip(packs, counts, strict=True)]
    smaller = [index for index, numbers in enumerate(packed) if (numbers == MIXED).any()]

    encoded = _encode(model, inputs, counts, side)
    tokens = encoded.visual_tokens()
    tokens = replace(
        tokens,
        has_cls=tokens.has_cls and packing == "published",
        scores=functools.cache(tokens.scores),  # asked for by each image that is made smaller
        metric=functools.cache(tokens.metric),
    )
    method.checked_budget(tokens)  # one that does not fit a crop is refused, whatever becomes of the crops
    project: Any = model.multi_modal_projector
    newline: Any = model.image_newline
    images: dict[int, ReducedImage] = {}
    if len(smaller) < len(sizes):
        selection = method.select(tokens)
        rows = project(encoded.reduce(selection))
        places = selection.positions().to(rows.device)  # the tower may be on another one
        arrange = in_model_order if packing == "model" else published
        parts = zip(sizes, packed, torch.split(rows, counts), torch.split(places, counts), strict=True)
        for index, (size, numbers, crop_rows, crop_places) in enumerate(parts):
            if index not in smaller:
                grid = _grid(model, size)
                crops = Crops(crop_rows, crop_places, selection.contextual, grid, side, numbers, newline)
                images[index] = arrange(crops)
    if smaller:
        # of all crops at once, as the model has it: a projector may round otherwise for another number of rows
        features, ends = project(encoded.patches), list(itertools.accumulate(counts))
        for index in smaller:
            start, stop = ends[index] - counts[index], ends[index]
            crops_of_image = tokens.part(start, stop)
            images[index] = together(packs[index], features[start:stop], newline, packed[index], crops_of_image, method)
    return [images[index] for index in range(len(sizes))]


def _encode(model: nn.Module, inputs: Mapping[str, Any], counts: list[int], side: int) -> EncodedImages:
    """Run the tower on the crops of all images, one after the other."""
    pixels: Tensor = inputs["pixel_values"]
    if pixels.dim() == 5:  # the crops of each image, padded to one number
        pixels = torch.cat([crops[:count] for crops, count in zip(pixels, counts, strict=True)])
    if pixels.dim() != 4 or len(pixels) != sum(counts):
        raise ValueError(
            f"pixel_values must hold {counts} crops, as image_sizes say, got {tuple(inputs['pixel_values'].shape)}"
        )
    encoded = encode(model.vision_tower, pixels, setting(model, inputs, "vision_feature_layer"))  # type: ignore[arg-type]
    cut = setting(model, inputs, "vision_feature_select_strategy") == "default"
    if cut != encoded.has_cls or encoded.patches.shape[1] != side**2:
        raise ValueError(
            f"the visual tokens must be the {side} x {side} patches of a crop, but {encoded.patches.shape[1]} patches "
            f"{'and a CLS token' if encoded.has_cls else 'without a CLS token'} were encoded, and "
            f"vision_feature_select_strategy {'cuts off' if cut else 'does not cut off'} the first token"
        )
    return encoded


def _crop_counts(model: nn.Module, sizes: list[list[int]], images_of_prompt: Any) -> list[int]:
    """How many crops each image has. LLaVA-OneVision does not crop the images of a prompt that has several."""
    config: Any = model.config
    count = _upstream(model).image_size_to_num_patches
    numbers = [] if images_of_prompt is None else [int(number) for number in images_of_prompt]
    cropped = [number == 1 for number in numbers for _ in range(number)] or [True] * len(sizes)
    return [
        count(size, config.image_grid_pinpoints, config.vision_config.image_size) if is_cropped else 1
        for size, is_cropped in zip(sizes, cropped, strict=True)
    ]


def _grid(model: nn.Module, size: list[int]) -> tuple[int, int]:
    """(height, width) of the crops of an image of that size."""
    config: Any = model.config
    shape = _upstream(model).get_anyres_image_grid_shape
    height, width = shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    return height, width


def _upstream(model: nn.Module) -> Any:
    """The module of transformers that the model's class comes from, also where the class was replaced by a subclass."""
    names = [cls.__module__ for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models.")]
    return sys.modules[names[0]]
