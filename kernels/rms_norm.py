"""Triton kernels of vlmfast/ops/rms_norm.py.

Bytes (s = element size): the forward moves 2 R D s, with a residual 4 R D s; the backward 3 R D s, or 4 R D s with
the gradient of a residual, plus a float32 row of weight gradient per program, of which there are at most two per
multiprocessor. A row stays in registers between its two uses, so nothing is read twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfast.kernels.launch import (
    FP_FUSION,
    Tile,
    as_rows,
    ceil_div,
    device_unsupported,
    next_power_of_two,
    on_device,
    processors,
)
from vlmfast.kernels.partial_sums import sum_partials

MAX_ROWS = 2**31 - 64  # rows are counted in 32 bits, their offsets in 64
MAX_HIDDEN = 8192  # rows twice as long would spill registers in the backward


def _tile(hidden: int, elements: int, elements_per_thread: int) -> Tile:
    """Narrow rows share a program: with one head of 128 channels per program, seven eighths of it would idle."""
    columns = next_power_of_two(hidden)
    rows = min(64, max(1, elements // columns))  # more would only spread very narrow rows over more registers
    return Tile(rows, columns, warps=min(16, max(4, columns // (32 * elements_per_thread))))


def forward_tile(hidden: int) -> Tile:
    """32 elements per thread: four 16-byte loads in flight for bfloat16."""
    return _tile(hidden, elements=2048, elements_per_thread=32)


def backward_tile(hidden: int) -> Tile:
    """Half of that: the backward holds three operands and the weight gradient at once."""
    return _tile(hidden, elements=1024, elements_per_thread=16)


@triton.jit
def _weighted(rows, weight_ptr, column, hidden, VARIANT: tl.constexpr):
    """Multiply rows by the weight as VARIANT takes it, None by nothing."""
    if VARIANT is not None:
        weight = tl.load(weight_ptr + column, mask=column < hidden, other=0.0).to(tl.float32)
        if VARIANT == "gemma":
            weight += 1.0
        rows *= weight
    return rows


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    new_residual_ptr,
    x_row_stride,
    residual_row_stride,
    rows,
    hidden,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    VARIANT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Normalise h = x, or h = residual + x stored as the new residual; VARIANT None is without a weight."""
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]).to(tl.int64)
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    mask = (row < rows) & (column < hidden)
    h = tl.load(x_ptr + row * x_row_stride + column, mask=mask, other=0.0).to(tl.float32)
    dtype = x_ptr.dtype.element_ty
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_row_stride + column, mask=mask, other=0.0)
        rounded = (residual.to(tl.float32) + h).to(dtype)  # Hugging Face adds in the dtype
        tl.store(new_residual_ptr + row * hidden + column, rounded, mask=mask)
        h = rounded.to(tl.float32)
    normed = h * tl.rsqrt(tl.sum(h * h, 1, keep_dims=True) / hidden + eps)
    if VARIANT == "llama":
        normed = normed.to(dtype).to(tl.float32)
    y = _weighted(normed, weight_ptr, column, hidden, VARIANT)
    tl.store(y_ptr + row * hidden + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad_output_ptr,
    x_ptr,
    weight_ptr,
    grad_residual_ptr,
    grad_x_ptr,
    partial_ptr,
    grad_output_row_stride,
    x_row_stride,
    grad_residual_row_stride,
    rows,
    hidden,
    eps,
    HAS_GRAD_RESIDUAL: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    VARIANT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """grad_x = r * (g - n * mean(g * n)) with r the inverse rms, n = x * r, g = grad_output * weight.

    A program walks over blocks of rows and keeps its share of the weight gradient in registers.
    """
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    if VARIANT is not None:
        weight = tl.load(weight_ptr + column, mask=column < hidden, other=0.0).to(tl.float32)
    if VARIANT == "gemma":
        weight += 1.0
    grad_weight = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]).to(tl.int64)
        mask = (row < rows) & (column < hidden)
        x = tl.load(x_ptr + row * x_row_stride + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_output_ptr + row * grad_output_row_stride + column, mask=mask, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / hidden + eps)
        normed = x * inverse_rms
        scaled = grad if VARIANT is None else grad * weight
        grad_x = inverse_rms * (scaled - normed * (tl.sum(scaled * normed, 1, keep_dims=True) / hidden))
        if HAS_GRAD_RESIDUAL:
            grad_residual = tl.load(grad_residual_ptr + row * grad_residual_row_stride + column, mask=mask, other=0.0)
            grad_x += grad_residual.to(tl.float32)
        tl.store(grad_x_ptr + row * hidden + column, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if WEIGHT_GRAD:
            if VARIANT == "llama":  # the weight multiplied the rounded row
                normed = normed.to(x_ptr.dtype.element_ty).to(tl.float32)
            grad_weight += grad * normed
    if WEIGHT_GRAD:
        partial = tl.sum(grad_weight, 0, keep_dims=True)
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * hidden + column, partial, mask=column < hidden)


