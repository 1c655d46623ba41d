"""LLaVA-NeXT inside vLLM, in VisionZip's published packing, whose number of tokens depends on the size alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, get_anyres_image_grid_shape
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlmfast.reduce.families.llava_next import Packing, pack_numbers, packer, reduce_crops
from vlmfast.reduce.methods import Method
from vlmfast.vllm.encoding import ReducedEncoder, check_tower, encode_crops
from vlmfast.vllm.processing import FullBudget, ReducedProcessor

NO_NEWLINE = torch.empty(0)  # the published packing has none


def packing_of(config: Any, height: int, width: int) -> Packing:
    """Return how the crops of an image of this size are packed, by transformers' own code, run on numbers."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    grid = tuple(get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, vision.image_size))
    count = 1 + grid[0] * grid[1]
    model: Any = SimpleNamespace(config=config)
    strategy = config.vision_feature_select_strategy
    pack = packer(
        functools.partial(LlavaNextModel.pack_image_features, model),
        [height, width],
        vision_feature_select_strategy=strategy,
    )
    return Packing(pack, pack_numbers(pack, count, side**2), count, grid, side, NO_NEWLINE)


class Info(FullBudget, LlavaNextProcessingInfo):
    """The processing info of images."""


class Processor(ReducedProcessor, LlavaNextMultiModalProcessor):
    """A processor that makes fewer placeholders."""

    def rows(self, method: Method, count: int, size: Any) -> int:
        """Count the tokens that are left of what the model shows of each crop."""
        config = self.info.get_hf_config()
        packing = packing_of(config, size.height, size.width)
        has_cls = config.vision_feature_select_strategy == "default"
        return sum(sum(method.counts(packing.side**2, has_cls, shown)) for shown in packing.shown)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
class VlmfastLlavaNextForConditionalGeneration(ReducedEncoder, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with fewer visual tokens."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        check_tower(config)
        if (config.vision_config.model_type == "clip_vision_model") != (
            config.vision_feature_select_strategy == "default"
        ):
            raise ValueError("the visual tokens of LLaVA-NeXT must be the patches of its crops, without a CLS token")
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _process_image_input(self, image_input: Any) -> Any:
        packings = [packing_of(self.config, *size) for size in image_input["image_sizes"].tolist()]
        # those of a request are padded to one number of crops
        pixels = [crops[: image.crops] for crops, image in zip(image_input["pixel_values"], packings, strict=True)]
        methods = self.methods_of(len(packings))
        pieces = self.pieces([image.crops * image.side**2 for image in packings])
        return [rows for piece in pieces for rows in self.reduce_images(pixels[piece], packings[piece], methods[piece])]

    def reduce_images(
        self, pixels: Sequence[Tensor], packings: Sequence[Packing], methods: Sequence[Method]
    ) -> list[Tensor]:
        """Encode the crops of images at once, reduce each, and arrange what is left."""
        encoded = encode_crops(self.vision_tower, torch.cat(list(pixels)))
        patches = packings[0].side ** 2
        project = functools.cache(lambda: self.multi_modal_projector(encoded.patches))
        tokens = encoded.visual_tokens(project, encoded.has_cls, patches)
        totals = [shown for image in packings for shown in image.shown]
        owners = [method for image, method in zip(packings, methods, strict=True) for _ in range(image.crops)]
        crops = iter(reduce_crops(encoded, tokens, totals, owners, self.multi_modal_projector))
        return [image.as_published([next(crops) for _ in range(image.crops)]).features for image in packings]
