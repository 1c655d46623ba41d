"""SmolVLM and SmolVLM2."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.language import LANGUAGE_MODELS
from vlmfast.patches.masked_rows import image_mask, merge_inputs
from vlmfast.patches.pixel_shuffle import shuffle_square

FAMILY = Family(
    model_types=("smolvlm", "smolvlm_vision"),
    replace={
        "smolvlm.SmolVLMModel.inputs_merger": merge_inputs,  # up to transformers 5.17
        "smolvlm.SmolVLMModel.get_placeholder_mask": image_mask,
        "smolvlm.SmolVLMConnector.pixel_shuffle": shuffle_square,
        **LANGUAGE_MODELS,
    },
    tiny=lambda: tiny.idefics("smolvlm", language="llama"),
)
