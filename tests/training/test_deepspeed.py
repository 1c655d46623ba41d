"""DeepSpeed's ZeRO-3 on two processes: `make test-training` runs this."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed")

import vlmfast
from tests.helpers.patches_models import patched
from tests.helpers.reduce_models import Talk
from tests.training.processes import on_two_processes
from tests.training.steps import (
    METHOD,
    RATE,
    Weights,
    assert_losses_alike,
    assert_trained_alike,
    samples,
    weights,
)
from tests.training.steps import steps as train_alone
from vlmfast.reduce import Method

FIRST = {"llava": 0, "qwen3_vl": 2}


@pytest.fixture(scope="module", autouse=True)
def imported_before_the_forks() -> None:
    for name in ("torch._dynamo", "torch._functorch.aot_autograd", "torch._inductor.compile_fx"):
        importlib.import_module(name)  # DeepSpeed needs them


def train(rank: int, model_type: str, when: str, method: Method | None) -> tuple[list[float], Weights]:
    import deepspeed

    talk = Talk.of(model_type)
    model = talk.model.train()
    if when == "first":
        vlmfast.patch(model, reduce=method)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), RATE), config=config, dist_init_required=False
    )
    if when == "last":
        vlmfast.patch(engine, reduce=method)
    assert bool(patched(model)) == (when != "never")
    assert all(hasattr(parameter, "ds_tensor") for parameter in model.parameters())
    losses = []
    for _ in range(2):
        inputs = samples(talk, FIRST[model_type] if rank == 0 else 1)
        if when == "never" and method is not None:
            inputs = vlmfast.compress_inputs(engine, inputs, method)
        loss = engine(**inputs).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return losses, weights(model)


@pytest.mark.parametrize(
    ("model_type", "when", "method"),
    [("qwen3_vl", "first", None), ("llava", "last", None), ("llava", "first", METHOD), ("qwen3_vl", "last", METHOD)],
)
def test_zero_3(model_type: str, when: str, method: Any, monkeypatch: pytest.MonkeyPatch):
    """The first losses are those of one process; the steps are DeepSpeed's, and those of an unpatched model."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    # By shared memory it would have to be compiled, for minutes: gloo remains. `deepspeed.comm.torch` is torch itself.
    monkeypatch.setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)
    talk = Talk.of(model_type)
    before = weights(talk.model)
    alone = train_alone(talk, talk.model, [(FIRST[model_type],), (1,)], method)
    plain = on_two_processes(train, model_type, "never", method)
    for rank, (own, found) in enumerate(on_two_processes(train, model_type, when, method)):
        losses, trained = plain[rank]
        assert own[0] == pytest.approx(alone[rank], rel=1e-5)
        assert_losses_alike(own, losses)
        assert_trained_alike(found, trained, before)
