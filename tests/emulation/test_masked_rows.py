"""The CUDA kernels of the ops on masked rows under the emulation's eyes: every access, every byte, planted faults."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.emulation import build
from tests.emulation.backend import check_library
from tests.emulation.test_rms_norm import BOUNDS, MISALIGNED, RACE, SCHEDULES, Fault, far_rows, plant, traffic_of
from tests.helpers import cases
from vlmfast.registry import OPS

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

NAMES = [op.name for op in OPS.values() if op.stem == "masked_rows"]
UNNOTICED = "DID NOT RAISE"  # what is to be refused was not
MISCOUNTED = "differ|device-side assertion|race: write of global"  # whichever call comes first

# Of the tensors of a call in turn: rows for vectors of 16, of 4 and of 2 bytes, masks that begin anywhere.
LAYOUTS = [
    (cases.contiguous, cases.padded),
    (cases.padded, cases.offset),
    (functools.partial(cases.padded, by=2), cases.contiguous),
    (cases.oddly_padded, cases.transposed),
    (cases.expanded, cases.every_other),
]


def long_samples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """More positions than the chunks of one launch take at a time, with runs that fill whole chunks."""
    mask = torch.rand(2, 1700) < 0.6
    mask[:, 300:900], mask[:, 1000:1300] = True, False
    x = torch.randn(2, 1700, 8).bfloat16()
    yield "row_index", (mask,)
    yield "split_rows", (x, mask, int(mask.sum()))
    for keep, pad_left in ((1700, False), (1200, True)):
        yield "compact_tokens", (x, mask, keep, None, pad_left)
        yield "compact_tokens_backward", (x[:, :keep], mask, pad_left)


def far_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Rows whose offsets pass 2 ** 31."""
    x, rows, mask = far_rows()[None], far_rows(), torch.ones(1, 3, dtype=torch.bool)
    yield "deepstack_add", (x, mask, rows)
    yield "place_embeddings", (x, mask, rows)
    yield "split_rows", (x, mask, 3)
    yield "compact_tokens", (x, ~mask, 3)
    yield "compact_tokens_backward", (x, ~mask)


