"""4M (github.com/apple/ml-4m): the choice of the visible tokens and of the targets, in its training and fine-tuning."""

from __future__ import annotations

from torch import nn

from vlmfast.patches.apply import Patch, patch_projects


def patch(model: nn.Module) -> Patch:
    """Replace how a 4M model packs its visible tokens and its targets: sort, gather and masked write become one op.

    The results are those of upstream, bit for bit, up to 1e6 tokens per sample; beyond, where upstream's sorting key
    can no longer tell tokens apart, they are what it means. What joins the modalities stays the model's own code, with
    its random order for the decoder (``random.seed`` makes it the same), which fails on Python 3.11 and newer.

    Args:
        model: a ``FourM`` or an ``FM``, or a wrapper such as DistributedDataParallel around it; its tokens must be
            float32, float16 or bfloat16.

    Returns:
        A `vlmfast.Patch`: ``report()``, ``undo()``, and a context manager.

    Raises:
        TypeError: if ``model`` is not a module. ValueError: if it is no 4M model, or its methods are others than those
            of apple/ml-4m. RuntimeError: if it is patched already.

    Source:
        FourM.forward_mask_encoder and FourM.forward_mask_decoder of apple/ml-4m, fourm/models/fm.py.
    """
    return patch_projects(model, "4M", ("FourM",))
