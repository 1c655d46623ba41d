"""The reducer of each model type: it encodes the images of a prompt and reduces their visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vlmfast.reduce.families import internvl, llava, llava_next, llava_videos, qwen
from vlmfast.reduce.reduced_image import ReducedImage


@dataclass(frozen=True)
class Reducer:
    """How the images and videos of one type of model are reduced."""

    # (the base model, the vision inputs, the method, what gives the text of images) -> the images in prompt order; the
    # tower runs once, as configured
    reduce: Callable[..., list[ReducedImage]]
    # the same of its videos, or None: those of such a model stay as they are
    reduce_videos: Callable[..., list[ReducedImage]] | None = None
    videos_end_with_newline: bool = False  # they are then one tensor (videos, tokens, D), not a list
    one_tensor: bool = False  # whether get_image_features gives images as one tensor (images, tokens, D), not as a list


QWEN = Reducer(qwen.reduce, qwen.reduce_videos)

REDUCERS: Mapping[str, Reducer] = {
    "internvl": Reducer(internvl.reduce, one_tensor=True),
    "llava": Reducer(llava.reduce),
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
    "vipllava": Reducer(llava.reduce, one_tensor=True),
}
