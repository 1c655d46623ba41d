"""Qwen2.5-VL, Qwen3-VL, Qwen3-VL-MoE and Qwen3.5 inside vLLM. Videos stay as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeProcessingInfo,
    Qwen3_5ProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlmfast.reduce.families.qwen import BlockAttention, raster_order, reduce_encoded
from vlmfast.reduce.methods import Method
from vlmfast.reduce.tokens import Grid
from vlmfast.vllm.encoding import ReducedEncoder, attention_inputs, mean_over_ranks
from vlmfast.vllm.positions import PlacedTokens, with_places
from vlmfast.vllm.processing import ReducedProcessor


@dataclass(frozen=True)
class AttentionByRank(BlockAttention):
    """The attention of a block whose heads are divided over the ranks."""

    def scores(self) -> Tensor:
        """(N,): the mean over all heads."""
        return mean_over_ranks(super().scores())

    def metric(self) -> Tensor:
        """(N, head_dim): the mean over all heads."""
        return mean_over_ranks(super().metric())


class ReducedQwen(ReducedEncoder, PlacedTokens):
    """Mixin for all of them."""

    visual: Any

    def _process_image_input(self, image_input: Any) -> Any:
        side: int = self.visual.spatial_merge_size
        pixels, grid_thw = image_input["pixel_values"], image_input["image_grid_thw"]
        grids: list[Grid] = [(t, h // side, w // side) for t, h, w in grid_thw.tolist()]
        counts = [math.prod(grid) for grid in grids]
        methods = self.methods_of(len(grids))
        patches = torch.split(pixels, [count * side**2 for count in counts])
        found: list[Tensor] = []
        for piece in self.pieces(counts):
            part = {
                "pixel_values": torch.cat(patches[piece]),
                "image_grid_thw": grid_thw[piece],
                "type": "pixel_values",
            }
            found += self._reduce_images(part, grids[piece], methods[piece])
        return found

    def _reduce_images(
        self, image_input: Mapping[str, Any], grids: Sequence[Grid], methods: Sequence[Method]
    ) -> list[Tensor]:
        """Encode images at once; vLLM keeps DeepStack's levels as additional channels."""
        tower = self.visual
        attention = tower.blocks[-1].attn
        with attention_inputs(attention.attn) as seen:
            features = torch.cat(super()._process_image_input(image_input))  # type: ignore[misc]
        levels = torch.split(features, self.config.vision_config.out_hidden_size, 1)
        query, key = (seen[name].flatten(0, 1) for name in ("query", "key"))  # (1, T, H, head_dim)
        group = tower.spatial_merge_size**2
        bounds = torch.tensor([0, *(math.prod(grid) * group for grid in grids)]).cumsum(0).to(key.device, torch.int32)
        order = raster_order(tower, grids, key.device)
        block = AttentionByRank(query, key, bounds, group, attention.hidden_size_per_attention_head**-0.5, order)
        images = reduce_encoded(levels, block, image_input["pixel_values"], grids, methods)
        return [
            with_places(
                torch.cat([image.features, *image.levels], 1),
                torch.stack([image.columns // width, image.columns % width], 1),
            )
            for image, (_, _, width) in zip(images, grids, strict=True)
        ]

    def _process_video_input(self, video_input: Any) -> Any:
        videos = super()._process_video_input(video_input)  # type: ignore[misc]
        return [with_places(rows, rows.new_zeros(len(rows), 2, dtype=torch.int64)) for rows in videos]


class Processor2(ReducedProcessor, Qwen2_5_VLMultiModalProcessor):
    """A processor of Qwen2.5-VL that makes fewer placeholders."""


class Processor3(ReducedProcessor, Qwen3VLMultiModalProcessor):
    """A processor of Qwen3-VL and what came after it that makes fewer placeholders."""


@MULTIMODAL_REGISTRY.register_processor(
    Processor2, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class VlmfastQwen2_5_VLForConditionalGeneration(ReducedQwen, Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    """Qwen2.5-VL with fewer visual tokens."""


@MULTIMODAL_REGISTRY.register_processor(Processor3, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder)
class VlmfastQwen3VLForConditionalGeneration(ReducedQwen, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with fewer visual tokens."""


@MULTIMODAL_REGISTRY.register_processor(
    Processor3, info=Qwen3VLMoeProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class VlmfastQwen3VLMoeForConditionalGeneration(ReducedQwen, Qwen3VLMoeForConditionalGeneration):
    """Qwen3-VL-MoE with fewer visual tokens."""


@MULTIMODAL_REGISTRY.register_processor(Processor3, info=Qwen3_5ProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder)
class VlmfastQwen3_5ForConditionalGeneration(ReducedQwen, Qwen3_5ForConditionalGeneration):  # noqa: N801
    """Qwen3.5 with fewer visual tokens."""


@MULTIMODAL_REGISTRY.register_processor(
    Processor3, info=Qwen3_5MoeProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class VlmfastQwen3_5MoeForConditionalGeneration(ReducedQwen, Qwen3_5MoeForConditionalGeneration):  # noqa: N801
    """Qwen3.5-MoE with fewer visual tokens."""
