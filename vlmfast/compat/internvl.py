"""InternVL (github.com/OpenGVLab/InternVL): pixel shuffle and ``mlp1`` of its models with remote code."""

from __future__ import annotations

from torch import nn

from vlmfast.patches.apply import Patch, patch_projects


def patch(model: nn.Module) -> Patch:
    """Replace how an InternVL model with remote code turns the features of its vision tower into tokens.

    Upstream's ``extract_feature`` runs the tower, drops the CLS row, shuffles, normalises and projects. The replacement
    runs the tower, one pass for shuffle and LayerNorm, and the linear layers. ``pixel_shuffle`` is replaced for other
    callers; version v1 of the shuffle, which leaves the map transposed, no longer warns at each call.

    ``mlp1`` stays a module with its own parameters. Where it or one of its modules was replaced (LoRA, quantisers) or
    has hooks, it runs as a module after the shuffle. Where a fork changed ``extract_feature``, that method is skipped
    with a warning and only the shuffle is replaced.

    Args:
        model: an ``InternVLChatModel`` (``AutoModel.from_pretrained(..., trust_remote_code=True)``), or a wrapper such
            as DistributedDataParallel around it; float32, float16 or bfloat16. For transformers' own InternVL there is
            `vlmfast.patch`.

    Returns:
        A `vlmfast.Patch`, with ``report()`` and ``undo()``, which is also a context manager.

    Raises:
        TypeError: if ``model`` is not a module. ValueError: if it is not an InternVLChatModel, or its methods are not
            those of OpenGVLab/InternVL. RuntimeError: if it is patched already.

    Source:
        InternVLChatModel.extract_feature and .pixel_shuffle of OpenGVLab/InternVL,
        internvl_chat/internvl/model/internvl_chat/modeling_internvl_chat.py.
    """
    return patch_projects(model, "InternVL", ("InternVLChatModel",))
