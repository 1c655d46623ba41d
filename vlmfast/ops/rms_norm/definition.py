"""Root-mean-square normalisation, alone and after a residual addition."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vlmfast import checks
from vlmfast.backends import PLAIN
from vlmfast.checks import DTYPES
from vlmfast.functions import op

_INFINITY = math.inf  # a global of this module is faster to look up
VARIANTS = ("llama", "gemma", "olmo")
# Each of 8 compiled layers of residual, norm and scale takes 4 us for a token of 2048 channels when inlined, and 8 us
# with the kernel as a node (a CPU with AVX-512); for 600 tokens the two are equal. Inductor fuses norms on GPUs as
# well, but that has not been timed.
INLINED = ("cpu", "cuda")


def _wide(x: Tensor) -> Tensor:
    """Widen ``x`` to the dtype of the arithmetic: float32, or float64 for the references of tests."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- what a call must look like ----


def _check(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, variant: str = "llama") -> bool:
    # The fast path of nearly every call, without the function calls below.
    if (
        type(x) in PLAIN
        and (dtype := x.dtype) in DTYPES
        and ((on_cpu := x.is_cpu) or x.is_cuda)
        and (shape := x.shape)  # x.size(-1) would cost twice as much
        and (
            weight is None
            or (
                type(weight) in PLAIN
                and weight.dtype in DTYPES
                and weight.shape == (shape[-1],)
                and (weight.is_cpu if on_cpu else weight.device == x.device)
            )
        )
        and type(eps) is float
        and 0.0 <= eps < _INFINITY
        and variant in VARIANTS
    ):
        return on_cpu and (weight is None or weight.dtype is dtype)
    checks.tensor("x", x)
    if weight is not None:
        checks.tensor("weight", weight)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    if weight is not None:
        if weight.dim() != 1 or weight.numel() != x.shape[-1]:
            raise ValueError(f"weight must have shape ({x.shape[-1]},), the last size of x, got {tuple(weight.shape)}")
        checks.same_device("weight", weight, "x", x)
    checks.epsilon("eps", eps)
    checks.one_of("variant", variant, VARIANTS)
    return False


def _check_add(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, variant: str = "llama"
) -> bool:
    on_cpu = _check(x, weight, eps, variant)
    if (
        type(residual) in PLAIN
        and residual.dtype is x.dtype
        and residual.shape == x.shape
        and (residual.is_cpu if on_cpu else residual.device == x.device)
    ):
        return on_cpu
    _check_twin("residual", residual, x)
    return False


def _check_twin(name: str, value: Tensor, x: Tensor) -> None:
    checks.tensor(name, value)
    checks.same_shape(name, value, "x", x)
    checks.same_device(name, value, "x", x)
    if value.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {value.dtype}")


def _check_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    variant: str = "llama",
    grad_residual: Tensor | None = None,
    weight_grad: bool = True,
) -> None:
    _check(x, weight, eps, variant)
    checks.tensor("grad_output", grad_output)
    checks.same_shape("grad_output", grad_output, "x", x)
    checks.same_device("grad_output", grad_output, "x", x)
    if grad_residual is not None:
        _check_twin("grad_residual", grad_residual, x)


# ---- calls with several dtypes: the native CPU kernels take a float32 weight with 16-bit rows ----


def rms_norm_mixed(device: str, x: Tensor, weight: Tensor, *_: Any) -> bool:
    """Return whether the kernels for a type of device take a call with tensors of several dtypes."""
    return device == "cpu" and weight.dtype == torch.float32


def add_rms_norm_mixed(device: str, x: Tensor, residual: Tensor, *norm: Any) -> bool:
    """Return the same for `add_rms_norm`, whose residual must have the dtype of ``x``."""
    return rms_norm_mixed(device, x, *norm)


def rms_norm_backward_mixed(
    device: str,
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    variant: str = "llama",
    *_: Any,
) -> bool:
    """Return the same for `rms_norm_backward`, whose gradient must have the dtype of the output."""
    dtype = torch.float32 if variant == "llama" else x.dtype
    return weight is not None and rms_norm_mixed(device, x, weight) and grad_output.dtype == dtype


# ---- gradients ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, ctx.variant = inputs
    ctx.save_for_backward(x, weight)  # recomputing the inverse rms is cheaper than storing and loading it


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    weight_grad = ctx.needs_input_grad[1]
    grad_x, grad_weight = rms_norm_backward(grad_output, x, weight, ctx.eps, ctx.variant, None, weight_grad)
    return grad_x, grad_weight if weight_grad else None


def _add_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps, ctx.variant = inputs
    ctx.save_for_backward(output[1], weight)


def _add_backward(ctx: Any, grad_output: Tensor | None, grad_residual: Tensor | None) -> tuple[Any, ...]:
    hidden_states, weight = ctx.saved_tensors
    weight_grad = ctx.needs_input_grad[2]
    if grad_output is None:  # only the new residual was used
        return grad_residual, grad_residual
    grad_x, grad_weight = rms_norm_backward(
        grad_output, hidden_states, weight, ctx.eps, ctx.variant, grad_residual, weight_grad
    )
    return grad_x, grad_x, grad_weight if weight_grad else None


