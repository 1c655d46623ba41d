"""nanoVLM (github.com/huggingface/nanoVLM): its modality projector and the placement of image embeddings."""

from __future__ import annotations

from torch import nn

from vlmfast.patches.apply import Patch, patch_projects


def patch(model: nn.Module) -> Patch:
    """Replace how a nanoVLM model shuffles and projects patches, and how it places image embeddings.

    The placement is one pass and does not make the host wait. The shuffle is one pass before the linear layer, where
    upstream copies the map as often as its layout demands. Of an older model without placeholders, which puts the image
    in front of the text, only the projector is patched. A ``proj`` that was replaced (LoRA, quantisers) or has hooks
    runs as a module after the shuffle. A method that a fork changed is skipped with a warning.

    Args:
        model: a ``VisionLanguageModel``, its ``ModalityProjector``, or a wrapper around it; float32, float16 or
            bfloat16.

    Returns:
        A `vlmfast.Patch`, with ``report()`` and ``undo()``, which is also a context manager.

    Raises:
        TypeError: if ``model`` is not a module. ValueError: if it is not a nanoVLM model, or its methods are not those
            of huggingface/nanoVLM. RuntimeError: if it is patched already.

    Source:
        VisionLanguageModel._replace_img_tokens_with_embd of huggingface/nanoVLM, models/vision_language_model.py, and
        ModalityProjector.forward and .pixel_shuffle, models/modality_projector.py.
    """
    return patch_projects(model, "nanoVLM", ("VisionLanguageModel", "ModalityProjector"))
