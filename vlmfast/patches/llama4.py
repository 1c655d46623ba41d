"""Llama 4. Its L2 norm of queries and keys has no weight and stays as it is."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.masked_rows import image_mask
from vlmfast.patches.pixel_shuffle import shuffle_mlp
from vlmfast.patches.rms_norm import llama4_rms_norm

TEXT = {
    "head_dim": 16,
    "intermediate_size_mlp": 96,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 256,
}
VISION = {
    "intermediate_size": 128,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "vision_output_dim": 32,
}

FAMILY = Family(
    model_types=("llama4", "llama4_text", "llama4_vision_model"),
    replace={
        "llama4.Llama4ForConditionalGeneration.get_placeholder_mask": image_mask,
        "llama4.Llama4VisionPixelShuffleMLP.forward": shuffle_mlp,
        "llama4.Llama4TextRMSNorm.forward": llama4_rms_norm,
    },
    tiny=lambda: tiny.image_rows(
        "llama4", text_config=tiny.text(**TEXT), vision_config=tiny.vision(**VISION), image_token_index=tiny.IMAGE
    ),
)
