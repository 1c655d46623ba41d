"""The connector between a vision tower and a language model: pixel shuffle, LayerNorm, Linear and activation.

Two designs, counted for one InternVL tile (1024 patches of 1024 channels in bfloat16: 256 tokens of 4096 channels,
projected to N):

* One pass for the gather, the input scale and the LayerNorm, which reads the tower's output in place, followed by the
  vendor's matmul. The pass moves 4.2 MB; upstream moves 17 MB. The matmul is 2.1 N MFLOP and reads 8 N kB of weights
  (N = 3584: 7.5 GFLOP, 29 MB).
* A matmul of our own that reads its tiles through the shuffle: `pixel_shuffle_gemm`. It saves half of the pass, or all
  of it without a LayerNorm, but has to be nearly as fast as the vendor's.

`pixel_shuffle_linear` is the first. On a CPU the matmul takes nearly all of the time; it runs in float32 if the
processor has no half-precision matmul instructions (vlmfast/linear.py). With such instructions N = 896 takes 4.2 ms
(EPYC with AVX-512 and bfloat16 instructions, one thread): oneDNN's matmul 3.8 ms, the pass 0.22 ms and GELU 0.05 ms.
The pass without the LayerNorm takes 0.05 ms, which is all that the second design could save, if its matmul were within
1 % of oneDNN's. By the data sheet of an H100 (3.35 TB/s, 989 TFLOP/s) the pass of the first design takes 1.3 us, and
the matmul 7.6 us for N = 3584 or 1.9 us for N = 896, unless the tokens stay in the L2 cache. The second design has not
been timed on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast import checks
from vlmfast.functions import op
from vlmfast.linear import linear
from vlmfast.ops.pixel_shuffle.definition import (
    check_norm_parameters,
    check_pixel_shuffle,
    pixel_shuffle,
    pixel_shuffle_norm,
    square,
)

ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}  # -> torch's name of the approximation


def check_linear(
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
) -> None:
    """Raise unless the arguments are those of `pixel_shuffle_linear`."""
    checks.tensor("x", x, ("B", "height * width", "C"))
    check_pixel_shuffle(x, square(x) if grid is None else grid, scale, order, input_scale)
    checks.tensor("weight", weight)
    channels = scale**2 * x.shape[2]
    if weight.dim() != 2 or weight.shape[1] != channels:
        raise ValueError(f"weight must have shape (out, {channels}), got {tuple(weight.shape)}")
    checks.same_device("weight", weight, "x", x)
    if bias is not None:
        checks.tensor("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({weight.shape[0]},), the rows of weight, got {tuple(bias.shape)}")
        checks.same_device("bias", bias, "x", x)
    if norm_weight is None and norm_bias is not None:
        raise ValueError("norm_bias must be None where norm_weight is, got a tensor")
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    check_norm_parameters(x, scale, norm_eps, **{name: value for name, value in norm.items() if value is not None})
    if activation is not None:
        checks.one_of("activation", activation, tuple(ACTIVATIONS))


def _fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, grid: Sequence[int] | None, scale: int, *others: Any
) -> Tensor:
    order, input_scale, norm_weight, norm_bias, norm_eps, activation = others
    grid = square(x) if grid is None else grid
    if norm_weight is not None:
        norm_bias = torch.zeros_like(norm_weight) if norm_bias is None else norm_bias
        tokens = pixel_shuffle_norm(x, norm_weight, norm_bias, grid, scale, order, input_scale, norm_eps)
    elif grid[1] == scale and input_scale == 1.0:  # the patches of a token are adjacent, as in Qwen-VL
        tokens = x.reshape(x.shape[0], -1, scale**2 * x.shape[2])
    else:
        tokens = pixel_shuffle(x, grid, scale, order, input_scale)
    projected = linear(tokens, weight, bias)
    if activation is None:
        return projected
    if projected.requires_grad or torch.compiler.is_compiling():
        return F.gelu(projected, approximate=ACTIVATIONS[activation])
    activated: Tensor = torch.ops.aten.gelu_(projected, approximate=ACTIVATIONS[activation])
    return activated


@op(check=check_linear, compose=_fused, parts=("pixel_shuffle", "pixel_shuffle_norm"))
def pixel_shuffle_linear(
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
    """Apply `pixel_shuffle`, a LayerNorm if there is a weight for one, a linear layer and an activation.

    Args:
        x: (B, height * width, C) float32, float16 or bfloat16, row-major patches; any strides, such as those of a
            slice that leaves the CLS token out.
        weight: (out, scale**2 * C) of the linear layer.
        bias: (out,) or None.
        grid: (height, width) of the patches, both divisible by ``scale``; None for a square.
        scale: patches along each side of a token.
        order: how the tokens are numbered: "row", or "column" (InternVL v1 leaves the map transposed).
        input_scale: multiplies ``x``, rounded to its dtype; VITA has 0.5.
        norm_weight: (scale**2 * C,) for a LayerNorm after the shuffle, (C,) for one before it, or None.
        norm_bias: as ``norm_weight``.
        norm_eps: added to the variance.
        activation: None, "gelu" (exact) or "gelu_tanh".

    Returns:
        (B, height * width / scale**2, out) contiguous, of the dtype of ``x``.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes, a grid, a scale, an order or an activation
            that do not fit.

    Source:
        InternVLMultiModalProjector, Idefics3Connector and Qwen3VLVisionPatchMerger of transformers 5.23.
    """
    layout = square(x) if grid is None else grid, scale, order, input_scale
    if norm_weight is None:
        tokens = pixel_shuffle.op.reference(x, *layout)
    else:
        norm_bias = torch.zeros_like(norm_weight) if norm_bias is None else norm_bias
        tokens = pixel_shuffle_norm.op.reference(x, norm_weight, norm_bias, *layout, norm_eps)
    projected = F.linear(tokens, weight, bias)
    return projected if activation is None else F.gelu(projected, approximate=ACTIVATIONS[activation])
