"""Token reduction of LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision, which see an image as an overview and crops.

Each crop is reduced by itself, with a budget of its own, before the projector. Videos stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.reduce.images import ReducedImage
from vlmfast.reduce.methods import Method
from vlmfast.reduce.packing import Crops, in_model_order, pack_numbers, published
from vlmfast.reduce.towers import EncodedImages, encode, setting


def reduce_next(model: nn.Module, inputs: Mapping[str, Any], method: Method) -> list[ReducedImage]:
    """The images of LLaVA-NeXT and LLaVA-NeXT-Video, packed as the method says.

    In the model's own packing there is no place for a CLS token: it is left out, and all of the budget are patches.
    """
    strategy = setting(model, inputs, "vision_feature_select_strategy")
    return _reduce(model, inputs, method, method.packing, vision_feature_select_strategy=strategy)


def reduce_onevision(model: nn.Module, inputs: Mapping[str, Any], method: Method) -> list[ReducedImage]:
    """The images of LLaVA-OneVision, always in the model's own packing."""
    ratio = setting(model, inputs, "vision_aspect_ratio")
    return _reduce(model, inputs, method, "model", vision_aspect_ratio=ratio)


def _reduce(
    model: nn.Module, inputs: Mapping[str, Any], method: Method, packing: str, **settings: Any
) -> list[ReducedImage]:
    sizes: list[list[int]] = torch.as_tensor(inputs["image_sizes"]).tolist()
    counts = _crop_counts(model, sizes, inputs.get("batch_num_images"))
    config: Any = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    packed = []
    for index, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        numbers = pack_numbers(model.pack_image_features, count, side**2, size, **settings)  # type: ignore[arg-type]
        if numbers is None:
            raise ValueError(
                f"image {index} of {size[0]} x {size[1]} is made smaller after its crops were encoded, and its tokens "
                f"are mixed of several patches then: resize it beforehand, or give model and processor a larger "
                f"vision_aspect_ratio than {settings['vision_aspect_ratio']!r}, such as 'anyres_max_36'"
            )
        packed.append(numbers)

    encoded = _encode(model, inputs, counts, side)
    tokens = encoded.visual_tokens()
    selection = method.select(replace(tokens, has_cls=False) if packing == "model" else tokens)
    rows = model.multi_modal_projector(encoded.reduce(selection))  # type: ignore[operator]
    places = selection.positions().to(rows.device)  # the tower may be on another one
    parts = zip(sizes, packed, torch.split(rows, counts), torch.split(places, counts), strict=True)
    newline: Any = model.image_newline
    arrange = in_model_order if packing == "model" else published
    return [
        arrange(Crops(crop_rows, crop_places, selection.contextual, _grid(model, size), side, numbers, newline))
        for size, numbers, crop_rows, crop_places in parts
    ]


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
