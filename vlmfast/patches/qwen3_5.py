"""Qwen3.5: a norm centred on zero, and a gated one in its linear attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from vlmfast.ops.rms_norm import rms_norm
from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.masked_rows import image_and_video_masks
from vlmfast.patches.merger import merge_patches
from vlmfast.patches.rms_norm import gemma_rms_norm


def gated_rms_norm(self: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
    """Qwen3_5RMSNormGated.forward: the norm, then the gate in float32."""
    normed = rms_norm(hidden_states, self.weight, self.variance_epsilon)
    gated: Tensor = normed * ACT2FN[self.activation](gate.to(torch.float32))
    return gated.to(hidden_states.dtype)


def tiny_hybrid(model_type: str, **text: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model of two layers: linear attention, then full attention."""
    linear = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    mrope = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    return tiny.qwen(
        model_type,
        text_config=tiny.text(head_dim=16, rope_parameters={**rope, **mrope}, **linear, **text),
        vision_config=tiny.qwen3_vision(),
    )


FAMILY = Family(
    model_types=("qwen3_5", "qwen3_5_text", "qwen3_5_vision"),
    replace={
        "qwen3_5.Qwen3_5Model.get_placeholder_mask": image_and_video_masks,
        "qwen3_5.Qwen3_5VisionPatchMerger.forward": merge_patches,
        "qwen3_5.Qwen3_5RMSNorm.forward": gemma_rms_norm,
        "qwen3_5.Qwen3_5RMSNormGated.forward": gated_rms_norm,
    },
    tiny=lambda: tiny_hybrid("qwen3_5"),
)
