"""LLaVA 1.5."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.language import LANGUAGE_MODELS
from vlmfast.patches.masked_rows import image_mask
from vlmfast.reduce.llava import reduce_images

FAMILY = Family(
    model_types=("llava",),
    replace={"llava.LlavaModel.get_placeholder_mask": image_mask, **LANGUAGE_MODELS},
    tiny=lambda: tiny.llava("llava", language="llama", vision_feature_layer=-2),
    reducer=reduce_images,
)
