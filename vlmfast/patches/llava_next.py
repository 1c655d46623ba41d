"""LLaVA-NeXT (1.6): an image and its tiles."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.language import LANGUAGE_MODELS

FAMILY = Family(
    model_types=("llava_next",),
    replace=LANGUAGE_MODELS,
    tiny=lambda: tiny.llava_tiles("llava_next", language="mistral", vision_feature_layer=-2),
)
