"""The CUDA kernels of patch-info mining in the emulation: every access, every byte, planted faults."""

from __future__ import annotations

from collections.abc import Iterator

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
    compare,
    every_access,
    planted_faults,
    sample_calls,
)
from tests.helpers import cases

# Layouts of the tensors, one pair per call in turn: maps whose rows are aligned for vectors of 16 bytes, and others.
LAYOUTS = [
    (cases.contiguous, cases.padded),
    (cases.padded, cases.oddly_padded),
    (cases.oddly_padded, cases.contiguous),
    (cases.every_other, cases.offset),
]


def wide_calls(dtype: torch.dtype) -> Iterator[Call]:
    """Yield calls with block rows of one vector, of two, and of more lanes than a group; more channels than groups.

    Also with rows that are not aligned, and with pixels of so little variance that the epsilon of the norm counts.
    """
    for (batch, channels), grid, scale, listed, layout, faint in [
        ((2, 70), (2, 3), 8, True, cases.contiguous, 1.0),
        ((1, 300), (1, 2), 8, False, cases.contiguous, 1.0),
        ((1, 20), (1, 2), 16, False, cases.oddly_padded, 1.0),
        ((1, 20), (1, 2), 16, False, cases.contiguous, 2.0**-9),
        ((1, 9), (2, 1), 24, True, cases.contiguous, 1.0),
        ((1, 40), (3, 2), 4, True, cases.contiguous, 1.0),
    ]:
        tokens = grid[0] * grid[1]
        feature_map = faint * (torch.randn(batch, channels, grid[0] * scale, grid[1] * scale) + 2)
        blocks = torch.arange(1, tokens, 2).expand(batch, -1) if listed else None
        query, grad = torch.randn(2, batch, tokens if blocks is None else blocks.shape[1], channels)
        call = [x.to(dtype) for x in (grad, query * channels**-0.5, feature_map)]
        call[2] = layout(call[2])
        yield "mine_patches", (*call[1:], scale, blocks)
        yield "mine_patches_backward", (*call, scale, blocks)


def examine(kernels: Kernels, dtype: torch.dtype) -> None:
    compare(kernels, wide_calls(dtype), sample_calls("patch_mining", LAYOUTS, dtype))


test_patch_mining = every_access("patch_mining", examine)


def test_bytes_moved() -> None:
    query, grad, feature_map = torch.randn(1, 6, 72), torch.randn(1, 6, 72), torch.randn(1, 72, 16, 24)
    call: list[Tensor] = [x.bfloat16() for x in (grad, query, feature_map)]
    assert_traffic(1, "mine_patches", *call[1:], 8)
    assert_traffic(1, "mine_patches_backward", *call, 8)
    blocks = torch.tensor([[0, 2, 5]])
    assert_traffic(1, "mine_patches", call[1][:, :3], call[2], 8, blocks)
    assert_traffic(1, "mine_patches_backward", call[0][:, :3], call[1][:, :3], call[2], 8, blocks)


FAULTS = [
    Fault("grid not walked", "mining.cuh", "work += gridDim.x", "work += sizes.batch * units", WRONG),
    Fault(
        "list left out",
        "mining.cuh",
        "number = min(max(blocks.at(place.batch)[place.token], int64_t{0}), sizes.total - 1);",
        ";",
        WRONG,
    ),
    Fault(
        "blocks without a token left as they are", "mining.cuh", "zeros.store(gradient(vector, channel));", ";", WRONG
    ),
    Fault("eps left out", "mining.cuh", "variance + sizes.eps", "variance", WRONG),
    Fault(
        "mean of the samples alone",
        "mining.cuh",
        "rows.mean[pixel] / samples + rest;",
        "rows.mean[pixel] / samples;",
        WRONG,
    ),
    Fault("lanes left out", "mining.cuh", "offset = lanes / 2;", "offset = lanes / 4;", WRONG),
    Fault(
        "vectors behind the first lanes left out",
        "mining.cuh",
        "first < policy.vectors; first += lanes",
        "first < lanes; first += lanes",
        f"{WRONG}|nobody has written",
    ),
    Fault(
        "sums read before they are there",
        "mining.cuh",
        "pixels, rows.mean);\n    __syncthreads();",
        "pixels, rows.mean);",
        UNORDERED,
    ),
    Fault(
        "sums begun early",
        "mining.cuh",
        "  __syncthreads();  // all threads are done with the previous sums, and with the block before this one\n",
        "",
        UNORDERED,
    ),
    Fault(
        "weights read early",
        "mining.cuh",
        "totals[0], totals[1]);\n    __syncthreads();",
        "totals[0], totals[1]);",
        UNORDERED,
    ),
    Fault("every lane stores", "mining.cuh", "lane == 0 && channel < channels", "channel < channels", RACE),
    Fault("row past the end", "mining.cuh", "lane == 0 && channel < channels", "lane == 0", f"{BOUNDS}|{RACE}|{WRONG}"),
    Fault("alignment of strides unchecked", "cuda_torch.h", "view.stride(dim) * view.width() %", "0 %", MISALIGNED),
    Fault("slope not of the average", "mining.cuh", "weight * (reached - average)", "weight * reached", WRONG),
    Fault(
        "constant left out", "mining.cuh", "rows.along[pixel], rows.constant[pixel])", "rows.along[pixel], 0.f)", WRONG
    ),
]

test_planted_fault_is_noticed = planted_faults("patch_mining", examine, FAULTS)
