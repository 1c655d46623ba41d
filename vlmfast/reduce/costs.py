"""What a prompt costs a language model: the operations of its prefill and the bytes of its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Layer:
    """What a layer does with each token.

    Attributes:
        weights: the weights that a token is multiplied with.
        attention: channels of all heads of queries; 0 where nothing attends.
        cached: bytes of keys and values of a token.
    """

    weights: int
    attention: int
    cached: int


@dataclass(frozen=True)
class Shape:
    """A language model, by its layers."""

    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, model: Any) -> Shape:
        """Measure a model with its head."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        cached = 2 * (getattr(config, "num_key_value_heads", None) or heads) * size
        experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
        active = (getattr(config, "num_experts_per_tok", None) or 1) / experts
        found = []
        for layer in model.base_model.language_model.layers:
            dtypes = [x.dtype for x in layer.parameters()]
            # quantised weights are no numbers of that width
            width = next((d for d in dtypes if d.is_floating_point and d.itemsize > 1), dtypes[0]).itemsize
            attends = getattr(layer, "self_attn", None) is not None
            found.append(Layer(_weights(layer, active), heads * size * attends, cached * width * attends))
        return cls(tuple(found))

    def operations(self, samples: int, columns: Sequence[int]) -> int:
        """Count the floating-point operations of a prefill in which each layer has so many columns.

        Two for each weight and token, and four for each channel of a query and each key that it sees. Norms, positions,
        the head and the vision tower do not count; a padded column does, as it is computed.
        """
        parts = (
            2 * number * layer.weights + 4 * layer.attention * (number * (number + 1) // 2)
            for layer, number in zip(self.layers, columns, strict=True)
        )
        return samples * sum(parts)

    def bytes(self, samples: int, columns: Sequence[int]) -> int:
        """Count the bytes of the keys and values that a cache holds of these columns."""
        return samples * sum(layer.cached * number for layer, number in zip(self.layers, columns, strict=True))

    def compare(self, samples: int, before: Sequence[int], after: Sequence[int]) -> str:
        """Say what both are before and after."""
        operations = [f"{self.operations(samples, columns) / 1e9:.4g}" for columns in (before, after)]
        sizes = [f"{self.bytes(samples, columns) / 1e6:.4g}" for columns in (before, after)]
        return f"language model: prefill {' -> '.join(operations)} GFLOP, cache {' -> '.join(sizes)} MB"


def _weights(layer: nn.Module, active: float) -> int:
    """Count what a token is multiplied with: linear layers, and of experts the share that it is given to."""
    count = 0.0
    for name, module in layer.named_modules():
        if hasattr(module, "base_layer"):  # of an adapter, which counts itself
            continue
        own = [number for number in map(vars(module).get, ("in_features", "out_features")) if isinstance(number, int)]
        if len(own) == 2:  # also of what is quantised
            count += own[0] * own[1] * (active if ".experts." in f".{name}." else 1)
        else:
            stacked = (x.numel() for x in module.parameters(recurse=False) if x.dim() == 3)
            count += active * sum(stacked)
    return round(count)
