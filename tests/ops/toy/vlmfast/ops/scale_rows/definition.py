"""Multiplication of each row by its own factor."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmfast import checks
from vlmfast.functions import op


def _check(x: Tensor, factors: Tensor) -> None:
    checks.tensor("x", x)
    checks.tensor("factors", factors)
    if x.dim() != 2 or factors.shape != x.shape[:1]:
        raise ValueError(f"factors must have shape ({x.shape[0]},), the rows of x, got {tuple(factors.shape)}")
    if factors.dtype != x.dtype:
        raise TypeError(f"factors must have the dtype of x, {x.dtype}, got {factors.dtype}")
    checks.same_device("factors", factors, "x", x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_output: Tensor | None) -> tuple[Any, ...]:
    if grad_output is None:
        return None, None
    x, factors = ctx.saved_tensors
    return scale_rows(grad_output, factors), (grad_output * x).sum(1)


@op(check=_check, gradients=(_setup_context, _backward), exact=True)
def scale_rows(x: Tensor, factors: Tensor) -> Tensor:
    """Multiply each row by a number of its own.

    Args:
        x: (B, D) float32, float16 or bfloat16; any strides.
        factors: (B,) of the dtype of ``x``.

    Returns:
        (B, D) contiguous, of the dtype of ``x``.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for shapes or devices that do not fit.

    Source:
        Nobody asked for it.
    """
    return x * factors[:, None]
