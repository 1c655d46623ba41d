"""ViP-LLaVA: LLaVA on the features of several layers."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.language import LANGUAGE_MODELS

FAMILY = Family(
    model_types=("vipllava",),
    replace=LANGUAGE_MODELS,
    tiny=lambda: tiny.llava("vipllava", language="llama", vision_feature_layers=[-1, -2]),
)