def rms_norm_unsupported(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, variant: str = "llama"
) -> str | None:
    if x.shape[-1] > MAX_HIDDEN:
        return f"the last size of x is {x.shape[-1]}, more than {MAX_HIDDEN}"
    if x.numel() >= MAX_ROWS * max(1, x.shape[-1]):
        return f"x has {x.numel() // x.shape[-1]} rows, {MAX_ROWS} or more"
    return device_unsupported(x)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, variant: str = "llama") -> Tensor:
    return _forward(x, None, weight, eps, variant)[0]


def add_rms_norm_unsupported(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, variant: str = "llama"
) -> str | None:
    return rms_norm_unsupported(x, weight)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, variant: str = "llama"
) -> tuple[Tensor, Tensor]:
    return _forward(x, residual, weight, eps, variant)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, variant: str
) -> tuple[Tensor, Tensor | None]:
    llama = variant == "llama" and weight is not None
    dtype = torch.promote_types(x.dtype, weight.dtype) if llama else x.dtype
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    new_residual = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y, new_residual
    x_rows = as_rows(x)
    residual_rows = x_rows if residual is None else as_rows(residual)
    rows, hidden = x_rows.shape
    tile = forward_tile(hidden)
    with on_device(x):
        _forward_kernel[(ceil_div(rows, tile.rows),)](
            x_rows,
            residual_rows,
            x_rows if weight is None else weight.contiguous(),
            y,
            y if new_residual is None else new_residual,
            x_rows.stride(0),
            residual_rows.stride(0),
            rows,
            hidden,
            eps,
            HAS_RESIDUAL=residual is not None,
            VARIANT=None if weight is None else variant,
            BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            num_warps=tile.warps,
            **FP_FUSION,
        )
    return y, new_residual


def rms_norm_backward_unsupported(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    variant: str = "llama",
    grad_residual: Tensor | None = None,
    weight_grad: bool = True,
) -> str | None:
    return rms_norm_unsupported(x, weight)


def rms_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    variant: str = "llama",
    grad_residual: Tensor | None = None,
    weight_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weight_grad = weight_grad and weight is not None
    no_gradient = (x if weight is None else weight).new_empty(0)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(weight) if weight_grad else no_gradient
    x_rows, grad_rows = as_rows(x), as_rows(grad_output)
    residual_rows = x_rows if grad_residual is None else as_rows(grad_residual)
    rows, hidden = x_rows.shape
    tile = backward_tile(hidden)
    programs = min(ceil_div(rows, tile.rows), 2 * processors(x))
    partials = torch.empty((programs if weight_grad else 0, hidden), dtype=torch.float32, device=x.device)
    with on_device(x):
        _backward_kernel[(programs,)](
            grad_rows,
            x_rows,
            x_rows if weight is None else weight.contiguous(),
            residual_rows,
            grad_x,
            partials,
            grad_rows.stride(0),
            x_rows.stride(0),
            residual_rows.stride(0),
            rows,
            hidden,
            eps,
            HAS_GRAD_RESIDUAL=grad_residual is not None,
            WEIGHT_GRAD=weight_grad,
            VARIANT=None if weight is None else variant,
            BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            num_warps=tile.warps,
            **FP_FUSION,
        )
    return grad_x, sum_partials(partials, weight.dtype) if weight_grad else no_gradient
