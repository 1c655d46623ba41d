"""The CUDA kernels of the token merge under the emulation's eyes: every access, every byte, planted faults."""

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
from tests.emulation.test_pixel_shuffle import in_gaps
from tests.emulation.test_rms_norm import BOUNDS, MISALIGNED, RACE, SCHEDULES, WRONG, Fault, far_rows, plant, traffic_of
from tests.helpers import cases
from tests.ops.test_generated import assert_within
from vlmfast.ops.token_merge_calls import MERGES
from vlmfast.registry import OPS

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

NAMES = [op.name for op in OPS.values() if op.stem == "token_merge" and op.compose is None]
UNNOTICED = "DID NOT RAISE"  # what is to be refused was not
MISPLACED = "elements differ"

# Of the tensors of a call in turn: rows for vectors of 16 bytes and for single elements, crops with gaps between them.
LAYOUTS = [
    (cases.contiguous, cases.padded),
    (cases.padded, cases.transposed),
    (cases.oddly_padded, cases.contiguous),
    (cases.expanded, cases.offset),
    (cases.every_other, cases.every_other),
]


def kept_of(batch: int, tokens: int, kept: int) -> Tensor:
    return torch.rand(batch, tokens).argsort(1)[:, :kept].sort(1).values


def long_calls(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """More than one step of each loop: keys that no shared memory holds, many targets, members and numbers."""
    yield "top_tokens", (torch.randint(0, 300, (2, 20700)).to(dtype), 9000)
    doubles = torch.randn(1, 7, 24).repeat(1, 50, 1)[:, :330].to(dtype)  # also of targets that are looked at later
    yield "merge_slots", (doubles, kept_of(1, 330, 20), 150)
    x, nobody = in_gaps(torch.randn(2, 9, 16).to(dtype), 3), torch.empty(2, 0, dtype=torch.int64)
    yield "merge_slots", (x, nobody, 2)  # vectors fit the rows of the first crop alone
    yield "merge_rows", (x, nobody, torch.tensor([[0, *[1] * 8]] * 2).int(), 1)
    yield "merge_rows_backward", (x, torch.arange(-9, 0).int().expand(2, 9), 0)
    kept = kept_of(1, 2300, 20)
    few, many = (OPS["merge_slots"].reference(torch.randn(1, 2300, 4), kept, count) for count in (3, 2100))
    hidden = torch.randn(1, 2300, 8).to(dtype)
    for slots, count in ((few, 3), (many, 2100)):
        for merge in MERGES:
            if slots is few:  # a block for each row, that looks at all slots: many would take a minute here
                yield "merge_rows", (hidden, kept, slots, count, merge)
            yield "merge_rows_backward", (hidden[:, : 20 + count], slots, count, merge)


def far_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Offsets that pass 2 ** 31, from row to row and from crop to crop."""
    for rows in (far_rows()[None], far_rows()[:, None]):
        batch, tokens = rows.shape[:2]
        nothing, slots = torch.empty(batch, 0, dtype=torch.int64), torch.zeros(batch, tokens, dtype=torch.int32)
        slots[:, 1:] = 1
        yield "merge_slots", (rows, nothing, 1)
        yield "merge_rows", (rows, nothing, slots, 1)
        yield "merge_rows_backward", (rows, slots - tokens, 0)


def strange_calls(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...], tuple[Any, ...]]]:
    """Numbers that merge_slots never gives, and calls without them of the same result."""
    hidden, kept = torch.randn(1, 9, 8).to(dtype), torch.tensor([[2, 5]])
    slots = torch.tensor([[0, 2, -2, 4, -(2**31), -1, 2**31 - 1, -3, 1]], dtype=torch.int32)
    tame = slots.where((slots < 4) & (slots >= -2), -3)
    yield "merge_rows", (hidden, kept, slots, 2), (hidden, kept, tame, 2)
    yield "merge_rows_backward", (hidden[:, :4], slots, 2), (hidden[:, :4], tame, 2)
    yield "merge_rows", (hidden, torch.tensor([[-5, 2**40]]), tame, 2), (hidden, torch.tensor([[0, 8]]), tame, 2)


def calls(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name in NAMES:
        for index, sample in enumerate(OPS[name].samples("cpu", dtype)):
            layouts = [LAYOUTS[index % len(LAYOUTS)][place % 2] for place in range(len(sample))]
            yield name, tuple(f(a) if cases.is_tensor(a) else a for f, a in zip(layouts, sample, strict=True))
    yield from long_calls(dtype)
    yield from far_calls()


def examine(library: str, dtype: torch.dtype) -> None:
    """Raise where a build of the kernels touches what it must not, or is wrong."""
    kernels = getattr(torch.ops, library)
    with pytest.raises(RuntimeError, match="scores must not be NaN"):
        kernels.top_tokens(torch.tensor([[1.0, torch.nan, 2.0]]).to(dtype), 1)
    # Whatever is wrong with these, it stays within the crop.
    kernels.merge_slots(torch.randn(2, 40, 16).to(dtype), torch.full((2, 30), 2**40), 5)
    kernels.merge_slots(torch.randn(2, 40, 16).to(dtype), torch.full((2, 30), -(2**40)), 5)
    differ = total = 0
    pairs = [(name, args, args) for name, args in calls(dtype)]
    for name, args, like in (*strange_calls(dtype), *pairs):
        op = OPS[name]
        got, reference = (cases.outputs(f) for f in (getattr(kernels, name)(*args), op.reference(*like)))
        if op.exact:
            wrong = int((got[0] != reference[0]).sum())
            assert wrong == 0, f"{name}: {wrong} of {got[0].numel()} elements differ"
        assert_within(got, reference, cases.outputs(op.reference(*cases.widened(like))))
        differ, total = differ + int((got[0] != reference[0]).sum()), total + got[0].numel()
    if dtype != torch.float32:  # in float32 every sum is its own rounding
        assert differ <= total // 500, f"{differ} of {total} elements are rounded in another order"


@pytest.fixture(scope="module")
def checked() -> ctypes.CDLL:
    return check_library("token_merge")


@pytest.mark.parametrize(("dtype", "schedule"), zip(cases.DTYPES, SCHEDULES, strict=True), ids=str)
def test_token_merge(checked: ctypes.CDLL, dtype: torch.dtype, schedule: int) -> None:
    checked.vlmfast_emulation_schedule(schedule)
    examine("vlmfast_checked_token_merge", dtype)


def test_every_run_gives_the_same_bits(checked: ctypes.CDLL) -> None:
    hidden, kept = torch.randn(2, 300, 40), kept_of(2, 300, 9)
    slots = OPS["merge_slots"].reference(hidden, kept, 3)
    runs = []
    for schedule in SCHEDULES:
        checked.vlmfast_emulation_schedule(schedule)
        runs.append(torch.ops.vlmfast_checked_token_merge.merge_rows(hidden, kept, slots, 3))
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_bytes_moved(checked: ctypes.CDLL) -> None:
    """The memory traffic that the header of csrc/token_merge/cuda.cu promises, and the number of launches."""
    traffic = functools.partial(traffic_of, checked, torch.ops.vlmfast_checked_token_merge)
    batch, tokens, chosen, contextual = 2, 300, 20, 4
    scores = torch.randn(batch, tokens)
    assert traffic("top_tokens", scores, chosen) == (1, scores.nbytes, 8 * batch * chosen)

    kept, metric = kept_of(batch, tokens, chosen), torch.randn(batch, tokens, 128).bfloat16()
    blocks, searched = 6, 5  # blocks of up to 128 tokens; loads of a search among 20
    launches, loaded, stored = traffic("merge_slots", metric, kept, contextual)
    assert (launches, stored) == (1, 4 * batch * tokens)
    joining = batch * (tokens - chosen - contextual)
    numbers = 8 * (searched + 1) * (batch * tokens + blocks * contextual)
    assert 0 <= loaded - 256 * (joining + blocks * contextual) <= numbers

    row, slices = 2048, 4
    hidden = torch.randn(batch, tokens, 1024).bfloat16()
    slots = torch.ops.vlmfast_checked_token_merge.merge_slots(metric, kept, contextual)
    merged = traffic("merge_rows", hidden, kept, slots, contextual)
    numbers = 4 * batch * contextual * slices * tokens + 8 * 32 * batch * chosen
    moved = OPS["merge_rows"].bytes(hidden, kept, slots, contextual)
    rows = batch * (chosen + contextual)
    assert merged == (1, row * batch * tokens + numbers, row * rows)
    assert sum(merged[1:]) < 1.05 * moved

    grad = torch.randn(batch, chosen + contextual, 1024).bfloat16()
    launches, loaded, stored = traffic("merge_rows_backward", grad, slots, contextual)
    numbers = 4 * (32 + tokens) * batch * tokens  # a block counts the slots of its crop: here one has 160 tokens
    assert (launches, stored) == (1, row * batch * tokens)
    assert row * batch * tokens < loaded < row * batch * tokens + numbers


# ---- planted faults ----

FAULTS = [
    Fault("one zero above the other", "token_choice.cuh", "if (bits == kSign) bits = 0;", "", MISPLACED),
    Fault("last digit left out", "token_choice.cuh", "shift >= 0;", "shift > 0;", f"{MISPLACED}|{BOUNDS}"),
    Fault("histogram not cleared", "token_choice.cuh", "      histogram[digit] = 0;\n", "", f"{MISPLACED}|nobody"),
    Fault(
        "barrier missing behind the digit",
        "token_choice.cuh",
        "      __syncthreads();\n      threshold",
        "      threshold",
        f"{RACE}|nobody has written",
    ),
    Fault(
        "one tie too many",
        "token_choice.cuh",
        "equal_rank < wanted)",
        "equal_rank <= wanted)",
        f"{RACE}|{BOUNDS}",
    ),
    Fault("key too many in the cache", "token_choice.cuh", "position < policy.cached ?", "true ?", "dynamic shared"),
    Fault(
        "NaN unchecked",
        "token_choice.cuh",
        "VLMFAST_DEVICE_ASSERT(numbers,",
        "VLMFAST_DEVICE_ASSERT(true,",
        UNNOTICED,
    ),
    Fault("last of equal targets", "token_slots.cuh", "similarity > best)", "similarity >= best)", MISPLACED),
    Fault("last of equal targets later", "token_slots.cuh", "!(best > best_s", "!(best >= best_s", MISPLACED),
    Fault(
        "place of a target off by one",
        "token_slots.cuh",
        "position <= number + rank",
        "position < number + rank",
        MISPLACED,
    ),
    Fault("more targets than asked for", "token_slots.cuh", "&& number / step < contextual", "", MISPLACED),
    Fault("zero length unchecked", "token_slots.cuh", "squares[0] > 0.f ?", "true ?", MISPLACED),
    Fault(
        "barrier missing behind the places",
        "token_slots.cuh",
        "      __syncthreads();\n      for (int base",
        "      for (int base",
        f"{RACE}|nobody has written",
    ),
    Fault(
        "kept position unchecked",
        "token_rows.cuh",
        "min(max(kept[crop][rank], int64_t{0}), int64_t{sizes.tokens - 1})",
        "kept[crop][rank]",
        BOUNDS,
    ),
    Fault("members of the last step alone", "token_rows.cuh", "count += listed;", "count = listed;", WRONG),
    Fault("warp left out", "token_rows.cuh", "other < kWarps;", "other < kWarps - 1;", WRONG),
    Fault(
        "barrier missing before the sum",
        "token_rows.cuh",
        "    __syncthreads();\n    const int64_t out_column",
        "    const int64_t out_column",
        f"{RACE}|nobody has written",
    ),
    Fault("mean without its target", "token_rows.cuh", "1.f + count :", "0.f + max(count, 1) :", WRONG),
    Fault("slot followed anywhere", "token_rows.cuh", "slot < 2 * int64_t{contextual}", "true", WRONG),
    Fault(
        "vector too many",
        "token_rows.cuh",
        "k * kStep < hidden - column",
        "k * kStep <= hidden - column",
        f"{RACE}|{BOUNDS}",
    ),
    Fault("alignment of crops unchecked", "cuda.cu", "{x.rows(), x.images()}", "{x.rows()}", MISALIGNED),
    Fault(
        "32-bit offset",
        "cuda_torch.h",
        "data + image * image_stride + row * row_stride;",
        "data + int(image) * int(image_stride) + int(row) * int(row_stride);",
        "overflow",
    ),
]


@pytest.mark.planted
@pytest.mark.parametrize("index", range(len(FAULTS)), ids=[fault.name.replace(" ", "-") for fault in FAULTS])
def test_planted_fault_is_noticed(tmp_path: Path, index: int) -> None:
    library = f"vlmfast_token_merge_fault_{index}"
    planted = plant(FAULTS[index], "token_merge", tmp_path)
    torch.ops.load_library(str(build.build("check", library=library, csrc=planted, cache=tmp_path)))
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception), match=FAULTS[index].notice):
        examine(library, torch.bfloat16)
