"""vlmfast's RMSNorm as providers of vLLM's IR ops.

``--ir-op-priority.rms_norm vlmfast,native``, and ``--ir-op-priority.fused_add_rms_norm vlmfast,native`` for the norm
after the residual. vLLM has no kernels of its own for them on CPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

import vlmfast


def register() -> None:
    """Add the providers, unless they are there."""
    from vllm import ir

    if "vlmfast" not in ir.ops.rms_norm.impls:
        ir.ops.rms_norm.register_impl("vlmfast", supports_args=supported)(rms_norm)
        ir.ops.fused_add_rms_norm.register_impl("vlmfast", supports_args=add_supported)(fused_add_rms_norm)


def supported(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    """Tell whether `rms_norm` takes a call: with a weight of the same dtype, over whole rows."""
    return variance_size is None and weight is not None and weight.dtype == x.dtype


def add_supported(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    """Tell the same of `fused_add_rms_norm`, whose residual must have the dtype of ``x`` too."""
    return supported(x, weight, epsilon, variance_size) and x_residual.dtype == x.dtype


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """(..., D) -> (..., D), as vLLM defines it, for a call that is `supported`."""
    return vlmfast.rms_norm(x, _given(weight), eps=epsilon)


def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """(..., D) twice -> (..., D) normalised and their sum, for a call that is `add_supported`.

    vLLM normalises the sum before it is rounded; `vlmfast.add_rms_norm`, like Hugging Face, rounds first. In float32
    nothing is rounded, so that they agree.
    """
    if x.dtype == torch.float32:
        return vlmfast.add_rms_norm(x, x_residual, _given(weight), eps=epsilon)
    total = x.float().add_(x_residual)
    return vlmfast.rms_norm(total, eps=epsilon).to(x.dtype).mul_(_given(weight)), total.to(x.dtype)


def _given(weight: Tensor | None) -> Tensor:
    if weight is None:
        raise TypeError("weight must be a tensor, got None")
    return weight
