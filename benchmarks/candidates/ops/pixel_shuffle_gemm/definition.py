"""The other way to compute `pixel_shuffle_linear`: one matmul whose tiles are read through the shuffle.

candidates/kernels/pixel_shuffle_gemm.py says what it saves and at what price. No GPU has timed this op yet.
`python -m vlmfast bench pixel_shuffle_gemm` does, beside `pixel_shuffle_linear` and the matmul alone, and
`make gpu-report` runs that. Where it wins, `_fused` in vlmfast/ops/pixel_shuffle/connector.py is the one place that
chooses: a line in front of its own returns `pixel_shuffle_gemm(...)` for those shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence  # noqa: F401  (torch evaluates the wrapped annotations among the names of this file)
from typing import Any

from torch import Tensor

from vlmfast.functions import op
from vlmfast.ops.pixel_shuffle.connector import check_linear, pixel_shuffle_linear


@op(check=check_linear)
@functools.wraps(pixel_shuffle_linear.op.reference, assigned=())
def pixel_shuffle_gemm(*args: Any, **kwargs: Any) -> Tensor:
    """Compute `pixel_shuffle_linear`, whose arguments, result and errors are its own, as one matmul, for inference.

    Where a gradient is needed its definition runs, which `torch.compile(fullgraph=True)` refuses.
    """
    tokens: Tensor = pixel_shuffle_linear.op.reference(*args, **kwargs)
    return tokens
