"""ViP-LLaVA: LLaVA on the features of several layers."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.language import LANGUAGE_MODELS
from vlmfast.patches.masked_rows import image_mask

FAMILY = Family(
    model_types=("vipllava",),
    replace={"vipllava.VipLlavaModel.get_placeholder_mask": image_mask, **LANGUAGE_MODELS},
    tiny=lambda: tiny.llava("vipllava", language="llama", vision_feature_layers=[-1, -2]),
)
