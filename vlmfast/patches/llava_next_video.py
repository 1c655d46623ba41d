"""LLaVA-NeXT-Video."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.language import LANGUAGE_MODELS
from vlmfast.patches.masked_rows import image_and_video_masks

FAMILY = Family(
    model_types=("llava_next_video",),
    replace={"llava_next_video.LlavaNextVideoModel.get_placeholder_mask": image_and_video_masks, **LANGUAGE_MODELS},
    tiny=lambda: tiny.llava_tiles(
        "llava_next_video", language="gemma", video_token_index=tiny.VIDEO, vision_feature_layer=-2
    ),
)
