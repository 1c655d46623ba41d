"""nanoVLM (github.com/huggingface/nanoVLM): image embeddings in the place of their placeholders."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlmfast.compat.instance import patch_instance
from vlmfast.ops.masked_rows import place_embeddings
from vlmfast.patches import Patch


def patch(model: nn.Module) -> Patch:
    """Replace how a nanoVLM places image embeddings: one pass, without a host sync.

    Args:
        model: a ``VisionLanguageModel`` that has placeholders for image tokens, or a wrapper around it.

    Returns:
        A `vlmfast.Patch`: ``report()``, ``undo()``, and a context manager.

    Raises:
        TypeError: if ``model`` is not a module. ValueError: if it is no nanoVLM, or one from before placeholders.
            RuntimeError: if it is patched already.

    Source:
        VisionLanguageModel._replace_img_tokens_with_embd of huggingface/nanoVLM, models/vision_language_model.py.
    """
    methods = {"_replace_img_tokens_with_embd": replace_img_tokens_with_embd}
    absent = "it is older than nanoVLM's placeholders and puts the image in front of the text"
    return patch_instance(model, "VisionLanguageModel", methods, absent)


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
