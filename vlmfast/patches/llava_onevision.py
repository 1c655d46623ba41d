"""LLaVA-OneVision."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.language import LANGUAGE_MODELS
from vlmfast.patches.masked_rows import image_and_video_masks

FAMILY = Family(
    model_types=("llava_onevision",),
    replace={"llava_onevision.LlavaOnevisionModel.get_placeholder_mask": image_and_video_masks, **LANGUAGE_MODELS},
    tiny=lambda: tiny.llava_tiles(
        "llava_onevision",
        language="qwen2",
        tower="siglip_vision_model",
        video_token_index=tiny.VIDEO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
)
