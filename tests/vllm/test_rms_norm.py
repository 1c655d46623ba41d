"""vlmfast's RMSNorm as a provider of vLLM's IR ops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vllm import ir

import vlmfast
import vlmfast.vllm
from tests.helpers import written_models
from tests.vllm.agreement import TOLERANCE, ask, differences, engine, hugging_face, rounds
from vlmfast.vllm import rms_norm


@pytest.fixture(autouse=True)
def registered():
    vlmfast.vllm.register()
    ir.set_default_torch_wrap(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_is_as_good_as_native(dtype: torch.dtype):
    """Against float64, and what it does not support goes to vLLM's own."""
    x, weight = torch.randn(5, 7, 96, dtype=dtype), torch.randn(96, dtype=dtype)
    exact = torch.nn.functional.rms_norm(x.double(), [96], weight.double(), 1e-6)
    with ir.ops.rms_norm.set_priority(["native"]):
        native = ir.ops.rms_norm(x, weight, 1e-6)
        bare = ir.ops.rms_norm(x, None, 1e-6)
    with ir.ops.rms_norm.set_priority(["vlmfast", "native"]):
        found = ir.ops.rms_norm(x, weight, 1e-6)
        assert torch.equal(ir.ops.rms_norm(x, None, 1e-6), bare)
    assert found.dtype == native.dtype
    assert (found - exact).abs().max() <= (native - exact).abs().max() * 1.01
    assert not rms_norm.supported(x, None, 1e-6)
    assert not rms_norm.supported(x, weight.double(), 1e-6)
    assert not rms_norm.supported(x, weight, 1e-6, 48)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_sum_is_normalised_before_it_is_rounded_as_in_vllm(dtype: torch.dtype):
    x, residual, weight = (torch.randn(*shape, dtype=dtype) for shape in ((7, 96), (7, 96), (96,)))
    fused = ir.ops.fused_add_rms_norm
    with fused.set_priority(["native"]):
        expected, summed = fused(x, residual, weight, 1e-6)
        bare = fused(x, residual, None, 1e-6)
    before = x.clone(), residual.clone()
    with fused.set_priority(["vlmfast", "native"]):
        found, added = fused(x, residual, weight, 1e-6)
        assert all(map(torch.equal, fused(x, residual, None, 1e-6), bare))
    assert (x.equal(before[0]), residual.equal(before[1])) == (True, True)
    assert added.equal(summed)
    assert found.dtype == dtype
    equal = (found == expected).float().mean() if dtype != torch.float32 else (found - expected).abs().max() < 1e-5
    assert equal > 0.999, equal
    if dtype != torch.float32:  # as Hugging Face has it
        rounded = vlmfast.add_rms_norm(x, residual, weight, eps=1e-6)[0]
        assert (rounded == expected).float().mean() < 0.95
    assert not rms_norm.add_supported(x, residual, None, 1e-6)
    assert not rms_norm.add_supported(x, residual.double(), weight, 1e-6)
    assert not rms_norm.add_supported(x, residual, weight, 1e-6, 48)


def test_an_engine_that_uses_it_answers_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = written_models.write("llava", tmp_path)
    requests = rounds("llava")[0]
    expected = hugging_face(folder, "visionzip:14+4", requests)
    calls: list[str] = []

    def counted(name: str) -> None:
        real = getattr(vlmfast, name)
        monkeypatch.setattr(vlmfast, name, lambda *args, **kwargs: calls.append(name) or real(*args, **kwargs))

    counted("rms_norm")
    counted("add_rms_norm")
    priority = {"ir_op_priority": {op: ["vlmfast", "native"] for op in ("rms_norm", "fused_add_rms_norm")}}
    with engine(folder, "visionzip:14+4", kernel_config=priority) as llm:
        found = differences(ask(llm, requests), expected)
    assert max(found) < TOLERANCE, found
    assert set(calls) == {"rms_norm", "add_rms_norm"}
