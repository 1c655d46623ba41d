"""Another way to compute `pixel_shuffle_linear`: one matmul whose tiles are read through the shuffle.

candidates/kernels/pixel_shuffle_gemm.py says what it saves and what it costs. No GPU has timed this op yet.
`python -m vlmfast bench pixel_shuffle_gemm` times it beside `pixel_shuffle_linear` and the matmul alone, and
`make gpu-report` runs that command. If it wins for some shapes, let `_fused` in vlmfast/ops/pixel_shuffle/connector.py
return `pixel_shuffle_gemm(...)` for these; the choice is made nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence  # noqa: F401  (torch evaluates the wrapped annotations in this module)
from typing import Any

from torch import Tensor

from vlmfast.functions import op
from vlmfast.ops.pixel_shuffle.connector import check_linear, pixel_shuffle_linear


@op(check=check_linear)
@functools.wraps(pixel_shuffle_linear.op.reference, assigned=())
def pixel_shuffle_gemm(*args: Any, **kwargs: Any) -> Tensor:
    """Compute `pixel_shuffle_linear` as one matmul, for inference; arguments, result and errors are the same.

    Where a gradient is needed the definition runs, which `torch.compile(fullgraph=True)` refuses.
    """
    tokens: Tensor = pixel_shuffle_linear.op.reference(*args, **kwargs)
    return tokens
