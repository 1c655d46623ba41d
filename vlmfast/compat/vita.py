"""VITA (github.com/VITA-MLLM/VITA): the features of its InternViT, halved and shuffled."""

from __future__ import annotations

from torch import nn

from vlmfast.patches.apply import Patch, patch_projects


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
    return patch_projects(model, "VITA", ("InternViTVisionTower",))
