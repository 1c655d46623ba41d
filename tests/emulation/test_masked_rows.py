"""The CUDA kernels of the ops on masked rows in the emulation: every access, every byte, planted faults."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import pytest
import torch

from tests.emulation.harness import (
    BOUNDS,
    DIFFER,
    MISALIGNED,
    RACE,
    UNNOTICED,
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

MISCOUNTED = f"{DIFFER}|device-side assertion|race: write of global"  # which of them depends on the first call to fail

# Layouts of the tensors, one pair per call in turn: rows aligned for vectors of 16, 4 and 2 bytes, unaligned masks.
LAYOUTS = [
    (cases.contiguous, cases.padded),
    (cases.padded, cases.offset),
    (functools.partial(cases.padded, by=2), cases.contiguous),
    (cases.oddly_padded, cases.transposed),
    (cases.expanded, cases.every_other),
]


def long_samples() -> Iterator[Call]:
    """Yield calls with more positions than the chunks of one launch, and runs that fill whole chunks."""
    mask = torch.rand(2, 1700) < 0.6
    mask[:, 300:900], mask[:, 1000:1300] = True, False
    x = torch.randn(2, 1700, 8).bfloat16()
    yield "row_index", (mask,)
    yield "split_rows", (x, mask, int(mask.sum()))
    for keep, pad_left in ((1700, False), (1200, True)):
        yield "compact_tokens", (x, mask, keep, None, pad_left)
        yield "compact_tokens_backward", (x[:, :keep], mask, pad_left)


def far_calls() -> Iterator[Call]:
    """Yield calls with rows at offsets beyond 2 ** 31."""
    x, rows, mask = far_rows()[None], far_rows(), torch.ones(1, 3, dtype=torch.bool)
    yield "deepstack_add", (x, mask, rows)
    yield "place_embeddings", (x, mask, rows)
    yield "split_rows", (x, mask, 3)
    yield "compact_tokens", (x, ~mask, 3)
    yield "compact_tokens_backward", (x, ~mask)


def refused_calls() -> Iterator[tuple[str, Call]]:
    """Yield messages and calls that only the device can refuse, before it accesses anything out of bounds."""
    mask = torch.tensor([[False, True, True], [True, True, True]])
    index = OPS["row_index"].reference(mask)
    x, message = torch.randn(2, 3, 8).bfloat16(), "the mask must be true at as many positions as there are rows"
    for rows, given in itertools.product((0, 4, 6), (None, index)):
        yield message, ("deepstack_add", (x, mask, torch.randn(rows, 8).bfloat16(), given))
        yield message, ("place_embeddings", (x, mask, torch.randn(rows, 8).bfloat16(), given))
        yield message, ("split_rows", (x, mask, rows, given))
        yield message, ("split_rows", (x[..., :0], mask, rows, given))
    yield message, ("place_embeddings", (x[:, :0], mask[:, :0], x[0, :2]))
    for position in (-1, 3):
        order = torch.tensor([[0, 1], [0, position]])
        yield "order must be within 0 and the tokens", ("compact_tokens", (x, mask, 2, order))


def examine(kernels: Kernels, dtype: torch.dtype) -> None:
    for message, (name, args) in refused_calls():
        with pytest.raises(RuntimeError, match=message):
            kernels(name, *args)
    compare(kernels, far_calls(), long_samples(), sample_calls("masked_rows", LAYOUTS, dtype))


test_masked_rows = every_access("masked_rows", examine)


def test_bytes_moved() -> None:
    mask = torch.zeros(2, 96, dtype=torch.bool)
    mask[:, 32:64] = True
    x, embeds, index = torch.randn(2, 96, 256).bfloat16(), torch.randn(64, 256).bfloat16(), None
    for launches in (2, 1):  # without an index, then with one
        assert_traffic(launches, "deepstack_add", x, mask, embeds, index)
        assert_traffic(launches, "place_embeddings", x, mask, embeds, index)
        for rest in (True, False):
            assert_traffic(launches, "split_rows", x, mask, 64, index, rest)
        index = OPS["row_index"].reference(mask)
    assert_traffic(1, "row_index", mask)
    assert_traffic(2, "compact_tokens", x, mask, 80)
    assert_traffic(1, "compact_tokens", x, mask, 80, OPS["compact_tokens"].reference(x, mask, 80)[2])
    assert_traffic(2, "compact_tokens_backward", x[:, :80], mask)


def test_mask_of_any_bytes() -> None:
    """A bool view of other bytes may hold any byte, and to torch every byte but 0 is true."""
    mask = torch.randint(0, 3, (1, 900), dtype=torch.uint8).mul(127)
    index = OPS["row_index"].reference(mask != 0)
    assert torch.equal(*checked("masked_rows")("row_index", mask.view(torch.bool)), index)


FAULTS = [
    Fault(
        "barrier missing in the scan",
        "common.cuh",
        "    __syncthreads();\n    const int count",
        "    const int count",
        "nobody has written",
    ),
    Fault("one buffer for two barriers", "common.cuh", "warp_counts[turn % 2]", "warp_counts[0]", RACE),
    Fault("chunk begins late", "mask_ranks.cuh", "first = begin; first", "first = begin + 1; first", MISCOUNTED),
    Fault("chunk counts itself", "mask_ranks.cuh", "count(0, begin)", "count(0, end)", MISCOUNTED),
    Fault("nothing carried on", "mask_ranks.cuh", "      before += sums.block;\n", "", MISCOUNTED),
    Fault("end of a sample left out", "mask_ranks.cuh", "if (threadIdx.x < end - rest)", "if (false)", MISCOUNTED),
    Fault("mask in vectors from anywhere", "mask_ranks.cuh", "min(before_vectors, ", "min(int64_t{0}, ", MISALIGNED),
    Fault("number unchecked", "cuda.cu", "number < rows && !", "!", BOUNDS),
    Fault("total unchecked", "cuda.cu", "&& !(last &&", "&& !(false &&", UNNOTICED),
    Fault("order unchecked", "cuda.cu", "position >= 0 && position < tokens,", "true,", UNNOTICED),
    Fault(
        "stride of another tensor", "cuda.cu", ": embeds.at(number)}", ": embeds.data + number * x.strides[0]}", BOUNDS
    ),
    Fault(
        "32-bit row offset",
        "cuda_torch.h",
        "indices * strides[dim++]",
        "int(indices) * int(strides[dim++])",
        "overflow",
    ),
    Fault("alignment unchecked", "cuda_torch.h", "view.stride(dim) * view.width() % bytes == 0", "true", MISALIGNED),
    Fault("vector too many", "row_moves.cuh", "k * step < hidden", "k * step <= hidden", BOUNDS),
]

test_planted_fault_is_noticed = planted_faults("masked_rows", examine, FAULTS)
