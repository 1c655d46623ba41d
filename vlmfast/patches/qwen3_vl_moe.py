"""Qwen3-VL with a mixture of experts."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.masked_rows import deepstack_process, image_and_video_masks
from vlmfast.patches.merger import merge_patches
from vlmfast.patches.rms_norm import llama_rms_norm

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}

FAMILY = Family(
    model_types=("qwen3_vl_moe", "qwen3_vl_moe_text", "qwen3_vl_moe_vision"),
    replace={
        "qwen3_vl_moe.Qwen3VLMoeModel.get_placeholder_mask": image_and_video_masks,
        "qwen3_vl_moe.Qwen3VLMoeVisionPatchMerger.forward": merge_patches,
        "qwen3_vl_moe.Qwen3VLMoeTextModel._deepstack_process": deepstack_process,
        "qwen3_vl_moe.Qwen3VLMoeTextRMSNorm.forward": llama_rms_norm,
    },
    tiny=lambda: tiny.qwen(
        "qwen3_vl_moe",
        text_config=tiny.text(head_dim=16, **EXPERTS, **tiny.mrope([4, 2, 2], mrope_interleaved=True)),
        vision_config=tiny.qwen3_vision(deepstack_visual_indexes=[0, 1]),
    ),
)
