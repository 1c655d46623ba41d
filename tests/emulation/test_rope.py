"""The CUDA kernels of rotary embedding in the emulation: every access, every byte, planted faults."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.emulation.harness import (
    BOUNDS,
    MISALIGNED,
    RACE,
    WRONG,
    Call,
    Fault,
    Kernels,
    assert_traffic,
    compare,
    every_access,
    far_rows,
    planted_faults,
    sample_calls,
)
from tests.helpers import cases
from vlmfast.registry import OPS

LAYOUTS = [
    (cases.contiguous, cases.padded),
    (cases.padded, cases.contiguous),
    (cases.oddly_padded, cases.offset),
    (cases.transposed, cases.contiguous),
    (cases.contiguous, cases.transposed),
]


def far_calls() -> Iterator[Call]:
    heads = far_rows()[:, None, None]
    angles = torch.rand(1, 3, 1, 64).bfloat16().squeeze(2).movedim(1, 0)
    yield "qk_norm_rope", (heads, heads, None, None, angles, angles)
    yield "qk_norm_rope_backward", (heads, heads, None, None, None, None, angles, angles)


def many_calls(dtype: torch.dtype) -> Iterator[Call]:
    """Yield calls with more rows than the emulation's small grids take at once, and more heads than a block does."""
    for heads, size, variant in ((19, 128, "llama"), (5, 72, "gemma"), (17, 64, None)):
        query, key = torch.randn(1, 11, heads, size).to(dtype), torch.randn(1, 11, 3, size).to(dtype)
        weights = [None if variant is None else torch.randn(size).to(dtype) for _ in range(2)]
        angles = torch.rand(1, 11, size).to(dtype), torch.rand(1, 11, size).to(dtype)
        tail = *weights, *angles, 0.3, variant or "olmo"
        yield "qk_norm_rope", (query, key, *tail)
        yield "qk_norm_rope_backward", (torch.randn_like(query), torch.randn_like(key), query, key, *tail)


def examine(kernels: Kernels, dtype: torch.dtype) -> None:
    same_order = dtype != torch.float32
    compare(kernels, far_calls())
    compare(kernels, sample_calls("rope", LAYOUTS, dtype), same_order=same_order)
    compare(kernels, many_calls(dtype), same_order=same_order)


test_rope = every_access("rope", examine)


def test_bytes_moved() -> None:
    label, args = next(iter(OPS["qk_norm_rope"].cases.workloads("cpu", torch.bfloat16)))
    assert label.startswith("1 of")
    assert_traffic(1, "qk_norm_rope", *args)
    query, key, _, _, *angles = args
    assert_traffic(1, "qk_norm_rope", query, key, None, None, *angles)
    assert_traffic(1, "qk_norm_rope_backward", query, key, None, None, None, None, *angles)
    grads = query.clone(), key.clone()
    assert_traffic(2, "qk_norm_rope_backward", *grads, *args)
    assert_traffic(1, "qk_norm_rope_backward", *grads, *args, 1e-6, "llama", None, False)


FAULTS = [
    Fault(
        "weights exchanged",
        "cuda.cu",
        "kernel_heads<scalar_t>(scope, call.query, {}, query_output)",
        "[&] { auto heads = kernel_heads<scalar_t>(scope, call.query, {}, query_output); heads.weight = "
        "scope.input<scalar_t>(call.key.weight).data; return heads; }()",
        WRONG,
    ),
    Fault(
        "positions shifted by one", "cuda.cu", "table.at(row % angles.rows)", "table.at((row + 1) % angles.rows)", WRONG
    ),
    Fault(
        "sections in another order", "cuda.cu", "(place >= angles.ends[0]) +", "2 * (place >= angles.ends[0]) -", WRONG
    ),
    Fault("angles of another batch", "cuda.cu", "row % angles.rows", "row", BOUNDS),
    Fault(
        "turned the other way",
        "cuda.cu",
        "a * cos.first[k][i] + b * sin.second[k][i]",
        "a * cos.first[k][i] - b * sin.second[k][i]",
        WRONG,
    ),
    Fault("rest of a head turned", "cuda.cu", "half + pair + rest_half, -1", "half + pair + rest_half, 0", WRONG),
    Fault("rounding of products left out", "cuda.cu", "round_all<scalar_t>(products);", "", WRONG),
    Fault("heads past the last", "cuda.cu", "head < heads ? head : -1", "head", f"{BOUNDS}|{RACE}"),
    Fault("alignment of halves unchecked", "cuda.cu", "half % vec == 0 &&", "", MISALIGNED),
    Fault(
        "partial sums of keys over those of queries", "cuda.cu", "* 2 + blockIdx.y) * head_dim", "* 2) * head_dim", RACE
    ),
    Fault("barrier missing", "cuda.cu", "  __syncthreads();\n", "", f"{RACE}|nobody has written"),
    Fault(
        "gradients of one group lost",
        "cuda.cu",
        "group < Policy::kHeads; ++group",
        "group < Policy::kHeads - 15; ++group",
        WRONG,
    ),
]

test_planted_fault_is_noticed = planted_faults("rope", examine, FAULTS)
