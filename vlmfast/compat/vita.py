"""VITA (github.com/VITA-MLLM/VITA): scaling and pixel shuffle of the features of its InternViT."""

from __future__ import annotations

from torch import nn

from vlmfast.patches.apply import Patch, patch_projects


def patch(model: nn.Module) -> Patch:
    """Replace what follows the InternViT of a VITA model: scaling and shuffle become one pass over its features.

    The replacement of ``InternViTVisionTower.forward`` reads the features behind the CLS row in place, without a copy.
    ``pixel_shuffle`` is replaced for other callers. ``feature_select`` stays the model's own, and so does the projector
    (Linear, GELU, Linear, no LayerNorm): another method calls it, and it takes the tower's tokens as they are. A method
    that a fork changed is skipped with a warning.

    Args:
        model: an ``InternViTVisionTower``, a VITA that holds one, or a wrapper such as DistributedDataParallel around
            it; float32, float16 or bfloat16.

    Returns:
        A `vlmfast.Patch`, with ``report()`` and ``undo()``, which is also a context manager.

    Raises:
        TypeError: if ``model`` is not a module. ValueError: if it holds no InternViTVisionTower, or its methods are not
            those of VITA-MLLM/VITA. RuntimeError: if it is patched already.

    Source:
        InternViTVisionTower.forward and .pixel_shuffle of VITA-MLLM/VITA,
        vita/model/multimodal_encoder/internvit/internvit_encoder.py.
    """
    return patch_projects(model, "VITA", ("InternViTVisionTower",))