# ---- the definitions ----


@op(check=_check, gradients=(_setup_context, _backward), inlined=INLINED)
def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, variant: str = "llama") -> Tensor:
    """Divide each row by its root mean square and multiply it by a weight, if there is one.

    The mean square is computed in float32. ``x`` is saved for the backward and must not be changed in place before it.
    "llama" rounds the quotient to the dtype of ``x`` before the weight; "olmo" multiplies by the weight and "gemma" by
    ``1 + weight`` in float32, and both round once::

        llama:      weight * (x32 * rsqrt(mean(x32 ** 2) + eps)).to(x.dtype)
        gemma:      (x32 * rsqrt(mean(x32 ** 2) + eps) * (1 + weight32)).to(x.dtype)
        olmo:       (x32 * rsqrt(mean(x32 ** 2) + eps) * weight32).to(x.dtype)
        no weight:  (x32 * rsqrt(mean(x32 ** 2) + eps)).to(x.dtype), whatever the variant

    Args:
        x: (..., D) float32, float16 or bfloat16; any strides.
        weight: (D,) float32, float16 or bfloat16, or None.
        eps: added to the mean square; finite, not negative.
        variant: "llama", "gemma" or "olmo".

    Returns:
        (..., D) contiguous; of the dtype of ``x``, or for "llama" with a weight of the dtype that torch promotes both
        to, which for float16 with bfloat16 is float32.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes, devices, eps or a variant that do not fit.

    Source:
        Qwen2RMSNorm.forward ("llama"), GemmaRMSNorm.forward ("gemma"), and Olmo2RMSNorm.forward, HeliumRMSNorm.forward
        and Gemma4RMSNorm.forward ("olmo") of transformers 5.23; without a weight NanoChatRMSNorm.forward and
        Gemma4RMSNorm.forward (``with_scale=False``).
    """
    x32 = _wide(x)
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if variant == "gemma":
        return (normed * (1.0 + _wide(weight))).to(x.dtype)
    if variant == "olmo":
        return (normed * _wide(weight)).to(x.dtype)
    return weight * normed.to(x.dtype)


@op(check=_check_add, gradients=(_add_setup_context, _add_backward), inlined=INLINED)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, variant: str = "llama"
) -> tuple[Tensor, Tensor]:
    """Add ``x`` to the residual stream and normalise the sum.

    ``new_residual = residual + x``, rounded to the dtype, then ``y = rms_norm(new_residual, weight, eps, variant)``.

    Args:
        x: (..., D) float32, float16 or bfloat16; any strides.
        residual: (..., D) of the shape and dtype of ``x``.
        weight: (D,) float32, float16 or bfloat16, or None.
        eps: added to the mean square; finite, not negative.
        variant: "llama", "gemma" or "olmo".

    Returns:
        ``(y, new_residual)``, each (..., D) and contiguous.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes, devices, eps or a variant that do not fit.

    Source:
        Qwen2DecoderLayer.forward of transformers 5.23: ``residual + hidden_states``, then ``post_attention_layernorm``.
    """
    new_residual = residual + x
    return rms_norm.op.reference(new_residual, weight, eps, variant), new_residual


@op(check=_check_backward, inlined=INLINED)
def rms_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    variant: str = "llama",
    grad_residual: Tensor | None = None,
    weight_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `rms_norm` and, with ``grad_residual``, of `add_rms_norm`, and round them once.

    With ``r = rsqrt(mean(x ** 2) + eps)``, ``n = x * r`` and ``g = grad_output * weight`` (gemma: ``1 + weight``; no
    weight: ``g = grad_output``), all in float32::

        grad_x = r * (g - n * mean(g * n)) + grad_residual
        grad_weight = sum over rows of grad_output * n      (llama: n rounded to the dtype of x, as in the forward)

    Args:
        grad_output: (..., D) the gradient of the output.
        x: (..., D) what was normalised.
        weight: (D,) the weight, or None.
        eps: as in the forward.
        variant: as in the forward.
        grad_residual: (..., D) the gradient of `add_rms_norm`'s second output, or None.
        weight_grad: False if the weight is frozen; its gradient is then skipped.

    Returns:
        ``(grad_x, grad_weight)``: (..., D) of the dtype of ``x``, and (D,) of the dtype of ``weight``. The second is
        (0,) if ``weight_grad`` is False or if there is no weight, and in the latter case has the dtype of ``x``.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes, devices, eps or a variant that do not fit.

    Source:
        The derivative of the expressions above.
    """
    x32, grad32 = _wide(x), _wide(grad_output)
    inverse_rms = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    normed = x32 * inverse_rms
    scaled = grad32
    if weight is not None:
        scaled = grad32 * (1.0 + _wide(weight) if variant == "gemma" else _wide(weight))
    grad_x = inverse_rms * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    if grad_residual is not None:
        grad_x = grad_x + _wide(grad_residual)
    if weight is None or not weight_grad:
        return grad_x.to(x.dtype), (x if weight is None else weight).new_empty(0)
    if variant == "llama":
        normed = _wide(normed.to(x.dtype))
    return grad_x.to(x.dtype), (grad32 * normed).sum_to_size(weight.shape).to(weight.dtype)
