"""Replacements that call `vlmfast.pixel_shuffle`.

The layers behind a shuffle are still called as modules, so that their hooks, adapters and quantised weights work. A
matmul would be no faster here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmfast.functions import accepting
from vlmfast.ops.pixel_shuffle import pixel_shuffle
from vlmfast.ops.pixel_shuffle.definition import square


def shuffle_square(self: Any, x: Tensor, scale_factor: int = 2) -> Tensor:
    """Replace Idefics3Connector.pixel_shuffle and its copy in SmolVLM."""
    return accepting(pixel_shuffle, x)(x, square(x), scale_factor)


def shuffle_hidden(self: Any, image_hidden_states: Tensor, pixel_shuffle_factor: int) -> Tensor:
    """Replace ModernVBertConnector.pixel_shuffle."""
    return shuffle_square(self, image_hidden_states, pixel_shuffle_factor)


def shuffle_map(self: Any, vision_features: Tensor, scale_factor: float = 0.5) -> Tensor:
    """Replace InternVLModel.pixel_shuffle, which shuffles a map of patches, square or not, into a map of tokens."""
    return shuffled_map(vision_features, side_of(scale_factor))


def shuffle_square_into_map(self: Any, image_features: Tensor) -> Tensor:
    """Replace AyaVisionMultiModalProjector.pixel_shuffle, which shuffles a square of patches into a map of tokens."""
    batch, _, channels = image_features.shape
    return shuffled_map(image_features.reshape(batch, *square(image_features), channels), self.downsample_factor)


def unshuffle_map(self: Any, hidden_states: Tensor) -> Tensor:
    """Replace Lfm2VlMultiModalProjector.pixel_unshuffle."""
    return shuffled_map(hidden_states, self.factor)


def shuffle_mlp(self: Any, encoded_patches: Tensor) -> Tensor:
    """Replace Llama4VisionPixelShuffleMLP.forward.

    Its caller slices off the CLS token. The op reads the slice as a view, without a copy.
    """
    tokens: Tensor = self.mlp(shuffle_square(self, encoded_patches, side_of(self.pixel_shuffle_ratio)))
    return tokens


def shuffled_map(x: Tensor, scale: int, order: str = "row") -> Tensor:
    """Shuffle (B, height, width, C) to (B, rows, columns, scale * scale * C); order "column" swaps rows and columns."""
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, height, width, C), got {tuple(x.shape)}")
    batch, height, width, _ = x.shape
    patches = x.flatten(1, 2)
    tokens = accepting(pixel_shuffle, patches)(patches, (height, width), scale, order)
    sides = (height // scale, width // scale)
    return tokens.view(batch, *(sides[::-1] if order == "column" else sides), tokens.shape[2])


def side_of(ratio: float) -> int:
    """Return the number of patches along a side of a token; ``ratio`` is upstream's name for its reciprocal."""
    side = round(1 / ratio) if ratio > 0 else 0
    if abs(side * ratio - 1) > 1e-6:
        raise ValueError(f"the ratio of a pixel shuffle must be 1 / an integer, got {ratio}")
    return side
