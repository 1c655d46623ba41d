"""Qwen3-VL."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.masked_rows import deepstack_process, image_and_video_masks
from vlmfast.patches.merger import merge_patches
from vlmfast.patches.rms_norm import llama_rms_norm

FAMILY = Family(
    model_types=("qwen3_vl", "qwen3_vl_text", "qwen3_vl_vision"),
    replace={
        "qwen3_vl.Qwen3VLModel.get_placeholder_mask": image_and_video_masks,
        "qwen3_vl.Qwen3VLVisionPatchMerger.forward": merge_patches,
        "qwen3_vl.Qwen3VLTextModel._deepstack_process": deepstack_process,
        "qwen3_vl.Qwen3VLTextRMSNorm.forward": llama_rms_norm,
    },
    tiny=lambda: tiny.qwen(
        "qwen3_vl",
        text_config=tiny.text(head_dim=16, **tiny.mrope([4, 2, 2], mrope_interleaved=True)),
        vision_config=tiny.qwen3_vision(deepstack_visual_indexes=[0, 1]),
    ),
)
