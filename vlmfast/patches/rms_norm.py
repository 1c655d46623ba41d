"""Replacements that call `vlmfast.rms_norm`.

Where the op refuses a dtype, such as float64, the replaced method runs. Checking beforehand would slow down every call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfast.ops.rms_norm import rms_norm
from vlmfast.patches.residual import NORMS, taken
from vlmfast.torch_internals import is_compiling


def llama_rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Replace LlamaRMSNorm.forward and its many copies, which round before they multiply by the weight."""
    return _normalise(self, hidden_states, self.weight, self.variance_epsilon)


def llama4_rms_norm(self: Any, x: Tensor) -> Tensor:
    """Replace Llama4TextRMSNorm.forward: as Llama's, with other names."""
    return _normalise(self, x, self.weight, self.eps)


def t5_rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Replace T5LayerNorm.forward, which rounds to the dtype of the weight.

    It equals Llama's where weight and input have one dtype; elsewhere upstream's method runs.
    """
    if self.weight.dtype != hidden_states.dtype:
        return _upstream(self, hidden_states)
    return _normalise(self, hidden_states, self.weight, self.variance_epsilon)


def gemma_rms_norm(self: Any, x: Tensor) -> Tensor:
    """Replace GemmaRMSNorm.forward and its copies, which multiply by 1 + weight."""
    return _normalise(self, x, self.weight, self.eps, "gemma")


def olmo_rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Replace Olmo2RMSNorm.forward and its copies, which multiply by the weight in float32."""
    return _normalise(self, hidden_states, self.weight, self.variance_epsilon, "olmo")


def moshi_rms_norm(self: Any, x: Tensor) -> Tensor:
    """Replace MoshiRMSNorm.forward: as OLMo's, with other names."""
    return _normalise(self, x, self.weight, self.eps, "olmo")


def gemma4_rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Replace Gemma4RMSNorm.forward: as OLMo's, but the weight may be missing."""
    return _normalise(self, hidden_states, self.weight if self.with_scale else None, self.eps, "olmo")


def plain_rms_norm(self: Any, x: Tensor) -> Tensor:
    """Replace NanoChatRMSNorm.forward and Llama4TextL2Norm's, which have no weight."""
    return _normalise(self, x, None, self.eps)


def grouped_rms_norm(self: Any, x: Tensor) -> Tensor:
    """Replace Qwen4ExpTextRMSNorm.forward: as Gemma's; upstream's method runs where it normalises groups."""
    if self.group_size is not None:
        return _upstream(self, x)
    return _normalise(self, x, self.weight, self.eps, "gemma")


def gated_rms_norm(self: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
    """Replace Qwen3NextRMSNormGated.forward: the norm, then the gate in float32.

    The class of transformers 4.57 has no ``activation``: it is always SiLU.
    """
    if is_compiling():
        return _upstream(self, hidden_states, gate)
    from transformers.activations import ACT2FN  # imported here, so that `import vlmfast` does not need transformers

    try:
        normed = rms_norm(hidden_states, self.weight, self.variance_epsilon)
    except TypeError:
        return _upstream(self, hidden_states, gate)
    gated: Tensor = normed * ACT2FN[getattr(self, "activation", "silu")](gate.to(torch.float32))
    return gated.to(hidden_states.dtype)


def _normalise(self: Any, x: Tensor, weight: Tensor | None, eps: float, variant: str = "llama") -> Tensor:
    if is_compiling():  # upstream's own lines have fewer guards, and Inductor makes the same code of them
        return _upstream(self, x)
    left = taken(self, x)
    if left is not None:
        return left
    try:
        return rms_norm(x, weight, eps, variant)
    except TypeError:
        return _upstream(self, x)


def _upstream(self: Any, *inputs: Tensor) -> Tensor:
    """Run the replaced method.

    A captured forward can outlive its patch; the class of the module is then the original class itself.
    """
    cls = type(self)
    output: Tensor = getattr(cls, "original_class", cls).forward(self, *inputs)
    return output


# The norms that can be fused with an addition: the name of their eps attribute, and the variant.
NORMS.update(
    {
        llama_rms_norm: ("variance_epsilon", "llama"),
        llama4_rms_norm: ("eps", "llama"),
        gemma_rms_norm: ("eps", "gemma"),
        olmo_rms_norm: ("variance_epsilon", "olmo"),
        moshi_rms_norm: ("eps", "olmo"),
    }
)