def calls(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield from far_calls()
    yield from long_samples()
    for name in NAMES:
        for index, sample in enumerate(OPS[name].samples("cpu", dtype)):
            if len({a.dtype for a in sample if cases.is_float(a)}) > 1:
                continue  # for the definition
            layouts = [LAYOUTS[index % len(LAYOUTS)][place % 2] for place in range(len(sample))]
            yield name, tuple(f(a) if cases.is_tensor(a) else a for f, a in zip(layouts, sample, strict=True))


def refused_calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """What only the device can refuse, and before anything out of bounds is touched: (message, op, arguments)."""
    mask = torch.tensor([[False, True, True], [True, True, True]])
    index = OPS["row_index"].reference(mask)
    x, message = torch.randn(2, 3, 8).bfloat16(), "the mask must be true at as many positions as there are rows"
    for rows, given in itertools.product((0, 4, 6), (None, index)):
        yield message, "deepstack_add", (x, mask, torch.randn(rows, 8).bfloat16(), given)
        yield message, "place_embeddings", (x, mask, torch.randn(rows, 8).bfloat16(), given)
        yield message, "split_rows", (x, mask, rows, given)
        yield message, "split_rows", (x[..., :0], mask, rows, given)
    yield message, "place_embeddings", (x[:, :0], mask[:, :0], x[0, :2])
    for position in (-1, 3):
        order = torch.tensor([[0, 1], [0, position]])
        yield "order must be within 0 and the tokens", "compact_tokens", (x, mask, 2, order)


def examine(library: str, dtype: torch.dtype) -> None:
    """Raise where a build of the kernels touches what it must not, or is wrong."""
    for message, name, args in refused_calls():
        with pytest.raises(RuntimeError, match=message):
            getattr(getattr(torch.ops, library), name)(*args)
    for name, args in calls(dtype):
        got = cases.outputs(getattr(getattr(torch.ops, library), name)(*args))
        for g, r in zip(got, cases.outputs(OPS[name].reference(*args)), strict=True):
            assert g.is_contiguous()
            assert torch.equal(g, r), f"{name}: {int((g != r).sum())} of {g.numel()} elements differ"


@pytest.fixture(scope="module")
def checked() -> ctypes.CDLL:
    return check_library("masked_rows")


@pytest.mark.parametrize(("dtype", "schedule"), zip(cases.DTYPES, SCHEDULES, strict=True), ids=str)
def test_masked_rows(checked: ctypes.CDLL, dtype: torch.dtype, schedule: int) -> None:
    checked.vlmfast_emulation_schedule(schedule)
    examine("vlmfast_checked_masked_rows", dtype)


def test_bytes_moved(checked: ctypes.CDLL) -> None:
    """The memory traffic that the header of csrc/masked_rows/cuda.cu promises, and the number of launches."""
    mask = torch.zeros(2, 96, dtype=torch.bool)
    mask[:, 32:64] = True
    positions, masked, row = 192, 64, 512  # row: bytes
    x, embeds = torch.randn(2, 96, 256).bfloat16(), torch.randn(masked, 256).bfloat16()
    traffic = functools.partial(traffic_of, checked, torch.ops.vlmfast_checked_masked_rows)
    threads = 8  # that share a row; each reads its number

    launches, _, stored = traffic("row_index", mask)
    assert (launches, stored) == (1, 4 * positions)
    index = torch.ops.vlmfast_checked_masked_rows.row_index(mask)
    numbers = 4 * threads * positions
    added = traffic("deepstack_add", x, mask, embeds, index)
    assert added == (1, numbers + row * (positions + masked), row * positions)
    assert traffic("place_embeddings", x, mask, embeds, index) == (1, numbers + row * positions, row * positions)
    split = traffic("split_rows", x, mask, masked, index)
    assert split == (1, numbers + row * positions, row * (positions + masked))
    assert traffic("split_rows", x, mask, masked, index, False) == (1, numbers + row * masked, row * masked)
    assert traffic("deepstack_add", x, mask, embeds)[0] == 2

    keep, valid = 80, 64  # of each sample
    launches, _, stored = traffic("compact_tokens", x, mask, keep)
    assert (launches, stored) == (2, 2 * keep * (row + 9))
    order = torch.ops.vlmfast_checked_masked_rows.compact_tokens(x, mask, keep)[2]
    given = traffic("compact_tokens", x, mask, keep, order)
    assert given == (1, 2 * (keep * threads * 9 + valid * row), 2 * keep * (row + 9))
    launches, loaded, stored = traffic("compact_tokens_backward", x[:, :keep], mask)
    assert (launches, stored) == (2, positions * (row + 8))
    assert row * 2 * valid < loaded < row * 2 * valid + 8 * threads * positions + 4 * positions


def test_mask_of_any_bytes(checked: ctypes.CDLL) -> None:
    """To torch every byte but 0 is true; a bool view of other bytes has such ones."""
    mask = torch.randint(0, 3, (1, 900), dtype=torch.uint8).mul(127)
    index = OPS["row_index"].reference(mask != 0)
    assert torch.equal(torch.ops.vlmfast_checked_masked_rows.row_index(mask.view(torch.bool)), index)


# ---- planted faults ----

FAULTS = [
    Fault("barrier missing in the scan", "row_ranks.cuh", "    __syncthreads();\n", "", "nobody has written"),
    Fault("one buffer for two barriers", "row_ranks.cuh", "warp_counts[turn % 2]", "warp_counts[0]", RACE),
    Fault("chunk begins late", "row_ranks.cuh", "first = begin; first", "first = begin + 1; first", MISCOUNTED),
    Fault("chunk counts itself", "row_ranks.cuh", "count(0, begin)", "count(0, end)", MISCOUNTED),
    Fault("nothing carried on", "row_ranks.cuh", "      before += sums.block;\n", "", MISCOUNTED),
    Fault("end of a sample left out", "row_ranks.cuh", "if (threadIdx.x < end - rest)", "if (false)", MISCOUNTED),
    Fault("mask in vectors from anywhere", "row_ranks.cuh", "min(before_vectors, ", "min(int64_t{0}, ", MISALIGNED),
    Fault("number unchecked", "cuda.cu", "number < rows && !", "!", BOUNDS),
    Fault("total unchecked", "cuda.cu", "&& !(last &&", "&& !(false &&", UNNOTICED),
    Fault("order unchecked", "cuda.cu", "position >= 0 && position < tokens,", "true,", UNNOTICED),
    Fault(
        "stride of another tensor",
        "cuda.cu",
        ": embeds[number]}",
        ": embeds.data + number * x.stride}",
        BOUNDS,
    ),
    Fault("32-bit row offset", "cuda_torch.h", "data + row * stride;", "data + int(row) * int(stride);", "overflow"),
    Fault("alignment unchecked", "cuda_torch.h", "fit = fit && operand", "operand", MISALIGNED),
    Fault("vector too many", "row_moves.cuh", "k * step < hidden", "k * step <= hidden", BOUNDS),
]


@pytest.mark.planted
@pytest.mark.parametrize("index", range(len(FAULTS)), ids=[fault.name.replace(" ", "-") for fault in FAULTS])
def test_planted_fault_is_noticed(tmp_path: Path, index: int) -> None:
    library = f"vlmfast_masked_rows_fault_{index}"
    planted = plant(FAULTS[index], "masked_rows", tmp_path)
    torch.ops.load_library(str(build.build("check", library=library, csrc=planted, cache=tmp_path)))
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception), match=FAULTS[index].notice):
        examine(library, torch.bfloat16)
