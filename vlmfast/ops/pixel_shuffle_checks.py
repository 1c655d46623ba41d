"""What a call of pixel_shuffle.py's ops must look like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfast import checks
from vlmfast.backends import PLAIN

ORDERS = ("row", "column")
ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}  # -> torch's name of the approximation


def square(x: Tensor) -> tuple[int, int]:
    """The grid of a square of patches."""
    side = math.isqrt(x.shape[1])
    if side * side != x.shape[1]:
        raise ValueError(f"grid must be given: the {x.shape[1]} patches of x are no square")
    return side, side


def _check_layout(grid: Sequence[int], scale: int, order: str, input_scale: float) -> None:
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
    checks.float_tensor(name, x)
    if x.dim() != 3 or x.shape[1] != tokens:
        raise ValueError(f"{name} must have shape (B, {tokens}, C) for a grid of {tuple(grid)}, got {tuple(x.shape)}")


def check_pixel_shuffle(
    x: Tensor, grid: Sequence[int], scale: int = 2, order: str = "row", input_scale: float = 1.0
) -> None:
    # What nearly every call brings, without the calls below: 0.9 us instead of 3.2.
    if (
        type(x) in PLAIN
        and x.dtype in checks.DTYPES
        and type(grid) in (tuple, list)
        and len(grid) == 2
        and type(grid[0]) is int is type(grid[1]) is type(scale)
        and grid[0] >= 0 <= grid[1]
        and scale > 0 == grid[0] % scale == grid[1] % scale
        and len(shape := x.shape) == 3
        and shape[1] == grid[0] * grid[1]
        and order in ORDERS
        and type(input_scale) is float
        and abs(input_scale) < math.inf
    ):
        return
    _check_layout(grid, scale, order, input_scale)
    _check_tokens("x", x, grid[0] * grid[1], grid)


def check_pixel_unshuffle(
    x: Tensor, grid: Sequence[int], scale: int = 2, order: str = "row", input_scale: float = 1.0
) -> None:
    _check_layout(grid, scale, order, input_scale)
    _check_tokens("x", x, grid[0] * grid[1] // scale**2, grid)
    if x.shape[2] % scale**2:
        raise ValueError(f"x must have a multiple of scale**2 = {scale**2} channels, got {x.shape[2]}")


def _check_norm_vector(name: str, value: Tensor, x: Tensor, scale: int) -> None:
    checks.float_tensor(name, value)
    channels = x.shape[2]
    if value.dim() != 1 or value.shape[0] not in (channels, scale**2 * channels):
        raise ValueError(
            f"{name} must have shape ({scale**2 * channels},), the channels of a token, or ({channels},), those of a "
            f"patch, got {tuple(value.shape)}"
        )
    checks.same_device(name, value, "x", x)


def check_norm(
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
    _check_norm_vector("norm_weight", norm_weight, x, scale)
    checks.float_tensor("norm_bias", norm_bias)
    checks.same_shape("norm_bias", norm_bias, "norm_weight", norm_weight)
    checks.same_device("norm_bias", norm_bias, "x", x)
    checks.epsilon("norm_eps", norm_eps)


def check_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    grid: Sequence[int],
    scale: int = 2,
    order: str = "row",
    input_scale: float = 1.0,
    norm_eps: float = 1e-5,
) -> None:
    check_norm(x, norm_weight, norm_weight, grid, scale, order, input_scale, norm_eps)
    checks.float_tensor("grad_output", grad_output)
    expected = (x.shape[0], x.shape[1] // scale**2, x.shape[2] * scale**2)
    if grad_output.shape != expected:
        raise ValueError(f"grad_output must have shape {expected}, got {tuple(grad_output.shape)}")
    checks.same_device("grad_output", grad_output, "x", x)


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
    checks.float_tensor("x", x)
    if x.dim() != 3:
        raise ValueError(f"x must have shape (B, height * width, C), got {tuple(x.shape)}")
    check_pixel_shuffle(x, square(x) if grid is None else grid, scale, order, input_scale)
    checks.float_tensor("weight", weight)
    channels = scale**2 * x.shape[2]
    if weight.dim() != 2 or weight.shape[1] != channels:
        raise ValueError(f"weight must have shape (out, {channels}), got {tuple(weight.shape)}")
    checks.same_device("weight", weight, "x", x)
    if bias is not None:
        checks.float_tensor("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({weight.shape[0]},), the rows of weight, got {tuple(bias.shape)}")
    if norm_weight is not None:
        _check_norm_vector("norm_weight", norm_weight, x, scale)
    if norm_bias is not None:
        if norm_weight is None:
            raise ValueError("norm_bias must be None where norm_weight is, got a tensor")
        checks.same_shape("norm_bias", norm_bias, "norm_weight", norm_weight)
    checks.epsilon("norm_eps", norm_eps)
    if activation is not None:
        checks.one_of("activation", activation, tuple(ACTIVATIONS))


# A function of its own, because `op` gives the check of an op that op's name.
def check_gemm(x: Tensor, weight: Tensor, *others: Any, **named: Any) -> None:
    check_linear(x, weight, *others, **named)
