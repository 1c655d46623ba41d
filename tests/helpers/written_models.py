"""Vision-language models with random weights, written to disk with a tokenizer and a processor, for whoever reads them.

Heads of the language models have 64 channels: vLLM's attention on CPUs takes 32, 64, 80, ... only.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TILES = {  # the names by which InternVL's processor asks its tokenizer
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *QWEN]
WORDS = [*re.findall(r"\S+", "user assistant what is in this image the and : ?"), *(f"w{i}" for i in range(346))]
WORDS += ["<", ">", ".", "seconds", *"0123456789"]  # times of frames, which Qwen3-VL is told
HIDDEN = 128  # channels of the language models
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
CHAT = (
    "{%- for m in messages -%}user {% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type in ('image', 'image_url') %}IMAGE{% else %} {{ c.text }}{% endif %}{% endfor %}{% endif %}"
    "{%- endfor %} assistant"
)


def write(name: str, folder: Path) -> Path:
    """Write the model of a family, once, and return its folder."""
    folder = folder / name
    if folder.exists():
        return folder
    tokenizer = _tokenizer(TILES if name == "internvl" else {})
    config, processor = FAMILIES[name](tokenizer)
    tokenizer.chat_template = CHAT.replace("IMAGE", placeholder(name))
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    config.architectures = [type(model).__name__]
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            # attention that prefers some patches clearly
            in_tower = "vision" in key or "visual" in key
            if in_tower and any(part in key for part in ("q_proj.weight", "k_proj.weight", "qkv.weight")):
                parameter.mul_(4.0)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    published = dict(_as_published(name, key, weight) for key, weight in weights.items())
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    processor.save_pretrained(folder)
    return folder


def _as_published(name: str, key: str, weight: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Return a weight as published checkpoints have it, and vLLM reads it, where transformers 5.17 writes another."""
    if "llava" in name and "vision_tower.vision_model." not in key:
        key = key.replace("vision_tower.", "vision_tower.vision_model.")
    if name == "qwen3_vl_moe" and ".experts." in key:  # the inputs of a matrix before its outputs
        inputs = EXPERTS["moe_intermediate_size"] if "down_proj" in key else HIDDEN
        weight = weight if weight.shape[1] == inputs else weight.mT.contiguous()
    return key, weight


def placeholder(name: str) -> str:
    """Return what stands for an image in a prompt."""
    if name == "internvl":
        return TILES["context_image_token"]
    return "<image>" if "llava" in name else "<|vision_start|><|image_pad|><|vision_end|>"


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Make a picture of coloured areas with noise."""
    rng = np.random.default_rng(seed)
    areas = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(areas).astype(int) + noise, 0, 255).astype(np.uint8))


def _tokenizer(named: Mapping[str, str]) -> Any:
    words = dict.fromkeys([*SPECIALS, *WORDS, *named.values()])
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        **({"extra_special_tokens": dict(named)} if named else {"additional_special_tokens": SPECIALS[4:]}),
        padding_side="left",
        model_max_length=8192,
        model_input_names=["input_ids", "attention_mask"],
    )


def _text(tokenizer: Any, **others: Any) -> dict[str, Any]:
    sizes = {"vocab_size": len(tokenizer), "hidden_size": HIDDEN, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    return sizes | heads | tokens | others


def _clip(**others: Any) -> dict[str, Any]:
    layers = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2}
    return (
        {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 7, "projection_dim": 32} | layers | others
    )


def _llava_parts(
    tokenizer: Any, side: int = 56, patch: int = 7, **tower: Any
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return what the configuration, the image processor and the processor of both LLaVAs have in common."""
    tower = _clip(image_size=side, patch_size=patch, **tower)
    count = (side // patch) ** 2
    features = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "image_seq_length": count}
    config = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "vision_config": tower} | features
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    tokens = {"patch_size": patch, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return config, sizes, tokens


def _llava(tokenizer: Any, text: Mapping[str, Any] = MappingProxyType({}), **tower: Any) -> tuple[Any, Any]:
    parts, sizes, tokens = _llava_parts(tokenizer, **tower)
    text = _text(tokenizer, model_type="llama", architectures=["LlamaForCausalLM"], **text)
    images = transformers.CLIPImageProcessor(**sizes)
    return transformers.LlavaConfig(text_config=text, **parts), transformers.LlavaProcessor(images, tokenizer, **tokens)


def _llava_next(tokenizer: Any) -> tuple[Any, Any]:
    parts, sizes, tokens = _llava_parts(tokenizer)
    text = _text(tokenizer, model_type="mistral", architectures=["MistralForCausalLM"])
    images = transformers.LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **sizes)
    config = transformers.LlavaNextConfig(text_config=text, image_grid_pinpoints=PINPOINTS, **parts)
    return config, transformers.LlavaNextProcessor(images, tokenizer, **tokens)


