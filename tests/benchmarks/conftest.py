"""Fixtures that replace the published models by one small model, and the workloads by one small one."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.cases import require, with_cases
from tests.helpers.published_models import little
from vlmfast.benchmarks import models, published, timing
from vlmfast.registry import OPS

MACHINE = timing.Ceilings(copy_gb_per_s=2.0, gemm_tflop_per_s=0.5)


@pytest.fixture
def llava(monkeypatch):
    """Make a small LLaVA the only model of the benchmark, under its published name, with one round."""
    monkeypatch.setattr(published, "MODELS", {"llava-1.5-7b": little("llava-1.5-7b")})
    monkeypatch.setattr(models, "ROUNDS", {"cpu": 1})
    return published.MODELS["llava-1.5-7b"]


@pytest.fixture
def small(monkeypatch):
    """Give rms_norm one small workload and short rounds."""
    require(OPS["rms_norm"], "native")
    monkeypatch.setattr(timing, "ROUND_SECONDS", 1e-4)
    monkeypatch.setattr(timing.measure, "__defaults__", (3,))
    monkeypatch.setattr(timing, "ceilings", lambda device, dtype: MACHINE)
    workload = ("4x64", (torch.randn(4, 64), torch.randn(64)))
    op = with_cases(OPS["rms_norm"], workloads=lambda device, dtype: [workload], layers={})
    monkeypatch.setitem(OPS, "rms_norm", op)
    return op
