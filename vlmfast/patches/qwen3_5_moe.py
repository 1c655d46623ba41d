"""Qwen3.5 with a mixture of experts."""

from vlmfast.patches.family import Family
from vlmfast.patches.masked_rows import image_and_video_masks
from vlmfast.patches.merger import merge_patches
from vlmfast.patches.qwen3_5 import gated_rms_norm, tiny_hybrid
from vlmfast.patches.rms_norm import gemma_rms_norm

SIZES = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}

FAMILY = Family(
    model_types=("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_moe_vision"),
    replace={
        "qwen3_5_moe.Qwen3_5MoeModel.get_placeholder_mask": image_and_video_masks,
        "qwen3_5_moe.Qwen3_5MoeVisionPatchMerger.forward": merge_patches,
        "qwen3_5_moe.Qwen3_5MoeRMSNorm.forward": gemma_rms_norm,
        "qwen3_5_moe.Qwen3_5MoeRMSNormGated.forward": gated_rms_norm,
    },
    tiny=lambda: tiny_hybrid("qwen3_5_moe", num_experts=4, num_experts_per_tok=2, **SIZES),
)
