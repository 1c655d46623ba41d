"""Tiny models of each type: model type -> the function that builds the model and its inputs, given the type."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

from tests.helpers import tiny_models
from tests.helpers.tiny_images import LLAVA, OTHERS, SHUFFLED
from tests.helpers.tiny_models import VOCABULARY, Built, language_model
from tests.helpers.tiny_patches import EXPERTS, IN_PATCHES, QWEN

SLIDING = {"sliding_window": 64}
TINY_VISUAL: dict[str, Callable[[str], Built]] = {**QWEN, **LLAVA, **IN_PATCHES, **SHUFFLED, **OTHERS}
TINY_LANGUAGE: dict[str, Callable[[str], Built]] = {
    **dict.fromkeys(("llama", "mistral", "phi3", "qwen2", "qwen3", "olmo2"), language_model),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), partial(language_model, **EXPERTS)),
    "mixtral": partial(language_model, num_local_experts=4),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), partial(language_model, **SLIDING)),
    "gemma3n_text": partial(
        language_model,
        head_dim=16,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        laurel_rank=8,
        altup_num_inputs=2,
        layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.5, 0.0],
        **SLIDING,
    ),
    "helium": partial(language_model, head_dim=16),
    "nanochat": language_model,
}
SINCE = {  # the first transformers that takes these inputs or this configuration, or has a known body
    "emu3": "5",
    "fuyu": "5.23",
    "gemma3n_text": "5",  # earlier, its norm divides by a square root: another body
    "perception_lm": "5.23",
    "video_llava": "5.23",
}
TINY = {**TINY_VISUAL, **TINY_LANGUAGE}


def build(model_type: str, **config: Any) -> Built:
    """Build the tiny model of that type with its inputs, the same at each call."""
    return TINY[model_type](model_type, **config)


def deep(model_type: str, layers: int) -> Built:
    """Build a tiny model whose language model has this many layers, none with a sliding window."""
    builder: Any = TINY[model_type]
    config = builder.keywords.get("text_config")
    if config is not None:
        return build(model_type, text_config={**config, "num_hidden_layers": layers})
    depth = partial(tiny_models.text, num_hidden_layers=layers, sliding_window=None)
    with mock.patch.object(tiny_models, "text", depth):
        return build(model_type)
