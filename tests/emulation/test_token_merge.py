"""The CUDA kernels of the token merge in the emulation: every access, every byte, planted faults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.emulation.harness import (
    BOUNDS,
    DIFFER,
    MISALIGNED,
    PAIRS,
    RACE,
    SCHEDULES,
    UNNOTICED,
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
    in_gaps,
    planted_faults,
    sample_calls,
)
from vlmfast.ops.token_merge.definition import MERGES
from vlmfast.registry import OPS


def kept_of(batch: int, tokens: int, kept: int) -> Tensor:
    return torch.rand(batch, tokens).argsort(1)[:, :kept].sort(1).values


def long_calls(dtype: torch.dtype) -> Iterator[Call]:
    """Yield calls with several steps of each loop: keys beyond the shared memory, many targets, members and scores."""
    yield "top_tokens", (torch.randint(0, 300, (2, 20700)).to(dtype), 9000)
    doubles = torch.randn(1, 7, 24).repeat(1, 50, 1)[:, :330].to(dtype)  # equal targets are in later steps too
    yield "merge_slots", (doubles, kept_of(1, 330, 20), 150)
    x, nobody = in_gaps(torch.randn(2, 9, 16).to(dtype), 3), torch.empty(2, 0, dtype=torch.int64)
    yield "merge_slots", (x, nobody, 2)  # only the rows of the first crop are aligned for vectors
    yield "merge_rows", (x, nobody, torch.tensor([[0, *[1] * 8]] * 2).int(), 1)
    yield "merge_rows_backward", (x, torch.arange(-9, 0).int().expand(2, 9), 0)
    kept = kept_of(1, 2300, 20)
    few, many = (OPS["merge_slots"].reference(torch.randn(1, 2300, 4), kept, count) for count in (3, 2100))
    hidden = torch.randn(1, 2300, 8).to(dtype)
    for slots, count in ((few, 3), (many, 2100)):
        for merge in MERGES:
            if slots is few:  # each row's block reads all slots, so many slots would take a minute here
                yield "merge_rows", (hidden, kept, slots, count, merge)
            yield "merge_rows_backward", (hidden[:, : 20 + count], slots, count, merge)


def far_calls() -> Iterator[Call]:
    """Yield calls with offsets beyond 2 ** 31 between rows and between crops."""
    for rows in (far_rows()[None], far_rows()[:, None]):
        batch, tokens = rows.shape[:2]
        nothing, slots = torch.empty(batch, 0, dtype=torch.int64), torch.zeros(batch, tokens, dtype=torch.int32)
        slots[:, 1:] = 1
        yield "merge_slots", (rows, nothing, 1)
        yield "merge_rows", (rows, nothing, slots, 1)
        yield "merge_rows_backward", (rows, slots - tokens, 0)


def strange_calls(dtype: torch.dtype) -> Iterator[tuple[Call, tuple[Any, ...]]]:
    """Yield calls with slots that merge_slots never returns, and arguments without such slots that give the same."""
    hidden, kept = torch.randn(1, 9, 8).to(dtype), torch.tensor([[2, 5]])
    slots = torch.tensor([[0, 2, -2, 4, -(2**31), -1, 2**31 - 1, -3, 1]], dtype=torch.int32)
    tame = slots.where((slots < 4) & (slots >= -2), -3)
    yield ("merge_rows", (hidden, kept, slots, 2)), (hidden, kept, tame, 2)
    yield ("merge_rows_backward", (hidden[:, :4], slots, 2)), (hidden[:, :4], tame, 2)
    yield ("merge_rows", (hidden, torch.tensor([[-5, 2**40]]), tame, 2)), (hidden, torch.tensor([[0, 8]]), tame, 2)


def examine(kernels: Kernels, dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match="scores must not be NaN"):
        kernels("top_tokens", torch.tensor([[1.0, torch.nan, 2.0]]).to(dtype), 1)
    for position in (2**40, -(2**40)):  # such positions must not lead out of the sequence
        kernels("merge_slots", torch.randn(2, 40, 16).to(dtype), torch.full((2, 30), position), 5)
    for call, like in strange_calls(dtype):
        compare(kernels, [call], like=like)
    samples = sample_calls("token_merge", PAIRS, dtype)
    compare(kernels, samples, long_calls(dtype), far_calls(), same_order=dtype != torch.float32)


test_token_merge = every_access("token_merge", examine)


@pytest.mark.thorough  # kernels for float32, whose bits tell orders of summation apart, must be compiled for it
def test_every_run_gives_the_same_bits() -> None:
    kernels = checked("token_merge", bfloat16_alone=False)
    hidden, kept = torch.randn(2, 300, 40), kept_of(2, 300, 9)
    slots = OPS["merge_slots"].reference(hidden, kept, 3)
    runs = []
    for schedule in SCHEDULES:
        kernels.schedule(schedule)
        runs += kernels("merge_rows", hidden, kept, slots, 3)
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_bytes_moved() -> None:
    hidden, metric = torch.randn(2, 300, 1024).bfloat16(), torch.randn(2, 300, 128).bfloat16()
    kept = kept_of(2, 300, 20)
    assert_traffic(1, "top_tokens", torch.randn(2, 300), 20)
    assert_traffic(1, "merge_slots", metric, kept, 4)
    slots = OPS["merge_slots"].reference(metric, kept, 4)
    assert_traffic(1, "merge_rows", hidden, kept, slots, 4)
    assert_traffic(1, "merge_rows_backward", hidden[:, :24], slots, 4)


FAULTS = [
    Fault("one zero above the other", "top_tokens.cuh", "if (bits == kSign) bits = 0;", "", DIFFER),
    Fault("last digit left out", "top_tokens.cuh", "shift >= 0;", "shift > 0;", f"{DIFFER}|{BOUNDS}"),
    Fault("histogram not cleared", "top_tokens.cuh", "      histogram[digit] = 0;\n", "", f"{DIFFER}|nobody"),
    Fault(
        "barrier missing behind the digit",
        "top_tokens.cuh",
        "      __syncthreads();\n      threshold",
        "      threshold",
        UNORDERED,
    ),
    Fault(
        "one tie too many",
        "top_tokens.cuh",
        "equal_rank < threshold.wanted)",
        "equal_rank <= threshold.wanted)",
        f"{RACE}|{BOUNDS}",
    ),
    Fault("key too many in the cache", "top_tokens.cuh", "position < policy.cached ?", "true ?", "dynamic shared"),
    Fault(
        "NaN unchecked", "top_tokens.cuh", "VLMFAST_DEVICE_ASSERT(numbers,", "VLMFAST_DEVICE_ASSERT(true,", UNNOTICED
    ),
    Fault("last of equal targets", "merge_slots.cuh", "similarity > best &&", "similarity >= best &&", DIFFER),
    Fault("last of equal targets later", "merge_slots.cuh", "!(best > best_s", "!(best >= best_s", DIFFER),
    Fault(
        "place of a target off by one", "merge_slots.cuh", "[rank] <= number + rank", "[rank] < number + rank", DIFFER
    ),
    Fault("more targets than asked for", "merge_slots.cuh", "&& number / step < contextual", "", DIFFER),
    Fault("zero length unchecked", "merge_slots.cuh", "squares[0] > 0.f ?", "true ?", DIFFER),
    Fault(
        "barrier missing behind the places",
        "merge_slots.cuh",
        "    __syncthreads();\n    for (int base",
        "    for (int base",
        UNORDERED,
    ),
    Fault(
        "kept position unchecked",
        "merge_rows.cuh",
        "min(max(kept.at(batch)[rank], int64_t{0}), int64_t{sizes.tokens - 1})",
        "kept.at(batch)[rank]",
        BOUNDS,
    ),
    Fault("members of the last step alone", "merge_rows.cuh", "count += listed;", "count = listed;", WRONG),
    Fault("warp left out", "merge_rows.cuh", "other < kWarps;", "other < kWarps - 1;", WRONG),
    Fault(
        "barrier missing before the sum",
        "merge_rows.cuh",
        "    __syncthreads();\n    const int64_t out_column",
        "    const int64_t out_column",
        UNORDERED,
    ),
    Fault("mean without its target", "merge_rows.cuh", "1.f + count :", "0.f + max(count, 1) :", WRONG),
    Fault("slot followed anywhere", "merge_rows.cuh", "slot < 2 * contextual", "true", WRONG),
    Fault(
        "vector too many",
        "merge_rows.cuh",
        "k * kStep < left",
        "k * kStep <= left",
        f"{RACE}|{BOUNDS}",
    ),
    Fault(
        "alignment of sequences unchecked",
        "cuda_torch.h",
        "for (int dim = 0; dim < rank - 1; ++dim) aligned",
        "for (int dim = rank > 2; dim < rank - 1; ++dim) aligned",
        MISALIGNED,
    ),
    Fault(
        "32-bit offset", "cuda_torch.h", "indices * strides[dim++]", "int(indices) * int(strides[dim++])", "overflow"
    ),
]

test_planted_fault_is_noticed = planted_faults("token_merge", examine, FAULTS)
