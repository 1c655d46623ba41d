"""A tiny model of each type: model type -> what builds it with its inputs, given that type."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.helpers import tiny_models as parts
from tests.helpers.tiny_models import AUDIO, IMAGE, VIDEO, Built, qwen3_vision, text, vision

# ---- Qwen ----

INTERLEAVED = parts.mrope([4, 2, 2], mrope_interleaved=True)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED_EXPERT = {"shared_expert_intermediate_size": 32}
DEEPSTACK = {"deepstack_visual_indexes": [0, 1]}
HYBRID = {  # linear attention, then full attention
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}


def thinker(model_type: str) -> Built:
    """Build the thinker of Qwen3-Omni, the part that the others follow."""
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration as Thinker

    config = Thinker.config_class(
        text_config=text(head_dim=16, **EXPERTS, **INTERLEAVED),
        vision_config=qwen3_vision(**DEEPSTACK),
        audio_config={
            "num_mel_bins": 16,
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "output_dim": 64,
            "downsample_hidden_size": 8,
        },
        audio_token_id=AUDIO,
        **parts.QWEN_TOKENS,
    )
    return parts.with_patches(parts.randomised(lambda: Thinker._from_config(config)))


QWEN = {
    "qwen2_vl": partial(
        parts.qwen,
        text_config=text(**parts.mrope([2, 3, 3])),
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
        },
    ),
    "qwen2_5_vl": partial(
        parts.qwen,
        text_config=text(**parts.mrope([2, 3, 3])),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3_vl": partial(
        parts.qwen, text_config=text(head_dim=16, **INTERLEAVED), vision_config=qwen3_vision(**DEEPSTACK)
    ),
    "qwen3_vl_moe": partial(
        parts.qwen,
        text_config=text(head_dim=16, decoder_sparse_step=1, **EXPERTS, **INTERLEAVED),
        vision_config=qwen3_vision(**DEEPSTACK),
    ),
    "qwen3_5": partial(parts.qwen, text_config=text(**HYBRID), vision_config=qwen3_vision()),
    "qwen3_5_moe": partial(
        parts.qwen, text_config=text(**HYBRID, **EXPERTS, **SHARED_EXPERT), vision_config=qwen3_vision()
    ),
    "qwen3_omni_moe": thinker,
}

# ---- LLaVA and others on CLIP or SigLIP ----

LLAVA = {
    "llava": partial(parts.llava, language="llama", vision_feature_layer=-2),
    "vipllava": partial(parts.llava, language="llama", vision_feature_layers=[-1, -2]),
    "llava_next": partial(parts.llava_tiles, language="mistral", vision_feature_layer=-2),
    "llava_next_video": partial(parts.llava_tiles, language="gemma", video_token_index=VIDEO, vision_feature_layer=-2),
    "llava_onevision": partial(
        parts.llava_tiles,
        language="qwen2",
        tower="siglip_vision_model",
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
}

# ---- pixel shuffles ----

SHUFFLED = {
    "internvl": partial(
        parts.image_rows,
        text_config=text(model_type="qwen3", head_dim=16),
        vision_config=vision(norm_type="rms_norm", use_qk_norm=True, image_size=[28, 28], patch_size=[7, 7]),
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    ),
    "idefics3": partial(parts.idefics, language="llama", scale_factor=2),
    "smolvlm": partial(parts.idefics, language="llama", scale_factor=2),
    "llama4": partial(
        parts.image_rows,
        text_config=text(
            head_dim=16,
            intermediate_size_mlp=96,
            num_local_experts=2,
            num_experts_per_tok=1,
            interleave_moe_layer_step=1,
            no_rope_layers=[1, 0],
            attention_chunk_size=256,
        ),
        vision_config=vision(
            intermediate_size=128,
            pixel_shuffle_ratio=0.5,
            projector_input_dim=32,
            projector_output_dim=32,
            vision_output_dim=32,
        ),
        image_token_index=IMAGE,
    ),
}

TINY: dict[str, Callable[[str], Built]] = {**QWEN, **LLAVA, **SHUFFLED, "llama": parts.language_model}


def build(model_type: str, **config: Any) -> Built:
    """Build the tiny model of that type with its inputs, the same at each call."""
    return TINY[model_type](model_type, **config)
