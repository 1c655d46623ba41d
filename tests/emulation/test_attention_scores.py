"""The CUDA kernels of the attention scores under the emulation's eyes: every access, every byte, planted faults."""

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

UNORDERED = f"{RACE}|nobody has written"

# Of the tensors of a call in turn: heads for vectors of 16 bytes and for single elements, as a projection leaves them.
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


def cls_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Chunks that are full and not, more heads than are joined at a time, heads longer than registers hold."""
    for (batch, heads, tokens, size), rest in [
        ((2, 3, 130, 64), (None, -1)),
        ((1, 35, 40, 16), (-0.5, 7)),
        ((1, 2, 300, 136), (0.3,)),
        ((1, 1, 9, 600), ()),
        ((1, 2, 5, 33), ()),
    ]:
        yield torch.randn(batch, heads, size).to(dtype), torch.randn(batch, heads, tokens, size).to(dtype), *rest
    far = far_rows()  # offsets that pass 2 ** 31, from token to token, from head to head, from image to image
    yield far[None, :1], far[None, None]
    yield far[None], far[None, :, None].expand(1, 3, 2, 64)
    yield far[:, None], far[:, None, None].expand(3, 1, 2, 64)


def received_calls(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Heads for every kernel, segments that begin and end within tiles and at their edges, more tiles than one."""
    for (heads, tokens, size), bounds, group, scale in [
        ((1, 200, 64), (0, 1, 64, 128, 129, 200), 4, None),
        ((2, 70, 72), (0, 35, 35, 70), 1, 2.0),
        ((1, 150, 104), None, 3, -0.1),
        ((1, 70, 9), (0, 64, 70), 1, 0.0),
        ((2, 66, 160), (0, 2, 66), 2, None),
    ]:
        query, key = torch.randn(2, heads, tokens, size).to(dtype)
        yield query, key, None if bounds is None else bounds_of(*bounds), group, scale
    query, key = torch.randn(2, 2, 20, 64).to(dtype)
    yield query, cases.oddly_padded(key)
    for far in (far_rows()[None], far_rows()[:, None]):
        yield far, far


