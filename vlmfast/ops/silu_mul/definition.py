"""The gated activation of an MLP: activation(gate) * up."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast import checks
from vlmfast.backends import PLAIN
from vlmfast.checks import DTYPES
from vlmfast.functions import op

ACTIVATIONS = ("silu", "gelu_tanh")
INLINED = ("cpu", "cuda")  # Inductor fuses the definition into one kernel as well
_BETA, _KAPPA = math.sqrt(2 / math.pi), 0.044715  # GELU's: tanh(beta * (x + kappa * x ** 3))


# ---- what a call must look like ----


def _check(gate: Tensor, up: Tensor, activation: str = "silu") -> bool:
    # The fast path of nearly every call, without the function calls below.
    if (
        type(gate) in PLAIN
        and type(up) in PLAIN
        and (dtype := gate.dtype) in DTYPES
        and up.dtype is dtype
        and ((on_cpu := gate.is_cpu) or gate.is_cuda)
        and (up.is_cpu if on_cpu else up.device == gate.device)
        and (shape := gate.shape)
        and up.shape == shape
        and activation in ACTIVATIONS
    ):
        return on_cpu
    checks.tensor("gate", gate)
    if gate.dim() == 0:
        raise ValueError("gate must have at least one dimension, got a scalar")
    _check_twin("up", up, gate)
    checks.one_of("activation", activation, ACTIVATIONS)
    return False


def _check_twin(name: str, value: Tensor, gate: Tensor) -> None:
    checks.tensor(name, value)
    checks.same_shape(name, value, "gate", gate)
    checks.same_device(name, value, "gate", gate)
    if value.dtype != gate.dtype:
        raise TypeError(f"{name} must have the dtype of gate, {gate.dtype}, got {value.dtype}")


def _check_backward(grad_output: Tensor, gate: Tensor, up: Tensor, activation: str = "silu") -> None:
    _check(gate, up, activation)
    _check_twin("grad_output", grad_output, gate)


# ---- gradients ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)  # upstream saves the activated gate too


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    return silu_mul_backward(grad_output, gate, up, ctx.activation)


# ---- the definitions ----


@op(check=_check, gradients=(_setup_context, _backward), inlined=INLINED)
def silu_mul(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """Multiply an activated gate by the up projection, as gated MLPs do between their linear layers.

    ``activation(gate)`` is rounded to the dtype, then multiplied by ``up`` and rounded again::

        silu:       gate / (1 + exp(-gate))
        gelu_tanh:  gate / 2 * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 * gate ** 3)))

    Args:
        gate: (..., D) float32, float16 or bfloat16; any strides, such as those of one half of a fused projection.
        up: (..., D) of the shape and dtype of ``gate``.
        activation: "silu" or "gelu_tanh".

    Returns:
        (..., D) contiguous, of the dtype of ``gate``.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes, devices or an activation that do not fit.

    Source:
        LlamaMLP.forward of transformers 5.23, between its projections: ``act_fn(gate_proj(x)) * up_proj(x)``;
        "gelu_tanh" is the ``gelu_pytorch_tanh`` of Gemma2MLP.
    """
    activated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return activated * up


@op(check=_check_backward, inlined=INLINED)
def silu_mul_backward(grad_output: Tensor, gate: Tensor, up: Tensor, activation: str = "silu") -> tuple[Tensor, Tensor]:
    """Compute the gradients of `silu_mul` in float32, and round them once.

    Both activations are ``gate * s`` with ``s = 1 / (1 + exp(-z))``: "silu" of ``z = gate``, "gelu_tanh" of
    ``z = 2 * sqrt(2 / pi) * (gate + 0.044715 * gate ** 3)``. With ``z'`` the derivative of ``z``::

        grad_gate = grad_output * up * s * (1 + gate * z' * (1 - s))
        grad_up   = grad_output * gate * s

    Args:
        grad_output: (..., D) of the shape and dtype of ``gate``.
        gate: (..., D) float32, float16 or bfloat16; any strides.
        up: (..., D) of the shape and dtype of ``gate``.
        activation: "silu" or "gelu_tanh".

    Returns:
        ``(grad_gate, grad_up)``, each (..., D), contiguous, of the dtype of ``gate``.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes, devices or an activation that do not fit.

    Source:
        The derivative of the expressions above.
    """
    wide = torch.promote_types(gate.dtype, torch.float32)
    grad, x, factor = grad_output.to(wide), gate.to(wide), up.to(wide)
    z, slope = x, torch.ones((), dtype=wide, device=x.device)
    if activation == "gelu_tanh":
        z, slope = 2 * _BETA * (x + _KAPPA * x * x * x), 2 * _BETA * (1 + 3 * _KAPPA * x * x)
    share, rest = torch.sigmoid(z), torch.sigmoid(-z)
    grad_gate = grad * factor * share * (1 + x * slope * rest)
    return grad_gate.to(gate.dtype), (grad * x * share).to(gate.dtype)
