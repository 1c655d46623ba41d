"""The CUDA kernels of the novelty of tokens in the emulation: every access, every byte, planted faults."""

from __future__ import annotations

from collections.abc import Iterator

import torch

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
    far_rows,
    planted_faults,
)
from tests.helpers import cases

# (batch, frames, tokens, hidden): fewer tokens than a warp takes, and several times as many; rows in vectors and in
# single elements, of one step and of several.
SHAPES = [(1, 1, 1, 8), (2, 3, 5, 64), (1, 4, 9, 72), (3, 2, 4, 7), (1, 2, 6, 1160), (2, 2, 3, 33), (1, 2, 70, 24)]
LAYOUTS = [
    cases.contiguous,
    cases.padded,
    cases.oddly_padded,
    cases.transposed,
    cases.offset,
    cases.every_other,
    cases.expanded,
]


def far_calls() -> Iterator[Call]:
    x = far_rows()
    for frames in (x[None, None], x[None, :, None], x[:, None, None].expand(3, 2, 1, 64)):
        yield "frame_novelty", (frames,)
        yield "frame_change", (frames,)


def calls(dtype: torch.dtype) -> Iterator[Call]:
    for index, shape in enumerate(SHAPES):
        for layout in (LAYOUTS[index], LAYOUTS[(index + 3) % len(LAYOUTS)]):
            frames = layout(torch.randn(shape).to(dtype))
            yield "frame_novelty", (frames,)
            yield "frame_change", (frames,)
    frames = torch.randn(1, 3, 5, 40).to(dtype)
    frames[:, 1] = 0
    yield "frame_novelty", (frames,)
    yield "frame_change", (frames,)


def examine(kernels: Kernels, dtype: torch.dtype) -> None:
    compare(kernels, far_calls())
    compare(kernels, calls(dtype))
    (change,) = kernels("frame_change", torch.randn(1, 1, 5, 72).to(dtype).repeat(1, 2, 1, 1))
    assert not change.any(), "what is the same is over the budget of 0"


test_frame_novelty = every_access("frame_novelty", examine)


def test_bytes_moved() -> None:
    frames = torch.randn(1, 3, 16, 1032).bfloat16()
    assert_traffic(2, "frame_novelty", frames)
    assert_traffic(1, "frame_change", frames)


FAULTS = [
    Fault("tokens past the last one read", "cuda.cu", "first + min(row, count - 1)", "first + row", BOUNDS),
    Fault("tokens past the last one written", "cuda.cu", "if (row < count) finish", "finish", BOUNDS),
    Fault("end of a row unchecked", "cuda.cu", "column < hidden; column", "column < hidden + 8; column", BOUNDS),
    Fault("end of a mean unchecked", "cuda.cu", "if (at < sizes.hidden) mean", "mean", BOUNDS),
    Fault("end of a row unchecked for means", "cuda.cu", "if (column < sizes.hidden) {", "{", BOUNDS),
    Fault("work not walked", "cuda.cu", "work += step", "work += works", WRONG),
    Fault("means not walked", "cuda.cu", "work += gridDim.x", "work += works", WRONG),
    Fault(
        "tokens of a warp alone",
        "cuda.cu",
        "token = warp; token < sizes.tokens",
        "token = warp; token < kWarps",
        f"{BOUNDS}|{WRONG}",
    ),
    Fault("parts of a mean left out", "cuda.cu", "part < kWarps; ++part", "part < 1; ++part", WRONG),
    Fault(
        "no barrier before the sums",
        "cuda.cu",
        "    __syncthreads();\n    for (int place",
        "    for (int place",
        UNORDERED,
    ),
    Fault(
        "no barrier after the sums", "cuda.cu", "__syncthreads();  // the columns before", "// the columns before", RACE
    ),
    Fault("the frame itself", "cuda.cu", "frame % changes + 1, token", "frame % changes, token", WRONG),
    Fault(
        "frames of another video",
        "cuda.cu",
        "rows.at(frame / changes, frame % changes, token)",
        "rows.at(0, frame, token)",
        f"{BOUNDS}|{WRONG}",
    ),
    Fault("alignment of strides unchecked", "cuda_torch.h", "view.stride(dim) * view.width() %", "0 %", MISALIGNED),
    Fault(
        "equal squares not told apart",
        "cuda.cu",
        "squares == other_squares ? squares : length",
        "false ? squares : length",
        WRONG,
    ),
    Fault("divided by nothing", "cuda.cu", "both == 0.f ? 0.f : dot", "dot", WRONG),
]

test_planted_fault_is_noticed = planted_faults("frame_novelty", examine, FAULTS)
