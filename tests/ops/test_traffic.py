"""Traffic is counted, not guessed: what each memory-bound op moves, held against `op.bytes`, and its launches."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.emulation import build
from tests.helpers import cases, traffic
from vlmfast.benchmarks.traffic import counted
from vlmfast.registry import OPS, Op

MOST = 1.05  # of op.bytes, each byte counted once per launch
MOST_REQUESTED = {
    "row_index": (1.75, "the mask before a chunk is counted again, a byte a position"),
    "merge_slots": (4.8, "each block of tokens reads all targets"),
    "merge_rows_backward": (3.0, "a row goes to all tokens that it was made of, and each block counts its slots again"),
    "cls_attention": (1.25, "the normaliser's parts are read for each token"),
    "rms_norm": (1.55, "a weight for each row of 2048: as much as the row"),
    "add_rms_norm": (1.3, "the same"),
    "rms_norm_backward": (1.7, "the same twice, for both passes over a row"),
    "pixel_shuffle_gemm": (4.0, "each block of columns reads all patches, each of tokens all of the weight"),
    "pixel_shuffle_norm": (2.05, "weight and bias for each row of 4096"),
    "pixel_shuffle_norm_backward": (2.05, "a weight for each row, in both passes"),
}
MOST_OTHERS_REQUEST = 1.1
LAUNCHES = {
    "triton": {"pixel_shuffle_norm_backward": 3},
    "emulated": {"pixel_shuffle_norm_backward": 2},
    "both": {
        "merge_tokens": 2,
        "visionzip": 3,
        "deepstack_add": 2,
        "place_embeddings": 2,
        "split_rows": 2,
        "compact_tokens": 2,
        "compact_tokens_backward": 2,
        "cls_attention": 2,
        "pixel_shuffle_gemm": 2,
        "rms_norm_backward": 2,
    },
}

BOUND_BY_MEMORY = [op for op in OPS.values() if op.name not in traffic.COMPUTE]


def require(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("with a GPU, Triton's interpreter is off")
    elif reason := build.missing():
        pytest.skip(reason)


@pytest.mark.parametrize("backend", traffic.BACKENDS)
@pytest.mark.parametrize("op", cases.each(BOUND_BY_MEMORY))
def test_traffic(op: Op, backend: str) -> None:
    require(backend)
    if not traffic.has_kernels(op, backend):
        assert op.name in cases.GEMMS
        pytest.skip(f"{op.name} has no CUDA kernel")
    _, args = traffic.workload(op)
    moved, budget = traffic.count(op, backend, args), op.bytes(*args)
    assert moved.launches == (LAUNCHES[backend] | LAUNCHES["both"]).get(op.name, 1)
    # from below too: a budget for what is never moved would let anything pass
    assert 0.95 <= moved.distinct / budget <= MOST
    assert moved.requested / budget <= MOST_REQUESTED.get(op.name, (MOST_OTHERS_REQUEST,))[0]


def test_report_is_of_every_op() -> None:
    """benchmarks/results/static.json: `make static` writes it."""
    for op in BOUND_BY_MEMORY:
        for backend in ("triton",) if op.name in cases.GEMMS else ("triton", "cuda"):
            ratio = counted(op.name, backend)
            assert ratio is not None
            assert 0.95 <= ratio <= MOST
    assert counted("rms_norm", "native") is None


def test_an_index_given_spares_a_launch() -> None:
    require("triton")
    op, mask = OPS["deepstack_add"], torch.rand(2, 90) < 0.5
    args = torch.randn(2, 90, 256), mask, torch.randn(int(mask.sum()), 256), OPS["row_index"].reference(mask)
    moved = traffic.count(op, "triton", args)
    assert (moved.launches, moved.distinct) == (1, op.bytes(*args))


def test_counts_of_triton() -> None:
    """Each lane that a mask lets through; what is read twice; what two launches read; bools; atomics."""
    require("triton")
    import triton

    from tests.helpers.traffic_kernel import kernel

    x, flags, y, total = torch.randn(100), torch.ones(100, dtype=torch.bool), torch.empty(100), torch.zeros(1)

    def run(launches: int) -> traffic.Traffic:
        with traffic.watched() as seen:
            for _ in range(launches):
                kernel[(triton.cdiv(100, 32),)](x, flags, y, total, 90, BLOCK=32)
        return traffic.total(seen)

    lanes, programs = 90, 4
    requested = lanes * (4 + 4 + 1 + 4) + 8 * programs
    assert run(1) == traffic.Traffic(1, lanes * (4 + 1 + 4) + 8, requested)
    assert run(2) == traffic.Traffic(2, 2 * (lanes * (4 + 1 + 4) + 8), 2 * requested)


def test_counts_of_the_emulation() -> None:
    require("emulated")
    x, weight = torch.randn(7, 1032).bfloat16(), torch.randn(1032).bfloat16()
    moved = traffic.count(OPS["rms_norm"], "emulated", (x, weight))
    assert moved == traffic.Traffic(1, 2 * x.nbytes + weight.nbytes, 2 * x.nbytes + 7 * weight.nbytes)


def test_partial_sums_of_a_larger_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has two multiprocessors: with more, each two leave rows of sums, as the budget says of a GPU."""
    require("triton")
    monkeypatch.setattr(importlib.import_module("vlmfast.kernels.rms_norm"), "processors", lambda x: 7)
    x, weight = torch.randn(30, 1024), torch.randn(1024)
    moved = traffic.count(OPS["rms_norm_backward"], "triton", (x, x.clone(), weight))
    assert moved.distinct == 3 * x.nbytes + 2 * weight.nbytes + 14 * 2 * 4 * 1024
