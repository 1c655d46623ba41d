"""SmolVLM and SmolVLM2."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.language import LANGUAGE_MODELS

FAMILY = Family(
    model_types=("smolvlm", "smolvlm_vision"),
    replace=LANGUAGE_MODELS,
    tiny=lambda: tiny.idefics("smolvlm", language="llama"),
)