def calls(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name in ("cls_attention", "received_attention"):
        for index, sample in enumerate(OPS[name].samples("cpu", dtype)):
            layouts = [LAYOUTS[index % len(LAYOUTS)][place % 2] for place in range(len(sample))]
            yield name, tuple(f(a) if cases.is_tensor(a) else a for f, a in zip(layouts, sample, strict=True))
    for args in cls_calls(dtype):
        yield "cls_attention", args
    for args in received_calls(dtype):
        yield "received_attention", args


def examine(library: str, dtype: torch.dtype) -> None:
    """Raise where a build of the kernels touches what it must not, or is wrong."""
    kernels = getattr(torch.ops, library)
    wild = torch.randn(1, 70, 64).to(dtype)
    for bounds in ((-9, 2**30), (5,), (), (60, 3, 900, -7)):  # nobody checks these: they are not followed anywhere
        kernels.received_attention(wild, wild, bounds_of(*bounds))
    for name, args in calls(dtype):
        op = OPS[name]
        got, reference = (cases.outputs(f(*args)) for f in (getattr(kernels, name), op.reference))
        assert_within(got, reference, cases.outputs(op.reference(*cases.widened(args))))


@pytest.fixture(scope="module")
def checked() -> ctypes.CDLL:
    return check_library("attention_scores")


@pytest.mark.parametrize(("dtype", "schedule"), zip(cases.DTYPES, SCHEDULES, strict=True), ids=str)
def test_attention_scores(checked: ctypes.CDLL, dtype: torch.dtype, schedule: int) -> None:
    checked.vlmfast_emulation_schedule(schedule)
    examine("vlmfast_checked_attention_scores", dtype)


def test_tensor_cores_are_exact(checked: ctypes.CDLL) -> None:
    """Small integers have exact products and sums, so a map of them shows each element that is out of place."""
    checked.vlmfast_emulation_schedule(0)
    for dtype in (torch.float16, torch.bfloat16):
        query, key = torch.randint(-3, 4, (2, 1, 96, 48)).to(dtype)
        args = (query, key, None, 1, 0.01)
        got = torch.ops.vlmfast_checked_attention_scores.received_attention(*args)
        exact = OPS["received_attention"].reference(*cases.widened(args))
        assert (got - exact).abs().max() < 1e-6


def test_bytes_moved(checked: ctypes.CDLL) -> None:
    """The memory traffic that the header of csrc/attention_scores/cuda.cu promises, and the number of launches."""
    traffic = functools.partial(traffic_of, checked, torch.ops.vlmfast_checked_attention_scores)
    batch, heads, tokens, size = 2, 3, 256, 64
    query, key = torch.randn(batch, heads, size).bfloat16(), torch.randn(batch, heads, tokens, size).bfloat16()
    products, parts, chunks = 4 * batch * heads * tokens, 8 * batch * heads * 8, 2
    launches, loaded, stored = traffic("cls_attention", query, key)
    assert (launches, stored) == (2, products + parts + 4 * batch * (tokens - 1))
    again = 16 * 2 * size * batch * heads * chunks  # each group of 8 threads has the query
    cls = 4 * batch * heads  # nobody wants its product
    assert loaded == key.nbytes + again + products - cls + chunks * parts

    rows, blocks = torch.randn(2, 256, size).bfloat16(), 2  # of 128 rows
    launches, loaded, stored = traffic("received_attention", rows, rows, None, 4)
    assert (launches, stored) == (3, 12 * 2 * 256 + 4 * 64)
    assert loaded == 2 * (1 + blocks) * rows.nbytes + (8 * blocks + 4) * 2 * 256


# ---- planted faults ----

FAULTS = [
    Fault(
        "barrier missing behind the products",
        "cls_attention.cuh",
        "    }\n    __syncthreads();\n",
        "    }\n",
        UNORDERED,
    ),
    Fault(
        "barrier missing behind the normalisers",
        "cls_attention.cuh",
        "      __syncthreads();\n      if (!wanted)",
        "      if (!wanted)",
        UNORDERED,
    ),
    Fault(
        "maximum not taken off",
        "cls_attention.cuh",
        "-normaliser.x)) * normaliser.y;",
        "0.f)) * normaliser.y;",
        WRONG,
    ),
    Fault("CLS column kept", "cls_attention.cuh", "&& token != sizes.cls", "", f"{BOUNDS}|{RACE}|{WRONG}"),
    Fault(
        "sums joined without their maxima",
        "cls_attention.cuh",
        "sum * fast_exp2(maximum - largest)",
        "sum",
        WRONG,
    ),
    Fault("key of another image", "cuda_torch.h", "data + batch * batch_stride + head", "data + head", WRONG),
    Fault(
        "token too many",
        "cls_attention.cuh",
        "if (token >= count) continue;",
        "if (token > count) continue;",
        BOUNDS,
    ),
    Fault(
        "alignment of keys unchecked",
        "cls_attention.cuh",
        "fit && key.aligned_to(kVectorBytes)",
        "fit",
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
    Fault(
        "bound searched wrong",
        "received_attention.cuh",
        "[middle] <= token",
        "[middle] < token",
        WRONG,
    ),
    Fault(
        "bounds unchecked",
        "received_attention.cuh",
        "max(begin, 0)",
        "begin",
        f"{BOUNDS}|before all tensors",
    ),
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
        "row < from.count && depth < from.size) return",
        "row < from.count) return",
        BOUNDS,
    ),
    Fault(
        "last step left out",
        "attention_tiles.cuh",
        "depth < kDepth; ++depth",
        "depth < kDepth - 1; ++depth",
        WRONG,
    ),
]


@pytest.mark.planted
@pytest.mark.parametrize("index", range(len(FAULTS)), ids=[fault.name.replace(" ", "-") for fault in FAULTS])
def test_planted_fault_is_noticed(tmp_path: Path, index: int) -> None:
    library = f"vlmfast_attention_fault_{index}"
    planted = plant(FAULTS[index], "attention_scores", tmp_path)
    torch.ops.load_library(str(build.build("check", library=library, csrc=planted, cache=tmp_path)))
    with pytest.raises((AssertionError, RuntimeError), match=FAULTS[index].notice):
        examine(library, torch.bfloat16)
