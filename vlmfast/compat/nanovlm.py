"""nanoVLM (github.com/huggingface/nanoVLM): its modality projector, and image embeddings in their placeholders."""

from __future__ import annotations

from torch import nn

from vlmfast.patches.apply import Patch, patch_projects


def patch(model: nn.Module) -> Patch:
    """Replace how a nanoVLM shuffles and projects patches, and how it places image embeddings.

    The placement is one pass without a host sync; the shuffle is one pass before the linear layer, where upstream
    copies the map as often as its layout demands. A model from before placeholders, which puts the image in front of
    the text, has only its projector patched. A ``proj`` that was replaced (LoRA, quantisers) or has hooks runs as it
    is, after the shuffle. Where a fork changed one of the methods, that one is skipped with a warning.

    Args:
        model: a ``VisionLanguageModel``, its ``ModalityProjector``, or a wrapper around it; float32, float16 or
            bfloat16.

    Returns:
        A `vlmfast.Patch`: ``report()``, ``undo()``, and a context manager.

    Raises:
        TypeError: if ``model`` is not a module. ValueError: if it is no nanoVLM, or its methods are others than those
            of huggingface/nanoVLM. RuntimeError: if it is patched already.

    Source:
        VisionLanguageModel._replace_img_tokens_with_embd of huggingface/nanoVLM, models/vision_language_model.py, and
        ModalityProjector.forward and .pixel_shuffle, models/modality_projector.py.
    """
    return patch_projects(model, "nanoVLM", ("VisionLanguageModel", "ModalityProjector"))
