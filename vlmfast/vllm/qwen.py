"""Qwen2.5-VL, Qwen3-VL, Qwen3-VL-MoE and Qwen3.5 inside vLLM.

The tokens of a video stand together in Qwen2.5-VL, whose positions tell the time of a frame; later ones write the time
before each frame.
"""

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
from vlmfast.reduce.kinds import KINDS, Kind
from vlmfast.reduce.methods import Method
from vlmfast.reduce.reduced_image import ReducedImage
from vlmfast.reduce.tokens import Grid
from vlmfast.vllm.encoding import ReducedEncoder, attention_inputs, mean_over_ranks
from vlmfast.vllm.positions import MOST, PlacedTokens, with_places
from vlmfast.vllm.processing import ReducedProcessor

IMAGE, VIDEO = KINDS


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

    overridden = ("embed_multimodal", "_process_image_input", "_process_video_input")
    visual: Any

    def _process_image_input(self, image_input: Any) -> Any:
        return self._process(IMAGE, image_input, [0.0] * len(image_input["image_grid_thw"]))

    def _process_video_input(self, video_input: Any) -> Any:
        return self._process(VIDEO, video_input, self.time_steps(video_input))

    def time_steps(self, video_input: Any) -> list[float]:
        """Return how far apart the positions of two frames are in each video: 0 where text tells the time."""
        return [0.0] * len(video_input["video_grid_thw"])

    def _process(self, kind: Kind, given: Any, steps: Sequence[float]) -> list[Tensor]:
        side: int = self.visual.spatial_merge_size
        sizes = f"{kind.name}_grid_thw"
        grids: list[Grid] = [(t, h // side, w // side) for t, h, w in given[sizes].tolist()]
        counts = [math.prod(grid) for grid in grids]
        methods = self.methods_of(len(grids), kind.name)
        patches = torch.split(given[kind.pixels], [count * side**2 for count in counts])
        found: list[ReducedImage] = []
        for piece in self.pieces(counts):
            part = {kind.pixels: torch.cat(patches[piece]), sizes: given[sizes][piece], "type": kind.pixels}
            found += self._reduce(kind, part, grids[piece], methods[piece])
        return [
            with_places(torch.cat([one.features, *one.levels], 1), places_in(grid, one.columns, step))
            for one, grid, step in zip(found, grids, steps, strict=True)
        ]

    def _reduce(
        self, kind: Kind, part: Mapping[str, Any], grids: Sequence[Grid], methods: Sequence[Method]
    ) -> list[ReducedImage]:
        """Encode images, or videos, at once; vLLM keeps DeepStack's levels as additional channels."""
        tower = self.visual
        attention = tower.blocks[-1].attn
        encode = super()._process_image_input if kind is IMAGE else super()._process_video_input  # type: ignore[misc]
        with attention_inputs(attention.attn) as seen:
            features = torch.cat(encode(part))
        levels = torch.split(features, self.config.vision_config.out_hidden_size, 1)
        query, key = (seen[name].flatten(0, 1) for name in ("query", "key"))  # (1, T, H, head_dim)
        group = tower.spatial_merge_size**2
        frames = [rows * columns * group for count, rows, columns in grids for _ in range(count)]
        bounds = torch.tensor([0, *frames]).cumsum(0).to(key.device, torch.int32)
        order = raster_order(tower, grids, key.device)
        block = AttentionByRank(query, key, bounds, group, attention.hidden_size_per_attention_head**-0.5, order)
        return reduce_encoded(levels, block, part[kind.pixels], grids, methods, kind.name)


def places_in(grid: Grid, columns: Tensor, step: float) -> Tensor:
    """(n,) numbers of tokens in a grid -> (n, 3): time, row and column.

    The time is rounded as in vLLM, and at most the largest that `with_places` can write.
    """
    _, rows, width = grid
    frame = columns // (rows * width)
    time = (frame.double() * step).long().clamp_(max=MOST)
    return torch.stack([time, columns // width % rows, columns % width], 1)


class QwenProcessor(ReducedProcessor):
    """Mixin for the processors of all of them."""

    def frame_tokens(self, video: Any) -> int:
        """Divide the grid of patches."""
        _, height, width = video["video_grid_thw"].data.tolist()
        side: int = self.info.get_hf_config().vision_config.spatial_merge_size
        return int(height * width // side**2)


class Processor2(QwenProcessor, Qwen2_5_VLMultiModalProcessor):
    """A processor of Qwen2.5-VL that makes fewer placeholders."""


class Processor3(QwenProcessor, Qwen3VLMultiModalProcessor):
    """A processor of Qwen3-VL and what came after it that makes fewer placeholders."""


@MULTIMODAL_REGISTRY.register_processor(
    Processor2, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class VlmfastQwen2_5_VLForConditionalGeneration(ReducedQwen, Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    """Qwen2.5-VL with fewer visual tokens."""

    def time_steps(self, video_input: Any) -> list[float]:
        """Return the seconds between the frames of each video, in positions."""
        rate = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        given = video_input["second_per_grid_ts"]
        seconds = [1.0] * len(video_input["video_grid_thw"]) if given is None else given.flatten().tolist()
        return [each * rate for each in seconds]


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
