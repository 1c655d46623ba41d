"""Tiny models that take images as rows of patches with their grids: Qwen-VL, GLM-V and others."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers

from tests.helpers import tiny_models as parts
from tests.helpers.tiny_models import AUDIO, IMAGE, VIDEO, VISION_END, VISION_START, Built, qwen3_vision, text, vision

# ---- Qwen ----

INTERLEAVED = parts.mrope([4, 2, 2], mrope_interleaved=True)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED_EXPERT = {"shared_expert_intermediate_size": 32}
DEEPSTACK = {"deepstack_visual_indexes": [0, 1]}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GLM_ROPE = {**ROPE, "mrope_section": [4, 2, 2], "partial_rotary_factor": 1.0}
HYBRID = {  # linear attention, then full attention
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {**GLM_ROPE, "mrope_interleaved": True},
}
QWEN2_5_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}
AUDIO_TOWER = {
    "num_mel_bins": 16,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "output_dim": 64,
}


def thinker(name: str, **config: Any) -> Built:
    """Build the thinker of Qwen-Omni, its vision-language model."""
    cls = getattr(transformers, f"{name}ThinkerForConditionalGeneration")
    found = cls.config_class(**config, **parts.QWEN_TOKENS, audio_token_id=AUDIO)
    return parts.with_images(parts.randomised(lambda: cls._from_config(found)), 4, (2 * 16, 3 * 2 * 4 * 4), parts.GRID)


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
        vision_config=QWEN2_5_VISION,
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
    "qwen3_omni_moe": lambda _: thinker(
        "Qwen3OmniMoe",
        text_config=text(head_dim=16, **EXPERTS, **INTERLEAVED),
        vision_config=qwen3_vision(**DEEPSTACK),
        audio_config={**AUDIO_TOWER, "downsample_hidden_size": 8},
    ),
    "qwen2_5_omni": lambda _: thinker(
        "Qwen2_5Omni",
        text_config=text(**parts.mrope([2, 3, 3])),
        vision_config=QWEN2_5_VISION,
        audio_config={**AUDIO_TOWER, "n_window": 4},
    ),
}

# ---- others whose images are rows of patches ----

GLM_TOKENS = {"image_start_token_id": VISION_START, "image_end_token_id": VISION_END}
GLM_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "num_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
VISUAL_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
IN_PATCHES = {
    "glm4v": partial(
        parts.patches,
        text_config=text(rope_parameters=GLM_ROPE, **parts.mrope([4, 2, 2])),
        vision_config=GLM_VISION,
        **VISUAL_TOKENS,
        **GLM_TOKENS,
    ),
    "glm4v_moe": partial(
        parts.patches,
        text_config=text(
            rope_parameters={**ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
            **parts.mrope([2, 1, 1]),
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
        ),
        vision_config=GLM_VISION,
        **VISUAL_TOKENS,
        **GLM_TOKENS,
    ),
    "glm46v": partial(
        parts.patches,
        text_config=text(model_type="glm4v_text", rope_parameters=GLM_ROPE),
        vision_config={"model_type": "glm4v_vision", **GLM_VISION},
        **VISUAL_TOKENS,
        **GLM_TOKENS,
    ),
    "glm_ocr": partial(
        parts.patches,
        text_config=text(rope_parameters=GLM_ROPE),
        vision_config=GLM_VISION,
        **VISUAL_TOKENS,
        **GLM_TOKENS,
    ),
    "ernie4_5_vl_moe": partial(
        parts.patches,
        values=3 * 4 * 4,
        text_config=text(
            rope_parameters={**ROPE, "mrope_section": [3, 3, 2]},
            moe_intermediate_size=[32, 32],
            moe_k=2,
            moe_num_experts=4,
            moe_num_shared_experts=1,
            mlp_layer_types=["dense", "sparse"],
        ),
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4},
        **VISUAL_TOKENS,
        **GLM_TOKENS,
    ),
    "exaone4_5": partial(
        parts.patches,
        text_config=text(model_type="exaone4", sliding_window=64, layer_types=["sliding_attention", "full_attention"]),
        vision_config={**QWEN2_5_VISION, "num_key_value_heads": 2},
        **VISUAL_TOKENS,
    ),
    "minimax_m3_vl": partial(
        parts.patches,
        text_config=text(
            head_dim=16,
            rotary_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            dense_intermediate_size=48,
            shared_intermediate_size=48,
            mlp_layer_types=["dense", "sparse"],
            layer_types=["full_attention", "full_attention"],
        ),
        vision_config=vision(num_attention_heads=2, image_size=16, patch_size=4),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=48,
    ),
    "video_llama_3": partial(
        parts.images,
        shape=(2 * 16, 3 * 7 * 7),
        inputs={**parts.GRID, "image_merge_sizes": torch.tensor([2, 2])},
        text_config=text(model_type="qwen2"),
        vision_config=vision(num_attention_heads=2),
        **VISUAL_TOKENS,
    ),
    "paddleocr_vl": partial(
        parts.images,
        shape=(2 * 16, 3, 7, 7),
        inputs=parts.GRID,
        text_config=text(head_dim=16, rope_parameters={**ROPE, "mrope_section": [4, 2, 2]}),
        vision_config=vision(),
        **parts.QWEN_TOKENS,
    ),
    "hunyuan_vl": partial(
        parts.patches,
        values=3 * 7 * 7,
        image_tokens=2 * 3 + 2,  # 2 rows of 2 patches and a row end, and a token before and after the image
        text_config=text(head_dim=16, rope_parameters={**ROPE, "mrope_section": [2, 2, 2, 2]}),
        vision_config=vision(out_hidden_size=64, text_hidden_size=64, max_image_size=28),
        image_token_id=IMAGE,
    ),
}
