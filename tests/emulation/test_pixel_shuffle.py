"""The CUDA kernels of pixel shuffle in the emulation: every access, every byte, planted faults."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.emulation.harness import (
    BOUNDS,
    DIFFER,
    MISALIGNED,
    RACE,
    WRONG,
    Call,
    Fault,
    Kernels,
    assert_traffic,
    checked,
    compare,
    every_access,
    far_rows,
    in_gaps,
    planted_faults,
    sample_calls,
)
from tests.helpers import cases

# Layouts of the tensors, one pair per call in turn: rows aligned for vectors of 16, 4 and 2 bytes, and gaps between
# images.
LAYOUTS = [
    (cases.padded, cases.contiguous),
    (cases.contiguous, cases.padded),
    (functools.partial(cases.padded, by=2), cases.expanded),
    (cases.oddly_padded, cases.offset),
    (cases.transposed, cases.every_other),
]

# ((B, C), grid, scale, whether patches rather than tokens are normalised): rows of every policy of row_policy.cuh,
# patches aligned for vectors, cases where only tokens are, and more rows than the emulation's small grids take at once.
NORMS = [
    ((2, 16), (8, 10), 2, True),
    ((3, 16), (4, 6), 2, False),
    ((1, 6), (4, 4), 2, False),
    ((1, 56), (6, 6), 3, False),
    ((2, 264), (2, 4), 2, True),
    ((1, 200), (4, 4), 2, False),
    ((1, 42), (4, 4), 2, False),
    ((1, 264), (4, 4), 2, False),
    ((1, 90), (2, 4), 2, False),
    ((1, 520), (2, 4), 2, False),
    ((1, 258), (2, 8), 2, False),
    ((1, 2056), (4, 4), 2, False),
]


def norm_calls(dtype: torch.dtype) -> Iterator[Call]:
    """Yield calls of the norm and its backward, with rows whose mean is far from zero and almost constant ones."""
    for index, ((batch, channels), grid, scale, each_patch) in enumerate(NORMS):
        noise = torch.randn(batch, grid[0] * grid[1], channels)
        values = torch.where(noise > 1.5, 251.0, 250.0) if index % 2 else noise + 10.0
        x = in_gaps(values.to(dtype), 8 if index % 4 else 3)
        size = channels if each_patch else channels * scale**2
        weight, bias = torch.randn(2, size).to(dtype)
        grad = torch.randn(batch, x.shape[1] // scale**2, channels * scale**2).to(dtype)
        layout = grid, scale, ("row", "column")[index % 2], (1.0, 0.5)[index % 3 % 2], (0.3, 1e-5)[index % 2]
        yield "pixel_shuffle_norm", (x, weight, bias, *layout)
        yield "pixel_shuffle_norm_backward", (grad, x, weight, *layout)


def far_maps() -> tuple[Tensor, Tensor]:
    """Return maps with offsets beyond 2 ** 31 between patches and between images."""
    rows = far_rows()
    return rows[None], rows[:, None]


def far_calls() -> Iterator[Call]:
    weight = torch.randn(64).bfloat16()
    for x in far_maps():
        grid = (x.shape[1], 1)
        yield "pixel_shuffle", (x, grid, 1)
        yield "pixel_unshuffle", (x, grid, 1)
        yield "pixel_shuffle_norm", (x, weight, weight, grid, 1)
        yield "pixel_shuffle_norm_backward", (x, x, weight, grid, 1)
    tall = far_rows()[None]
    grouped = tall.as_strided((1, 9, 64), (0, 2**28, 1))  # the patches of a token are far apart
    yield "pixel_shuffle_norm", (grouped, *torch.randn(2, 576).bfloat16(), (3, 3), 3)


def examine(kernels: Kernels, dtype: torch.dtype) -> None:
    compare(kernels, sample_calls("pixel_shuffle", LAYOUTS, dtype), same_order=dtype != torch.float32)
    compare(kernels, norm_calls(dtype), far_calls())


test_pixel_shuffle = every_access("pixel_shuffle", examine)


def test_bytes_moved() -> None:
    x, grid = torch.randn(60, 17, 264).bfloat16()[:, 1:], (4, 4)  # a slice behind the CLS token
    tokens, weight, bias = torch.randn(60, 4, 1056).bfloat16(), *torch.randn(2, 1056).bfloat16()
    assert_traffic(1, "pixel_shuffle", x, grid)
    assert_traffic(1, "pixel_shuffle", x, grid, 2, "column", 0.3)
    assert_traffic(1, "pixel_unshuffle", tokens, grid)
    assert_traffic(1, "pixel_shuffle_norm", x, weight[:264], bias[:264], grid)
    assert_traffic(2, "pixel_shuffle_norm_backward", tokens, x, weight[:264], grid)
    # Rows of tokens for which there are two blocks per multiprocessor, as the count of partial sums assumes.
    x, tokens, weight = (
        torch.randn(9, 16, 520).bfloat16(),
        torch.randn(9, 4, 2080).bfloat16(),
        torch.randn(2080).bfloat16(),
    )
    assert_traffic(1, "pixel_shuffle_norm", x, weight, weight.clone(), grid)
    assert_traffic(2, "pixel_shuffle_norm_backward", tokens, x, weight, grid)


def test_misfits_are_refused() -> None:
    """The kernel itself refuses calls on which it would read out of bounds, because a graph runs no other check."""
    kernels = checked("pixel_shuffle")
    x, weight, grad = torch.ones(1, 16, 8), torch.ones(32), torch.ones(1, 4, 32)
    for layout in (((4, 3),), ((4, 4), 3), ((4,),), ((4, 4), 0), ((2, 4),), ((-4, -4),), ((4, 4), 2, "diagonal")):
        for name, args in (
            ("pixel_shuffle", (x,)),
            ("pixel_unshuffle", (grad,)),
            ("pixel_shuffle_norm", (x, weight, weight)),
        ):
            with pytest.raises(RuntimeError, match="must"):
                kernels(name, *args, *layout)
    for vectors in ((weight[:16], weight), (weight, weight[:8]), (weight.half(), weight)):
        with pytest.raises(RuntimeError, match=r"norm_(weight|bias) must"):
            kernels("pixel_shuffle_norm", x, *vectors, (4, 4))
    for other in (grad[:, :3], grad[..., :31], grad.half()):
        with pytest.raises(RuntimeError, match="grad_output must"):
            kernels("pixel_shuffle_norm_backward", other, x, weight, (4, 4))
    with pytest.raises(RuntimeError, match="multiple of 4 channels"):
        kernels("pixel_unshuffle", grad[..., :30], (4, 4))


NORM, TORCH = "patch_norm.cuh", "cuda_torch.h"
FAULTS = [
    Fault(
        "dy and dx swapped", NORM, "part / scale * width + part % scale", "part % scale * width + part / scale", DIFFER
    ),
    Fault(
        "column order as row order",
        NORM,
        "by_column ? along : line",
        "by_column ? line : along",
        f"{DIFFER}|{BOUNDS}|{RACE}",
    ),
    Fault("token stride ignored", NORM, "offset(column, x.strides[1])", "offset(column, rows.channels)", BOUNDS),
    Fault(
        "32-bit offset", NORM, "map.step(part) * patch_stride", "int(map.step(part)) * int(patch_stride)", "overflow"
    ),
    Fault("vectors across patches", TORCH, "view.size(rank - 1) * view.width() % bytes == 0", "true", BOUNDS),
    Fault(
        "alignment of images unchecked",
        TORCH,
        "for (int dim = 0; dim < rank - 1; ++dim) aligned",
        "for (int dim = rank > 2; dim < rank - 1; ++dim) aligned",
        MISALIGNED,
    ),
    Fault("barrier missing in the reduction", "common.cuh", "      __syncthreads();\n", "", "nobody has written"),
    Fault("barrier missing between partial sums", NORM, "  __syncthreads();", "", RACE),
    Fault("token of another image", "cuda.cu", "tokens.at(image, token)", "tokens.at(0, token)", DIFFER),
    Fault("variance uncentred", NORM, "mean = sum[0] / rows.hidden;", "mean = 0.f;", WRONG),
    Fault("partial sum dropped", "partial_sums.cuh", "int block = warp;", "int block = warp + 1;", WRONG),
]

test_planted_fault_is_noticed = planted_faults("pixel_shuffle", examine, FAULTS)
