"""Qwen2.5-VL, with RMSNorm in the vision tower too. Up to transformers 4 it borrows the norm of Qwen2."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.masked_rows import image_and_video_masks
from vlmfast.patches.merger import qwen2_5_merge_patches
from vlmfast.patches.rms_norm import llama_rms_norm

VISION = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}

FAMILY = Family(
    model_types=("qwen2_5_vl", "qwen2_5_vl_text", "qwen2_5_vl_vision"),
    replace={
        "qwen2_5_vl.Qwen2_5_VLModel.get_placeholder_mask": image_and_video_masks,
        "qwen2_5_vl.Qwen2_5_VLPatchMerger.forward": qwen2_5_merge_patches,
        "qwen2_5_vl.Qwen2_5_VLRMSNorm.forward": llama_rms_norm,
        "qwen2.Qwen2RMSNorm.forward": llama_rms_norm,
    },
    tiny=lambda: tiny.qwen("qwen2_5_vl", text_config=tiny.text(**tiny.mrope([2, 3, 3])), vision_config=VISION),
)
