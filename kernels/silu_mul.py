"""The gated activation, activation(gate) * up, in Triton: each element is read once."""

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vlmfast.kernels.common.kernel import aligned, alignment, kernel, limited
from vlmfast.kernels.common.launch import (
    MAX_EXTENT,
    RowsConfig,
    as_rows,
    ceil_div,
    device_unsupported,
    next_power_of_two,
    on_device,
)


@functools.lru_cache
def config_for(hidden: int) -> RowsConfig:
    """Choose 16 elements per thread, two 16-byte loads of each bfloat16 operand. Long rows take several programs."""
    columns = min(1024, next_power_of_two(max(hidden, 1)))
    return RowsConfig(BLOCK_ROWS=min(64, 2048 // columns), BLOCK_COLUMNS=columns, num_warps=4)


@triton.jit
def _locate(rows, hidden, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Return the rows and columns of a program, and the mask of those that exist."""
    blocks = tl.cdiv(hidden, BLOCK_COLUMNS)
    row = (tl.program_id(0) // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    return row, column, (row < rows) & (column < hidden)


@triton.jit
def _inner(x):
    """Compute the argument of the tanh in GELU."""
    return 0.7978845608028654 * (x + 0.044715 * (x * x * x))


@kernel
@limited("of 64 rows there are fewer than two programs for each multiprocessor, whose loads are not all made first")
def silu_mul_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    gate_row_stride,
    up_row_stride,
    rows,
    hidden,
    GELU: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Store activation(gate), rounded to the dtype, times up."""
    hidden = aligned(hidden, ALIGNED)
    gate_row_stride, up_row_stride = aligned(gate_row_stride, ALIGNED), aligned(up_row_stride, ALIGNED)
    row, column, mask = _locate(rows, hidden, BLOCK_ROWS, BLOCK_COLUMNS)
    gate = tl.load(gate_ptr + row * gate_row_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row_stride + column, mask=mask, other=0.0).to(tl.float32)
    if GELU:  # computes the tanh, as torch does: far below zero its rounding decides the last bits of the result
        inner = _inner(gate)
        tanh = 1 - 2 / (tl.exp(2 * tl.abs(inner)) + 1)
        activated = 0.5 * gate * (1 + tl.where(inner < 0, -tanh, tanh))
    else:
        activated = gate / (1 + tl.exp(-gate))
    dtype = y_ptr.dtype.element_ty
    tl.store(y_ptr + row * hidden + column, (activated.to(dtype).to(tl.float32) * up).to(dtype), mask=mask)


@kernel
@limited("of 64 rows there are fewer than two programs for each multiprocessor, whose loads are not all made first")
def silu_mul_backward_kernel(
    grad_output_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    grad_output_row_stride,
    gate_row_stride,
    up_row_stride,
    rows,
    hidden,
    GELU: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Store the gradients; the activation is gate * s with s the sigmoid of z."""
    hidden, grad_output_row_stride = aligned(hidden, ALIGNED), aligned(grad_output_row_stride, ALIGNED)
    gate_row_stride, up_row_stride = aligned(gate_row_stride, ALIGNED), aligned(up_row_stride, ALIGNED)
    row, column, mask = _locate(rows, hidden, BLOCK_ROWS, BLOCK_COLUMNS)
    grad = tl.load(grad_output_ptr + row * grad_output_row_stride + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row_stride + column, mask=mask, other=0.0).to(tl.float32)
    z = gate
    slope = tl.full(gate.shape, 1.0, tl.float32)
    if GELU:
        z = 2 * _inner(gate)
        slope = 1.5957691216057308 * (1 + 0.134145 * gate * gate)
    power = tl.exp(-z)
    share = 1 / (1 + power)
    rest = tl.where(share == 0, 1.0, power * share)  # 1 - share, without cancellation
    grad_gate = grad * up * share * (1 + gate * slope * rest)
    dtype = grad_gate_ptr.dtype.element_ty
    tl.store(grad_gate_ptr + row * hidden + column, grad_gate.to(dtype), mask=mask)
    tl.store(grad_up_ptr + row * hidden + column, (grad * gate * share).to(dtype), mask=mask)


# ---- launchers ----


def unsupported(x: Tensor, *_: Any) -> str | None:
    hidden = x.shape[-1]
    if hidden >= MAX_EXTENT or x.numel() >= MAX_EXTENT * max(1, min(hidden, 64)):
        return f"a tensor of shape {tuple(x.shape)} takes more programs than there are"
    return device_unsupported(x)


def silu_mul(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    y = gate.new_empty(gate.shape)
    if gate.numel() == 0:
        return y
    gate, up = as_rows(gate), as_rows(up)
    rows, hidden = gate.shape
    config = config_for(hidden)
    with on_device(gate):
        silu_mul_kernel[_grid(rows, hidden, config)](
            *(gate, up, y, gate.stride(0), up.stride(0), rows, hidden),
            GELU=activation == "gelu_tanh",
            ALIGNED=alignment(hidden, gate.stride(0), up.stride(0)),
            **vars(config),
        )
    return y


def silu_mul_backward(grad_output: Tensor, gate: Tensor, up: Tensor, activation: str = "silu") -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    if gate.numel() == 0:
        return grad_gate, grad_up
    grad_output, gate, up = as_rows(grad_output), as_rows(gate), as_rows(up)
    rows, hidden = gate.shape
    config = config_for(hidden)
    with on_device(gate):
        silu_mul_backward_kernel[_grid(rows, hidden, config)](
            *(grad_output, gate, up, grad_gate, grad_up),
            *(grad_output.stride(0), gate.stride(0), up.stride(0), rows, hidden),
            GELU=activation == "gelu_tanh",
            ALIGNED=alignment(hidden, grad_output.stride(0), gate.stride(0), up.stride(0)),
            **vars(config),
        )
    return grad_gate, grad_up


def _grid(rows: int, hidden: int, config: RowsConfig) -> tuple[int]:
    return (ceil_div(rows, config.BLOCK_ROWS) * ceil_div(hidden, config.BLOCK_COLUMNS),)
