"""Sub-models, and models inside wrappers: PEFT, accelerate, and wrappers that hide the attributes of a model."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

import vlmfast
from tests.helpers.global_hooks import seen_by_global_hooks
from tests.helpers.patches_models import COMMON, assert_same, logits, patched, replaceable, rms_norms, state, tiny
from vlmfast.patches.rms_norm import llama_rms_norm


@pytest.fixture(autouse=True)
def on_the_definition():
    with vlmfast.use("torch"):
        yield


@pytest.mark.parametrize(
    ("model_type", "path"),
    [
        ("qwen2_5_vl", "model.visual"),
        ("qwen2_5_vl", "model.language_model"),
        ("qwen3_vl", "model.language_model"),
        ("internvl", "model.vision_tower"),
        ("llava", "model.language_model"),
        ("llama4", "language_model"),
    ],
)
def test_sub_model(model_type: str, path: str):
    model, inputs = tiny(model_type)
    part = model.get_submodule(path)
    want = logits(model, inputs)
    with vlmfast.patch(part):
        assert patched(model) == patched(part) == replaceable(part) != []
        assert_same(logits(model, inputs), want)
    with pytest.raises(ValueError, match="knows no method of this llama4_vision_model"):
        vlmfast.patch(tiny("llama4")[0].vision_model.model)


class Wrapper(nn.Module):
    """Hides the attributes of the model, as DistributedDataParallel and others do."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


def test_wrapped():
    model, inputs = tiny("llava")
    wrapper = Wrapper(Wrapper(model))
    want = logits(wrapper, inputs)
    with vlmfast.patch(wrapper):
        assert patched(model) == replaceable(model)
        assert_same(logits(wrapper, inputs), want)


def test_peft():
    peft = pytest.importorskip("peft")
    model, inputs = tiny("llava")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["input_layernorm"], init_lora_weights=False)
    wrapper = peft.get_peft_model(model, config)
    want = logits(wrapper, inputs)
    with vlmfast.patch(wrapper):
        assert patched(wrapper) == replaceable(wrapper)
        assert len(rms_norms(wrapper)) == 5 + 2  # two of them have trained copies
        assert_same(logits(wrapper, inputs), want)
    with vlmfast.patch(model):
        assert_same(logits(wrapper, inputs), want)


class Hook:
    """Imitates accelerate's hooks, which keep the method on the instance."""

    @staticmethod
    def add(module: nn.Module) -> None:
        module._hf_hook, module._old_forward = Hook(), module.forward

        def forward(module, *args, **kwargs):
            return module._old_forward(*args, **kwargs)

        module.forward = functools.update_wrapper(functools.partial(forward, module), module._old_forward)

    @staticmethod
    def remove(module: nn.Module) -> None:
        module.forward = module._old_forward
        del module._hf_hook, module._old_forward


def real_hooks():
    hooks = pytest.importorskip("accelerate.hooks")
    return lambda m: hooks.add_hook_to_module(m, hooks.ModelHook()), hooks.remove_hook_from_module


@pytest.mark.parametrize("hooks", [lambda: (Hook.add, Hook.remove), real_hooks], ids=["imitation", "accelerate"])
def test_accelerate_hooks(hooks):
    add, remove = hooks()
    model, inputs = tiny("llava")
    want = logits(model, inputs)
    norms = rms_norms(model)
    ours = llama_rms_norm
    plain = type(norms[0]).forward

    for module in model.modules():
        add(module)
    before = {name: (cls, set(attributes)) for name, (cls, attributes) in state(model).items()}
    patch = vlmfast.patch(model)
    assert patched(model) == replaceable(model)
    assert {module._old_forward.__func__ for module in norms} == {ours}
    assert_same(logits(model, inputs), want)
    twin = copy.deepcopy(model)
    assert all(module._old_forward.__self__ is module for module in rms_norms(twin))
    patch.undo()
    assert {module._old_forward.__func__ for module in norms} == {plain}
    assert {name: (cls, set(attributes)) for name, (cls, attributes) in state(model).items()} == before
    assert torch.equal(logits(model, inputs), want)

    with vlmfast.patch(model):  # hooks removed under the patch
        for module in model.modules():
            remove(module)
        assert {module.forward.__func__ for module in norms} == {ours}
        assert_same(logits(model, inputs), want)
    assert {module.forward.__func__ for module in norms} == {plain}

    with vlmfast.patch(model):  # hooks added under the patch
        for module in model.modules():
            add(module)
    assert {module._old_forward.__func__ for module in norms} == {plain}
    assert torch.equal(logits(model, inputs), want)


def test_accelerate_offload():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = tiny("llava")
    want = logits(model, inputs)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    with vlmfast.patch(model):
        assert_same(logits(model, inputs), want)
    assert torch.equal(logits(model, inputs), want)


@pytest.mark.parametrize("model_type", COMMON)
def test_global_hooks_see_what_they_saw(model_type: str):
    model, inputs = tiny(model_type)

    def step() -> None:
        model(**inputs).logits.sum().backward()

    try:
        want = seen_by_global_hooks(model, step)
    except RuntimeError as error:  # Llama 4 and transformers 4.57 change in place what a hook has seen
        pytest.skip(f"upstream: {error}")
    with vlmfast.patch(model):
        assert seen_by_global_hooks(model, step) == want
