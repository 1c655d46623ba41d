"""LLaVA 1.5."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.language import LANGUAGE_MODELS

FAMILY = Family(
    model_types=("llava",),
    replace=LANGUAGE_MODELS,
    tiny=lambda: tiny.llava("llava", language="llama", vision_feature_layer=-2),
)
