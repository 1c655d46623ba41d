"""The CUDA kernels of the gated activation in the emulation: every access, every byte, planted faults."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from tests.emulation.harness import (
    BOUNDS,
    MISALIGNED,
    WRONG,
    Call,
    Fault,
    Kernels,
    assert_traffic,
    compare,
    every_access,
    far_rows,
    planted_faults,
)
from tests.helpers import cases

# (rows, hidden): rows that share a block, fill one, or take several; in vectors and in single elements.
SHAPES = [(1, 8), (100, 72), (3, 7), (25, 264), (5, 33), (9, 600), (3, 2056), (2, 4104), (2, 1030)]

# Layouts of the gate, of up, and of the gradient.
LAYOUTS = [
    (cases.padded, cases.contiguous, cases.expanded),
    (cases.contiguous, cases.expanded, cases.padded),
    (cases.padded, cases.offset, cases.contiguous),
    (cases.oddly_padded, cases.padded, cases.offset),
]


def far_calls() -> Iterator[Call]:
    x = far_rows()
    yield "silu_mul", (x, x)
    yield "silu_mul_backward", (x, x, x)


def calls(dtype: torch.dtype) -> Iterator[Call]:
    for index, ((rows, hidden), layouts) in enumerate(itertools.product(SHAPES, LAYOUTS)):
        gate, up, grad = (layout(torch.randn(rows, hidden).to(dtype)) for layout in layouts)
        activation = ("silu", "gelu_tanh")[index % 2]
        yield "silu_mul", (gate, up, activation)
        yield "silu_mul_backward", (grad, gate, up, activation)


def examine(kernels: Kernels, dtype: torch.dtype) -> None:
    compare(kernels, far_calls())
    compare(kernels, calls(dtype), same_order=dtype != torch.float32)


test_silu_mul = every_access("silu_mul", examine)


def test_bytes_moved() -> None:
    gate, up, grad = (torch.randn(7, 1032).bfloat16() for _ in range(3))
    assert_traffic(1, "silu_mul", gate, up)
    assert_traffic(1, "silu_mul_backward", grad, gate, up, "gelu_tanh")


FAULTS = [
    Fault("end of a row unchecked", "cuda.cu", "row < rows && column < hidden", "row < rows", BOUNDS),
    Fault("last row unchecked", "cuda.cu", "row < rows && column < hidden", "column < hidden", BOUNDS),
    Fault("parts of a row left out", "cuda.cu", "(vectors + along - 1) / along;", "1;", WRONG),
    Fault("grid not walked", "cuda.cu", "block += gridDim.x", "block += blocks", WRONG),
    Fault(
        "row stride of another tensor",
        "cuda.cu",
        "up.at(row) + column",
        "up.data + (gate.at(row) - gate.data) + column",
        f"{BOUNDS}|{WRONG}",
    ),
    Fault("alignment of strides unchecked", "cuda_torch.h", "view.stride(dim) * view.width() %", "0 %", MISALIGNED),
    Fault("rounding of the gate left out", "cuda.cu", "round_all<scalar_t>(activated);", "", WRONG),
    Fault("SiLU for GELU", "cuda.cu", "activation == Activation::kSilu ? x", "true ? x", WRONG),
    Fault("slope of GELU left out", "cuda.cu", "z_slope = 2.f * kBeta * (1.f", "z_slope = 1.f * (1.f", WRONG),
    Fault("gradient not times up", "cuda.cu", "grads[i] * ups[i] * share", "grads[i] * share", WRONG),
]

test_planted_fault_is_noticed = planted_faults("silu_mul", examine, FAULTS)
