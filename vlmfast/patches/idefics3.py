"""Idefics3."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.language import LANGUAGE_MODELS
from vlmfast.patches.masked_rows import merge_inputs
from vlmfast.patches.pixel_shuffle import shuffle_square

FAMILY = Family(
    model_types=("idefics3", "idefics3_vision"),
    replace={
        "idefics3.Idefics3Model.inputs_merger": merge_inputs,
        "idefics3.Idefics3Connector.pixel_shuffle": shuffle_square,
        **LANGUAGE_MODELS,
    },
    tiny=lambda: tiny.idefics("idefics3", language="llama"),
)
