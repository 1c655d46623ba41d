"""Gated MLPs: activation and multiplication by the gate in one launch, between the module's own projections."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast.linear import linear
from vlmfast.modules import child, is_bare, project
from vlmfast.ops.silu_mul import silu_mul


def gated_mlp(self: Any, x: Tensor) -> Tensor:
    """Replace LlamaMLP.forward and its copies."""
    return _gated_mlp(self, x)


def _gated_mlp(self: Any, x: Tensor, multiply: Callable[..., Tensor] | None = None) -> Tensor:
    act_fn = child(self, "act_fn")
    activation = activation_of(act_fn)
    if activation is None:
        product = act_fn(project(self, "gate_proj", x, multiply)) * project(self, "up_proj", x, multiply)
    else:
        product = _gated(activation, project(self, "gate_proj", x, multiply), project(self, "up_proj", x, multiply))
    return project(self, "down_proj", product, multiply)


def vision_gated_mlp(self: Any, hidden_state: Tensor) -> Tensor:
    """Replace Qwen2_5_VLMLP.forward: as Llama's, with linear layers that no processor makes slow."""
    return _gated_mlp(self, hidden_state, linear)


def fused_gated_mlp(self: Any, hidden_states: Tensor) -> Tensor:
    """Replace Phi3MLP.forward and its copies, whose single projection computes both gate and up."""
    gate, up = project(self, "gate_up_proj", hidden_states).chunk(2, dim=-1)
    activation = activation_of(self.activation_fn)
    product = up * self.activation_fn(gate) if activation is None else _gated(activation, gate, up)
    return project(self, "down_proj", product)


def activation_of(act_fn: nn.Module) -> str | None:
    """Return the name by which `silu_mul` knows the activation.

    None where the op has no such activation, and where the module has a hook.
    """
    kind = type(act_fn)
    if not isinstance(act_fn, nn.Module) or not is_bare(act_fn):
        return None
    if kind is nn.SiLU:
        return None if act_fn.inplace else "silu"
    if kind.__module__ != "transformers.activations":
        return None
    if kind.__name__ == "SiLUActivation":
        return "silu"
    act: Any = getattr(act_fn, "act", None)
    is_tanh = isinstance(act, partial) and act.func is F.gelu and act.keywords == {"approximate": "tanh"}
    return "gelu_tanh" if is_tanh and kind.__name__ in ("GELUTanh", "PytorchGELUTanh") else None


def _gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """Return the product of activated gate and up.

    The definition, which is upstream's own lines, runs for tensors that the op does not take, and in float32 on a CPU:
    the last bits of torch's vectorised exponential are not those of the op.
    """
    if not (gate.is_cpu and gate.dtype == torch.float32):
        try:
            return silu_mul(gate, up, activation)
        except (TypeError, ValueError):
            pass
    product: Tensor = silu_mul.op.reference(gate, up, activation)
    return product
