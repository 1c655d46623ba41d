"""LLaVA-NeXT (1.6): an image and its tiles."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.language import LANGUAGE_MODELS
from vlmfast.patches.masked_rows import image_mask

FAMILY = Family(
    model_types=("llava_next",),
    replace={"llava_next.LlavaNextModel.get_placeholder_mask": image_mask, **LANGUAGE_MODELS},
    tiny=lambda: tiny.llava_tiles("llava_next", language="mistral", vision_feature_layer=-2),
)
