"""The reducer of each model type: it encodes the images of a prompt and reduces their visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlmfast.reduce.families import internvl, llava, llava_next, llava_videos, qwen, shrinking
from vlmfast.reduce.families.shrinking import Shrunk
from vlmfast.reduce.methods.smaller_image import SmallerImage
from vlmfast.reduce.reduced_image import ReducedImage


@dataclass(frozen=True)
class Reducer:
    """The functions that reduce the images and videos of one type of model."""

    # (the base model, the vision inputs, the method, a function that returns the text of images) -> the images in
    # prompt order; the tower runs once, as configured
    reduce: Callable[..., list[ReducedImage]]
    # the same for videos, or None if videos are not reduced
    reduce_videos: Callable[..., list[ReducedImage]] | None = None
    videos_end_with_newline: bool = False  # they are then one tensor (videos, tokens, D), not a list
    # makes pictures smaller before the tower, or None if the number of crops depends on their size
    shrink: Callable[[Any, Mapping[str, Any], SmallerImage], Shrunk] | None = None
    one_tensor: bool = False  # whether get_image_features gives images as one tensor (images, tokens, D), not as a list

    def reduce_smaller(self, base: Any, inputs: Mapping[str, Any], method: SmallerImage) -> list[ReducedImage]:
        """Make the pictures smaller and encode them; their tokens take the first placeholders of each."""
        if self.shrink is None:
            raise ValueError(no_crops(method, type(base).__name__))
        smaller = self.shrink(base, inputs, method)
        images = self.reduce(base, smaller.inputs, method)
        return [replace(image, total=image.total + fewer) for image, fewer in zip(images, smaller.fewer, strict=True)]


def no_crops(method: SmallerImage, name: str) -> str:
    """Say why the pictures of the model of that name cannot be made smaller here."""
    return (
        f"{method} cannot make the pictures of {name} smaller, which are seen as crops, more of them the larger they "
        f"are: give its processor a smaller picture"
    )


QWEN = Reducer(qwen.reduce, qwen.reduce_videos, shrink=shrinking.of_qwen)

REDUCERS: Mapping[str, Reducer] = {
    "internvl": Reducer(internvl.reduce, shrink=shrinking.of_fixed_size, one_tensor=True),
    "llava": Reducer(llava.reduce, shrink=shrinking.of_fixed_size),
    "llava_next": Reducer(llava_next.reduce_next),
    "llava_next_video": Reducer(llava_next.reduce_next, llava_videos.reduce_next),
    "llava_onevision": Reducer(
        llava_next.reduce_onevision, llava_videos.reduce_onevision, videos_end_with_newline=True
    ),
    "qwen2_5_vl": QWEN,
    "qwen2_vl": QWEN,
    "qwen3_5": QWEN,
    "qwen3_5_moe": QWEN,
    "qwen3_vl": QWEN,
    "qwen3_vl_moe": QWEN,
    "vipllava": Reducer(llava.reduce, shrink=shrinking.of_fixed_size, one_tensor=True),
}
