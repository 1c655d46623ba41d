"""Pixel shuffle, alone or with a LayerNorm: S x S neighbouring patches become one token with S * S times the channels.

The positions of patches are computed, so each patch moves once. Upstream permutes the map twice, each time with a full
copy, and normalises in further passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast import checks
from vlmfast.backends import PLAIN
from vlmfast.functions import op

ORDERS = ("row", "column")
INLINED = ("cpu",)  # Inductor's copy is as fast as the kernel and saves the node's 25 us; not timed on a GPU


def _shuffled(x: Tensor, grid: Sequence[int], scale: int, order: str, input_scale: float) -> Tensor:
    batch, _, channels = x.shape
    height, width = grid
    blocks = x.reshape(batch, height // scale, scale, width // scale, scale, channels)
    blocks = blocks.permute(0, 3, 1, 2, 4, 5) if order == "column" else blocks.permute(0, 1, 3, 2, 4, 5)
    tokens = blocks.reshape(batch, height * width // scale**2, scale**2 * channels)
    return tokens if input_scale == 1.0 else tokens * input_scale


# ---- what a call must look like ----


def square(x: Tensor) -> tuple[int, int]:
    """Return the grid of a square of patches."""
    side = math.isqrt(x.shape[1])
    if side * side != x.shape[1]:
        raise ValueError(f"grid must be given: the {x.shape[1]} patches of x are no square")
    return side, side


def _check_layout(grid: Sequence[int], scale: int, order: str = "row", input_scale: float = 1.0) -> None:
    if not isinstance(scale, (int, torch.SymInt)) or isinstance(scale, bool) or scale < 1:
        raise ValueError(f"scale must be an int of at least 1, got {scale!r}")
    sides = tuple(grid) if isinstance(grid, Sequence) else ()
    if len(sides) != 2 or not all(isinstance(side, (int, torch.SymInt)) for side in sides):
        raise ValueError(f"grid must be (height, width), got {grid!r}")
    if min(sides) < 0 or any(side % scale for side in sides):
        raise ValueError(f"grid must be divisible by scale, {scale}, got {sides}")
    checks.one_of("order", order, ORDERS)
    number = isinstance(input_scale, (int, float)) and not isinstance(input_scale, bool)
    if not (number and abs(input_scale) < math.inf):  # not math.isfinite, which torch.compile cannot trace
        raise ValueError(f"input_scale must be a finite number, got {input_scale!r}")


def _check_tokens(name: str, x: Tensor, tokens: int, grid: Sequence[int]) -> None:
    checks.tensor(name, x)
    if x.dim() != 3 or x.shape[1] != tokens:
        raise ValueError(f"{name} must have shape (B, {tokens}, C) for a grid of {tuple(grid)}, got {tuple(x.shape)}")


def check_pixel_shuffle(
    x: Tensor, grid: Sequence[int], scale: int = 2, order: str = "row", input_scale: float = 1.0
) -> None:
    """Raise unless the arguments are those of `pixel_shuffle`."""
    # The fast path of nearly every call, without the function calls below: 0.9 us instead of 3.2 us.
    if (
        type(x) in PLAIN
        and x.dtype in checks.DTYPES
        and type(grid) in (tuple, list)
        and len(grid) == 2
        and type(grid[0]) is int
        and type(grid[1]) is int
        and type(scale) is int
        and grid[0] >= 0
        and grid[1] >= 0
        and scale > 0
        and grid[0] % scale == 0
        and grid[1] % scale == 0
        and len(shape := x.shape) == 3
        and shape[1] == grid[0] * grid[1]
        and order in ORDERS
        and type(input_scale) is float
        and abs(input_scale) < math.inf
    ):
        return
    _check_layout(grid, scale, order, input_scale)
    _check_tokens("x", x, grid[0] * grid[1], grid)


def _check_pixel_unshuffle(x: Tensor, grid: Sequence[int], scale: int = 2, *others: Any, **named: Any) -> None:
    _check_layout(grid, scale, *others, **named)
    _check_tokens("x", x, grid[0] * grid[1] // scale**2, grid)
    if x.shape[2] % scale**2:
        raise ValueError(f"x must have a multiple of scale**2 = {scale**2} channels, got {x.shape[2]}")


def check_norm_parameters(x: Tensor, scale: int, eps: float, **parameters: Tensor) -> None:
    """Raise unless all have one element per channel of a token, or all have one per channel of a patch."""
    channels = x.shape[2]
    for name, value in parameters.items():
        checks.tensor(name, value)
        if value.dim() != 1 or value.shape[0] not in (channels, scale**2 * channels):
            raise ValueError(
                f"{name} must have shape ({scale**2 * channels},), the channels of a token, or ({channels},), those of "
                f"a patch, got {tuple(value.shape)}"
            )
        checks.same_device(name, value, "x", x)
        checks.same_shape(name, value, "norm_weight", parameters["norm_weight"])
    checks.epsilon("norm_eps", eps)


def _check_norm(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    grid: Sequence[int],
    scale: int = 2,
    order: str = "row",
    input_scale: float = 1.0,
    norm_eps: float = 1e-5,
) -> None:
    check_pixel_shuffle(x, grid, scale, order, input_scale)
    check_norm_parameters(x, scale, norm_eps, norm_weight=norm_weight, norm_bias=norm_bias)


def _check_norm_backward(
    grad_output: Tensor, x: Tensor, norm_weight: Tensor, grid: Sequence[int], scale: int = 2, *others: Any, **named: Any
) -> None:
    _check_norm(x, norm_weight, norm_weight, grid, scale, *others, **named)
    checks.tensor("grad_output", grad_output)
    expected = (x.shape[0], x.shape[1] // scale**2, x.shape[2] * scale**2)
    if grad_output.shape != expected:
        raise ValueError(f"grad_output must have shape {expected}, got {tuple(grad_output.shape)}")
    checks.same_device("grad_output", grad_output, "x", x)


# ---- gradients ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.layout = inputs


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor]:
    return (pixel_unshuffle(grad_output, *ctx.layout),)


def _unshuffle_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor]:
    return (pixel_shuffle(grad_output, *ctx.layout),)


# ---- the definitions ----


@op(check=check_pixel_shuffle, gradients=(_setup_context, _backward), exact=True, inlined=INLINED)
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


@op(check=_check_pixel_unshuffle, gradients=(_setup_context, _unshuffle_backward), exact=True, inlined=INLINED)
def pixel_unshuffle(
    x: Tensor, grid: Sequence[int], scale: int = 2, order: str = "row", input_scale: float = 1.0
) -> Tensor:
    """Split each token into its patches: the inverse of `pixel_shuffle` and, with the same input scale, its gradient.

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
    ctx.save_for_backward(x, weight)  # recomputing mean and deviation is cheaper than storing and loading them


