"""`vlmfast.pixel_shuffle` under the parameters of the upstream methods.

The layers behind a shuffle stay the modules that they are: their hooks, adapters and quantised weights go on working,
and a matrix product has nothing to gain from being called by another name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmfast.ops.pixel_shuffle import pixel_shuffle
from vlmfast.patches.dtypes import accepting


def shuffle_square(self: Any, x: Tensor, scale_factor: int = 2) -> Tensor:
    """Idefics3Connector.pixel_shuffle and its copy in SmolVLM."""
    return accepting(pixel_shuffle, x)(x, _square(x), scale_factor)


def shuffle_map(self: Any, vision_features: Tensor, scale_factor: float = 0.5) -> Tensor:
    """InternVLModel.pixel_shuffle: a map of patches, which need not be square, into a map of tokens."""
    batch, height, width, channels = vision_features.shape
    scale = _scale(scale_factor)
    patches = vision_features.reshape(batch, height * width, channels)
    tokens = accepting(pixel_shuffle, patches)(patches, (height, width), scale)
    return tokens.view(batch, height // scale, width // scale, tokens.shape[2])


def shuffle_mlp(self: Any, encoded_patches: Tensor) -> Tensor:
    """Llama4VisionPixelShuffleMLP.forward. Its caller cuts the CLS token off by a slice, which is not copied here."""
    shuffle = accepting(pixel_shuffle, encoded_patches)
    tokens: Tensor = self.mlp(shuffle(encoded_patches, _square(encoded_patches), _scale(self.pixel_shuffle_ratio)))
    return tokens


def _square(x: Tensor) -> tuple[int, int]:
    """The sides that upstream takes for granted; the op refuses what is no square."""
    side = int(x.shape[1] ** 0.5)
    return side, side


def _scale(ratio: float) -> int:
    """Patches along a side of a token, of which upstream has the reciprocal."""
    scale = round(1 / ratio)
    if abs(scale * ratio - 1) > 1e-6:
        raise ValueError(f"the ratio of a pixel shuffle must be 1 / an integer, got {ratio}")
    return scale
