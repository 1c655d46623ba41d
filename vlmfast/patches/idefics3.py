"""Idefics3."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.language import LANGUAGE_MODELS
from vlmfast.patches.masked_rows import merge_inputs

FAMILY = Family(
    model_types=("idefics3", "idefics3_vision"),
    replace={"idefics3.Idefics3Model.inputs_merger": merge_inputs, **LANGUAGE_MODELS},
    tiny=lambda: tiny.idefics("idefics3", language="llama"),
)
