"""LLaVA-1.5 inside vLLM, its tower CLIP or SigLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlmfast.reduce.groups import by_group
from vlmfast.reduce.methods import Method
from vlmfast.vllm.encoding import ReducedEncoder, check_tower, encode_crops
from vlmfast.vllm.processing import FullBudget, ReducedProcessor


class Info(FullBudget, LlavaProcessingInfo):
    """The processing info of images."""


class Processor(ReducedProcessor, LlavaMultiModalProcessor):
    """A processor that makes fewer placeholders."""

    def rows(self, method: Method, count: int, size: Any) -> int:
        """Count a CLS token if the method keeps it or the model uses it."""
        config = self.info.get_hf_config()
        has_cls = config.vision_config.model_type == "clip_vision_model"
        uses_cls = has_cls and config.vision_feature_select_strategy == "full"
        kept, contextual, keep_cls = method.counts(count - uses_cls, has_cls, count)
        return kept + contextual + (keep_cls or uses_cls)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
class VlmfastLlavaForConditionalGeneration(ReducedEncoder, LlavaForConditionalGeneration):
    """LLaVA-1.5 with fewer visual tokens."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_tower(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _process_image_input(self, image_input: Any) -> Any:
        pixels: Tensor = image_input["pixel_values"]
        methods = self.methods_of(len(pixels))
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        pieces = self.pieces([side**2] * len(pixels))
        return [rows for piece in pieces for rows in self.reduce_images(pixels[piece], methods[piece])]

    def reduce_images(self, pixels: Tensor, methods: Sequence[Method]) -> list[Tensor]:
        """Encode images at once, reduce the input of the projector, and project what is left."""
        encoded = encode_crops(self.vision_tower, pixels)
        uses_cls = encoded.has_cls and self.config.vision_feature_select_strategy == "full"
        total = encoded.hidden.shape[1] - (encoded.has_cls and not uses_cls)
        project = self.multi_modal_projector
        tokens = encoded.visual_tokens(lambda: project(encoded.patches), encoded.has_cls, total)

        def reduce(method: Method, members: list[int]) -> Tensor:
            selection = method.select(tokens.take(members, total))
            if uses_cls:
                selection = replace(selection, keep_cls=True)
            rows: Tensor = project(encoded.reduce(selection, members))
            return rows

        return by_group(methods, reduce)
