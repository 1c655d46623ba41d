"""Parts of tiny random models and hand-built inputs, which need no download and no processor."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 64
IMAGE, VIDEO, VISION_START, VISION_END, AUDIO = 3, 4, 5, 6, 7  # token ids
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
GRID = {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}
Built = tuple[nn.Module, dict[str, Any]]  # a model and its inputs


# ---- configurations ----


def text(**config: Any) -> dict[str, Any]:
    """Make the configuration of a language model with two layers and four heads of 16 channels."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **config,
    }


def vision(**config: Any) -> dict[str, Any]:
    """Make the configuration of a vision tower with two layers and 4 x 4 patches per image of 28 x 28 pixels."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 7,
        **config,
    }


def qwen3_vision(**config: Any) -> dict[str, Any]:
    """Make the configuration of the vision tower of Qwen3-VL and Qwen3.5."""
    return {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "num_position_embeddings": 16,
        **config,
    }


def mrope(sections: list[int], **config: Any) -> dict[str, Any]:
    """Make the configuration of M-RoPE, in keys that every supported transformers reads."""
    return {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "default", "mrope_section": sections, **config}}


# ---- models ----


def model(model_type: str, **config: Any) -> nn.Module:
    """Build a random model of that type."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as VISUAL

    auto = AutoModelForImageTextToText if model_type in VISUAL else AutoModelForCausalLM
    return randomised(lambda: auto.from_config(AutoConfig.for_model(model_type, **copy.deepcopy(config))))


def randomised(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model in evaluation mode, the same at each call.

    One-dimensional parameters are moved off their initial ones and zeros, which would hide an unused weight, and so are
    matrices of zeros. Other parameters are enlarged, so that every layer affects the output.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        result = build().eval()
        for parameter in result.parameters():
            if parameter.dim() > 1 and parameter.any():
                parameter.mul_(3.0)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    result.generation_config.pad_token_id = 0
    result.generation_config.eos_token_id = None  # generate as many tokens as asked for
    return result


# ---- inputs ----


def prompts(image_tokens: int) -> dict[str, Tensor]:
    """Make two prompts with one image each and different text."""
    before, image, after = [1, 10, VISION_START], [IMAGE] * image_tokens, [VISION_END, 11, 12, 13]
    ids = torch.tensor([before + image + after, before + image + [VISION_END, 14, 15, 16]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pixels(*shape: int) -> Tensor:
    """Draw random pixels, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# ---- models with inputs ----


def language_model(model_type: str, **config: Any) -> Built:
    """Build a language model alone, with a prompt of text."""
    return model(model_type, **text(**config)), prompts(image_tokens=4)


def with_images(result: nn.Module, image_tokens: int, shape: tuple[int, ...], inputs: dict[str, Tensor]) -> Built:
    """Add two prompts, pixels of that shape for both, and other inputs."""
    found = {**prompts(image_tokens), "pixel_values": pixels(*shape), **{name: x.clone() for name, x in inputs.items()}}
    if "mm_token_type_ids" in inspect.signature(result.forward).parameters:
        found["mm_token_type_ids"] = (found["input_ids"] == IMAGE).int()
    return result, found


def images(
    model_type: str,
    image_tokens: int = 4,
    shape: tuple[int, ...] = (2, 3, 28, 28),
    inputs: dict[str, Tensor] | None = None,
    **config: Any,
) -> Built:
    """Build a model that takes one image per prompt, by default of 28 x 28 pixels."""
    return with_images(model(model_type, **config), image_tokens, shape, inputs or {})


def patches(model_type: str, values: int = 3 * 2 * 4 * 4, image_tokens: int = 4, **config: Any) -> Built:
    """Build a model that takes images as rows of patches: 4 x 4 patches of ``values`` numbers per prompt."""
    return images(model_type, image_tokens, (2 * 16, values), GRID, **config)


def qwen(model_type: str, **config: Any) -> Built:
    """Build a Qwen-VL model, or one whose special tokens have the same names."""
    return patches(model_type, **config, **QWEN_TOKENS)


def llava(model_type: str, language: str, **config: Any) -> Built:
    """Build a LLaVA with a CLIP tower."""
    return images(
        model_type,
        image_tokens=16,
        text_config=text(model_type=language),
        vision_config=vision(model_type="clip_vision_model", projection_dim=32),
        image_token_index=IMAGE,
        **config,
    )


def llava_tiles(model_type: str, language: str, tower: str = "clip_vision_model", **config: Any) -> Built:
    """Build a LLaVA that takes a thumbnail and two crops, with a learned newline after each row of patches."""
    result = model(
        model_type,
        text_config=text(model_type=language),
        vision_config=vision(model_type=tower, **({"vision_use_head": False} if "siglip" in tower else {})),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[28, 56], [56, 28]],
        **config,
    )
    return with_images(result, 16 + 4 * (8 + 1), (2, 3, 3, 28, 28), {"image_sizes": torch.tensor([[28, 56], [28, 56]])})


def idefics(model_type: str, language: str, **config: Any) -> Built:
    """Build an Idefics or SmolVLM model, which takes a list of images per prompt."""
    return images(
        model_type,
        shape=(2, 1, 3, 28, 28),
        text_config=text(model_type=language),
        vision_config=vision(),
        image_token_id=IMAGE,
        pad_token_id=0,
        **config,
    )
