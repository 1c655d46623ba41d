"""Two processes train or run one model together: as one process does the unpatched model."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import vlmfast
from tests.conftest import shortens_prompts
from tests.helpers.patches_models import patched
from tests.helpers.reduce_models import Talk
from tests.helpers.thorough import first_of
from tests.training.processes import RANKS, on_two_processes
from tests.training.steps import (
    METHOD,
    MODELS,
    Weights,
    assert_losses_alike,
    assert_trained_alike,
    samples,
    steps,
    weights,
)
from vlmfast.reduce import Method

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or not dist.is_gloo_available(), reason="needs fork and gloo")

FIRST = {"llava": 0, "qwen3_vl": 2}  # a prompt of the first process; that of the second is 1
Trained = tuple[list[float], Weights]


# ---- training ----


@functools.cache
def alone(model_type: str, method: Method | None, *batches: tuple[int, ...]) -> Trained:
    """Train the unpatched model in this process."""
    talk = Talk.of(model_type)
    losses = steps(talk, talk.model, list(batches), method)
    return losses, weights(talk.model)


@functools.cache
def start(model_type: str) -> Weights:
    return weights(Talk.of(model_type).model)


def replicated(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def sharded(model: Any, checkpointing: bool = False) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded_with_checkpoints(model: Any) -> nn.Module:
    return sharded(model, checkpointing=True)


def not_at_all(model: nn.Module) -> nn.Module:
    """Leave both processes to themselves: their gradients are not averaged."""
    return model


def train(rank: int, model_type: str, wrap: Callable, patch_first: bool, method: Method | None) -> Any:
    talk = Talk.of(model_type)
    if patch_first:
        patch = vlmfast.patch(talk.model, reduce=method)
        wrapped = wrap(talk.model)
    else:
        wrapped = wrap(talk.model)
        patch = vlmfast.patch(wrapped, reduce=method)
    losses = steps(talk, wrapped, [(FIRST[model_type],)] if rank == 0 else [(1,)])
    return losses, weights(talk.model), patch.report()


WAYS = [replicated, sharded, sharded_with_checkpoints]


@pytest.mark.parametrize("model_type", first_of(reversed(MODELS)))
@pytest.mark.parametrize("method", first_of([None, METHOD]), ids=["all tokens", "half of them"])
@pytest.mark.parametrize("patch_first", [True, False], ids=["patched first", "patched last"])
@pytest.mark.parametrize(
    "wrap", [*WAYS[:2], pytest.param(WAYS[2], marks=pytest.mark.thorough)], ids=lambda f: f.__name__
)
def test_each_with_its_own_samples(wrap: Callable, patch_first: bool, method: Method | None, model_type: str):
    if method is not None and not shortens_prompts():
        pytest.skip("prompts can be shortened from transformers 5.17 on")
    losses, trained = alone(model_type, method, (FIRST[model_type],), (1,))
    for rank, (own, found, report) in enumerate(on_two_processes(train, model_type, wrap, patch_first, method)):
        assert_losses_alike(own, losses[rank::RANKS])
        assert_trained_alike(found, trained, start(model_type))
        (layers,) = [line for line in report.splitlines() if "DecoderLayer.forward" in line]
        assert " 2 modules" in layers, report
        assert "skipped" not in report


def test_gradients_that_are_not_averaged_would_be_noticed():
    _, trained = alone("llava", None, (FIRST["llava"],), (1,))
    for _, found, _ in on_two_processes(train, "llava", not_at_all, True, None):
        with pytest.raises(AssertionError, match="off by"):
            assert_trained_alike(found, trained, start("llava"))


# ---- tensor parallelism ----

# That of Qwen3, which Qwen3-VL's configuration lacks
QWEN3 = {
    **{f"self_attn.{name}_proj": "colwise" for name in "qkv"},
    **dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), "replicated_with_grad_allreduce"),
    "self_attn.o_proj": "rowwise",
    "mlp.gate_proj": "colwise",
    "mlp.up_proj": "colwise",
    "mlp.down_proj": "rowwise",
}
PLANS: dict[str, Any] = {
    "llava": "auto",
    "qwen3_vl": {f"model.language_model.layers.*.{name}": style for name, style in QWEN3.items()},
}


def in_slices(rank: int, folder: str, model_type: str, method: Method | None) -> Any:
    """Load each process's part of the weights, patch, train, and generate.

    A step has one batch: transformers' hook for the norms of queries and keys sums what is accumulated once more.
    """
    from transformers.distributed import DistributedConfig

    how = DistributedConfig(tp_size=RANKS, tp_plan=PLANS[model_type])
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, distributed_config=how)
    vlmfast.patch(model, reduce=method)
    assert patched(model)
    layer = model.model.language_model.layers[0]
    assert layer.self_attn.q_proj.weight.to_local().shape[0] == layer.self_attn.q_proj.weight.shape[0] // RANKS
    talk = Talk.of(model_type)
    losses = steps(talk, model, [(FIRST[model_type], 1)])
    return losses, weights(model), answer(talk, model)


def answer(talk: Talk, model: Any) -> list[list[int]]:
    inputs = {name: value for name, value in samples(talk, 1).items() if name not in ("labels", "use_cache")}
    return model.eval().generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:].tolist()


@pytest.mark.parametrize("method", first_of([None, METHOD]), ids=["all tokens", "half of them"])
@pytest.mark.parametrize("model_type", MODELS)
def test_each_with_a_slice_of_the_weights(model_type: str, method: Method | None, tmp_path: Path):
    pytest.importorskip("transformers.distributed")
    talk = Talk.of(model_type)
    talk.model.save_pretrained(tmp_path)
    losses, trained = alone(model_type, method, (FIRST[model_type], 1))
    with torch.no_grad():
        for name, parameter in talk.model.named_parameters():
            parameter.copy_(torch.from_numpy(trained[name]))
    with vlmfast.patch(talk.model, exclude="*", reduce=method) if method else nullcontext():
        want = answer(talk, talk.model)
    for own, found, said in on_two_processes(in_slices, str(tmp_path), model_type, method):
        assert_losses_alike(own, losses)
        assert_trained_alike(found, trained, start(model_type))
        assert said == want
