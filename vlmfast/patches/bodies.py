"""The table of known bodies: the digest of each method and the function that replaces it. A new body is one line.

``python -m vlmfast scan`` prints the digests that are missing here and the classes that have them. A body whose source
changed between two releases of transformers has a line for each version.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlmfast.patches import (
    attention,
    grids,
    layers,
    masked_rows,
    merger,
    mining,
    mlp,
    pixel_shuffle,
    projects,
    rms_norm,
    segments,
    tiles,
)
from vlmfast.patches.masked_rows import expanded, flat, masks
from vlmfast.patches.projects import Named


@dataclass(frozen=True)
class Body:
    """One known body of a method.

    Attributes:
        method: the name of the method.
        key: the digest of the body; a `Named` for projects whose copies differ in details that do not matter.
        function: the replacement; None where there is none.
        says: what the body does and which models have it; without a replacement, why there is none.
    """

    method: str
    key: str | Named
    function: Callable[..., Any] | None
    says: str


MASK = "get_placeholder_mask"
INDEX = "get_rope_index"
ENCODE = "get_image_features"
PACK_TILES = "pack_image_features"
# Methods whose unknown bodies cause no warning: without the replacement the host waits for the device, no more.
QUIET = {INDEX, ENCODE, PACK_TILES}
REPLACE = "_replace_img_tokens_with_embd"
# Names that the bodies of projects outside transformers use; see `Named`.
PACK = "torch arange shape device unsqueeze argsort gather repeat rearrange"
PACK_VISIBLE = (
    f"{PACK} list values cat_encoder_tensors num_register_tokens register_tokens cat zeros_like zeros bool full int16"
)
PACK_TARGETS = f"{PACK} cat_decoder_tensors adapt_decoder_attention_mask"
PLACE = "clone tokenizer image_token_id view size to dtype"
SHUFFLE = "size view int permute contiguous"
SHUFFLE_SQUARE = f"{SHUFFLE} scale_factor reshape"
SHUFFLE_EITHER = f"{SHUFFLE} ps_version"
PROJECT = "pixel_shuffle proj"
EXTRACT = (
    "select_layer vision_model last_hidden_state hidden_states int shape reshape pixel_shuffle downsample_ratio mlp1"
)
SELECT = (
    "type list vision_tower to device dtype unsqueeze feature_select append int shape reshape pixel_shuffle "
    "scale_pix_shuffle"
)
MINE = (
    "int shape permute reshape len contiguous get_model vlm_uni_query_projector vlm_uni_aux_projector "
    "vlm_uni_val_projector transpose nan_to_num softmax mean"
)

BODIES = (
    # RMSNorm
    Body("forward", "c4cf7d37d3454e26", rms_norm.llama_rms_norm, "rounds before the weight: Llama and most others"),
    Body("forward", "58203d20fe8fc54b", rms_norm.llama4_rms_norm, "rounds before the weight: Llama 4"),
    Body("forward", "f18029c6dfe37c98", rms_norm.t5_rms_norm, "rounds to the dtype of the weight: T5, IDEFICS"),
    Body("forward", "d1b945cdbf3b29ac", rms_norm.gemma_rms_norm, "weight centred on zero: Gemma, Qwen3-Next"),
    Body("forward", "d62ce359834cce2d", rms_norm.olmo_rms_norm, "weight in float32: OLMo, gpt-oss"),
    Body("forward", "1c86d4645d34e3fe", rms_norm.olmo_rms_norm, "weight in float32: Helium, Nemotron-H"),
    Body("forward", "1983de0977549aa5", rms_norm.moshi_rms_norm, "weight in float32: Moshi"),
    Body("forward", "7f41768cdb0349a1", rms_norm.gemma4_rms_norm, "weight in float32, or none: Gemma 4"),
    Body("forward", "9927d6d85ce7736b", rms_norm.plain_rms_norm, "no weight: NanoChat, queries and keys of Llama 4"),
    Body("forward", "903350b77e9f8b2d", rms_norm.grouped_rms_norm, "of groups, or as Gemma's: Qwen4"),
    Body("forward", "b16b7bab329bec95", rms_norm.gated_rms_norm, "rounds before the weight, then a gate: Qwen3-Next"),
    Body("forward", "2a6ea0d024e30f25", rms_norm.gated_rms_norm, "as before: Qwen3-Next of 4.57"),
    Body("forward", "bf4ff6e895490516", None, "it has a gate before a norm of groups"),
    Body("forward", "be6da3e7541855b2", None, "it has a gate before the norm"),
    Body("forward", "bf4fa6dd0f532959", None, "it is a LayerNorm without a bias"),
    # Where image, video and audio embeddings go
    Body(MASK, "c7355c551ffcc3cf", masks("image"), "LLaVA, InternVL"),
    Body(MASK, "a9feaa999f70546c", masks("image"), "LLaVA-NeXT, Llama 4, SmolVLM"),
    Body(MASK, "4b9e3f7046a012c3", masks("image"), "LFM2-VL"),
    Body(MASK, "46988a3ee36819dc", masks("image"), "PaddleOCR-VL"),
    Body(MASK, "c94b82523d452cd7", masks("image"), "DiffusionGemma"),
    Body(MASK, "284c5f552e0e178c", expanded(masks("image")), "LLaVA of 4.57"),
    Body(MASK, "13675a6c859bf0c7", expanded(masks("image")), "LLaVA-NeXT of 4.57"),
    Body(MASK, "f50c04ecb19b4e3e", expanded(masks("image")), "DeepSeek-VL of 4.57"),
    Body(MASK, "1918ea98a2051bb7", expanded(masks("image")), "LFM2-VL of 4.57"),
    Body(MASK, "c22815b31c99d24b", expanded(masks("image")), "HunYuan-VL"),
    Body(MASK, "1d9951a154b80737", masks("image", owner="vocabulary_mapping"), "Chameleon, Emu3"),
    Body(MASK, "5b49e29d9057f24f", expanded(masks("image", owner="vocabulary_mapping")), "Chameleon of 4.57"),
    Body(MASK, "96378a356f97a5e4", flat(masks("image")), "(B, T): Granite-Docling"),
    Body(MASK, "f6bfd363c9277b96", masks("image", "video"), "Qwen-VL"),
    Body(MASK, "0e948c0e7e08e09c", masks("image", "video"), "Perception-LM"),
    Body(MASK, "50571513a30a54b0", masks("image", "video"), "Video-LLaVA"),
    Body(MASK, "9b6e87d342dde2ab", expanded(masks("image", "video")), "Qwen-VL of 4.57"),
    Body(MASK, "1e7970183a8dd85d", expanded(masks("image", "video")), "LLaVA-OneVision of 4.57"),
    Body(MASK, "13d30daa9b1d0548", expanded(masks("image", "video")), "Perception-LM of 4.57"),
    Body(MASK, "005c2f54df4cfd40", expanded(masks("image", "video")), "Video-LLaVA of 4.57"),
    Body(MASK, "324dca0c8a3a95f9", expanded(masks("image", "video")), "MiniMax-M3-VL"),
    Body(MASK, "7afd1b971aa7570a", masked_rows.video_as_image_masks, "GLM-4V"),
    Body(MASK, "ba7ac1fa1641f3f7", expanded(masked_rows.video_as_image_masks), "GLM-4V of 4.57"),
    Body(MASK, "f0935138b4329c04", masks("image", "video", "audio"), "Qwen-Omni"),
    Body(MASK, "dde67559a8e7bfe8", expanded(masks("image", "video", "audio")), "Qwen-Omni of 4.57"),
    Body(MASK, "3f4eb0a3de881dd5", flat(masks("image", "video", "audio")), "(B, T): Gemma 4"),
    Body(MASK, "faa442613a134458", masks("image", "audio"), "Gemma 3n"),
    Body(MASK, "8258c72629015d90", expanded(masks("image", "audio")), "Gemma 3n of 4.57"),
    Body(MASK, "9a42c6206f9d9e74", expanded(masks("audio")), "Audio Flamingo 3, Voxtral"),
    Body(MASK, "5efec55a18a55876", expanded(masked_rows.token_mask), "of a token that it is told: MiniCPM-V"),
    Body(MASK, "0a2c03ac446ffa7f", expanded(masked_rows.token_mask), "of a token that it is told: Inkling"),
    Body(MASK, "2d2124ff886fed1b", expanded(masked_rows.token_mask), "of a token that it is told: Nemotron-H Omni"),
    Body(MASK, "5e855dd6a79678f8", masked_rows.placeholder_token_mask, "of a token that it is told: Pocket TTS"),
    Body(MASK, "659557310ed40b57", None, "its caller may bring more features than placeholders"),
    Body(MASK, "ba932a9dcfdfd127", None, "its caller may bring more features than placeholders"),
    Body(MASK, "9a16367addf424a1", None, "its caller may bring more features than placeholders"),
    Body(MASK, "f47e5c05e6ddb736", None, "its caller may bring more features than placeholders"),
    Body(MASK, "d5462c2648ae0ef4", None, "it calls the method of its model"),
    Body(MASK, "5ea6de54cdd8687b", None, "it is of ids, not of embeddings"),
    Body("inputs_merger", "6cd25170c3a5c63b", masked_rows.merge_inputs, "of images: Idefics"),
    Body("inputs_merger", "7e6f8030f5b5e86b", masked_rows.merge_first_inputs, "of images: Idefics of 5.17"),
    Body("inputs_merger", "1d209c3c3e76b94c", masked_rows.merge_first_inputs, "of images: Idefics of 4.57"),
    Body("inputs_merger", "b6d1acc837fc0014", masked_rows.merge_blocks, "of blocks of images: SmolVLM of 5.17"),
    Body("inputs_merger", "8fb255e85317806c", masked_rows.merge_blocks, "of blocks of images: SmolVLM of 4.57"),
    # DeepStack
    Body("_deepstack_process", "69056dc0e7c310ed", masked_rows.deepstack_process, "adds to a copy: Qwen3-VL"),
    Body("_deepstack_process", "b0ff7dae565a7caf", masked_rows.deepstack_process, "adds in place: Qwen3-VL of 4.57"),
    Body("_deepstack_process", "bd8c1f74348db57c", masked_rows.wide_deepstack_process, "(B, T, D): Omni of 4.57"),
    # Connectors
    Body("forward", "16e04f79d7a92b2a", merger.merge_patches, "LayerNorm, two linear layers: Qwen3-VL"),
    Body("forward", "529a858c72fa85dd", merger.qwen2_merge_patches, "a norm and a sequence of layers: Qwen2-VL"),
    Body("forward", "01ddc0a1a6ed155b", merger.omni_merge_patches, "LayerNorm and a list of layers: Qwen-Omni"),
    Body("forward", "f0b08b5f3d04ab82", merger.project_tokens, "LayerNorm, two linear layers: InternVL"),
    Body("forward", "38e040efe7e634d6", pixel_shuffle.shuffle_mlp, "pixel shuffle and layers: Llama 4"),
    Body("pixel_shuffle", "6ebc7b4524308084", pixel_shuffle.shuffle_square, "of a square: Idefics3, SmolVLM"),
    Body("pixel_shuffle", "6623a259a2f18c2c", pixel_shuffle.shuffle_hidden, "of a square: ModernVBERT"),
    Body("pixel_shuffle", "19ff59cf2d776e87", pixel_shuffle.shuffle_square_into_map, "square into map: Aya Vision"),
    Body("pixel_shuffle", "5b12b75944ad9ea3", pixel_shuffle.shuffle_map, "of a map: InternVL"),
    Body("pixel_shuffle", "34fa941962c5be6d", pixel_shuffle.shuffle_map, "of a map: Nemotron-H Omni"),
    Body("pixel_unshuffle", "0e9cd6380436a1fa", pixel_shuffle.unshuffle_map, "of a map: LFM2-VL"),
    Body("pixel_unshuffle", "34cd16df0e9b8183", None, "it interpolates"),
    Body("pixel_shuffle", "2df8ea4545572550", None, "it is of images of several sizes"),
    # Attention of vision towers
    Body("forward", "64e302b8da90caf8", segments.attend, "within windows, images or frames: Qwen-VL"),
    Body("forward", "b08684f56aea5b5d", segments.attend_457, "within windows, images or frames: Qwen-VL of 4.57"),
    # What depends on the sizes of images
    Body("forward", "a38a3c23256a5b8b", grids.encode, "positions of patches: Qwen2-VL"),
    Body("forward", "f77f207f77bd0d5d", grids.encode, "and windows: Qwen2.5-VL"),
    Body("forward", "e862ea7e5d07e509", grids.encode, "and windows: Qwen2.5-Omni"),
    Body("forward", "53d1105d9ccfc6b6", grids.encode, "and interpolated embeddings: Qwen3-VL"),
    Body("forward", "17b8df0727a11cf8", grids.encode, "and interpolated embeddings: Qwen3.5"),
    Body("forward", "daac8df481d3360a", grids.encode, "and interpolated embeddings: Qwen3-Omni"),
    Body(INDEX, "7b9fd1c6deaeffa3", grids.index_positions, "of text, images and videos: Qwen2-VL"),
    Body(INDEX, "05f4a578b4fd5480", grids.index_positions, "of text, images and videos: Qwen2-VL of 5.17"),
    Body(INDEX, "3cefb032f7229ac2", grids.index_timed_positions, "of text, images and videos: Qwen2.5-VL"),
    Body(INDEX, "07159aaa9c60e86f", grids.index_timed_positions, "of text, images and videos: Qwen2.5-VL of 5.17"),
    Body(INDEX, "adeb3f99b7dacd02", grids.index_positions, "of text, images and frames: Qwen3-VL"),
    Body(INDEX, "67a1ed38af4d7e82", grids.index_positions, "of text, images and frames: Qwen3-VL of 5.17"),
    Body(ENCODE, "f317c0bb783b5f55", tiles.encode_tiles, "of crops: LLaVA-NeXT"),
    Body(ENCODE, "97f9768b3829ad6f", tiles.encode_tiles, "of crops: LLaVA-NeXT-Video"),
    Body(PACK_TILES, "23382ecd8a5d4bfb", tiles.pack_tiles, "with newlines and without padding: LLaVA-NeXT"),
    # Gated MLPs
    Body("forward", "53cf8d209a685e47", mlp.gated_mlp, "three projections: Llama and most others"),
    Body("forward", "e623c7e14c4101df", mlp.vision_gated_mlp, "three projections: towers of Qwen2.5-VL and GLM-4V"),
    Body("forward", "b28c02621ea13681", mlp.fused_gated_mlp, "one projection for gate and up: Phi-3, GLM"),
    # Decoder layers
    Body("forward", "4ac1461b49a26d73", layers.llama_layer, "two norms: Llama, Qwen2-VL and most others"),
    Body("forward", "b4a713f46cf63ebc", layers.llama_layer_457, "two norms: Llama of 4.57"),
    Body("forward", "5f192e3a500f70a5", layers.qwen2_vl_layer_457, "two norms: Qwen2-VL of 4.57"),
    Body("forward", "0da2d645e1ea3862", layers.qwen3_vl_layer, "two norms: Qwen3-VL"),
    Body("forward", "326b8b7e1c892d1a", layers.qwen3_vl_layer_457, "two norms: Qwen3-VL of 4.57"),
    Body("forward", "61fb41a79a35ab3f", layers.qwen3_5_layer, "two norms, attention or what is linear: Qwen3.5"),
    Body("forward", "1dc83e5eaa9323c7", layers.gemma_layer, "four norms: Gemma 2 and 3"),
    # Attention of decoders
    Body("forward", "3dbdad7fe8d9cbaa", attention.attends_optional(), "Llama, Gemma, Cohere and others"),
    Body("forward", "fd0b80116c462244", attention.attends_cached(), "Llama and others of 4.57"),
    Body("forward", "e55867e41fa34d69", attention.attends(attention.window), "with a window: Qwen2"),
    Body("forward", "e181b0a27dd2c6c0", attention.attends_cached(attention.window), "with a window: Qwen2 of 4.57"),
    Body(
        "forward", "fcc949dea00cb9bf", attention.attends(attention.configured_window), "with a window: Mistral, Mixtral"
    ),
    Body("forward", "39da9e934223c397", attention.attends_cached(attention.configured_window), "Mistral of 4.57"),
    Body("forward", "fc92d9516aac7b08", attention.attends(normed=True), "with norms: Qwen3-VL"),
    Body("forward", "bdee13b387578ecd", attention.attends_cached(normed=True), "with norms: Qwen3-VL of 4.57"),
    Body("forward", "71aca1ba5aa117de", attention.attends(attention.window, normed=True), "window, norms: Qwen3"),
    Body("forward", "ba7e13848f009281", attention.attends_cached(attention.window, normed=True), "Qwen3 of 4.57"),
    Body("forward", "c3205f56b36c2f67", attention.qwen2_vl_attention, "told the positions: Qwen2-VL, Qwen2.5-VL"),
    Body("forward", "15169cc84ebeb06f", attention.qwen2_vl_attention_457, "with M-RoPE by sections: Qwen2-VL of 4.57"),
    Body("forward", "7602c8a61a4b108f", attention.attends_optional(attention.capped_window), "with a cap: Gemma 2"),
    Body(
        "forward", "4409cb583473a106", attention.attends_cached(attention.capped_window), "with a cap: Gemma 2 of 4.57"
    ),
    Body(
        "forward",
        "4cdff23a90abf07c",
        attention.attends_optional(attention.window, normed=True),
        "window, norms: Gemma 3",
    ),
    Body("forward", "fb3e768bf8915985", attention.attends_cached(attention.window, normed=True), "Gemma 3 of 4.57"),
    Body(
        "forward",
        "1da0b6810adddba4",
        attention.attends(normed=True, gated=True),
        "norms and a gate: Qwen3.5, Qwen3-Next",
    ),
    Body("forward", "61745e41a450e714", attention.attends_cached(normed=True, gated=True), "Qwen3-Next of 4.57"),
    # Projects outside transformers
    Body(
        "forward_mask_encoder", Named("FourM", PACK_VISIBLE), projects.forward_mask_encoder, "packs visible tokens: 4M"
    ),
    Body("forward_mask_decoder", Named("FourM", PACK_TARGETS), projects.forward_mask_decoder, "packs targets: 4M"),
    Body(REPLACE, Named("VisionLanguageModel", PLACE), projects.replace_img_tokens_with_embd, "of images: nanoVLM"),
    Body("forward", Named("ModalityProjector", PROJECT), projects.project_square, "shuffle, linear layer: nanoVLM"),
    Body("pixel_shuffle", Named("ModalityProjector", SHUFFLE_SQUARE), projects.shuffle_square, "of a square: nanoVLM"),
    Body("extract_feature", Named("InternVLChatModel", EXTRACT), projects.extract_feature, "shuffle, layers: InternVL"),
    Body("pixel_shuffle", Named("InternVLChatModel", SHUFFLE_EITHER), projects.shuffle_ordered_map, "map: InternVL"),
    Body("forward", Named("InternViTVisionTower", SELECT), projects.select_and_shuffle, "scaled shuffle: VITA"),
    Body("pixel_shuffle", Named("InternViTVisionTower", SHUFFLE), projects.shuffle_x_map, "of a map: VITA"),
    Body("unified_resampler", Named("MGMMetaForCausalLM", MINE), mining.unified_resampler, "mining: Mini-Gemini"),
)

# The first three parameters, with self, of every known forward. A longer forward that begins otherwise cannot be known,
# so its source is not read.
BEGINNINGS = {
    tuple(inspect.signature(body.function).parameters)[:3]
    for body in BODIES
    if body.method == "forward" and body.function is not None
}
