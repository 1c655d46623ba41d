"""Pixel shuffle: S x S neighbouring patches become one token of S * S as many channels, alone and before a projection.

Where the patches are, is arithmetic: no patch is moved twice. Upstream permutes the map two times, each a full copy,
then normalises and multiplies in passes of their own. Two designs, counted for one InternVL tile (1024 patches of 1024
channels in bfloat16: 256 tokens of 4096 channels, projected to N):

* One pass for the gather, the input scale and the LayerNorm, which reads the tower's output where it lies, then the
  vendor's product. The pass moves 4.2 MB, where upstream moves 17; the product is 2.1 N MFLOP and reads 8 N kB of
  weights (N = 3584: 7.5 GFLOP, 29 MB).
* A product of our own that reads its tiles through the shuffle: vlmfast/ops/pixel_shuffle_gemm.py. It saves half of
  the pass, or all of it where there is no LayerNorm, and has to be nearly as fast as the vendor's.

`pixel_shuffle_linear` is the first. On a CPU nearly all of the time is the product's, which is done in float32 where
the processor cannot multiply half-precision numbers (vlmfast/products.py). Where it can, N = 896 takes 4.2 ms (EPYC
with AVX-512 and bfloat16 instructions, one thread): oneDNN's product 3.8, the pass 0.22, GELU 0.05, and the pass
without the LayerNorm 0.05. That is all the second could save, if it were within 1 % of oneDNN. By the data sheet of an
H100 (3.35 TB/s, 989 TFLOP/s) the pass of the first is 1.3 us beside 7.6 us of product for N = 3584, and beside 1.9 us
for N = 896, unless the tokens stay in the second-level cache. No GPU has timed the second against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.ops import bytes_moved
from vlmfast.ops import pixel_shuffle_calls as calls
from vlmfast.ops import pixel_shuffle_checks as checks
from vlmfast.products import linear
from vlmfast.registry import op


def _shuffled(x: Tensor, grid: Sequence[int], scale: int, order: str, input_scale: float) -> Tensor:
    batch, _, channels = x.shape
    height, width = grid
    blocks = x.reshape(batch, height // scale, scale, width // scale, scale, channels)
    blocks = blocks.permute(0, 3, 1, 2, 4, 5) if order == "column" else blocks.permute(0, 1, 3, 2, 4, 5)
    tokens = blocks.reshape(batch, height * width // scale**2, scale**2 * channels)
    return tokens if input_scale == 1.0 else tokens * input_scale


# ---- gradients ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.layout = inputs


def _backward(ctx: Any, grad_output: Tensor | None) -> tuple[Any, ...]:
    grad_x = None if grad_output is None else pixel_unshuffle(grad_output, *ctx.layout)
    return grad_x, None, None, None, None


def _unshuffle_backward(ctx: Any, grad_output: Tensor | None) -> tuple[Any, ...]:
    grad = None if grad_output is None else pixel_shuffle(grad_output, *ctx.layout)
    return grad, None, None, None, None


# ---- the definitions ----


@op(
    check=checks.check_pixel_shuffle,
    upstream=calls.shuffle_upstream,
    limits={"x.clone()": lambda x, *_: x.clone},
    samples=calls.shuffle_samples,
    bad_calls=calls.shuffle_bad_calls,
    workloads=calls.shuffle_workloads,
    bytes=lambda x, *_: 2 * x.nbytes,
    setup_context=_setup_context,
    backward=_backward,
    exact=True,
)
def pixel_shuffle(
    x: Tensor, grid: Sequence[int], scale: int = 2, order: str = "row", input_scale: float = 1.0
) -> Tensor:
    """Join each square of ``scale`` x ``scale`` patches into one token.

    Channel ``(dy * scale + dx) * C + c`` of token ``(Y, X)`` is channel c of patch
    ``(scale * Y + dy, scale * X + dx)``, times ``input_scale`` and rounded to the dtype.

    Args:
        x: (B, height * width, C) float32, float16 or bfloat16, row-major patches; any strides, such as those of a
            slice that leaves the CLS token out.
        grid: (height, width) of the patches, both divisible by ``scale``.
        scale: patches along each side of a token.
        order: how the tokens are numbered: "row", or "column" (InternVL v1 leaves the map transposed).
        input_scale: VITA multiplies by 0.5.

    Returns:
        (B, height * width / scale**2, scale**2 * C) contiguous, of the dtype of ``x``.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for a grid, a scale or an order that does not fit.

    Source:
        InternVLModel.pixel_shuffle and Idefics3Connector.pixel_shuffle of transformers 5.23.
    """
    return _shuffled(x, grid, scale, order, input_scale)


@op(
    check=checks.check_pixel_unshuffle,
    samples=calls.unshuffle_samples,
    bad_calls=calls.unshuffle_bad_calls,
    workloads=calls.unshuffle_workloads,
    bytes=lambda x, *_: 2 * x.nbytes,
    setup_context=_setup_context,
    backward=_unshuffle_backward,
    exact=True,
)
def pixel_unshuffle(
    x: Tensor, grid: Sequence[int], scale: int = 2, order: str = "row", input_scale: float = 1.0
) -> Tensor:
    """Take each token apart into its patches: the inverse of `pixel_shuffle`, and with the same scale its gradient.

    Args:
        x: (B, height * width / scale**2, scale**2 * C) float32, float16 or bfloat16; any strides.
        grid: (height, width) of the patches, both divisible by ``scale``.
        scale: patches along each side of a token.
        order: how the tokens are numbered: "row" or "column".
        input_scale: multiplies the result.

    Returns:
        (B, height * width, C) contiguous, of the dtype of ``x``.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for a grid, a scale or an order that does not fit.

    Source:
        The derivative of `pixel_shuffle`.
    """
    rows, columns, channels = grid[0] // scale, grid[1] // scale, x.shape[2] // scale**2
    if order == "column":
        blocks = x.reshape(x.shape[0], columns, rows, scale, scale, channels).permute(0, 2, 3, 1, 4, 5)
    else:
        blocks = x.reshape(x.shape[0], rows, columns, scale, scale, channels).permute(0, 1, 3, 2, 4, 5)
    patches = blocks.reshape(x.shape[0], grid[0] * grid[1], channels)
    return patches if input_scale == 1.0 else patches * input_scale


def _norm_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.layout = inputs
    ctx.save_for_backward(x, weight)  # mean and deviation are cheaper to compute again than to store and load


def _norm_backward(ctx: Any, grad_output: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * (3 + len(ctx.layout))
    if grad_output is None:
        return nothing
    x, weight = ctx.saved_tensors
    grads = pixel_shuffle_norm_backward(grad_output, x, weight, *ctx.layout)
    needed = zip(grads, ctx.needs_input_grad[:3], strict=True)
    return *(grad if need else None for grad, need in needed), *nothing[3:]


@op(
    check=checks.check_norm,
    upstream=calls.norm_upstream,
    samples=calls.norm_samples,
    bad_calls=calls.norm_bad_calls,
    workloads=calls.norm_workloads,
    bytes=lambda x, weight, bias, *_: 2 * x.nbytes + weight.nbytes + bias.nbytes,
    flops=lambda x, *_: 8 * x.numel(),
    setup_context=_norm_setup_context,
    backward=_norm_backward,
)
def pixel_shuffle_norm(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    grid: Sequence[int],
    scale: int = 2,
    order: str = "row",
    input_scale: float = 1.0,
    norm_eps: float = 1e-5,
) -> Tensor:
    """`pixel_shuffle` with a LayerNorm, in one pass.

    A weight of ``scale**2 * C`` elements normalises each token after the shuffle (InternVL), one of C each patch
    before it (Qwen-VL). Mean and variance are taken in float32, and the result is rounded once.

    Args:
        x: (B, height * width, C) float32, float16 or bfloat16, row-major patches; any strides.
        norm_weight: (scale**2 * C,) or (C,).
        norm_bias: as ``norm_weight``.
        grid: (height, width) of the patches, both divisible by ``scale``.
        scale: patches along each side of a token.
        order: how the tokens are numbered: "row" or "column".
        input_scale: multiplies ``x``, rounded to its dtype, before the norm.
        norm_eps: added to the variance; finite, not negative.

    Returns:
        (B, height * width / scale**2, scale**2 * C) contiguous, of the dtype of ``x``.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes, a grid, a scale or an order that do not fit.

    Source:
        InternVLMultiModalProjector.layer_norm after InternVLModel.pixel_shuffle, and Qwen3VLVisionPatchMerger.norm, of
        transformers 5.23.
    """
    if norm_weight.shape[0] == x.shape[2]:
        scaled = x if input_scale == 1.0 else x * input_scale
        return _shuffled(
            F.layer_norm(scaled, norm_weight.shape, norm_weight, norm_bias, norm_eps), grid, scale, order, 1.0
        )
    tokens = _shuffled(x, grid, scale, order, input_scale)
    return F.layer_norm(tokens, norm_weight.shape, norm_weight, norm_bias, norm_eps)


@op(
    check=checks.check_norm_backward,
    samples=calls.norm_backward_samples,
    bad_calls=calls.norm_backward_bad_calls,
    workloads=calls.norm_backward_workloads,
    bytes=bytes_moved.norm_backward,
    flops=lambda grad_output, x, *_: 16 * x.numel(),
)
def pixel_shuffle_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    grid: Sequence[int],
    scale: int = 2,
    order: str = "row",
    input_scale: float = 1.0,
    norm_eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `pixel_shuffle_norm`, in float32 and rounded once.

    With ``n = (x - mean) * r``, ``r = rsqrt(variance + eps)`` and ``g = grad_output * weight``, in the places that the
    shuffle gives them::

        grad_x = r * (g - mean(g) - n * mean(g * n)) * input_scale
        grad_weight = sum over rows of grad_output * n
        grad_bias = sum over rows of grad_output

    Args:
        grad_output: (B, height * width / scale**2, scale**2 * C) the gradient of the output.
        x: (B, height * width, C) as in the forward.
        norm_weight: as in the forward.
        grid: as in the forward.
        scale: as in the forward.
        order: as in the forward.
        input_scale: as in the forward.
        norm_eps: as in the forward.

    Returns:
        ``(grad_x, grad_weight, grad_bias)``: of the shape and dtype of ``x``, and twice of ``norm_weight``.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes, a grid, a scale or an order that do not fit.

    Source:
        The derivative of the expressions above.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    size = norm_weight.shape[0]
    scaled = (x if input_scale == 1.0 else x * input_scale).to(wide)
    grad = grad_output.to(wide).reshape(*grad_output.shape[:2], grad_output.shape[2] // size, size)
    rows = _shuffled(scaled, grid, scale, order, 1.0).reshape(grad.shape)
    centred = rows - rows.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + norm_eps)
    normed = centred * inverse
    weighted = grad * norm_weight.to(wide)
    grad_rows = inverse * (
        weighted - weighted.mean(-1, keepdim=True) - normed * (weighted * normed).mean(-1, keepdim=True)
    )
    grad_x = pixel_unshuffle.op.reference(grad_rows.flatten(2), grid, scale, order, input_scale)
    return (
        grad_x.to(x.dtype),
        (grad * normed).sum((0, 1, 2)).to(norm_weight.dtype),
        grad.sum((0, 1, 2)).to(norm_weight.dtype),
    )


def _fused(
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
    grid = checks.square(x) if grid is None else grid
    if norm_weight is not None:
        norm_bias = torch.zeros_like(norm_weight) if norm_bias is None else norm_bias
        tokens = pixel_shuffle_norm(x, norm_weight, norm_bias, grid, scale, order, input_scale, norm_eps)
    elif grid[1] == scale and input_scale == 1.0:  # the patches of a token are neighbours: Qwen-VL's order
        tokens = x.reshape(x.shape[0], -1, scale**2 * x.shape[2])
    else:
        tokens = pixel_shuffle(x, grid, scale, order, input_scale)
    projected = linear(tokens, weight, bias)
    if activation is None:
        return projected
    if projected.requires_grad or torch.compiler.is_compiling():
        return F.gelu(projected, approximate=checks.ACTIVATIONS[activation])
    activated: Tensor = torch.ops.aten.gelu_(projected, approximate=checks.ACTIVATIONS[activation])
    return activated


@op(
    compose=_fused,
    parts=("pixel_shuffle", "pixel_shuffle_norm"),
    check=checks.check_linear,
    upstream=calls.linear_upstream,
    limits={"F.linear alone": calls.bare_linear},
    samples=calls.linear_samples,
    bad_calls=calls.linear_bad_calls,
    workloads=calls.linear_workloads,
    bytes=bytes_moved.linear,
    flops=lambda x, weight, *_: 2 * x.numel() * weight.shape[0],
)
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
    """`pixel_shuffle`, a LayerNorm if there is a weight for one, a linear layer and an activation.

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
    grid = checks.square(x) if grid is None else grid
    if norm_weight is not None and norm_weight.shape[0] == x.shape[2]:
        scaled = x if input_scale == 1.0 else x * input_scale
        tokens = _shuffled(
            F.layer_norm(scaled, norm_weight.shape, norm_weight, norm_bias, norm_eps), grid, scale, order, 1.0
        )
    else:
        tokens = _shuffled(x, grid, scale, order, input_scale)
        if norm_weight is not None:
            tokens = F.layer_norm(tokens, norm_weight.shape, norm_weight, norm_bias, norm_eps)
    projected = F.linear(tokens, weight, bias)
    return projected if activation is None else F.gelu(projected, approximate=checks.ACTIVATIONS[activation])
