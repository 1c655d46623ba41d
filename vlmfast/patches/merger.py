"""Replacements that run LayerNorm, linear layer and GELU behind a vision tower as `vlmfast.pixel_shuffle_linear`.

The op takes weights, so it can replace only plain modules. Upstream's own ``forward`` runs where modules have hooks,
adapters, quantised or parametrised weights, or weights of several dtypes, and under autocast.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast.backends import PLAIN
from vlmfast.checks import DTYPES
from vlmfast.modules import is_bare, is_plain
from vlmfast.ops.pixel_shuffle import pixel_shuffle_linear


def merge_patches(self: Any, x: Tensor) -> Tensor:
    """Replace Qwen3VLVisionPatchMerger.forward and its copies.

    The op sees from the size of the norm's weight whether the norm is before or after the shuffle.
    """
    hidden = _fused(x, self.linear_fc1, self.act_fn, self.norm)
    merged: Tensor = _upstream(self, x) if hidden is None else self.linear_fc2(hidden)
    return merged


def qwen2_merge_patches(self: Any, x: Tensor) -> Tensor:
    """Replace PatchMerger.forward of Qwen2-VL and its copies.

    Qwen2.5-VL's has an RMSNorm, which is a site of its own and is called as a module here.
    """
    mlp = self.mlp
    bare = is_plain(mlp, nn.Sequential) and len(mlp) == 3
    if isinstance(self.ln_q, nn.LayerNorm):
        hidden = _fused(x, mlp[0], mlp[1], self.ln_q) if bare else None
        merged: Tensor = _upstream(self, x) if hidden is None else mlp[2](hidden)
    else:
        normed = self.ln_q(x)
        hidden = _fused(normed, mlp[0], mlp[1]) if bare else None
        merged = mlp(normed.view(-1, self.hidden_size)) if hidden is None else mlp[2](hidden)
    return merged


def omni_merge_patches(self: Any, hidden: Tensor) -> Tensor:
    """Replace Qwen3OmniMoeVisionPatchMerger.forward, whose layers are in a ModuleList."""
    fused = _fused(hidden, self.mlp[0], self.mlp[1], self.ln_q) if len(self.mlp) == 3 else None
    merged: Tensor = _upstream(self, hidden) if fused is None else self.mlp[2](fused)
    return merged


def project_tokens(self: Any, image_features: Tensor) -> Tensor:
    """Replace InternVLMultiModalProjector.forward, whose input is already shuffled."""
    hidden = _fused(image_features, self.linear_1, self.act, self.layer_norm)
    if hidden is None:
        return _upstream(self, image_features)
    projected: Tensor = self.linear_2(hidden.view(*image_features.shape[:-1], hidden.shape[-1]))
    return projected


def _upstream(self: Any, x: Tensor) -> Tensor:
    output: Tensor = self.original_class.forward(self, x)
    return output


def _fused(x: Tensor, linear: nn.Module, act: nn.Module, norm: nn.Module | None = None) -> Tensor | None:
    """Return ``act(linear(norm(x)))`` of tokens joined from neighbouring patches; None where the op cannot."""
    if not (type(linear) is nn.Linear and _is_gelu(act) and (norm is None or type(norm) is nn.LayerNorm)):
        return None
    layers = [linear, act] if norm is None else [linear, act, norm]
    weights = [weight for layer in layers for weight in layer.parameters()]
    if not all(map(is_bare, layers)) or not _agree(x, weights) or torch.is_autocast_enabled(x.device.type):
        return None
    scale = math.isqrt(linear.in_features // x.shape[-1])
    if scale**2 * x.shape[-1] != linear.in_features:
        return None  # upstream's forward raises the error
    patches = x.reshape(1, -1, x.shape[-1])
    return pixel_shuffle_linear(
        patches,
        linear.weight,
        linear.bias,
        # The processors put the scale * scale patches of a token next to each other: a grid `scale` patches wide.
        grid=(patches.shape[1] // scale, scale),
        scale=scale,
        norm_weight=None if norm is None else norm.weight,
        norm_bias=None if norm is None else norm.bias,
        norm_eps=1e-5 if norm is None else norm.eps,
        activation="gelu",
    )[0]


def _is_gelu(act: nn.Module) -> bool:
    """Tell whether a module is the exact (erf) GELU of torch or transformers."""
    if type(act) is nn.GELU:
        return act.approximate == "none"
    named = type(act).__name__ == "GELUActivation" and type(act).__module__ == "transformers.activations"
    return named and act.act is F.gelu


def _agree(x: Tensor, weights: list[nn.Parameter]) -> bool:
    """Tell whether all tensors are plain (quantised weights may not be) and of one dtype that the op takes."""
    return x.dtype in DTYPES and all(type(tensor) in PLAIN and tensor.dtype == x.dtype for tensor in (x, *weights))
