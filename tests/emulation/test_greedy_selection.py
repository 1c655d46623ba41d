"""The CUDA kernels of the greedy choices under the emulation's eyes: every access, planted faults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.emulation.harness import (
    BOUNDS,
    DIFFER,
    PAIRS,
    UNNOTICED,
    UNORDERED,
    Call,
    Fault,
    Kernels,
    compare,
    every_access,
    far_rows,
    planted_faults,
    sample_calls,
)
from tests.helpers.bad_bounds import BAD_BOUNDS, CHOSEN, TOKENS
from tests.helpers.cases import DTYPES
from vlmfast.ops.greedy_selection import cases as greedy


def far_calls() -> Iterator[Call]:
    """Offsets that pass 2 ** 31, from row to row and from image to image."""
    rows = far_rows()
    yield "farthest", (rows[None], 2)
    yield "farthest", (rows[:, None], 1)
    yield "dpp_map", (rows[None], 2)
    yield "dpp_map", (rows[:, None], 1)
    yield "coverage", (rows[None], 2)
    yield "coverage", (rows[:, None], 1)


def weighed_calls() -> Iterator[Call]:
    """A quality of another dtype than the features."""
    quality = greedy._eighths(2, 40, device="cpu")
    for dtype in DTYPES:
        yield "farthest", (greedy._signs(2, 40, 64, "cpu").to(dtype), 9, quality)
        yield "dpp_map", (torch.eye(40, 64).repeat(2, 1, 1).to(dtype), 9, quality)
        similarity = torch.randint(-8, 33, (2, 40, 30)) / 16
        yield "coverage", (similarity.to(dtype), 9, quality[:, :30].bfloat16(), quality.half())


def examine(kernels: Kernels, dtype: torch.dtype) -> None:
    for bad in (-1.0, torch.inf, torch.nan):
        quality = torch.ones(1, 40).to(dtype)
        quality[0, 33] = bad
        with pytest.raises(RuntimeError, match="quality must be finite and not negative"):
            kernels("farthest", torch.eye(40)[None].to(dtype), 0, quality)
        with pytest.raises(RuntimeError, match="relevance must be finite and not negative"):
            kernels("dpp_map", torch.eye(40)[None].to(dtype), 0, quality)
        with pytest.raises(RuntimeError, match="quality must be finite and not negative"):
            kernels("coverage", torch.eye(40)[None].to(dtype), 0, None, quality)
        with pytest.raises(RuntimeError, match="row_weights must be finite and not negative"):
            kernels("coverage", torch.eye(40)[None].to(dtype), 0, quality)
    rows = torch.eye(TOKENS)[None].to(dtype)
    for message, bounds in BAD_BOUNDS:
        for name, weights in (("farthest", (None, True)), ("dpp_map", (None,)), ("coverage", (None, None))):
            with pytest.raises(RuntimeError, match=message):
                kernels(name, rows, CHOSEN, *weights, *bounds)
    compare(kernels, sample_calls("greedy_selection", PAIRS, dtype), far_calls())
    if dtype == torch.float32:  # with bfloat16 no other kernels are built
        compare(kernels, weighed_calls())


test_greedy_selection = every_access("greedy_selection", examine)

FAULTS = [
    Fault("the last of equal ones", "greedy.cuh", "if (bits + 1 > key)", "if (bits + 1 >= key)", DIFFER),
    Fault("zero above all others", "greedy.cuh", "    worth += 0.f;  // -0 + 0 is 0\n", "", DIFFER),
    Fault(
        "best of the first warps alone",
        "greedy.cuh",
        "if (lane < GreedyPolicy::kWarps) best",
        "if (lane < 2) best",
        DIFFER,
    ),
    Fault(
        "quality unchecked",
        "farthest.cuh",
        "read_weights(quality, image.row, image.first, tokens, state.weight),",
        "(read_weights(quality, image.row, image.first, tokens, state.weight), true),",
        UNNOTICED,
    ),
    Fault("a token is its own neighbour", "farthest.cuh", "if (other != token)", "if (true)", DIFFER),
    Fault("lengths unknown", "farthest.cuh", "    __syncthreads();  // all lengths are written\n", "", UNORDERED),
    Fault("quality of the first token", "farthest.cuh", "first_by_quality ? distance", "true ? distance", DIFFER),
    Fault(
        "quality of the others", "farthest.cuh", "own.offer(nearest * state.weight[token]", "own.offer(nearest", DIFFER
    ),
    Fault("doubles apart", "farthest.cuh", "distance < kSame ?", "distance < -1.f ?", DIFFER),
    Fault("rows without a direction", "farthest.cuh", "square > 0.f && square < INFINITY ?", "true ?", DIFFER),
    Fault(
        "tile read while it is written",
        "gram.cuh",
        "      __syncthreads();  // the elements before these have been read\n",
        "",
        UNORDERED,
    ),
    Fault(
        "elements behind the last",
        "gram.cuh",
        "&& first_depth + depth < policy.size",
        "",
        "of an input of|isnan|elements differ",
    ),
    Fault(
        "the first part alone", "gram.cuh", "first_depth += Tile::kDepth", "first_depth += 64 * Tile::kDepth", DIFFER
    ),
    Fault("nothing new ahead of others", "dpp_map.cuh", "token, worth > 0.f)", "token)", DIFFER),
    Fault("relevance once", "dpp_map.cuh", "worth = own * left[token] * own", "worth = left[token] * own", DIFFER),
    Fault("roundings are new", "dpp_map.cuh", "now < kNothingNew ?", "now < 0.f ?", DIFFER),
    Fault("the last share alone", "dpp_map.cuh", "for (int i = 0; i < step;", "for (int i = 1; i < step;", DIFFER),
    Fault("shares of another length", "dpp_map.cuh", "share = rest * scale", "share = rest", DIFFER),
    Fault(
        "left of the best one asked for too late",
        "dpp_map.cuh",
        "      __syncthreads();  // all threads have read left_of_best\n",
        "",
        UNORDERED,
    ),
    Fault(
        "images unchecked",
        "greedy.cuh",
        "VLMFAST_DEVICE_ASSERT(first >= 0 && end >= first",
        "VLMFAST_DEVICE_ASSERT(true || first >= 0 && end >= first",
        f"{UNNOTICED}|{BOUNDS}",
    ),
    Fault(
        "what is kept unchecked",
        "greedy.cuh",
        "VLMFAST_DEVICE_ASSERT(place >= 0",
        "VLMFAST_DEVICE_ASSERT(true || place >= 0",
        f"{UNNOTICED}|{BOUNDS}",
    ),
    Fault("positions from the image on", "greedy.cuh", "= image.first + token;", "= token;", DIFFER),
    Fault("what is not finite covers", "coverage.cuh", "fabsf(similarity) < INFINITY ?", "true ?", DIFFER),
    Fault(
        "a bound taken for what it adds", "coverage.cuh", "state.step[own] == step", "state.step[own] >= 0.f", DIFFER
    ),
    Fault(
        "rows covered by the last alone", "coverage.cuh", "fmaxf(state.covered[row], sound", "fmaxf(0.f, sound", DIFFER
    ),
    Fault("weights of rows left out", "coverage.cuh", ", 0.f) * state.weight[row]", ", 0.f)", DIFFER),
    Fault("quality of a token left out", "coverage.cuh", " * state.quality[best.token];", ";", DIFFER),
    Fault("chosen twice", "coverage.cuh", "state.bound[best] = kTaken;", "", f"{DIFFER}|nobody|isnan"),
    Fault(
        "rows read while they are covered",
        "coverage.cuh",
        "      __syncthreads();  // the rows are covered\n",
        "",
        UNORDERED,
    ),
    Fault(
        "weights read before they are there",
        "coverage.cuh",
        "    __syncthreads();  // all weights are written\n",
        "",
        UNORDERED,
    ),
]

test_planted_fault_is_noticed = planted_faults("greedy_selection", examine, FAULTS)
