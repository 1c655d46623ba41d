"""The CUDA kernels of the attention scores in the emulation: every access, every byte, planted faults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.emulation.harness import (
    BOUNDS,
    MISALIGNED,
    RACE,
    UNORDERED,
    WRONG,
    Call,
    Fault,
    Kernels,
    assert_traffic,
    checked,
    compare,
    every_access,
    far_rows,
    planted_faults,
    sample_calls,
)
from tests.helpers import cases
from vlmfast.registry import OPS

# Layouts of the tensors, one pair per call in turn: heads aligned for vectors of 16 bytes, heads for single elements,
# heads as a projection leaves them.
LAYOUTS = [
    (cases.contiguous, cases.transposed),
    (cases.padded, cases.contiguous),
    (cases.oddly_padded, cases.padded),
    (cases.expanded, cases.every_other),
    (cases.contiguous, cases.oddly_padded),
    (cases.offset, cases.contiguous),
]


def bounds_of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def cls_calls(dtype: torch.dtype) -> Iterator[Call]:
    """Yield calls with full and partial chunks, many heads, and heads longer than the registers hold."""
    for (batch, heads, tokens, head_dim), rest in [
        ((2, 3, 130, 64), (None, -1)),
        ((1, 35, 40, 16), (-0.5, 7)),
        ((1, 2, 300, 136), (0.3,)),
        ((1, 1, 9, 600), ()),
        ((1, 2, 5, 33), ()),
    ]:
        query, key = (
            torch.randn(batch, heads, head_dim).to(dtype),
            torch.randn(batch, heads, tokens, head_dim).to(dtype),
        )
        yield "cls_attention", (query.to(dtype), key.to(dtype), *rest)
    far = far_rows()  # for offsets beyond 2 ** 31 between tokens, heads and images
    yield "cls_attention", (far[None, :1], far[None, None])
    yield "cls_attention", (far[None], far[None, :, None].expand(1, 3, 2, 64))
    yield "cls_attention", (far[:, None], far[:, None, None].expand(3, 1, 2, 64))


def last_row_calls(dtype: torch.dtype) -> Iterator[Call]:
    """Yield calls with shared and own keys of heads, padding at either end, fully masked chunks, and longer caches."""
    for (batch, heads, key_heads, tokens, head_dim), scale in [
        ((2, 6, 3, 130, 64), None),
        ((1, 70, 2, 40, 16), -0.5),
        ((2, 4, 4, 300, 136), 0.3),
        ((1, 3, 1, 40, 600), None),  # in shorter rows the error of the definition may be next to nothing
    ]:
        query = torch.randn(batch, heads, head_dim).to(dtype)
        key = torch.randn(batch, key_heads, tokens + 5, head_dim).to(dtype)[:, :, :tokens]
        yield "last_row_attention", (query, key, None, scale)
        valid = torch.rand(batch, tokens + 3)[:, :tokens] < 0.5
        valid[0, : tokens // 2] = False
        yield "last_row_attention", (query, key, valid, scale)
        valid[-1] = False
        yield "last_row_attention", (query, key, valid, scale)


def received_calls(dtype: torch.dtype) -> Iterator[Call]:
    """Yield calls with heads for every kernel, segments that end inside tiles and at their edges, and several tiles."""
    for (heads, tokens, head_dim), bounds, group, scale in [
        ((1, 200, 64), (0, 1, 64, 128, 129, 200), 4, None),
        ((2, 70, 72), (0, 35, 35, 70), 1, 2.0),
        ((1, 150, 104), None, 3, -0.1),
        ((1, 70, 9), (0, 64, 70), 1, 0.0),
        ((2, 66, 160), (0, 2, 66), 2, None),
    ]:
        query, key = torch.randn(2, heads, tokens, head_dim).to(dtype)
        yield "received_attention", (query, key, None if bounds is None else bounds_of(*bounds), group, scale)
    query, key = torch.randn(2, 2, 20, 64).to(dtype)
    yield "received_attention", (query, cases.oddly_padded(key))
    for far in (far_rows()[None], far_rows()[:, None]):
        yield "received_attention", (far, far)


def examine(kernels: Kernels, dtype: torch.dtype) -> None:
    wild = torch.randn(1, 70, 64).to(dtype)
    for bounds in ((-9, 2**30), (5,), (), (60, 3, 900, -7)):  # unchecked bounds must not lead out of the tensors
        kernels("received_attention", wild, wild, bounds_of(*bounds))
    compare(
        kernels,
        sample_calls("attention_scores", LAYOUTS, dtype),
        cls_calls(dtype),
        last_row_calls(dtype),
        received_calls(dtype),
    )


test_attention_scores = every_access("attention_scores", examine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.thorough)])
def test_tensor_cores_are_exact(dtype: torch.dtype) -> None:
    """Products and sums of small integers are exact, so any misplaced element of a map of them shows."""
    kernels = checked("attention_scores", bfloat16_alone=dtype == torch.bfloat16)
    kernels.schedule(0)
    query, key = torch.randint(-3, 4, (2, 1, 96, 48)).to(dtype)
    args = (query, key, None, 1, 0.01)
    (got,) = kernels("received_attention", *args)
    exact = OPS["received_attention"].reference(*cases.widened(args))
    assert (got - exact).abs().max() < 1e-6


def test_bytes_moved() -> None:
    query, key = torch.randn(2, 3, 64).bfloat16(), torch.randn(2, 3, 256, 64).bfloat16()
    assert_traffic(2, "cls_attention", query, key)


FAULTS = [
    Fault(
        "barrier missing behind the products",
        "row_attention.cuh",
        "    }\n    __syncthreads();\n",
        "    }\n",
        UNORDERED,
    ),
    Fault(
        "barrier missing behind the normalisers",
        "row_attention.cuh",
        "      __syncthreads();\n      if (!seen)",
        "      if (!seen)",
        UNORDERED,
    ),
    Fault(
        "maximum not taken off", "row_attention.cuh", "-normaliser.x)) * normaliser.y;", "0.f)) * normaliser.y;", WRONG
    ),
    Fault("CLS column kept", "row_attention.cuh", "&& token != sizes.left_out", "", f"{BOUNDS}|{RACE}|{WRONG}"),
    Fault("keys not shared", "row_attention.cuh", "head / sizes.group", "head", f"{BOUNDS}|{WRONG}"),
    Fault("padding seen", "row_attention.cuh", "wanted && sizes.sees(batch, token)", "wanted", WRONG),
    Fault("padding in the sum", "row_attention.cuh", "sizes.sees(batch, first + token)", "true", WRONG),
    Fault("flags of another sequence", "row_attention.cuh", "sequence * valid_stride", "0", WRONG),
    Fault("sums joined without their maxima", "row_attention.cuh", "sum * fast_exp2(maximum - from)", "sum", WRONG),
    Fault(
        "key of another image",
        "cuda_torch.h",
        "(row += indices * strides[dim++])",
        "(row += indices * (rank == 4 && dim == 0 ? 0 : strides[dim]), ++dim)",
        WRONG,
    ),
    Fault(
        "token too many", "row_attention.cuh", "if (token >= count) continue;", "if (token > count) continue;", BOUNDS
    ),
    Fault(
        "alignment of keys unchecked",
        "cuda.cu",
        "(kVectorBytes, args.query, args.key);",
        "(kVectorBytes, args.query);",
        MISALIGNED,
    ),
    Fault("buffer used twice", "received_attention.cuh", "buffer ^= 1)", "buffer ^= 0)", RACE),
    Fault(
        "barrier missing behind a tile",
        "attention_tiles.cuh",
        "      }\n    });\n    __syncthreads();\n",
        "      }\n    });\n",
        UNORDERED,
    ),
    Fault(
        "edge of a segment taken in",
        "received_attention.cuh",
        "column < segments[r].y",
        "column <= segments[r].y",
        WRONG,
    ),
    Fault("tile taken for whole", "received_attention.cuh", "first >= last_segment.x &&", "", WRONG),
    Fault("bound searched wrong", "received_attention.cuh", "[middle] <= token", "[middle] < token", WRONG),
    Fault("bounds unchecked", "received_attention.cuh", "max(begin, 0)", "begin", f"{BOUNDS}|before all tensors"),
    Fault(
        "row past the end stored",
        "received_attention.cuh",
        "&& row < sizes.tokens) results",
        ") results",
        f"{BOUNDS}|{RACE}",
    ),
    Fault(
        "half of the lanes left out",
        "received_attention.cuh",
        "offset = Tiles::kLanes / 2;",
        "offset = Tiles::kLanes / 4;",
        WRONG,
    ),
    Fault(
        "registers of the operand swapped",
        "attention_tiles.cuh",
        "own[tile][step][half + 2] = pair.y;",
        "own[tile][step][3 - half] = pair.y;",
        WRONG,
    ),
    Fault(
        "depth behind the end of a row",
        "attention_tiles.cuh",
        "row < from.count && depth < from.head_dim) return",
        "row < from.count) return",
        BOUNDS,
    ),
    Fault("last step left out", "attention_tiles.cuh", "depth < kDepth; ++depth", "depth < kDepth - 1; ++depth", WRONG),
]

test_planted_fault_is_noticed = planted_faults("attention_scores", examine, FAULTS)
