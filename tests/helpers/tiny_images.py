"""Tiny models that take images as maps of pixels: LLaVA, models with a pixel shuffle, and others."""

from __future__ import annotations

from functools import partial

import torch

from tests.helpers import tiny_models as parts
from tests.helpers.tiny_models import AUDIO, IMAGE, VIDEO, VISION_END, VISION_START, text, vision

VISUAL_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SIGLIP = vision(model_type="siglip_vision_model", vision_use_head=False)
CLIP = vision(model_type="clip_vision_model", projection_dim=32)
QFORMER = {**vision(vocab_size=parts.VOCABULARY, encoder_hidden_size=32)}
GEMMA_LAYERS = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA_TOKENS = {"boi_token_id": VISION_START, "eoi_token_id": VISION_END, "audio_token_id": AUDIO}
PIXTRAL_SIZES = {"image_sizes": torch.tensor([[28, 28], [28, 28]])}
CODES = {"embed_dim": 8, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}  # of a VQ-VAE

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
        parts.images,
        text_config=text(model_type="qwen3", head_dim=16),
        vision_config=vision(norm_type="rms_norm", use_qk_norm=True, image_size=[28, 28], patch_size=[7, 7]),
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    ),
    "idefics3": partial(parts.idefics, language="llama", scale_factor=2),
    "smolvlm": partial(parts.idefics, language="llama", scale_factor=2),
    "llama4": partial(
        parts.images,
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
    "aya_vision": partial(
        parts.images,
        text_config=text(model_type="cohere2", sliding_window=64),
        vision_config=SIGLIP,
        image_token_index=IMAGE,
        downsample_factor=2,
    ),
    "cohere2_vision": partial(
        parts.images,
        text_config=text(model_type="cohere2", sliding_window=64),
        vision_config=SIGLIP,
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=64,
    ),
    "granite_docling": partial(
        parts.images,
        shape=(2, 1, 3, 28, 28),
        inputs={"pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool)},
        text_config=text(),
        vision_config=vision(out_hidden_size=64, scale_factor=2, deepstack_visual_indexes=[0], use_fine_route=False),
        image_token_id=IMAGE,
    ),
}

# ---- others ----

OTHERS = {
    "gemma3": partial(
        parts.images,
        text_config=text(head_dim=16, query_pre_attn_scalar=16, **GEMMA_LAYERS),
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
    ),
    "gemma4": partial(
        parts.images,
        shape=(2, 16, 3 * 7 * 7),
        inputs={"image_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1).repeat(2, 1, 1)},
        text_config=text(
            head_dim=16,
            global_head_dim=16,
            vocab_size_per_layer_input=parts.VOCABULARY,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=0,
            **GEMMA_LAYERS,
        ),
        vision_config=vision(num_key_value_heads=4, head_dim=8, pooling_kernel_size=2, position_embedding_size=64),
        **VISUAL_TOKENS,
        **GEMMA_TOKENS,
    ),
    "paligemma": partial(
        parts.images,
        image_tokens=16,
        text_config=text(model_type="gemma", head_dim=16),
        vision_config={**SIGLIP, "projection_dim": 64},
        projection_dim=64,
        image_token_index=IMAGE,
    ),
    "mistral3": partial(
        parts.images,
        inputs=PIXTRAL_SIZES,
        text_config=text(model_type="mistral", head_dim=16),
        vision_config=vision(model_type="pixtral"),
        image_token_index=IMAGE,
    ),
    "lighton_ocr": partial(
        parts.images,
        inputs=PIXTRAL_SIZES,
        text_config=text(model_type="qwen3", head_dim=16),
        vision_config=vision(model_type="pixtral"),
        image_token_id=IMAGE,
    ),
    "ovis2": partial(
        parts.images,
        text_config=text(model_type="qwen2"),
        vision_config=vision(vocab_size=24, hidden_stride=2),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[20, 21, 22, 23, 24],
        vocab_size=parts.VOCABULARY,
        hidden_size=64,
    ),
    "janus": partial(
        parts.images,
        image_tokens=16,
        text_config=text(model_type="llama"),
        vision_config=vision(projection_dim=64, num_image_tokens=16, depth=2, mlp_ratio=2),
        vq_config={
            **CODES,
            "num_embeddings": 16,
            "latent_channels": 32,
            "num_patches": 4,
            "projection_dim": 64,
            "image_token_embed_dim": 64,
        },
        image_token_id=IMAGE,
    ),
    "emu3": partial(
        parts.images,
        image_tokens=4 * 5,  # 4 rows of 4 patches and a row end
        shape=(2, 3, 8, 8),
        inputs={"image_sizes": torch.tensor([[8, 8], [8, 8]])},
        text_config=text(attention_dropout=0.0),
        vq_config={
            **CODES,
            "codebook_size": 16,
            "latent_channels": 4,
            "temporal_downsample_factor": 1,
            "attn_resolutions": [],
            "hidden_size": 32,
        },
        vocabulary_map={
            "<image>": IMAGE,
            "<|extra_200|>": 8,
            **{f"<|visual token {code:06d}|>": 30 + code for code in range(16)},
        },
    ),
    "deepseek_vl": partial(
        parts.images,
        image_tokens=16,
        text_config=text(model_type="llama"),
        vision_config=SIGLIP,
        image_token_id=IMAGE,
    ),
    "got_ocr2": partial(
        parts.images,
        shape=(2, 3, 64, 64),
        text_config=text(model_type="qwen2"),
        vision_config=vision(
            output_channels=16,
            image_size=64,
            patch_size=8,
            mlp_dim=48,
            window_size=4,
            global_attn_indexes=[1],
            initializer_range=0.02,
        ),
        image_token_index=IMAGE,
    ),
    "video_llava": partial(parts.llava, language="llama", video_token_index=VIDEO),
    "perception_lm": partial(
        parts.images,
        image_tokens=16,
        shape=(2, 1, 3, 28, 28),
        text_config=text(model_type="llama"),
        vision_config={**CLIP, "model_args": {"embed_dim": 32}},
        **VISUAL_TOKENS,
    ),
    "aria": partial(
        parts.images,
        text_config=text(model_type="aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        vision_config=vision(model_type="idefics3_vision"),
        image_token_index=IMAGE,
        projector_patch_to_query_dict={16: 4},
    ),
    "idefics2": partial(
        parts.idefics,
        language="mistral",
        perceiver_config={
            "hidden_size": 64,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        },
    ),
    "mllama": partial(
        parts.images,
        shape=(2, 1, 1, 3, 28, 28),
        inputs={
            "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
            "cross_attention_mask": torch.ones(2, 11, 1, 1, dtype=torch.long),
        },
        text_config=text(cross_attention_layers=[1], rope_parameters=ROPE, rope_scaling={"rope_type": "default"}),
        vision_config=vision(
            num_global_layers=1,
            vision_output_dim=64,
            max_num_tiles=1,
            intermediate_layers_indices=[0],
            supported_aspect_ratios=[[1, 1]],
        ),
        image_token_index=IMAGE,
    ),
    "instructblip": partial(
        parts.images,
        inputs={"qformer_input_ids": torch.tensor([[1, 2, 9], [1, 3, 9]])},
        text_config=text(model_type="llama"),
        vision_config=vision(initializer_range=0.02),
        qformer_config=QFORMER,
        num_query_tokens=4,
        image_token_index=IMAGE,
    ),
    "lfm2_vl": partial(
        parts.images,
        shape=(2, 16, 3 * 7 * 7),
        inputs={
            "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
            "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        },
        text_config=text(model_type="lfm2", layer_types=["conv", "full_attention"]),
        vision_config=vision(model_type="siglip2_vision_model", num_patches=16, vision_use_head=False),
        image_token_id=IMAGE,
        projector_hidden_size=32,
    ),
    "fuyu": partial(
        parts.images,
        image_tokens=16,
        shape=(2, 16, 3 * 7 * 7),
        text_config=text(model_type="persimmon"),
        image_size=28,
        patch_size=7,
        image_token_id=IMAGE,
    ),
    "florence2": partial(
        parts.images,
        image_tokens=2,
        text_config={
            "model_type": "bart",
            "vocab_size": parts.VOCABULARY,
            "d_model": 64,
            **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
            **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
            **{f"{part}_ffn_dim": 96 for part in ("encoder", "decoder")},
        },
        vision_config={
            "depths": [1, 1, 1, 1],
            **{name: [2, 2, 2, 2] for name in ("num_heads", "num_groups")},
            "embed_dim": [16, 16, 16, 16],
            "window_size": 4,
            "projection_dim": 64,
            "max_position_embeddings": 8,
        },
        image_token_id=IMAGE,
    ),
    "minicpmv4_6": partial(
        parts.images,
        image_tokens=1,
        shape=(1, 3, 7, 2 * 16 * 7),
        inputs={"target_sizes": torch.tensor([[4, 4], [4, 4]])},
        text_config=text(model_type="qwen3", head_dim=16),
        vision_config=vision(insert_layer_id=0),
        insert_layer_id=0,
        image_size=28,
        **VISUAL_TOKENS,
    ),
    "step3p7": partial(
        parts.images,
        image_tokens=1,
        text_config=text(
            head_dim=16,
            num_local_experts=4,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            share_expert_dim=32,
            mlp_layer_types=["dense", "sparse"],
            layer_types=["full_attention", "full_attention"],
            sliding_window=64,
        ),
        vision_config=vision(mlp_ratio=1.5, max_position_embeddings=16),
        image_token_id=IMAGE,
    ),
}
