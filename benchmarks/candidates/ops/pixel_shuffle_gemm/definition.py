"""The other way to compute `pixel_shuffle_linear`: one matmul whose tiles are read through the shuffle.

candidates/kernels/pixel_shuffle_gemm.py counts the bytes and FLOP of both, and what they should take. No GPU has timed
this op yet. `python -m vlmfast bench pixel_shuffle_gemm` does, beside `pixel_shuffle_linear` and the matmul alone, and
`make gpu-report` runs that. Where it wins, `_fused` in vlmfast/ops/pixel_shuffle/connector.py is the one place that
chooses: a line in front of its own returns `pixel_shuffle_gemm(...)` for those shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlmfast.ops.pixel_shuffle.connector import check_linear, pixel_shuffle_linear
from vlmfast.registry import op


@op(check=check_linear)
def pixel_shuffle_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    grid: Sequence[int] | None = None,
    scale: int = 2,
    order: str = "row",
    input_scale: float = 1.0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    activation: str | None = None,
) -> Tensor:
    """Compute `pixel_shuffle_linear` as one matmul, for inference.

    Where a gradient is needed its definition runs, which `torch.compile(fullgraph=True)` refuses.

    Args:
        x: as in `pixel_shuffle_linear`.
        weight: as there.
        bias: as there.
        grid: as there.
        scale: as there.
        order: as there.
        input_scale: as there.
        norm_weight: as there.
        norm_bias: as there.
        norm_eps: as there.
        activation: as there.

    Returns:
        (B, height * width / scale**2, out) contiguous, of the dtype of ``x``.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes, a grid, a scale, an order or an activation
            that do not fit.

    Source:
        The same modules.
    """
    result: Tensor = pixel_shuffle_linear.op.reference(
        x, weight, bias, grid, scale, order, input_scale, norm_weight, norm_bias, norm_eps, activation
    )
    return result
