"""LLaVA 1.5."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.language import LANGUAGE_MODELS
from vlmfast.patches.masked_rows import image_mask

FAMILY = Family(
    model_types=("llava",),
    replace={"llava.LlavaModel.get_placeholder_mask": image_mask, **LANGUAGE_MODELS},
    tiny=lambda: tiny.llava("llava", language="llama", vision_feature_layer=-2),
)
