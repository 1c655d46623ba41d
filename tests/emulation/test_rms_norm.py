"""The CUDA kernels of RMSNorm in the emulation: every access, every byte, planted faults."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from tests.emulation.harness import (
    BOUNDS,
    MISALIGNED,
    RACE,
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

NAMES = ("rms_norm", "add_rms_norm", "rms_norm_backward")

# (rows, hidden): one pair for each policy of row_policy.cuh, with partial blocks and partial vectors, and more rows
# than the emulation's small grids take at once.
SHAPES = [(1, 8), (100, 72), (3, 7), (25, 264), (5, 33), (9, 600), (7, 70), (7, 1032)]
SHAPES += [(3, 129), (3, 2056), (3, 259), (2, 8208), (2, 1030)]

# Layouts of the first and the second operand: rows that are aligned for vectors, and rows that are not.
LAYOUTS = [
    (cases.padded, cases.contiguous),
    (cases.contiguous, cases.expanded),
    (cases.padded, cases.offset),
    (cases.oddly_padded, cases.padded),
]


def far_calls() -> Iterator[Call]:
    x, weight = far_rows(), torch.randn(64).bfloat16()
    yield "rms_norm", (x, weight)
    yield "add_rms_norm", (x, x, weight)
    yield "rms_norm_backward", (x, x, weight)


def calls(name: str, dtype: torch.dtype) -> Iterator[Call]:
    """Yield calls of an op in every shape and layout, cycling through the values of the other arguments."""
    for index, ((rows, hidden), layouts) in enumerate(itertools.product(SHAPES, LAYOUTS)):
        x, other = (layout(torch.randn(rows, hidden).to(dtype)) for layout in layouts)
        inputs = {"rms_norm": (x,), "add_rms_norm": (x, other), "rms_norm_backward": (other, x)}[name]
        tail = (torch.randn(rows, hidden).to(dtype) if index % 3 else None, index % 4 > 0)
        variant = ("llama", "gemma", "olmo", None)[index // 2 % 4]
        weight = None if variant is None else torch.randn(hidden).to(dtype)
        settings = (1e-6, 0.3)[index % 2], variant or "olmo"
        yield name, (*inputs, weight, *settings, *(tail if name == "rms_norm_backward" else ()))


def examine(kernels: Kernels, dtype: torch.dtype) -> None:
    compare(kernels, far_calls())
    for name in NAMES:
        compare(kernels, calls(name, dtype), same_order=dtype != torch.float32)


test_rms_norm = every_access("rms_norm", examine)


def test_bytes_moved() -> None:
    x, weight = torch.randn(7, 2056).bfloat16(), torch.randn(2056).bfloat16()
    assert_traffic(1, "rms_norm", x, weight)
    assert_traffic(1, "add_rms_norm", x, x.clone(), weight)
    assert_traffic(1, "rms_norm_backward", x, x.clone(), weight, 1e-6, "llama", None, False)
    assert_traffic(2, "rms_norm_backward", x, x.clone(), weight)


FAULTS = [
    Fault("barrier missing", "common.cuh", "      __syncthreads();\n", "", "nobody has written"),
    Fault("one buffer for two barriers", "common.cuh", "warp_sums[turn % 2]", "warp_sums[0]", RACE),
    Fault(
        "barrier missing in the partial sums", "partial_sums.cuh", "    __syncthreads();\n", "", "nobody has written"
    ),
    Fault("reduction step missing", "common.cuh", "offset > 0;", "offset > 1;", WRONG),
    Fault("shuffle group too narrow", "common.cuh", "offset, kLanes)", "offset, kLanes / 2)", WRONG),
    Fault("last vector off by one", "row_policy.cuh", "if (column < end)", "if (column <= end)", BOUNDS),
    Fault("end of a long row left out", "row_policy.cuh", "column = first() + kColumns;", "column = end;", WRONG),
    Fault("row stride of another tensor", "cuda.cu", "row * residual_stride", "row * x_stride", f"{BOUNDS}|{RACE}"),
    Fault("row mask missing", "row_policy.cuh", "row < rows ? hidden : 0", "hidden", BOUNDS),
    Fault(
        "idle threads leave",
        "row_policy.cuh",
        "function(row, row < rows",
        "if (row >= rows) return; function(row, row < rows",
        "diverg",
    ),
    Fault("32-bit row offset", "cuda.cu", "x + row * x_stride", "x + int(row) * int(x_stride)", "overflow"),
    Fault("alignment of strides unchecked", "cuda_torch.h", "view.stride(dim) * view.width() %", "0 %", MISALIGNED),
    Fault(
        "alignment of pointers unchecked",
        "cuda_torch.h",
        "reinterpret_cast<uintptr_t>(view.data()) %",
        "0 %",
        MISALIGNED,
    ),
    Fault("two blocks, one partial sum", "cuda.cu", "{blockIdx.x} * hidden;", "{blockIdx.x / 2} * hidden;", RACE),
    Fault("accumulator not cleared", "cuda.cu", "[kVec] = {};", "[kVec];", WRONG),
    Fault("rounding of llama left out", "common.cuh", "round_all<scalar_t>(normed);", ";", WRONG),
    Fault("1 of gemma left out", "common.cuh", "1.f + weight : weight", "weight : weight", WRONG),
    Fault("olmo rounded too soon", "common.cuh", "variant == Variant::kLlama)", "variant != Variant::kGemma)", WRONG),
    Fault("no weight taken for zeros", "ops.h", "weight_tensor ? order : Variant::kGemma", "order", WRONG),
    Fault("eps left out", "cuda.cu", "hidden + eps)", "hidden)", WRONG),
]

test_planted_fault_is_noticed = planted_faults("rms_norm", examine, FAULTS)
