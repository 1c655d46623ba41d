"""Multiplication of each row by its own factor, with one program per row."""

import torch
import triton.language as tl

from vlmfast.kernels.common.kernel import aligned, alignment, kernel
from vlmfast.kernels.common.launch import device_unsupported, on_device, with_contiguous_rows


def unsupported(x, factors):
    return device_unsupported(x)


@kernel
def _scale_rows_kernel(x_ptr, factor_ptr, y_ptr, x_row_stride, hidden, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    x_row_stride, hidden = aligned(x_row_stride, ALIGNED), aligned(hidden, ALIGNED)
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row).to(tl.float32)
    for first in range(0, hidden, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_row_stride + column, mask=column < hidden)
        tl.store(y_ptr + row * hidden + column, x.to(tl.float32) * factor, mask=column < hidden)


def scale_rows(x, factors):
    x, factors = with_contiguous_rows(x), factors.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        with on_device(x):
            numbers = x.stride(0), x.shape[1]
            _scale_rows_kernel[(x.shape[0],)](x, factors, y, *numbers, ALIGNED=alignment(*numbers), BLOCK=1024)
    return y
