"""Liger and a patch on one model, in either order: `make test-training` runs this.

Liger's kernels need a GPU, and Triton's interpreter fails on them. Here torch computes what they compute, so that these
tests show who calls whom.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("liger_kernel")

import liger_kernel.transformers.functional as fused
import liger_kernel.transformers.rms_norm as norms
import liger_kernel.transformers.swiglu as gates
from liger_kernel.transformers import _apply_liger_kernel_to_instance, monkey_patch
from transformers.models.llama import modeling_llama

import vlmfast
from tests.helpers.patches_models import patched
from tests.helpers.reduce_models import Talk
from tests.training.steps import METHOD, assert_losses_alike, assert_trained_alike, descend, samples, weights
from vlmfast.reduce import Method

CALLED: list[str] = []


class Norm:
    @staticmethod
    def apply(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, *_: Any) -> Tensor:
        CALLED.append("norm")
        return (offset + weight) * F.rms_norm(x, x.shape[-1:], eps=eps)


class Gate:
    @staticmethod
    def apply(gate: Tensor, up: Tensor, *_: Any) -> Tensor:
        CALLED.append("gate")
        return F.silu(gate) * up


class Loss:
    @staticmethod
    def apply(x: Tensor, weight: Tensor, target: Tensor, bias: Any, *_: Any) -> tuple[Any, ...]:
        CALLED.append("loss")
        return F.cross_entropy(F.linear(x, weight, bias), target, ignore_index=-100), None, None, None


def rope(q: Tensor, k: Tensor, *angles: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    CALLED.append("rope")
    return upstream_rope(q, k, *angles)


upstream_rope = modeling_llama.apply_rotary_pos_emb


@pytest.fixture(autouse=True)
def computed_by_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace Liger's kernels, and take out of transformers' modules again what Liger puts into them."""
    monkeypatch.setattr(norms, "LigerRMSNormFunction", Norm)
    monkeypatch.setattr(gates, "LigerSiLUMulFunction", Gate)
    monkeypatch.setattr(fused, "LigerFusedLinearCrossEntropyFunction", Loss)
    monkeypatch.setattr(monkey_patch, "liger_rotary_pos_emb", rope)
    modules = [module for name, module in sys.modules.items() if name.startswith("transformers.models.ll")]
    before = [(module, dict(vars(module))) for module in modules]
    CALLED.clear()
    yield
    for module, members in before:
        vars(module).update(members)


def liger(model: Any) -> None:
    _apply_liger_kernel_to_instance(model=model)


def liger_without_its_loss(model: Any) -> None:
    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False)


def patch(model: Any) -> None:
    with pytest.warns(UserWarning, match="already replaced") if "forward" in vars(model) else nullcontext():
        vlmfast.patch(model)


def train(talk: Talk, method: Method | None = None) -> list[float]:
    losses = []
    talk.model.train()
    for _ in range(3):
        inputs = samples(talk, 0, 1)
        loss = talk.model(**inputs if method is None else vlmfast.compress_inputs(talk.model, inputs, method)).loss
        loss.backward()
        losses.append(loss.item())
        descend(talk.model)
    return losses


@pytest.mark.parametrize("steps", [(liger, patch), (patch, liger)], ids=["patched last", "patched first"])
@pytest.mark.parametrize("method", [None, METHOD], ids=["all tokens", "compressed"])
def test_they_compose(steps: tuple[Callable, ...], method: Method | None):
    plain, talk = Talk.of("llava"), Talk.of("llava")
    before = weights(talk.model)
    want = train(plain, method)
    for step in steps:
        step(talk.model)
    assert patched(talk.model)
    assert not CALLED
    assert_losses_alike(train(talk, method), want)
    assert_trained_alike(weights(talk.model), weights(plain.model), before)
    assert {"norm", "gate", "loss"} <= set(CALLED), "Liger's part is not run"


@pytest.mark.parametrize("patch_first", [True, False], ids=["patched first", "patched last"])
def test_a_reduction_composes_with_all_but_the_loss(patch_first: bool):
    plain, talk = Talk.of("llava"), Talk.of("llava")
    want = train(plain, METHOD)
    if patch_first:
        vlmfast.patch(talk.model, reduce=METHOD)
        liger_without_its_loss(talk.model)
    else:
        liger_without_its_loss(talk.model)
        with pytest.warns(UserWarning, match="already replaced"):
            vlmfast.patch(talk.model, reduce=METHOD)
    assert_losses_alike(train(talk), want)
    assert {"norm", "gate"} <= set(CALLED)


def test_a_reduction_is_refused_with_the_loss():
    talk = Talk.of("llava")
    liger(talk.model)
    with pytest.raises(RuntimeError, match="prompts cannot be shortened: forward was already replaced"):
        vlmfast.patch(talk.model, reduce=METHOD)
    talk = Talk.of("llava")
    vlmfast.patch(talk.model, reduce=METHOD)
    liger(talk.model)
    with pytest.raises(RuntimeError, match=r"pixel_values came to LlavaModel without .* vlmfast.compress_inputs"):
        train(talk)
    with torch.no_grad():  # text is not reduced
        talk.model(**talk.batch((10, 11, 12)))
