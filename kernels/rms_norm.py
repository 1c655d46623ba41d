"""RMSNorm in Triton. A row stays in registers between the reduction and its use, so nothing is read twice."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfast.kernels.common.kernel import aligned, alignment, kernel, limited
from vlmfast.kernels.common.launch import (
    as_rows,
    ceil_div,
    device_unsupported,
    norm_config_for,
    on_device,
    processors,
    shared_memory,
    stages_for,
)
from vlmfast.kernels.common.partial_sums import sum_partials

MAX_ROWS = 2**31 - 64  # rows are counted in 32 bits, their offsets in 64
MAX_HIDDEN = 8192  # rows twice as long would spill registers in the backward


@triton.jit
def _load_weight(weight_ptr, weight_offset, column, hidden, ROUNDED: tl.constexpr):
    """Load the factors of a row: the weight plus its offset, or ones without a weight. ROUNDED implies no offset."""
    if weight_ptr is None:
        weight = tl.full(column.shape, 1.0, tl.float32)
    else:
        weight = tl.load(weight_ptr + column, mask=column < hidden, other=0.0).to(tl.float32)
        if not ROUNDED:
            weight += weight_offset
    return weight


@kernel
@limited("rows that are no power of two are padded to one, and idle threads take their instructions too")
def rms_norm_kernel(
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
    weight_offset,
    ROUNDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Normalise h = x, or h = residual + x, which is also stored as the new residual."""
    hidden = aligned(hidden, ALIGNED)
    x_row_stride, residual_row_stride = aligned(x_row_stride, ALIGNED), aligned(residual_row_stride, ALIGNED)
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]).to(tl.int64)
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    mask = (row < rows) & (column < hidden)
    h = tl.load(x_ptr + row * x_row_stride + column, mask=mask, other=0.0).to(tl.float32)
    dtype = x_ptr.dtype.element_ty
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_row_stride + column, mask=mask, other=0.0)
        rounded = (residual.to(tl.float32) + h).to(dtype)  # Hugging Face adds in the dtype
        tl.store(new_residual_ptr + row * hidden + column, rounded, mask=mask)
        h = rounded.to(tl.float32)
    normed = h * tl.rsqrt(tl.sum(h * h, 1, keep_dims=True) / hidden + eps)
    if ROUNDED:  # before the weight multiplies it
        normed = normed.to(dtype).to(tl.float32)
    y = normed * _load_weight(weight_ptr, weight_offset, column, hidden, ROUNDED)
    tl.store(y_ptr + row * hidden + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@kernel
@limited(
    "rows are padded to a power of two; of 600 rows of 2048 or 9600 of 128, each program has no more than three steps"
)
def rms_norm_backward_kernel(
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
    weight_offset,
    ROUNDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Store r * (g - n * mean(g * n)) with r the inverse rms, n = x * r, g = grad_output * weight.

    A program loops over blocks of rows and accumulates its share of the weight gradient in registers.
    """
    hidden = aligned(hidden, ALIGNED)
    grad_output_row_stride, x_row_stride = aligned(grad_output_row_stride, ALIGNED), aligned(x_row_stride, ALIGNED)
    grad_residual_row_stride = aligned(grad_residual_row_stride, ALIGNED)
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    # Broadcast over the rows, or the compiler gives all rows the thread layout of the single row of weights.
    columns = tl.broadcast_to(column, (BLOCK_ROWS, BLOCK_COLUMNS))
    weight = _load_weight(weight_ptr, weight_offset, columns, hidden, ROUNDED)
    grad_weight = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]).to(tl.int64)
        mask = (row < rows) & (column < hidden)
        x = tl.load(x_ptr + row * x_row_stride + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_output_ptr + row * grad_output_row_stride + column, mask=mask, other=0.0).to(tl.float32)
        if grad_residual_ptr is not None:  # loaded here, to be in flight together with x and grad
            grad_residual = tl.load(grad_residual_ptr + row * grad_residual_row_stride + column, mask=mask, other=0.0)
        inverse_rms = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / hidden + eps)
        normed = x * inverse_rms
        scaled = grad * weight
        projection = tl.sum(scaled * normed, 1, keep_dims=True) / -hidden  # negated per row, not per element
        grad_x = inverse_rms * (scaled + normed * projection)
        if grad_residual_ptr is not None:
            grad_x += grad_residual.to(tl.float32)
        tl.store(grad_x_ptr + row * hidden + column, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            if ROUNDED:  # the weight multiplied the rounded row
                normed = normed.to(x_ptr.dtype.element_ty).to(tl.float32)
            grad_weight += grad * normed
    if partial_ptr is not None:
        partial = tl.sum(grad_weight, 0, keep_dims=True)
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * hidden + column, partial, mask=column < hidden)


# ---- launchers ----


def unsupported(x: Tensor, *_: Any) -> str | None:
    if x.shape[-1] > MAX_HIDDEN:
        return f"the last size of x is {x.shape[-1]}, more than {MAX_HIDDEN}"
    if x.numel() >= MAX_ROWS * max(1, x.shape[-1]):
        return f"x has {x.numel() // x.shape[-1]} rows, {MAX_ROWS} or more"
    return device_unsupported(x)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, variant: str = "llama") -> Tensor:
    return _forward(x, None, weight, eps, variant)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, variant: str = "llama"
) -> tuple[Tensor, Tensor]:
    return _forward(x, residual, weight, eps, variant)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, variant: str
) -> tuple[Tensor, Tensor | None]:
    widened = weight is not None and variant == "llama"
    dtype = torch.promote_types(x.dtype, weight.dtype) if widened else x.dtype
    y = x.new_empty(x.shape, dtype=dtype)
    new_residual = None if residual is None else x.new_empty(x.shape)
    if x.numel() == 0:
        return y, new_residual
    x = as_rows(x)
    residual, residual_stride = _rows_or_none(residual)
    weight = None if weight is None else weight.contiguous()
    rows, hidden = x.shape
    config = norm_config_for(hidden)
    with on_device(x):
        rms_norm_kernel[(ceil_div(rows, config.BLOCK_ROWS),)](
            *(x, residual, weight, y, new_residual),
            *(x.stride(0), residual_stride, rows, hidden, eps),
            *_order(x, weight, variant),
            ALIGNED=alignment(hidden, x.stride(0), residual_stride),
            **vars(config),
        )
    return y, new_residual


def rms_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    variant: str = "llama",
    grad_residual: Tensor | None = None,
    weight_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    grad_x = x.new_empty(x.shape)
    no_gradient = (x if weight is None else weight).new_empty(0)
    weight_grad = weight_grad and weight is not None
    if x.numel() == 0:
        return grad_x, torch.zeros_like(weight) if weight_grad else no_gradient
    x, grad_output = as_rows(x), as_rows(grad_output)
    grad_residual, residual_stride = _rows_or_none(grad_residual)
    weight = None if weight is None else weight.contiguous()
    rows, hidden = x.shape
    config = norm_config_for(hidden, backward=True)
    programs = min(ceil_div(rows, config.BLOCK_ROWS), 2 * processors(x))
    step = (2 if grad_residual is None else 3) * x.element_size() * config.BLOCK_ROWS * config.BLOCK_COLUMNS
    partials = x.new_empty(programs, hidden, dtype=torch.float32) if weight_grad else None
    with on_device(x):
        rms_norm_backward_kernel[(programs,)](
            *(grad_output, x, weight, grad_residual, grad_x, partials),
            *(grad_output.stride(0), x.stride(0), residual_stride, rows, hidden, eps),
            *_order(x, weight if weight_grad else None, variant),
            ALIGNED=alignment(hidden, grad_output.stride(0), x.stride(0), residual_stride),
            STAGES=stages_for(step, shared_memory(x)),
            **vars(config),
        )
    return grad_x, sum_partials(partials, weight.dtype) if weight_grad else no_gradient


def _order(x: Tensor, weight: Tensor | None, variant: str) -> tuple[float, bool]:
    """Return the offset of the weight, and whether rows are rounded before the weight, which float32 rows never are."""
    rounded = variant == "llama" and weight is not None and x.dtype != torch.float32
    return 1.0 if variant == "gemma" else -0.0, rounded  # -0.0 changes no number


def _rows_or_none(x: Tensor | None) -> tuple[Tensor | None, int]:
    """View a tensor as rows, and return their stride too; (None, 0) for None."""
    if x is None:
        return None, 0
    rows = as_rows(x)
    return rows, rows.stride(0)
