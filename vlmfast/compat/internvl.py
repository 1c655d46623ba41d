"""InternVL (github.com/OpenGVLab/InternVL): the pixel shuffle and ``mlp1`` of its models with remote code."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import vlmfast.ops.pixel_shuffle as ops
from vlmfast.compat.instance import Replacements, patch_instance
from vlmfast.nn import apply_shuffled, is_plain
from vlmfast.patches import Patch

SHUFFLE_BODY = {"size", "view", "int", "permute", "contiguous"}
BODIES = {
    "InternVLChatModel.extract_feature": {
        *("select_layer", "vision_model", "last_hidden_state", "hidden_states", "int", "shape", "reshape"),
        *("pixel_shuffle", "downsample_ratio", "mlp1"),
    },
    "InternVLChatModel.pixel_shuffle": SHUFFLE_BODY | {"ps_version"},
}


def patch(model: nn.Module) -> Patch:
    """Replace how an InternVL with remote code makes tokens of the features of its tower.

    ``extract_feature`` drops the CLS row, shuffles, normalises and projects: what is left of it is the tower, one pass
    for the gather and the LayerNorm, and the products. ``pixel_shuffle`` is for others who call it. Version v1 of the
    shuffle, which leaves the map transposed, no longer warns of it at each call.

    ``mlp1`` stays a module with its own parameters; where it, or one of its modules, was replaced (LoRA, quantisers) or
    has hooks, it runs as it is, after the shuffle. Where a fork changed ``extract_feature``, that method is skipped
    with a warning and only the shuffle is replaced.

    Args:
        model: an ``InternVLChatModel`` (``AutoModel.from_pretrained(..., trust_remote_code=True)``), or a wrapper such
            as DistributedDataParallel around it; float32, float16 or bfloat16. For transformers' own InternVL there is
            `vlmfast.patch`.

    Returns:
        A `vlmfast.Patch`: ``report()``, ``undo()``, and a context manager.

    Raises:
        TypeError: if ``model`` is not a module. ValueError: if it is no InternVLChatModel, or its methods are others
            than those of OpenGVLab/InternVL. RuntimeError: if it is patched already.

    Source:
        InternVLChatModel.extract_feature and .pixel_shuffle of OpenGVLab/InternVL,
        internvl_chat/internvl/model/internvl_chat/modeling_internvl_chat.py.
    """
    replace: Replacements = {
        "InternVLChatModel.extract_feature": extract_feature,
        "InternVLChatModel.pixel_shuffle": pixel_shuffle,
    }
    return patch_instance(model, "InternVL", replace, "it is not that of OpenGVLab/InternVL", BODIES)


def extract_feature(self: Any, pixel_values: Tensor) -> Tensor:
    """Make the tokens of images.

    Args:
        self: the InternVLChatModel; its ``select_layer``, ``downsample_ratio`` and ``ps_version`` hold at each call.
        pixel_values: (B, 3, height, width), as the tower takes them; h * w patches in a square.

    Returns:
        (B, h * w * downsample_ratio**2, D), D of the language model.

    Raises:
        ValueError: for patches that are no square, or whose sides the shuffle does not divide.
    """
    last = self.select_layer == -1
    outputs = self.vision_model(pixel_values=pixel_values, output_hidden_states=not last, return_dict=True)
    features = outputs.last_hidden_state if last else outputs.hidden_states[self.select_layer]
    modules = list(self.mlp1) if is_plain(self.mlp1, nn.Sequential) else [self.mlp1]
    return apply_shuffled(modules, features[:, 1:], scale=side_of(self.downsample_ratio), order=_order(self))


def pixel_shuffle(self: Any, x: Tensor, scale_factor: float = 0.5) -> Tensor:
    """Join squares of patches into tokens.

    Args:
        self: the InternVLChatModel; its ``ps_version`` holds at each call.
        x: (B, height, width, C) float32, float16 or bfloat16.
        scale_factor: 1 / S, S patches along each side of a token.

    Returns:
        (B, height / S, width / S, S * S * C), or (B, width / S, height / S, S * S * C) for version v1.

    Raises:
        ValueError: for a map or a factor that does not fit.
    """
    return shuffle_map(x, scale_factor, _order(self))


def _order(model: Any) -> str:
    return "column" if model.ps_version == "v1" else "row"


def shuffle_map(x: Tensor, scale_factor: float, order: str) -> Tensor:
    """`vlmfast.pixel_shuffle` of a map: (B, height, width, C) to (B, rows, columns, S * S * C); "column" swaps them."""
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, height, width, C), got {tuple(x.shape)}")
    scale, (height, width) = side_of(scale_factor), x.shape[1:3]
    tokens = ops.pixel_shuffle(x.flatten(1, 2), (height, width), scale, order)
    sides = (width // scale, height // scale) if order == "column" else (height // scale, width // scale)
    return tokens.view(x.shape[0], *sides, tokens.shape[2])


def side_of(scale_factor: float) -> int:
    """S, of the factor 1 / S by which each side of the map shrinks."""
    side = round(1 / scale_factor) if scale_factor > 0 else 0
    if abs(side * scale_factor - 1) > 1e-6:
        raise ValueError(f"scale_factor (InternVL's downsample_ratio) must be 1 / S of an int S, got {scale_factor}")
    return side
