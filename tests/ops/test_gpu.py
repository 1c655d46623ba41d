"""Tests that need a GPU: no synchronisation, CUDA graphs, streams, and devices that are not the current one."""

from __future__ import annotations

import pytest
import torch

import vlmfast
from tests.helpers.cases import EACH_OP, outputs, require, runnable
from vlmfast.registry import OPS, Op

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Turn the fixture of the same name off: filling memory launches kernels, and here only ours may run."""
    torch.manual_seed(0)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("op", EACH_OP)
def test_no_host_synchronisation(op: Op, backend: str):
    for args in runnable(op, backend, op.cases.samples("cuda", torch.bfloat16))[:5]:
        with vlmfast.use(backend):
            op.run(*args)  # the first call compiles
            torch.cuda.set_sync_debug_mode("error")
            try:
                op.run(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("op", EACH_OP)
def test_cuda_graph(op: Op, backend: str):
    """A captured call replays with new contents of its inputs."""
    args = runnable(op, backend, op.cases.samples("cuda", torch.bfloat16))[0]
    with vlmfast.use(backend):
        op.run(*args)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = outputs(op.run(*args))
        for a in args:
            if isinstance(a, torch.Tensor) and a.is_floating_point():
                a.copy_(torch.randn_like(a))
        graph.replay()
        for got, want in zip(captured, outputs(op.run(*args)), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_the_current_stream_is_used(backend: str):
    """On a stream behind a long copy, the op must wait for that copy."""
    require(OPS["rms_norm"], backend)
    x, weight = torch.zeros(4096, 4096, device="cuda"), torch.ones(4096, device="cuda")
    source = torch.ones_like(x)
    with vlmfast.use(backend):
        vlmfast.rms_norm(x, weight)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(100_000_000)
            x.copy_(source)
            y = vlmfast.rms_norm(x, weight)
        torch.cuda.synchronize()
    torch.testing.assert_close(y, source)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_device_that_is_not_the_current_one(backend: str):
    require(OPS["rms_norm"], backend)
    x, weight = torch.randn(8, 512, device="cuda:1"), torch.randn(512, device="cuda:1")
    with vlmfast.use(backend), torch.cuda.device(0):
        y = vlmfast.rms_norm(x, weight)
    assert y.device == x.device
    torch.testing.assert_close(y, vlmfast.rms_norm.op.reference(x, weight))
