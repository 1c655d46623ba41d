"""Cases of the gated activation that the generated tests do not reach."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vlmfast
from tests.helpers.cases import family, require
from vlmfast.registry import OPS

ROOT = Path(__file__).parents[2]
FAMILY = family("silu_mul")
X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere torch takes other exponentials")


def every_number(dtype: torch.dtype) -> torch.Tensor:
    """Return every number of a 16-bit dtype, in rows of whole vectors."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)


@X86
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_native_silu_of_every_number_is_that_of_torch(dtype: torch.dtype):
    require(OPS["silu_mul"], "native")
    gate = every_number(dtype)
    with vlmfast.use("native"):
        got = vlmfast.silu_mul(gate, torch.ones_like(gate))
    assert torch.equal(got.view(torch.int16)[~got.isnan()], F.silu(gate).view(torch.int16)[~got.isnan()])
    assert torch.equal(got.isnan(), F.silu(gate).isnan())


@X86
@pytest.mark.parametrize(("dtype", "others"), [(torch.float16, 1), (torch.bfloat16, 0)], ids=str)
def test_native_gelu_of_every_number_is_that_of_torch(dtype: torch.dtype, others: int):
    """All are bit-equal but one of float16, where torch's tanh falls on the other side of a tie."""
    require(OPS["silu_mul"], "native")
    gate = every_number(dtype)
    want = F.gelu(gate, approximate="tanh")
    with vlmfast.use("native"):
        got = vlmfast.silu_mul(gate, torch.ones_like(gate), "gelu_tanh")
    assert torch.equal(got.isnan(), want.isnan())
    assert int((got != want)[~want.isnan()].sum()) <= others


@X86
def test_native_silu_of_float32_is_that_of_whole_vectors_of_torch():
    require(OPS["silu_mul"], "native")
    gate, up = torch.randn(64, 1024) * 20, torch.randn(64, 1024)
    with vlmfast.use("native"):
        assert torch.equal(vlmfast.silu_mul(gate, up), F.silu(gate) * up)


@pytest.mark.thorough
def test_every_instruction_set_gives_the_same_bits(tmp_path: Path):
    require(OPS["silu_mul"], "native")
    code = """
import sys, torch, vlmfast
torch.manual_seed(0)
found = []
with vlmfast.use("native"):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        grad, gate, up = (8 * torch.randn(3, 111, dtype=dtype) for _ in range(3))
        for activation in ("silu", "gelu_tanh"):
            found.append(vlmfast.silu_mul(gate, up, activation))
            found += vlmfast.ops.silu_mul.silu_mul_backward(grad, gate, up, activation)
torch.save(found, sys.argv[1])
"""
    results = []
    for level in ("baseline", "v3", "v4", "v4_bf16"):
        path = tmp_path / f"{level}.pt"
        environment = {**os.environ, "VLMFAST_CPU_LEVEL": level, "PYTHONPATH": str(ROOT)}
        run = subprocess.run([sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True)
        if re.search("which this (processor|build) does not have", run.stderr):
            continue
        assert run.returncode == 0, run.stderr
        results.append(torch.load(path))
    assert results
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_halves_of_one_projection_are_not_copied():
    """The halves are read in place, with the row stride of the whole."""
    fused = torch.randn(5, 2, 96)
    gate, up = fused.chunk(2, dim=-1)
    for backend in ("native", "triton", "torch"):
        if OPS["silu_mul"].backend(backend).unsupported(gate, up) is None:
            with vlmfast.use(backend):
                got = vlmfast.silu_mul(gate, up)
            torch.testing.assert_close(got, F.silu(gate) * up)


def test_backward_keeps_two_tensors():
    """Upstream's lines save a third one, the activated gate."""
    gate, up = (torch.randn(2, 8, requires_grad=True) for _ in range(2))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        vlmfast.silu_mul(gate, up)
    assert len(kept) == 2
