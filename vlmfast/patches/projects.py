"""Replacements for projects outside transformers, and how their bodies are recognised.

The sources of these projects are copied by hand, and the copies differ in what they print. A body is therefore
recognised by the name of its class and by the exact set of names that it uses, not by a digest.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.functions import accepting
from vlmfast.modules import is_plain
from vlmfast.nn import apply_shuffled
from vlmfast.ops.masked_rows import compact_tokens, place_embeddings
from vlmfast.ops.pixel_shuffle import pixel_shuffle
from vlmfast.ops.pixel_shuffle.definition import square
from vlmfast.patches.pixel_shuffle import shuffled_map, side_of

Modalities = dict[str, dict[str, Tensor]]
_TALKING = {"print", "warn", "warnings"}


@dataclass(frozen=True)
class Named:
    """A body that is recognised by the names that it uses, not by its digest.

    Attributes:
        class_name: the class that defines the method.
        names: the functions, methods and attributes that the body uses, separated by spaces.
    """

    class_name: str
    names: str

    def difference(self, method: Any) -> str | None:
        """Say which names the body of a method lacks or adds, or return None if it is this body."""
        known = set(self.names.split())
        code = getattr(inspect.unwrap(method), "__code__", None)
        used = _names(code) - _TALKING if code else set()
        told = [("without", known - used), ("with", used - known)]
        return ", ".join(f"{word} {', '.join(sorted(names))}" for word, names in told if names) or None


def _names(code: CodeType) -> set[str]:
    """Return the names that code uses, those of nested code included: comprehensions, before Python 3.12."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


# ---- 4M ----


def forward_mask_encoder(
    self: Any, mod_dict: Modalities, num_encoder_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Replace FourM.forward_mask_encoder: pack the visible tokens of all modalities behind the register tokens.

    Returns ``(tokens, emb, mask, mod_mask)``: (B, N, D); (B, N, D); (B, 1, N) bool, true where a token is padding; and
    (B, N) int16, the modality of each token, -1 for padding and registers.
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
    """Replace FourM.forward_mask_decoder: pack the targets of all modalities.

    Returns ``(tokens, emb, mask, target_ids, attention_mask, mod_mask)``: as the encoder's, with the (B, M) ids and a
    (B, M, M) bool mask, true where attention is blocked.
    """
    all_tokens, all_emb, all_mask, all_ids, all_attention, all_mod = self.cat_decoder_tensors(mod_dict)
    tokens, emb, mask, order = _pack(all_tokens, all_emb, all_mask, num_decoder_tokens)
    target_ids = all_ids.gather(1, order).masked_fill(mask, 0)
    mod_mask = all_mod.gather(1, order)
    # The attention mask separates padding by the modality that it came from as well, so mod_mask is masked afterwards.
    attention_mask = self.adapt_decoder_attention_mask(all_attention.gather(1, order), mod_mask)
    return tokens, emb, mask[:, None], target_ids, attention_mask, mod_mask.masked_fill(mask, -1)


def _pack(tokens: Tensor, emb: Tensor, mask: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keep = min(number, tokens.shape[1])
    compact = accepting(compact_tokens, tokens)
    tokens, kept_mask, order = compact(tokens, mask, keep)
    return tokens, compact(emb, mask, keep, order)[0], kept_mask, order


# ---- nanoVLM ----


def project_square(self: Any, x: Tensor) -> Tensor:
    """Replace ModalityProjector.forward: shuffle the patches of a square, (B, h * w, C), and project the tokens."""
    return apply_shuffled([self.proj], x, scale=self.scale_factor)


def shuffle_square(self: Any, x: Tensor) -> Tensor:
    """Replace ModalityProjector.pixel_shuffle: (B, h * w, C) to (B, h * w / S**2, S**2 * C)."""
    return apply_shuffled([], x, scale=self.scale_factor)


def replace_img_tokens_with_embd(self: Any, input_ids: Tensor, token_embd: Tensor, image_embd: Tensor) -> Tensor:
    """Replace VisionLanguageModel's method: put the image embeddings at their placeholders, in order."""
    mask = input_ids == self.tokenizer.image_token_id
    rows = image_embd.reshape(-1, image_embd.shape[-1])
    return accepting(place_embeddings, token_embd, rows)(token_embd, mask, rows)


# ---- InternVL with remote code, and VITA ----


def extract_feature(self: Any, pixel_values: Tensor) -> Tensor:
    """Replace InternVLChatModel.extract_feature: (B, 3, height, width) pixels to (B, h * w / S**2, D) tokens."""
    last = self.select_layer == -1
    outputs = self.vision_model(pixel_values=pixel_values, output_hidden_states=not last, return_dict=True)
    features = outputs.last_hidden_state if last else outputs.hidden_states[self.select_layer]
    modules = list(self.mlp1) if is_plain(self.mlp1, nn.Sequential) else [self.mlp1]
    return apply_shuffled(modules, features[:, 1:], scale=side_of(self.downsample_ratio), order=_order(self))


def shuffle_ordered_map(self: Any, x: Tensor, scale_factor: float = 0.5) -> Tensor:
    """Replace InternVLChatModel.pixel_shuffle, whose version v1 leaves the map of tokens transposed."""
    return shuffled_map(x, side_of(scale_factor), _order(self))


def _order(model: Any) -> str:
    return "column" if model.ps_version == "v1" else "row"


@torch.no_grad()
def select_and_shuffle(self: Any, images: Tensor) -> Tensor:
    """Replace InternViTVisionTower.forward: (B, 3, height, width) to (B, h * w / 4, 4 * C), without a gradient.

    Raises:
        TypeError: for a list of images; upstream's method fails on lists too.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch.Tensor of shape (B, 3, height, width), got {type(images).__name__}")
    outputs = self.vision_tower(images.to(device=self.device, dtype=self.dtype), output_hidden_states=True)
    features = self.feature_select(outputs).to(images.dtype)
    return accepting(pixel_shuffle, features)(features, square(features), input_scale=self.scale_pix_shuffle)


def shuffle_x_map(self: Any, x: Tensor, scale_factor: float = 0.5) -> Tensor:
    """Replace InternViTVisionTower.pixel_shuffle."""
    return shuffled_map(x, side_of(scale_factor))
