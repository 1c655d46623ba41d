"""4M (github.com/apple/ml-4m): the choice of the visible tokens and of the targets, in its training and fine-tuning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.compat.instance import Replacements, patch_instance
from vlmfast.ops.masked_rows import compact_tokens
from vlmfast.patches import Patch

Modalities = dict[str, dict[str, Tensor]]


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
    replace: Replacements = {
        "FourM.forward_mask_encoder": forward_mask_encoder,
        "FourM.forward_mask_decoder": forward_mask_decoder,
    }
    return patch_instance(model, "4M", replace, "it is not the FourM of apple/ml-4m")


def forward_mask_encoder(
    self: Any, mod_dict: Modalities, num_encoder_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pack the visible tokens of all modalities, behind the registers if there are any.

    Args:
        self: the FourM.
        mod_dict: modality -> its tensors, as ``cat_encoder_tensors`` takes them: O tokens of D channels in all.
        num_encoder_tokens: how many tokens to keep of each sample, if there are as many.

    Returns:
        ``(tokens, emb, mask, mod_mask)``: (B, N, D), (B, N, D), (B, 1, N) bool, true where a token is not valid, and
        (B, N) int16, the modality or -1. Rows that are not valid are zeros.
    """
    all_tokens, all_emb, all_mask, all_mod = self.cat_encoder_tensors(mod_dict)
    tokens, emb, mask, order = _pack(all_tokens, all_emb, all_mask, num_encoder_tokens)
    mod_mask = all_mod.gather(1, order).masked_fill(mask, -1)
    if self.num_register_tokens > 0:
        registers = self.register_tokens.expand(tokens.shape[0], -1, -1)
        tokens = torch.cat([registers, tokens], dim=1)
        emb = torch.cat([torch.zeros_like(registers), emb], dim=1)
        mask = torch.cat([mask.new_zeros(registers.shape[:2]), mask], dim=1)
        mod_mask = torch.cat([mod_mask.new_full(registers.shape[:2], -1), mod_mask], dim=1)
    return tokens, emb, mask[:, None], mod_mask


def forward_mask_decoder(
    self: Any, mod_dict: Modalities, num_decoder_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pack the targets of all modalities.

    Args:
        self: the FourM.
        mod_dict: modality -> its tensors, as ``cat_decoder_tensors`` takes them.
        num_decoder_tokens: how many tokens to keep of each sample, if there are as many.

    Returns:
        ``(tokens, emb, mask, target_ids, attention_mask, mod_mask)``: (B, M, D), (B, M, D), (B, 1, M) bool, true where
        a token is not valid, (B, M) int, (B, M, M) bool, true where attention is blocked, and (B, M) int16, the
        modality or -1. Rows and ids that are not valid are zeros.
    """
    all_tokens, all_emb, all_mask, all_ids, all_attention, all_mod = self.cat_decoder_tensors(mod_dict)
    tokens, emb, mask, order = _pack(all_tokens, all_emb, all_mask, num_decoder_tokens)
    target_ids = all_ids.gather(1, order).masked_fill(mask, 0)
    mod_mask = all_mod.gather(1, order)
    # upstream separates padding by the modality that it came from, which the mask may thus not replace yet
    attention_mask = self.adapt_decoder_attention_mask(all_attention.gather(1, order), mod_mask)
    return tokens, emb, mask[:, None], target_ids, attention_mask, mod_mask.masked_fill(mask, -1)


def _pack(tokens: Tensor, emb: Tensor, mask: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keep = min(number, tokens.shape[1])
    tokens, kept_mask, order = compact_tokens(tokens, mask, keep)
    return tokens, compact_tokens(emb, mask, keep, order)[0], kept_mask, order
