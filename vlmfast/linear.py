"""Linear layers on processors without instructions for half-precision matrix multiplication."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.backends import PLAIN
from vlmfast.torch_internals import forward_mode, in_function_transform, is_jit_tracing

# On these torch multiplies half precision element by element. Widening to float32 first takes (256, 4096) x (4096, 896)
# in bfloat16 from 243 ms to 28 ms on one thread of an EPYC with AVX2, and 16 rows from 10.9 ms to 3.7 ms. With 4 rows,
# widening the weight takes as long as it saves.
FEWEST_ROWS = 8


def _slow() -> frozenset[torch.dtype]:
    """List the dtypes whose matrix multiplications are slow on this processor."""
    try:
        fast = {
            torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        }
    except AttributeError:  # torch without oneDNN, or without this query: widen nothing
        return frozenset()
    return frozenset(dtype for dtype, is_fast in fast.items() if not is_fast)


SLOW = _slow()  # at import, because the call would break a graph of torch.compile


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``F.linear`` with torch's accuracy: accumulated in float32 and rounded once."""
    if (
        not x.is_cpu
        or x.dtype not in SLOW
        or not _is_ordinary(x, weight, bias)
        or x.numel() < FEWEST_ROWS * x.shape[-1]
    ):
        return F.linear(x, weight, bias)
    result: Tensor = _Widened.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


def _is_ordinary(*tensors: Tensor | None) -> bool:
    """Return whether all are plain tensors of one dtype, in a call that nothing else transforms or casts."""
    found = [tensor for tensor in tensors if tensor is not None]
    return (
        all(type(tensor) in PLAIN and tensor.dtype == found[0].dtype for tensor in found)
        and not torch.is_autocast_enabled("cpu")
        and not in_function_transform()
        and forward_mode._current_level < 0
        and not (torch.compiler.is_exporting() or is_jit_tracing())  # graphs may run without this package
    )


class _Widened(torch.autograd.Function):
    """A linear layer in float32 that widens again in the backward: copies kept for it would be twice the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        wide = gradient.float()
        rows = wide.reshape(-1, wide.shape[-1])
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            (wide @ weight.float()).to(gradient.dtype) if for_x else None,
            (rows.t() @ x.float().reshape(-1, x.shape[-1])).to(gradient.dtype) if for_weight else None,
            rows.sum(0).to(gradient.dtype) if for_bias else None,
        )
