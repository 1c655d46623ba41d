"""`vlmfast.rms_norm` under the parameters and attributes of the upstream classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfast.ops.rms_norm import rms_norm


def llama_rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Replace LlamaRMSNorm.forward, which rounds before the weight, and its many copies."""
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def llama4_rms_norm(self: Any, x: Tensor) -> Tensor:
    """Replace Llama4TextRMSNorm.forward: as Llama's, under other names."""
    return rms_norm(x, self.weight, self.eps)


def t5_rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Replace T5LayerNorm.forward, which rounds to the dtype of the weight: as Llama's where that is the input's."""
    if self.weight.dtype != hidden_states.dtype:
        unrounded: Tensor = _upstream(self).forward(self, hidden_states)
        return unrounded
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def gemma_rms_norm(self: Any, x: Tensor) -> Tensor:
    """Replace GemmaRMSNorm.forward and its copies: the weight is centred on zero."""
    return rms_norm(x, self.weight, self.eps, "gemma")


def olmo_rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Replace Olmo2RMSNorm.forward and its copies: the weight is multiplied in float32."""
    return rms_norm(hidden_states, self.weight, self.variance_epsilon, "olmo")


def moshi_rms_norm(self: Any, x: Tensor) -> Tensor:
    """Replace MoshiRMSNorm.forward: as OLMo's, under other names."""
    return rms_norm(x, self.weight, self.eps, "olmo")


def gemma4_rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Replace Gemma4RMSNorm.forward: as OLMo's, or without a weight."""
    return rms_norm(hidden_states, self.weight if self.with_scale else None, self.eps, "olmo")


def plain_rms_norm(self: Any, x: Tensor) -> Tensor:
    """Replace NanoChatRMSNorm.forward and Llama4TextL2Norm's, which have no weight."""
    return rms_norm(x, None, self.eps)


def grouped_rms_norm(self: Any, x: Tensor) -> Tensor:
    """Replace Qwen4ExpTextRMSNorm.forward: as Gemma's, unless it normalises groups."""
    if self.group_size is not None:
        grouped: Tensor = _upstream(self).forward(self, x)
        return grouped
    return rms_norm(x, self.weight, self.eps, "gemma")


def gated_rms_norm(self: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
    """Replace Qwen3NextRMSNormGated.forward: the norm, then the gate in float32; transformers 4.57 has SiLU only."""
    from transformers.activations import ACT2FN  # which `import vlmfast` does without

    normed = rms_norm(hidden_states, self.weight, self.variance_epsilon)
    gated: Tensor = normed * ACT2FN[getattr(self, "activation", "silu")](gate.to(torch.float32))
    return gated.to(hidden_states.dtype)


def _upstream(module: Any) -> Any:
    """Return the class whose methods are upstream's, also after the patch, which these functions outlive."""
    return getattr(module, "original_class", type(module))
