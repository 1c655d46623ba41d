"""The matmul of a projection is called without its module only where this makes no difference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP

import vlmfast
from tests.helpers.patches_models import patched, tiny
from tests.helpers.segments_of_towers import LENGTHS, WIDTH, attention_of, inputs_of
from vlmfast import linear as linear_layers
from vlmfast.modules import project

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def of_another_class(linear: nn.Linear) -> None:
    linear.__class__ = Doubled


def hooked(linear: nn.Linear) -> None:
    linear.register_forward_hook(lambda module, args, output: 2 * output)


def hooked_before(linear: nn.Linear) -> None:
    linear.register_forward_pre_hook(lambda module, args: 2 * args[0])


def replaced(linear: nn.Linear) -> None:
    linear.forward = MethodType(lambda self, x: 2 * F.linear(x, self.weight, self.bias), linear)


def compiled(linear: nn.Linear) -> None:
    linear._compiled_call_impl = lambda x: 2 * F.linear(x, linear.weight, linear.bias)


def kept_elsewhere(linear: nn.Linear) -> None:
    """Remove the weight from the module's parameters, as FSDP does with its shards."""
    weight = 2 * linear.weight.detach()
    del linear.weight
    linear.weight = weight
    if linear.bias is not None:
        bias = 2 * linear.bias.detach()
        del linear.bias
        linear.bias = bias


CHANGES = (of_another_class, hooked, hooked_before, replaced, compiled, kept_elsewhere)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_what_was_done_to_a_projection_counts(bias: bool, change: Callable[[nn.Linear], None]):
    owner = nn.ModuleDict({"up": nn.Linear(6, 4, bias=bias)})
    x = torch.randn(3, 6)
    before = owner["up"](x)
    assert torch.equal(project(owner, "up", x), before)
    change(owner["up"])
    assert torch.equal(project(owner, "up", x), owner["up"](x))
    assert not torch.equal(project(owner, "up", x), before)


@torch.no_grad()
def test_what_was_done_to_all_projections_counts(monkeypatch: pytest.MonkeyPatch):
    owner, x = nn.ModuleDict({"up": nn.Linear(6, 4)}), torch.randn(3, 6)
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * forward(self, x))
    assert torch.equal(project(owner, "up", x), owner["up"](x))
    assert torch.equal(owner["up"](x), 2 * F.linear(x, owner["up"].weight, owner["up"].bias))


@torch.no_grad()
def test_every_projection_of_a_layer_is_seen_by_its_hook():
    model, inputs = tiny("llama")
    seen: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def count(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = seen.get(name, 0) + 1

        return count

    with vlmfast.patch(model):
        for name, module in model.named_modules():
            if name.endswith(PROJECTIONS):
                module.register_forward_hook(hook(name))
        model(**inputs)
    assert len(seen) == len(PROJECTIONS) * model.config.num_hidden_layers
    assert set(seen.values()) == {1}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("order", ["quantised, then patched", "patched, then quantised"])
def test_quantised_projections_are_called(order: str):
    """torch's dynamic quantisation replaces each linear layer by a module that has a method in place of its weight."""
    model, inputs = tiny("llama")
    model.lm_head = nn.Identity()  # the weight of the last one is tied
    quantise = functools.partial(torch.ao.quantization.quantize_dynamic, qconfig_spec={nn.Linear})
    want = quantise(model)(**inputs).logits
    assert not torch.equal(model(**inputs).logits, want)
    if order.startswith("patched"):
        vlmfast.patch(model)
        model = quantise(model)
    else:
        model = quantise(model)
        vlmfast.patch(model)
    kinds = {type(module) for name, module in model.named_modules() if name.endswith(PROJECTIONS)}
    assert kinds == {torch.ao.nn.quantized.dynamic.Linear}
    assert patched(model)
    assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("change", ["slow", "fast", "hook"])
def test_those_of_a_tower_are_widened_where_half_precision_is_slow(change: str, monkeypatch: pytest.MonkeyPatch):
    """What was done to a linear layer is called as before."""
    monkeypatch.setattr(linear_layers, "SLOW", frozenset({torch.bfloat16} if change != "fast" else ()))
    monkeypatch.setattr(linear_layers, "FEWEST_ROWS", 1)
    attention, inputs = attention_of().bfloat16(), inputs_of(LENGTHS["windows"], torch.bfloat16)
    config = Qwen2_5_VLConfig(vision_config={"hidden_size": WIDTH, "intermediate_size": 24}).vision_config
    mlp: nn.Module = Qwen2_5_VLMLP(config).bfloat16()
    model = nn.ModuleDict({"attention": attention, "mlp": mlp})
    seen, original = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: seen.append(x.dtype) or original(x, *rest))
    if change == "hook":
        for layer in (attention.qkv, attention.proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            layer.register_forward_hook(lambda *_: None)
    with vlmfast.patch(model):
        attention(**inputs)
        mlp(inputs["hidden_states"])
    assert seen == [torch.float32 if change == "slow" else torch.bfloat16] * 5
