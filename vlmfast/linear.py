"""Linear layers on processors that have no instructions to multiply half-precision numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# torch then multiplies such numbers one by one. Widened to float32 first, (256, 4096) x (4096, 896) in bfloat16 takes
# 28 ms instead of 243 on one thread of an EPYC with AVX2, and 16 rows 3.7 ms instead of 10.9; of 4 rows, to widen the
# weight takes as long as it saves.
FEWEST_ROWS = 8


def _slow() -> frozenset[torch.dtype]:
    """List the dtypes whose matrix multiplications are slow here."""
    try:
        fast = {
            torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        }
    except AttributeError:  # a torch without oneDNN, or one that does not tell: left as it is
        return frozenset()
    return frozenset(dtype for dtype, is_fast in fast.items() if not is_fast)


SLOW = _slow()  # once: a call in the traced code would break torch.compile's graph


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``F.linear``, as exactly: summed in float32 and rounded once, which torch does in half precision too.

    Where a gradient is needed, the float32 copies live until the backward.
    """
    if not x.is_cpu or x.dtype not in SLOW or x.numel() < FEWEST_ROWS * x.shape[-1] or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
