"""The CUDA kernels of pixel shuffle under the emulation's eyes: every access, every byte, planted faults."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.emulation import build
from tests.emulation.backend import check_library
from tests.emulation.test_rms_norm import BOUNDS, MISALIGNED, RACE, SCHEDULES, WRONG, Fault, far_rows, plant, traffic_of
from tests.helpers import cases
from tests.ops.test_generated import assert_within
from vlmfast.registry import OPS

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

NAMES = [op.name for op in OPS.values() if op.stem == "pixel_shuffle" and op.compose is None]

# Of the tensors of a call in turn: rows for vectors of 16, of 4 and of 2 bytes, images with gaps between them.
LAYOUTS = [
    (cases.padded, cases.contiguous),
    (cases.contiguous, cases.padded),
    (functools.partial(cases.padded, by=2), cases.expanded),
    (cases.oddly_padded, cases.offset),
    (cases.transposed, cases.every_other),
]

# (B, C), the grid, the scale, whether each patch is normalised: rows of every policy of row_policy.cuh, patches
# that vectors fit, tokens that they fit alone, and more rows than the emulation's small grids take at once.
NORMS = [
    ((2, 16), (8, 10), 2, True),
    ((3, 16), (4, 6), 2, False),
    ((1, 6), (4, 4), 2, False),
    ((1, 56), (6, 6), 3, False),
    ((2, 264), (2, 4), 2, True),
    ((1, 200), (4, 4), 2, False),
    ((1, 258), (2, 8), 2, False),
    ((1, 2056), (4, 4), 2, False),
]


def in_gaps(x: Tensor, image_gap: int) -> Tensor:
    """The same map with gaps between its patches, which vectors fit, and between its images."""
    batch, patches, channels = x.shape
    pitch = channels + 16 - channels % 8
    stride = patches * pitch + image_gap
    buffer = torch.full((batch * stride,), float("nan"), dtype=x.dtype)
    return buffer.as_strided(x.shape, (stride, pitch, 1)).copy_(x)


def norm_calls(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Both directions of the norm, of rows whose mean is far from zero; some are almost constant."""
    for index, ((batch, channels), grid, scale, each_patch) in enumerate(NORMS):
        noise = torch.randn(batch, grid[0] * grid[1], channels)
        x = in_gaps(((noise > 1.5) + 250.0 if index % 2 else noise + 10.0).to(dtype), (8, 3)[index % 4 == 0])
        size = channels if each_patch else channels * scale**2
        weight, bias = torch.randn(2, size).to(dtype)
        grad = torch.randn(batch, x.shape[1] // scale**2, channels * scale**2).to(dtype)
        layout = grid, scale, ("row", "column")[index % 2], (1.0, 0.5)[index % 3 % 2], (0.3, 1e-5)[index % 2]
        yield "pixel_shuffle_norm", (x, weight, bias, *layout)
        yield "pixel_shuffle_norm_backward", (grad, x, weight, *layout)


def far_maps() -> tuple[Tensor, Tensor]:
    """Maps whose offsets pass 2 ** 31, from patch to patch and from image to image."""
    rows = far_rows()
    return rows[None], rows[:, None]


def far_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    weight = torch.randn(64).bfloat16()
    for x in far_maps():
        grid = (x.shape[1], 1)
        yield "pixel_shuffle", (x, grid, 1)
        yield "pixel_unshuffle", (x, grid, 1)
        yield "pixel_shuffle_norm", (x, weight, weight, grid, 1)
        yield "pixel_shuffle_norm_backward", (x, x, weight, grid, 1)
    tall = far_rows()[None]
    grouped = tall.as_strided((1, 9, 64), (0, 2**28, 1))  # a token's own patches are far apart
    yield "pixel_shuffle_norm", (grouped, *torch.randn(2, 576).bfloat16(), (3, 3), 3)


def sample_calls(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name in NAMES:
        for index, sample in enumerate(OPS[name].samples("cpu", dtype)):
            layouts = [LAYOUTS[index % len(LAYOUTS)][place % 2] for place in range(len(sample))]
            yield name, tuple(f(a) if cases.is_tensor(a) else a for f, a in zip(layouts, sample, strict=True))


def check(library: str, name: str, args: tuple[Any, ...]) -> tuple[int, int]:
    """Raise where a call is wrong; how many of its elements are rounded otherwise than the definition's, of all."""
    op = OPS[name]
    got = cases.outputs(getattr(getattr(torch.ops, library), name)(*args))
    reference = cases.outputs(op.reference(*args))
    differ, total = sum(int((g != r).sum()) for g, r in zip(got, reference, strict=True)), sum(g.numel() for g in got)
    if op.exact:
        assert differ == 0, f"{name}: {differ} of {total} elements differ"
    assert_within(got, reference, cases.outputs(op.reference(*cases.widened(args))))
    return differ, total


def examine(library: str, dtype: torch.dtype) -> None:
    """Raise where a build of the kernels touches what it must not, or is wrong."""
    differ, total = map(sum, zip(*(check(library, name, args) for name, args in sample_calls(dtype)), strict=True))
    if dtype != torch.float32:  # in float32 every sum is its own rounding
        assert differ <= total // 500, f"{differ} of {total} elements are rounded in another order"
    for name, args in (*norm_calls(dtype), *far_calls()):
        check(library, name, args)


@pytest.fixture(scope="module")
def checked() -> ctypes.CDLL:
    return check_library("pixel_shuffle")


@pytest.mark.parametrize(("dtype", "schedule"), zip(cases.DTYPES, SCHEDULES, strict=True), ids=str)
def test_pixel_shuffle(checked: ctypes.CDLL, dtype: torch.dtype, schedule: int) -> None:
    checked.vlmfast_emulation_schedule(schedule)
    examine("vlmfast_checked_pixel_shuffle", dtype)


def test_bytes_moved(checked: ctypes.CDLL) -> None:
    """The memory traffic that the header of csrc/pixel_shuffle/cuda.cu promises, and the number of launches."""
    x = torch.randn(2, 17, 264).bfloat16()[:, 1:]  # read behind the CLS token, not copied
    moved, grid = x.numel() * 2, (4, 4)
    tokens, weight, bias = torch.randn(2, 4, 1056).bfloat16(), *torch.randn(2, 1056).bfloat16()
    traffic = functools.partial(traffic_of, checked, torch.ops.vlmfast_checked_pixel_shuffle)

    assert traffic("pixel_shuffle", x, grid) == (1, moved, moved)
    assert traffic("pixel_shuffle", x, grid, 2, "column", 0.3) == (1, moved, moved)
    assert traffic("pixel_unshuffle", tokens, grid) == (1, moved, moved)
    for vectors, rows in (((weight, bias), 8), ((weight[:264], bias[:264]), 32)):
        parameters = rows * vectors[0].nbytes
        assert traffic("pixel_shuffle_norm", x, *vectors, grid) == (1, moved + 2 * parameters, moved)
        blocks = 2 if rows == 8 else 5  # persistent ones
        partials = 16 * blocks * vectors[0].numel() // 2  # written once, read once
        launches, loaded, stored = traffic("pixel_shuffle_norm_backward", tokens, x, vectors[0], grid)
        assert (launches, stored) == (2, moved + partials + 2 * vectors[0].nbytes)
        assert loaded == 2 * moved + 3 * parameters + partials


def test_misfits_are_refused(checked: ctypes.CDLL) -> None:
    """What a kernel would read out of bounds on, where nobody has checked the call before."""
    ops = torch.ops.vlmfast_checked_pixel_shuffle
    x, weight, grad = torch.ones(1, 16, 8), torch.ones(32), torch.ones(1, 4, 32)
    for layout in (((4, 3),), ((4, 4), 3), ((4,),), ((4, 4), 0), ((2, 4),), ((-4, -4),), ((4, 4), 2, "diagonal")):
        for name, args in (
            ("pixel_shuffle", (x,)),
            ("pixel_unshuffle", (grad,)),
            ("pixel_shuffle_norm", (x, weight, weight)),
        ):
            with pytest.raises(RuntimeError, match="must"):
                getattr(ops, name)(*args, *layout)
    for vectors in ((weight[:16], weight), (weight, weight[:8]), (weight.half(), weight)):
        with pytest.raises(RuntimeError, match="weight must"):
            ops.pixel_shuffle_norm(x, *vectors, (4, 4))
    for other in (grad[:, :3], grad[..., :31], grad.half()):
        with pytest.raises(RuntimeError, match="grad_output must"):
            ops.pixel_shuffle_norm_backward(other, x, weight, (4, 4))
    with pytest.raises(RuntimeError, match="multiple of 4 channels"):
        ops.pixel_unshuffle(grad[..., :30], (4, 4))


# ---- planted faults ----

DIFFER = "elements differ"
MAP, NORM, LAUNCH, SUMS = (
    "patch_map.cuh",
    "patch_norm.cuh",
    "cuda.cu",
    "column_sums.cuh",
)
FAULTS = [
    Fault(
        "dy and dx swapped", MAP, "part / scale * width + part % scale", "part % scale * width + part / scale", DIFFER
    ),
    Fault(
        "column order as row order", MAP, "by_column ? along : line", "by_column ? line : along", f"{DIFFER}|{BOUNDS}"
    ),
    Fault("token stride ignored", NORM, "offset(column, x.row_stride)", "offset(column, rows.channels)", BOUNDS),
    Fault(
        "32-bit offset", NORM, "map.step(part) * patch_stride", "int(map.step(part)) * int(patch_stride)", "overflow"
    ),
    Fault("vectors across patches", LAUNCH, "{y_data, call.x.size}", "{y_data, call.rows.size}", BOUNDS),
    Fault("alignment of images unchecked", "cuda_torch.h", "{data, image_stride}", "{data, 0}", MISALIGNED),
    Fault("barrier missing in the reduction", "common.cuh", "      __syncthreads();\n", "", "nobody has written"),
    Fault("barrier missing between partial sums", NORM, "  __syncthreads();", "", RACE),
    Fault("variance uncentred", NORM, "mean = sum[0] / size;", "mean = 0.f;", WRONG),
    Fault("partial sum dropped", SUMS, "int block = warp;", "int block = warp + 1;", WRONG),
]


@pytest.mark.planted
@pytest.mark.parametrize("index", range(len(FAULTS)), ids=[fault.name.replace(" ", "-") for fault in FAULTS])
def test_planted_fault_is_noticed(tmp_path: Path, index: int) -> None:
    library = f"vlmfast_pixel_shuffle_fault_{index}"
    planted = plant(FAULTS[index], "pixel_shuffle", tmp_path)
    torch.ops.load_library(str(build.build("check", library=library, csrc=planted, cache=tmp_path)))
    with pytest.raises((AssertionError, RuntimeError), match=FAULTS[index].notice):
        examine(library, torch.bfloat16)
