"""`vlmfast.rms_norm` under the parameters and attributes of the upstream classes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmfast.ops.rms_norm import rms_norm


def llama_rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """LlamaRMSNorm.forward and its many copies."""
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def llama4_rms_norm(self: Any, x: Tensor) -> Tensor:
    """Llama4TextRMSNorm.forward: as Llama's, under other names."""
    return rms_norm(x, self.weight, self.eps)


def gemma_rms_norm(self: Any, x: Tensor) -> Tensor:
    """GemmaRMSNorm.forward and its copies: the weight is centred on zero."""
    return rms_norm(x, self.weight, self.eps, "gemma")
