"""Steps of training on tiny models, the same whether the model is patched or not, alone or on several processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vlmfast
from tests.helpers.reduce_models import WORD, Talk
from vlmfast.reduce import EvenTokens, Method

MODELS = ("qwen3_vl", "llava")
METHOD = EvenTokens(0.5)  # chooses by place, so that a rounding never changes what is kept
PROMPTS = [(0, 10, 11, 12), (10, 1, 13, 14, 15, 16), (12, 12, 2, 20, 21)]
RATE = 0.01

Weights = dict[str, np.ndarray]  # numpy's arrays, which pass between processes without shared memory


def samples(talk: Talk, *numbers: int) -> dict[str, Tensor]:
    """Make a batch of these prompts, whose labels are their words."""
    inputs = talk.batch(*(PROMPTS[number] for number in numbers), side="right")
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["input_ids"] < WORD, -100), "use_cache": False}


def weights(model: Any) -> Weights:
    """Return copies of all parameters that are trained, those of shards put together."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name: getattr(x, "full_tensor", lambda x=x: x)().detach().numpy().copy() for name, x in named}


def descend(model: Any) -> None:
    """Make a step of gradient descent, also on shards."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= RATE * parameter.grad
                parameter.grad = None


def steps(talk: Talk, model: Any, batches: list[tuple[int, ...]], method: Method | None = None) -> list[float]:
    """Descend twice along the mean gradient of the batches; return their losses. A method shortens them beforehand."""
    if method is not None and not talk.compressible:
        pytest.skip("this transformers takes no encoded images with DeepStack")
    losses = []
    model.train()
    for _ in range(2):
        for batch in batches:
            inputs = samples(talk, *batch)
            if method is not None:
                inputs = vlmfast.compress_inputs(talk.model, inputs, method)
            loss = model(**inputs).loss
            (loss / len(batches)).backward()
            losses.append(loss.item())
        descend(model)
    return losses


def assert_trained_alike(got: Weights, want: Weights, before: Weights) -> None:
    """Check that each parameter moved as far and to the same place, but for what float32 rounds."""
    assert got.keys() == want.keys() == before.keys()
    eps = np.finfo(np.float32).eps
    moved = 0
    for name, start in before.items():
        step = np.linalg.norm(want[name] - start)
        moved += bool(step > 0)
        error = np.linalg.norm(got[name] - want[name])
        assert error <= 1e-3 * step + 4 * eps * np.linalg.norm(start), (
            f"{name}: off by {error:.2g}, a step is {step:.2g}"
        )
    assert moved > len(before) / 2


def assert_losses_alike(got: Sequence[float], want: Sequence[float], tolerance: float = 1e-5) -> None:
    assert len(want) > 1
    assert len(set(want)) > 1, "nothing was trained"
    np.testing.assert_allclose(got, want, rtol=tolerance)
