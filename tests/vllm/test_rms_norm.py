"""vlmfast's RMSNorm as a provider of vLLM's IR op."""

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
    with ir.ops.rms_norm.set_priority(["vlmfast", "native"]):
        found = ir.ops.rms_norm(x, weight, 1e-6)
        assert ir.ops.rms_norm(x, None, 1e-6).shape == x.shape
    assert found.dtype == native.dtype
    assert (found - exact).abs().max() <= (native - exact).abs().max() * 1.01
    assert not rms_norm.supported(x, None, 1e-6)
    assert not rms_norm.supported(x, weight.double(), 1e-6)
    assert not rms_norm.supported(x, weight, 1e-6, 48)


def test_an_engine_that_uses_it_answers_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = written_models.write("llava", tmp_path)
    requests = rounds("llava")[0]
    expected = hugging_face(folder, "visionzip:14+4", requests)
    calls: list[tuple[int, ...]] = []
    real = vlmfast.rms_norm
    monkeypatch.setattr(
        vlmfast, "rms_norm", lambda x, *args, **kwargs: calls.append(x.shape) or real(x, *args, **kwargs)
    )
    priority = {"ir_op_priority": {"rms_norm": ["vlmfast", "native"]}}
    with engine(folder, "visionzip:14+4", kernel_config=priority) as llm:
        found = differences(ask(llm, requests), expected)
    assert max(found) < TOLERANCE, found
    assert calls
