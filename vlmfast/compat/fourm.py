"""4M (github.com/apple/ml-4m): packing of visible tokens and of targets, in training and fine-tuning."""

from __future__ import annotations

from torch import nn

from vlmfast.patches.apply import Patch, patch_projects


def patch(model: nn.Module) -> Patch:
    """Replace how a 4M model packs its visible tokens and its targets: sort, gather and masked write become one op.

    Up to 1e6 tokens per sample the results are bit-equal to upstream's. Beyond that, upstream's sorting key can no
    longer tell tokens apart, and the results here are in the order that it intends. The code that joins the modalities
    stays the model's own: it puts them in a random order for the decoder (``random.seed`` makes it reproducible), which
    fails on Python 3.11 and newer.

    Args:
        model: a ``FourM`` or an ``FM``, or a wrapper such as DistributedDataParallel around it; its tokens must be
            float32, float16 or bfloat16.

    Returns:
        A `vlmfast.Patch`, with ``report()`` and ``undo()``, which is also a context manager.

    Raises:
        TypeError: if ``model`` is not a module. ValueError: if it is not a 4M model, or its methods are not those of
            apple/ml-4m. RuntimeError: if it is patched already.

    Source:
        FourM.forward_mask_encoder and FourM.forward_mask_decoder of apple/ml-4m, fourm/models/fm.py.
    """
    return patch_projects(model, "4M", ("FourM",))