def _llava_onevision(tokenizer: Any) -> tuple[Any, Any]:
    tower = _clip(model_type="siglip_vision_model", vision_use_head=False, num_hidden_layers=2)
    text = _text(tokenizer, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    image, video = map(tokenizer.convert_tokens_to_ids, ("<image>", "<|video_pad|>"))
    pinpoints = [*PINPOINTS, [280, 280]]  # the crops of the last are more than it shows: it makes such an image smaller
    tokens = {"image_token_index": image, "video_token_index": video, "image_grid_pinpoints": pinpoints}
    size = {"height": 56, "width": 56}
    config = transformers.LlavaOnevisionConfig(
        text_config=text, vision_config=tower, vision_feature_select_strategy="full", **tokens
    )
    images = transformers.LlavaOnevisionImageProcessor(image_grid_pinpoints=pinpoints, size=size)
    return config, transformers.LlavaOnevisionProcessor(
        images,
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=64,
        vision_feature_select_strategy="full",
        video_token="<|video_pad|>",
    )


def _internvl(tokenizer: Any) -> tuple[Any, Any]:
    tower = _clip(model_type="internvl_vision", image_size=[56, 56], patch_size=[7, 7])
    text = _text(tokenizer, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    token = tokenizer.context_image_token_id
    config = transformers.InternVLConfig(
        text_config=text, vision_config=tower, image_token_id=token, image_seq_length=16, tie_word_embeddings=False
    )
    size = {"height": 56, "width": 56}
    images = transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=3)
    videos = transformers.InternVLVideoProcessor(size=size)
    return config, transformers.InternVLProcessor(images, tokenizer, videos, image_seq_length=16)


def _qwen_ids(tokenizer: Any) -> dict[str, Any]:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, map(tokenizer.convert_tokens_to_ids, QWEN), strict=True)) | {"tie_word_embeddings": False}


def _qwen_processor(tokenizer: Any, release: str, patch: int) -> Any:
    sizes: dict[str, Any] = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    area = (patch * 2) ** 2
    if release == "Qwen3":  # as published, and as its videos: vLLM normalises both by the numbers of images
        sizes |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = transformers.Qwen2VLImageProcessor(size={"shortest_edge": area, "longest_edge": area * 1280}, **sizes)
    videos = "Qwen3VLVideoProcessor" if release == "Qwen3" else "Qwen2VLVideoProcessor"
    return getattr(transformers, f"{release}VLProcessor" if release == "Qwen3" else f"{release}_VLProcessor")(
        image_processor=images, tokenizer=tokenizer, video_processor=getattr(transformers, videos)(**sizes)
    )


def _qwen_tower(patch: int, **others: Any) -> dict[str, Any]:
    layers = {"depth": 4, "hidden_size": 64, "out_hidden_size": 128, "intermediate_size": 96, "num_heads": 2}
    return layers | {"patch_size": patch, "spatial_merge_size": 2, "temporal_patch_size": 2} | others


def _qwen2_5_vl(tokenizer: Any) -> tuple[Any, Any]:
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e4}
    tower = _qwen_tower(14, window_size=56, fullatt_block_indexes=[1, 3])
    text = _text(tokenizer, rope_parameters=rope)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower, **_qwen_ids(tokenizer))
    return config, _qwen_processor(tokenizer, "Qwen2_5", 14)


def _qwen3_vl(
    tokenizer: Any, text: Mapping[str, Any] = MappingProxyType({}), kind: str = "Qwen3VL", **tower: Any
) -> tuple[Any, Any]:
    rope = {"rope_type": "default", "mrope_section": [12, 10, 10], "mrope_interleaved": True, "rope_theta": 1e4}
    tower = _qwen_tower(16, **{"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]} | tower)
    text = _text(tokenizer, **{"head_dim": 64, "num_hidden_layers": 4, "rope_parameters": rope} | dict(text))
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=tower, **_qwen_ids(tokenizer))
    return config, _qwen_processor(tokenizer, "Qwen3", 16)


# with as many tokens as published models have, of fewer and narrower layers: for measurements of speed
WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
WIDE_TOWER = {"hidden_size": 256, "intermediate_size": 1024}
wide_llava = functools.partial(
    _llava, text=WIDE | {"num_key_value_heads": 8}, side=336, patch=14, num_hidden_layers=7, **WIDE_TOWER
)
# Attention among 4080 patches does not shrink as fast as matrices: with two layers, the tower does a quarter of the
# work for a prompt of 1020 tokens, as in Qwen3-VL-8B
wide_qwen3_vl = functools.partial(
    _qwen3_vl,
    text={
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    out_hidden_size=1024,
    depth=2,
    num_position_embeddings=2304,
    deepstack_visual_indexes=[0],
    **WIDE_TOWER,
)

LINEAR = {  # layers of linear attention beside the last one, which rotates a quarter of its channels
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.25,
    },
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}

FAMILIES = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": functools.partial(_qwen3_vl, text=EXPERTS, kind="Qwen3VLMoe"),
    "qwen3_5": functools.partial(_qwen3_vl, text=LINEAR, kind="Qwen3_5", deepstack_visual_indexes=[]),
    "qwen3_5_moe": functools.partial(
        _qwen3_vl,
        text=LINEAR | EXPERTS | {"shared_expert_intermediate_size": 64},
        kind="Qwen3_5Moe",
        deepstack_visual_indexes=[],
    ),
    "llava_wide": wide_llava,
    "qwen3_vl_wide": wide_qwen3_vl,
}
