"""The cost of a prompt in a language model: operations of the prefill, and bytes of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Layer:
    """The cost of a token in a layer.

    Attributes:
        weights: the number of weights that a token is multiplied with.
        attention: channels of all query heads; 0 for a layer without attention.
        cached: bytes of the keys and values of a token.
    """

    weights: int
    attention: int
    cached: int


@dataclass(frozen=True)
class Shape:
    """The layers of a language model."""

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
            # quantised weights are packed: their dtype is not that of the cache
            width = next((d for d in dtypes if d.is_floating_point and d.itemsize > 1), dtypes[0]).itemsize
            attends = getattr(layer, "self_attn", None) is not None
            found.append(Layer(_weights(layer, active), heads * size * attends, cached * width * attends))
        return cls(tuple(found))

    def operations(self, samples: int, columns: Sequence[int]) -> int:
        """Count the floating-point operations of a prefill, given the number of columns in each layer.

        Two per weight and token, and four per channel of a query and key that it sees. Norms, positions, the head and
        the vision tower are not counted; padding is, because it is computed.
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
    """Count the weights that a token is multiplied with: of linear layers, and of the share of experts that it uses."""
    count = 0.0
    for name, module in layer.named_modules():
        if hasattr(module, "base_layer"):  # the layer inside is counted by itself
            continue
        own = [number for number in map(vars(module).get, ("in_features", "out_features")) if isinstance(number, int)]
        if len(own) == 2:  # of quantised layers too
            count += own[0] * own[1] * (active if ".experts." in f".{name}." else 1)
        else:
            stacked = (x.numel() for x in module.parameters(recurse=False) if x.dim() == 3)
            count += active * sum(stacked)
    return round(count)
