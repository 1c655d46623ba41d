"""VITA (github.com/VITA-MLLM/VITA): the features of its InternViT, halved and shuffled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import vlmfast.ops.pixel_shuffle as ops
from vlmfast.compat.instance import Replacements, patch_instance
from vlmfast.compat.internvl import SHUFFLE_BODY, shuffle_map
from vlmfast.ops.pixel_shuffle.definition import square
from vlmfast.patches import Patch

BODIES = {
    "InternViTVisionTower.forward": {
        *("type", "list", "vision_tower", "to", "device", "dtype", "unsqueeze", "feature_select", "append"),
        *("int", "shape", "reshape", "pixel_shuffle", "scale_pix_shuffle"),
    },
    "InternViTVisionTower.pixel_shuffle": SHUFFLE_BODY,
}


def patch(model: nn.Module) -> Patch:
    """Replace what follows the InternViT of a VITA: the factor and the shuffle become one pass over its features.

    Replaced are ``InternViTVisionTower.forward``, which reads the features where they lie behind the CLS row, and
    ``pixel_shuffle``, for others who call it. ``feature_select`` stays the model's own. So does the projector (Linear,
    GELU, Linear, no LayerNorm): it is called in another method than the shuffle, and the tower's tokens are all that
    lies between them. Where a fork changed one of the methods, that one is skipped with a warning.

    Args:
        model: an ``InternViTVisionTower``, a VITA that holds one, or a wrapper such as DistributedDataParallel around
            it; float32, float16 or bfloat16.

    Returns:
        A `vlmfast.Patch`: ``report()``, ``undo()``, and a context manager.

    Raises:
        TypeError: if ``model`` is not a module. ValueError: if it holds no InternViTVisionTower, or its methods are
            others than those of VITA-MLLM/VITA. RuntimeError: if it is patched already.

    Source:
        InternViTVisionTower.forward and .pixel_shuffle of VITA-MLLM/VITA,
        vita/model/multimodal_encoder/internvit/internvit_encoder.py.
    """
    replace: Replacements = {
        "InternViTVisionTower.forward": forward,
        "InternViTVisionTower.pixel_shuffle": pixel_shuffle,
    }
    return patch_instance(model, "VITA", replace, "it is not that of VITA-MLLM/VITA", BODIES)


@torch.no_grad()
def forward(self: Any, images: Tensor) -> Tensor:
    """Make the tokens of images; no gradient is recorded, as upstream.

    Args:
        self: the InternViTVisionTower; its ``select_layer`` and ``scale_pix_shuffle`` hold at each call.
        images: (B, 3, height, width) float32, float16 or bfloat16; h * w patches in a square.

    Returns:
        (B, h * w / 4, 4 * C), of the dtype of ``images``.

    Raises:
        TypeError: for a list of images, with which upstream's method fails too. ValueError: for patches that are no
            square, or of an odd side.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch.Tensor of shape (B, 3, height, width), got {type(images).__name__}")
    outputs = self.vision_tower(images.to(device=self.device, dtype=self.dtype), output_hidden_states=True)
    features = self.feature_select(outputs).to(images.dtype)
    return ops.pixel_shuffle(features, square(features), input_scale=self.scale_pix_shuffle)


def pixel_shuffle(self: Any, x: Tensor, scale_factor: float = 0.5) -> Tensor:
    """Join squares of patches into tokens.

    Args:
        self: the InternViTVisionTower.
        x: (B, height, width, C) float32, float16 or bfloat16.
        scale_factor: 1 / S, S patches along each side of a token.

    Returns:
        (B, height / S, width / S, S * S * C).

    Raises:
        ValueError: for a map or a factor that does not fit.
    """
    return shuffle_map(x, scale_factor, "row")
