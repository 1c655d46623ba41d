"""Qwen2-VL. Up to transformers 4 it borrows the norm of Qwen2."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.masked_rows import image_and_video_masks
from vlmfast.patches.merger import qwen2_merge_patches
from vlmfast.patches.rms_norm import llama_rms_norm

VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}

FAMILY = Family(
    model_types=("qwen2_vl", "qwen2_vl_text", "qwen2_vl_vision"),
    replace={
        "qwen2_vl.Qwen2VLModel.get_placeholder_mask": image_and_video_masks,
        "qwen2_vl.PatchMerger.forward": qwen2_merge_patches,
        "qwen2_vl.Qwen2VLRMSNorm.forward": llama_rms_norm,
        "qwen2.Qwen2RMSNorm.forward": llama_rms_norm,
    },
    tiny=lambda: tiny.qwen("qwen2_vl", text_config=tiny.text(**tiny.mrope([2, 3, 3])), vision_config=VISION),
)
