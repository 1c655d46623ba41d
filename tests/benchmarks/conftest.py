"""One little model in place of the published ones."""

from __future__ import annotations

import pytest

from tests.helpers.published_models import little
from vlmfast.benchmarks import models, published


@pytest.fixture
def llava(monkeypatch):
    """The little LLaVA as the only model of the benchmark, under its own name, and one round."""
    monkeypatch.setattr(published, "MODELS", {"llava-1.5-7b": little("llava-1.5-7b")})
    monkeypatch.setattr(models, "ROUNDS", {"cpu": 1})
    return published.MODELS["llava-1.5-7b"]
