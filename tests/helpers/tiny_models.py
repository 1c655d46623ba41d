"""Parts of tiny random models and hand-built inputs: no download, no processor, a fraction of a second."""

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
Built = tuple[nn.Module, dict[str, Any]]  # a model and its inputs


# ---- configurations ----


def text(**config: Any) -> dict[str, Any]:
    """Configure a language model of two layers and four heads of 16 channels."""
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
    """Configure a vision tower of two layers that turns an image of 28 x 28 into 4 x 4 patches."""
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
    """Configure the vision tower of Qwen3-VL and Qwen3.5."""
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
    """Configure multimodal rotary embeddings, in the notation that every supported transformers reads."""
    return {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "default", "mrope_section": sections, **config}}


# ---- models ----


def model(model_type: str, **config: Any) -> nn.Module:
    """Build a random model of that type."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    return randomised(lambda: auto.from_config(AutoConfig.for_model(model_type, **copy.deepcopy(config))))


def randomised(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model in evaluation mode, the same at each call.

    One-dimensional parameters are moved off their initial ones and zeros, which would hide a weight that is not used,
    and matrices are made larger, so that every layer leaves a trace in the output.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        result = build().eval()
        for parameter in result.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    result.generation_config.pad_token_id = 0
    result.generation_config.eos_token_id = None  # generate as many tokens as asked for
    return result


# ---- inputs ----


def prompts(image_tokens: int) -> dict[str, Tensor]:
    """Write two prompts of one image each, which differ in their text."""
    before, image, after = [1, 10, VISION_START], [IMAGE] * image_tokens, [VISION_END, 11, 12, 13]
    ids = torch.tensor([before + image + after, before + image + [VISION_END, 14, 15, 16]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pixels(*shape: int) -> Tensor:
    """Draw random pixels, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def with_token_types(result: nn.Module, inputs: dict[str, Any]) -> Built:
    """Add what tells images from text, where the model asks for it."""
    if "mm_token_type_ids" in inspect.signature(result.forward).parameters:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return result, inputs


# ---- models with inputs ----


def language_model(model_type: str, **config: Any) -> Built:
    """Build a language model alone, with a prompt of text."""
    return model(model_type, **text(**config)), prompts(image_tokens=4)


def qwen(model_type: str, **config: Any) -> Built:
    """Build a model that takes images as rows of patches: here 4 x 4 patches of 3 x 2 x 4 x 4 values."""
    return with_patches(model(model_type, **config, **QWEN_TOKENS))


def with_patches(result: nn.Module) -> Built:
    """Add the inputs of `qwen`."""
    images = {"pixel_values": pixels(2 * 16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}
    return with_token_types(result, {**prompts(image_tokens=4), **images})


def image_rows(model_type: str, image_tokens: int = 4, **config: Any) -> Built:
    """Build a model that takes one image of 28 x 28 for each prompt."""
    return model(model_type, **config), {**prompts(image_tokens), "pixel_values": pixels(2, 3, 28, 28)}


def llava(model_type: str, language: str, **config: Any) -> Built:
    """Build a LLaVA on CLIP."""
    return image_rows(
        model_type,
        image_tokens=16,
        text_config=text(model_type=language),
        vision_config=vision(model_type="clip_vision_model", projection_dim=32),
        image_token_index=IMAGE,
        **config,
    )


def llava_tiles(model_type: str, language: str, tower: str = "clip_vision_model", **config: Any) -> Built:
    """Build a LLaVA that takes a thumbnail and two tiles, with a learned row end after each row of patches."""
    result = model(
        model_type,
        text_config=text(model_type=language),
        vision_config=vision(model_type=tower, **({"vision_use_head": False} if "siglip" in tower else {})),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[28, 56], [56, 28]],
        **config,
    )
    inputs = prompts(image_tokens=16 + 4 * (8 + 1))
    inputs["pixel_values"] = pixels(2, 3, 3, 28, 28)
    inputs["image_sizes"] = torch.tensor([[28, 56], [28, 56]])
    return result, inputs


def idefics(model_type: str, language: str, **config: Any) -> Built:
    """Build an Idefics or SmolVLM, which take a list of images for each prompt."""
    result = model(
        model_type,
        text_config=text(model_type=language),
        vision_config=vision(),
        image_token_id=IMAGE,
        pad_token_id=0,
        **config,
    )
    return result, {**prompts(image_tokens=4), "pixel_values": pixels(2, 1, 3, 28, 28)}
