"""The counted traffic of each memory-bound op against `op.cases.bytes`, and its launches."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.emulation import build
from tests.helpers import cases, traffic
from vlmfast.benchmarks.ops import counted
from vlmfast.registry import OPS, Op

MOST = 1.05  # largest ratio to op.cases.bytes, each byte counted once per launch


def require(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("with a GPU, Triton's interpreter is off")
    elif reason := build.missing():
        pytest.skip(reason)


@pytest.mark.thorough  # the tests in tests/emulation count the traffic of small calls
@pytest.mark.parametrize("backend", ["triton", "emulated"])
@pytest.mark.parametrize("op", cases.each(traffic.BOUND_BY_MEMORY))
def test_traffic(op: Op, backend: str) -> None:
    require(backend)
    _, args = traffic.workload(op)
    moved, budget = traffic.count(op, backend, args), op.cases.bytes(*args)
    assert moved.launches == cases.launches_of(op, backend)
    # Also from below: a budget that counts bytes which are never moved would hide others.
    assert 0.95 <= moved.distinct / budget <= MOST
    assert moved.requested / budget <= op.cases.requested


def test_report_is_of_every_op() -> None:
    """benchmarks/results/static.json, which `make static` writes, has every op."""
    for op in traffic.BOUND_BY_MEMORY:
        for backend in ("triton", "cuda"):
            ratio = counted(op.name, backend)
            assert ratio is not None
            assert 0.95 <= ratio <= MOST
    assert counted("rms_norm", "native") is None


def test_an_index_given_spares_a_launch() -> None:
    require("triton")
    op, mask = OPS["deepstack_add"], torch.rand(2, 90) < 0.5
    args = torch.randn(2, 90, 256), mask, torch.randn(int(mask.sum()), 256), OPS["row_index"].reference(mask)
    moved = traffic.count(op, "triton", args)
    assert (moved.launches, moved.distinct) == (1, op.cases.bytes(*args))


@pytest.mark.parametrize("name", ["farthest", "dpp_map"])
def test_images_in_a_row_are_compared_apart(name: str) -> None:
    """A greedy selection compares the tokens of an image with each other, not with those of the next."""
    require("triton")
    ends, kept = (torch.tensor(each, dtype=torch.int32) for each in ([0, 40, 170, 234], [0, 5, 25, 35]))
    args = torch.randn(1, 234, 64), 35, *((None, True) if name == "farthest" else (None,))
    moved = traffic.count(OPS[name], "triton", (*args, ends, kept, 130))
    assert moved.distinct == pytest.approx(OPS[name].cases.bytes(*args, ends, kept, 130), rel=0.01)


def test_counts_of_triton() -> None:
    """Counts are right for masked lanes, repeated loads, loads of two launches, bools and atomics."""
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
    """With more multiprocessors than the interpreter's two, partial sums take the bytes that the budget says."""
    require("triton")
    monkeypatch.setattr(importlib.import_module("vlmfast.kernels.rms_norm"), "processors", lambda x: 7)
    x, weight = torch.randn(30, 1024), torch.randn(1024)
    moved = traffic.count(OPS["rms_norm_backward"], "triton", (x, x.clone(), weight))
    assert moved.distinct == 3 * x.nbytes + 2 * weight.nbytes + 14 * 2 * 4 * 1024
