"""Mini-Gemini's patch-info mining, without keys, values or a permuted copy of the feature map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.functions import accepting
from vlmfast.linear import linear
from vlmfast.modules import is_plain
from vlmfast.ops.patch_mining import mine_patches
from vlmfast.ops.patch_mining.definition import block_pixels


def unified_resampler(self: Any, images: Tensor, images_aux: Tensor) -> tuple[Tensor, Tensor]:
    """Replace MGMMetaForCausalLM.unified_resampler: (B, P * P, C) tokens and a (B, Ca, P * s, P * s) map.

    Returns ``(images, mined)``, both (B, P * P, C).
    """
    return images, mine(self.get_model(), images, images_aux, images_aux.shape[-1] // int(images.shape[1] ** 0.5))


def mine(model: Any, tokens: Tensor, feature_map: Tensor, scale: int, blocks: Tensor | None = None) -> Tensor:
    """Let each token attend to the pixels of its block, as `unified_resampler` does: (B, T, C).

    Upstream projects every pixel to a key and a value. Here the key's weights are applied to the query, and the value's
    weights to the weighted sum. Keys and values are computed as upstream does where a projector is no longer a plain
    LayerNorm and Linear (LoRA, quantisers, hooks), or where the two norms have different eps.

    Args:
        model: holds the three projectors of query, key and value.
        tokens: (B, T, C).
        feature_map: (B, Ca, height, width).
        scale: the number of pixels along each side of a block.
        blocks: (B, T) int64, ascending: the block of each token in raster order; None where every block has a token.
    """
    keys, values = norm_and_linear(model.vlm_uni_aux_projector), norm_and_linear(model.vlm_uni_val_projector)
    if keys is None or values is None or keys[0].eps != values[0].eps:
        return _mine_projected(model, tokens, feature_map, scale, blocks)
    (key_norm, key), (value_norm, value) = keys, values
    query = model.vlm_uni_query_projector(tokens) * key.out_features**-0.5
    if torch.is_grad_enabled():
        # These biases shift all logits of a query alike, so they cancel in the softmax. DDP still waits for their
        # gradients, which this term makes zero.
        query = query + sum((bias * 0).sum() for bias in (key_norm.bias, key.bias) if bias is not None)
    query = (linear(query, key.weight.t()) * key_norm.weight).to(feature_map.dtype)
    mined = accepting(mine_patches, query)(query, feature_map, scale, blocks, key_norm.eps)
    return linear(torch.addcmul(value_norm.bias, mined, value_norm.weight), value.weight, value.bias)


def norm_and_linear(projector: Any) -> tuple[nn.LayerNorm, nn.Linear] | None:
    """Return the two modules of a plain ``Sequential(LayerNorm, Linear)``, or None for anything else."""
    if not is_plain(projector, nn.Sequential) or len(projector) != 2:
        return None
    norm, layer = projector[0], projector[1]
    if (
        not is_plain(norm, nn.LayerNorm)
        or not is_plain(layer, nn.Linear)
        or layer.weight.shape[1:] != norm.weight.shape
    ):
        return None
    return norm, layer


def _mine_projected(model: Any, tokens: Tensor, feature_map: Tensor, scale: int, blocks: Tensor | None) -> Tensor:
    pixels = block_pixels(feature_map, scale, blocks).contiguous()
    query = model.vlm_uni_query_projector(tokens)
    keys, values = model.vlm_uni_aux_projector(pixels), model.vlm_uni_val_projector(pixels)
    logits = query[:, :, None] @ (keys.transpose(-1, -2) / keys.shape[-1] ** 0.5)
    mined: Tensor = logits.nan_to_num().softmax(-1) @ values
    return mined.squeeze(2)
