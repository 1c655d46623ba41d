"""InternVL 2.5, 3 and 3.5; the largest towers (6B) have RMSNorm, and normalise queries and keys."""

from vlmfast.patches import tiny
from vlmfast.patches.family import Family
from vlmfast.patches.language import LANGUAGE_MODELS
from vlmfast.patches.masked_rows import image_mask
from vlmfast.patches.merger import project_tokens
from vlmfast.patches.pixel_shuffle import shuffle_map
from vlmfast.patches.rms_norm import llama_rms_norm

FAMILY = Family(
    model_types=("internvl", "internvl_vision"),
    replace={
        "internvl.InternVLModel.get_placeholder_mask": image_mask,
        "internvl.InternVLModel.pixel_shuffle": shuffle_map,
        "internvl.InternVLMultiModalProjector.forward": project_tokens,
        "internvl.InternVLVisionRMSNorm.forward": llama_rms_norm,
        **LANGUAGE_MODELS,
    },
    tiny=lambda: tiny.image_rows(
        "internvl",
        text_config=tiny.text(model_type="qwen3", head_dim=16),
        vision_config=tiny.vision(norm_type="rms_norm", use_qk_norm=True, image_size=[28, 28], patch_size=[7, 7]),
        image_token_id=tiny.IMAGE,
        downsample_ratio=0.5,
    ),
)
