"""Build every image-text-to-text model type from its default configuration, with few layers and on the meta device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as VISUAL

LAYERS = 4  # enough for every kind of layer that a model mixes
COUNTS = ("num_hidden_layers", "depth", "encoder_layers", "decoder_layers", "num_layers")


def default_models() -> Iterator[tuple[str, nn.Module]]:
    """Build each type on the meta device, except those whose default configuration builds no model."""
    for model_type in VISUAL:
        for shorten in (shortened, lambda config: config):
            try:
                with torch.device("meta"):
                    model = AutoModelForImageTextToText.from_config(shorten(CONFIG_MAPPING[model_type]()))
            except Exception:  # some default configurations build no model, or need a library that is missing
                continue
            yield model_type, model
            break


def shortened(config: PretrainedConfig) -> PretrainedConfig:
    """Reduce the layers of a configuration and its sub-configurations, and shorten lists with an entry per layer."""
    lengths = [name for name in COUNTS if isinstance(getattr(config, name, None), int)]
    found = {getattr(config, name) for name in lengths}
    for name in lengths:
        setattr(config, name, min(getattr(config, name), LAYERS))
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            shortened(value)
        elif isinstance(value, list) and len(value) in found:
            setattr(config, name, value[:LAYERS])
    return config
