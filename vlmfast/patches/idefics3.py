"""Idefics3."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.language import LANGUAGE_MODELS

FAMILY = Family(
    model_types=("idefics3", "idefics3_vision"),
    replace=LANGUAGE_MODELS,
    tiny=lambda: tiny.idefics("idefics3", language="llama"),
)
