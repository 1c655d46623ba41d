"""nanoVLM (github.com/huggingface/nanoVLM): its modality projector, and image embeddings in their placeholders."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlmfast.compat.instance import Replacements, patch_instance
from vlmfast.nn import apply_shuffled
from vlmfast.ops.masked_rows import place_embeddings
from vlmfast.patches import Patch

BODIES = {
    "ModalityProjector.pixel_shuffle": {"size", "int", "scale_factor", "view", "reshape", "permute", "contiguous"},
    "ModalityProjector.forward": {"pixel_shuffle", "proj"},
}


def patch(model: nn.Module) -> Patch:
    """Replace how a nanoVLM shuffles and projects patches, and how it places image embeddings.

    The placement is one pass without a host sync; the shuffle is one pass before the product, where upstream copies the
    map as often as its layout demands. A model from before placeholders, which puts the image in front of the text, has
    only its projector patched; what it has not is in the report. A ``proj`` that was replaced (LoRA, quantisers) or has
    hooks runs as it is, after the shuffle.

    Args:
        model: a ``VisionLanguageModel``, its ``ModalityProjector``, or a wrapper around it; float32, float16 or
            bfloat16.

    Returns:
        A `vlmfast.Patch`: ``report()``, ``undo()``, and a context manager.

    Raises:
        TypeError: if ``model`` is not a module. ValueError: if it is no nanoVLM. RuntimeError: if it is patched
            already.

    Source:
        VisionLanguageModel._replace_img_tokens_with_embd of huggingface/nanoVLM, models/vision_language_model.py, and
        ModalityProjector.forward and .pixel_shuffle, models/modality_projector.py.
    """
    replace: Replacements = {
        "VisionLanguageModel._replace_img_tokens_with_embd": replace_img_tokens_with_embd,
        "ModalityProjector.forward": forward,
        "ModalityProjector.pixel_shuffle": pixel_shuffle,
    }
    absent = "it is older than nanoVLM's placeholders, or of another project"
    return patch_instance(model, "nanoVLM", replace, absent, BODIES)


def forward(self: Any, x: Tensor) -> Tensor:
    """Shuffle and project.

    Args:
        self: the ModalityProjector, with ``scale_factor`` S and ``proj``.
        x: (B, h * w, C) float32, float16 or bfloat16; the patches of a square.

    Returns:
        (B, h * w / S**2, D), D of the language model.

    Raises:
        ValueError: for patches that are no square, or whose sides S does not divide.
    """
    return apply_shuffled([self.proj], x, scale=self.scale_factor)


def pixel_shuffle(self: Any, x: Tensor) -> Tensor:
    """Shuffle, without the projection.

    Args:
        self: the ModalityProjector, with ``scale_factor`` S.
        x: (B, h * w, C) float32, float16 or bfloat16; the patches of a square.

    Returns:
        (B, h * w / S**2, S**2 * C).

    Raises:
        ValueError: for patches that are no square, or whose sides S does not divide.
    """
    return apply_shuffled([], x, scale=self.scale_factor)


def replace_img_tokens_with_embd(self: Any, input_ids: Tensor, token_embd: Tensor, image_embd: Tensor) -> Tensor:
    """Put the image embeddings in the place of the placeholders, in row-major order over the batch.

    Args:
        self: the VisionLanguageModel.
        input_ids: (B, T) integers, ``self.tokenizer.image_token_id`` at V positions.
        token_embd: (B, T, D) float32, float16 or bfloat16.
        image_embd: (images, tokens, D), V rows in all; rounded to the dtype of ``token_embd``.

    Returns:
        (B, T, D), of the dtype of ``token_embd``.

    Raises:
        ValueError: on a CPU, where there are not as many placeholders as rows; on a GPU that trips a device-side
            assertion.
    """
    mask = input_ids == self.tokenizer.image_token_id
    return place_embeddings(token_embd, mask, image_embd.reshape(-1, image_embd.shape[-1]))