def _norm_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    grads = pixel_shuffle_norm_backward(grad_output, *ctx.saved_tensors, *ctx.layout)
    return tuple(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False))


@op(check=_check_norm, gradients=(_norm_setup_context, _norm_backward))
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
    """Apply `pixel_shuffle` with a LayerNorm, in one pass.

    A weight of ``scale**2 * C`` elements normalises each token after the shuffle (InternVL), a weight of C elements
    each patch before it (Qwen-VL). Mean and variance are computed in float32, and the result is rounded once.

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
    norm = norm_weight.shape, norm_weight, norm_bias, norm_eps
    if norm_weight.shape[0] == x.shape[2]:
        scaled = x if input_scale == 1.0 else x * input_scale
        return _shuffled(F.layer_norm(scaled, *norm), grid, scale, order, 1.0)
    return F.layer_norm(_shuffled(x, grid, scale, order, input_scale), *norm)


@op(check=_check_norm_backward)
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
    """Compute the gradients of `pixel_shuffle_norm`, in float32 and rounded once.

    With ``n = (x - mean) * r``, ``r = rsqrt(variance + eps)`` and ``g = grad_output * weight``, all in the order of the
    tokens::

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
        ``(grad_x, grad_weight, grad_bias)``: the first like ``x``, the others like ``norm_weight``.

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
