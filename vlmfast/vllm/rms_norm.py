"""vlmfast's RMSNorm as a provider of vLLM's IR op, chosen by ``--ir-op-priority.rms_norm vlmfast,native``.

On CPUs vLLM has no kernel of its own for it. Its ``fused_add_rms_norm`` normalises the sum before it is rounded, which
vlmfast's does not, and has no provider here.
"""

from __future__ import annotations

from torch import Tensor

import vlmfast


def register() -> None:
    """Add the provider, unless it is there."""
    from vllm import ir

    if "vlmfast" not in ir.ops.rms_norm.impls:
        ir.ops.rms_norm.register_impl("vlmfast", supports_args=supported)(rms_norm)


def supported(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    """Tell whether `rms_norm` takes a call: with a weight of the same dtype, over whole rows."""
    return variance_size is None and weight is not None and weight.dtype == x.dtype


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """(..., D) -> (..., D), as vLLM defines it, for a call that is `supported`."""
    if weight is None:
        raise TypeError("weight must be a tensor, got None")
    return vlmfast.rms_norm(x, weight, eps=epsilon)
