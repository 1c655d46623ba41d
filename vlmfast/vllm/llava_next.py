"""LLaVA-NeXT and LLaVA-OneVision inside vLLM, in packings whose number of tokens depends on the size alone.

Those are VisionZip's published packing, for LLaVA-NeXT, and "whole". LLaVA-OneVision's videos have no crops to pack.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, get_anyres_image_grid_shape
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlmfast.reduce.families.llava_next import Packing, pack_numbers, packer, reduce_packed
from vlmfast.reduce.families.llava_videos import reduce_frames
from vlmfast.reduce.groups import by_group
from vlmfast.reduce.methods import Method
from vlmfast.reduce.reduced_image import ReducedImage
from vlmfast.vllm.encoding import ReducedEncoder, check_tower, encode_crops
from vlmfast.vllm.processing import FullBudget, ReducedProcessor

VLLMS_RATIO = "anyres_max_9"  # of LLaVA-OneVision: vLLM does not read the configuration
# of each model: who packs its crops, by which setting, and whether it has the published packing
PACKERS: dict[str, tuple[Any, str, bool]] = {
    "llava_next": (LlavaNextModel, "vision_feature_select_strategy", True),
    "llava_onevision": (LlavaOnevisionModel, "vision_aspect_ratio", False),
}


def packing_of(config: Any, height: int, width: int, newline: Tensor | None = None) -> Packing:
    """Return how the crops of an image of this size are packed, by transformers' own code, run on numbers."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    grid = tuple(get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, vision.image_size))
    count = 1 + grid[0] * grid[1]
    upstream, setting, _ = PACKERS[config.model_type]
    pack_features = functools.partial(upstream.pack_image_features, SimpleNamespace(config=config))
    pack = packer(pack_features, [height, width], **{setting: getattr(config, setting)})
    newline = torch.empty(0) if newline is None else newline
    return Packing(pack, pack_numbers(pack, count, side**2), count, grid, side, newline)


def frame_tokens(config: Any) -> int:
    """Return the tokens that LLaVA-OneVision makes of a frame of a video, after pooling."""
    vision = config.vision_config
    side: int = math.ceil(vision.image_size // vision.patch_size / 2)
    return side**2


def has_cls(config: Any) -> bool:
    """Tell whether the tower of a configuration has a CLS token."""
    return bool(config.vision_config.model_type == "clip_vision_model")


class CropRows(ReducedProcessor):
    """Mixin for the processors of both models."""

    def rows(self, method: Method, count: int, size: Any) -> int:
        """Count the tokens that are left of what the model shows of an image of this size."""
        config = self.info.get_hf_config()
        packing = packing_of(config, size.height, size.width)
        return packing.tokens_left(method, has_cls(config), PACKERS[config.model_type][2])


class ReducedCrops(ReducedEncoder):
    """Mixin for both models."""

    vision_tower: Any
    multi_modal_projector: Any
    image_newline: Tensor

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        check_tower(config)
        if has_cls(config) != (config.vision_feature_select_strategy == "default"):
            raise ValueError("the visual tokens must be the patches of the crops, without a CLS token")
        ratio = getattr(config, "vision_aspect_ratio", VLLMS_RATIO)
        if ratio != VLLMS_RATIO:
            raise ValueError(
                f"vision_aspect_ratio must be {VLLMS_RATIO!r}, the only one that vLLM knows, got {ratio!r}"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _process_image_input(self, image_input: Any) -> Any:
        sizes = image_input["image_sizes"].tolist()
        packings = [packing_of(self.config, height, width, self.image_newline) for height, width in sizes]
        # those of a request are padded to one number of crops
        pixels = [crops[: image.crops] for crops, image in zip(image_input["pixel_values"], packings, strict=True)]
        methods = self.methods_of(len(packings))
        pieces = self.pieces([image.crops * image.side**2 for image in packings])
        return [rows for piece in pieces for rows in self.reduce_images(pixels[piece], packings[piece], methods[piece])]

    def reduce_images(
        self, pixels: Sequence[Tensor], packings: Sequence[Packing], methods: Sequence[Method]
    ) -> list[Tensor]:
        """Encode the crops of images at once, reduce them, and arrange what is left."""
        encoded = encode_crops(self.vision_tower, torch.cat(list(pixels)))
        published = PACKERS[self.config.model_type][2]
        images = reduce_packed(encoded, packings, methods, self.multi_modal_projector, published)
        return [image.features for image in images]


class NextInfo(FullBudget, LlavaNextProcessingInfo):
    """The processing info of LLaVA-NeXT."""


class OnevisionInfo(FullBudget, LlavaOnevisionProcessingInfo):
    """The processing info of LLaVA-OneVision."""


class NextProcessor(CropRows, LlavaNextMultiModalProcessor):
    """A processor of LLaVA-NeXT that makes fewer placeholders."""


class OnevisionProcessor(CropRows, LlavaOnevisionMultiModalProcessor):
    """A processor of LLaVA-OneVision that makes fewer placeholders."""

    def video_rows(self, method: Method, count: int, video: Any) -> int:
        """Count the newline at the end of a video of which something is left."""
        left = super().video_rows(method, count - 1, video)
        return left and left + 1

    def frame_tokens(self, video: Any) -> int:
        """Return the tokens of a frame after pooling."""
        return frame_tokens(self.info.get_hf_config())


@MULTIMODAL_REGISTRY.register_processor(NextProcessor, info=NextInfo, dummy_inputs=LlavaDummyInputsBuilder)
class VlmfastLlavaNextForConditionalGeneration(ReducedCrops, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with fewer visual tokens."""


@MULTIMODAL_REGISTRY.register_processor(
    OnevisionProcessor, info=OnevisionInfo, dummy_inputs=LlavaOnevisionDummyInputsBuilder
)
class VlmfastLlavaOnevisionForConditionalGeneration(ReducedCrops, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision with fewer visual tokens."""

    overridden = (*ReducedCrops.overridden, "_process_video_pixels", "apply_pooling")

    def _process_video_pixels(self, inputs: Any) -> Any:
        videos: Sequence[Tensor] = list(inputs["pixel_values_videos"])
        methods = self.methods_of(len(videos), "video")
        frames = [len(video) for video in videos]
        pieces = self.pieces([count * frame_tokens(self.config) + 1 for count in frames])  # and a newline
        return [
            video.features
            for piece in pieces
            for video in self.reduce_videos(videos[piece], list(zip(frames, methods, strict=True))[piece])
        ]

    def reduce_videos(self, videos: Sequence[Tensor], kinds: Sequence[tuple[int, Method]]) -> list[ReducedImage]:
        """Encode and reduce videos; those with as many frames and the same method together."""

        def reduce(kind: tuple[int, Method], members: list[int]) -> list[ReducedImage]:
            pixels = torch.stack([videos[number] for number in members])
            return reduce_frames(self, encode_crops(self.vision_tower, pixels.flatten(0, 1)), pixels, kind[1])

        return by_group(kinds, reduce)
