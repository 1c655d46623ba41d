"""InternVL in Hugging Face's format inside vLLM, which serves it by its class for InternS1.

The frames of a video are tiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlmfast.reduce.families.internvl import reduce_tiles
from vlmfast.reduce.methods import Method
from vlmfast.vllm.encoding import ReducedEncoder, encode
from vlmfast.vllm.processing import FullBudget, ReducedProcessor


class Info(FullBudget, InternS1ProcessingInfo):
    """The processing info of images and videos."""

    def get_max_video_tokens(self, seq_len: int, mm_counts: Mapping[str, int]) -> int:
        """Return the tokens of the longest video, whose frames are tiles."""
        frames: int = self.get_num_frames_with_most_features(seq_len, mm_counts)
        return frames * tile_tokens(self.get_hf_config())


class Processor(ReducedProcessor, InternS1MultiModalProcessor):
    """A processor that makes fewer placeholders."""

    def rows(self, method: Method, count: int, size: Any) -> int:
        """Count what is left of each tile, also where it is the frame of a video."""
        tile = tile_tokens(self.info.get_hf_config())
        return count // tile * sum(method.counts(tile, False, tile))


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=InternS1DummyInputsBuilder)
class VlmfastInternVLForConditionalGeneration(ReducedEncoder, InternS1ForConditionalGeneration):
    """InternVL with fewer visual tokens."""

    overridden = ("embed_multimodal", "_process_vision_input")

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        if layer != -1 or strategy != "default":
            raise ValueError(
                f"vLLM takes the features of InternVL from the last layer, without a CLS token, but the configuration "
                f"has vision_feature_layer={layer} and vision_feature_select_strategy={strategy!r}"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _process_vision_input(self, image_input: Any) -> Any:
        tiles = image_input["num_patches"].tolist()
        pixels = torch.split(image_input["pixel_values"], tiles)
        methods = self.methods_of(len(tiles), "image" if image_input["type"] == "pixel_values" else "video")
        pieces = self.pieces([count * tile_tokens(self.config) for count in tiles])
        return [rows for piece in pieces for rows in self.reduce_images(pixels[piece], methods[piece])]

    def reduce_images(self, images: Sequence[Tensor], methods: Sequence[Method]) -> list[Tensor]:
        """Encode the tiles of images at once, and reduce each."""
        tower, pixels = self.vision_tower, torch.cat(list(images))
        encoded = encode(tower, tower.encoder.layer[-1].attention.attn, pixels, has_cls=True)
        owners = [method for tiles, method in zip(images, methods, strict=True) for _ in tiles]
        reduced = iter(reduce_tiles(self, encoded, encoded.patches, pixels, owners))
        return [torch.cat([next(reduced).features for _ in tiles]) for tiles in images]


def tile_tokens(config: Any) -> int:
    """Return how many tokens the model makes of a tile."""
    side = config.vision_config.image_size[0] // config.vision_config.patch_size[0]
    return int(side * config.downsample_ratio) ** 2
