"""The lifetime of a reduction: methods that were captured during it, and wrappers from before it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

import vlmfast
from tests.helpers.reduce_models import EACH_TYPE, METHODS, Talk

METHOD = METHODS[0]
PROMPTS = ((10, 0, 11, 12), (13, 14, 15, 1, 2, 16))


@pytest.fixture(autouse=True)
def on_the_definition():
    with vlmfast.use("torch"):
        yield


@pytest.fixture(autouse=True)
def traced_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def tokens(forward: Callable[..., Any], inputs: dict) -> int:
    """Return how many tokens the language model sees."""
    return forward(**inputs, use_cache=True).past_key_values.get_seq_length()


def prepared(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


# ---- captured during the patch ----


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_methods_that_are_kept_end_with_the_patch(model_type: str):
    talk = Talk.of(model_type)
    inputs = talk.batch(*PROMPTS)
    full = tokens(talk.model, inputs)
    lengths: list[int] = []
    with vlmfast.patch(talk.model, reduce=METHOD):
        forward, generate = functools.partial(talk.model.forward), functools.partial(talk.model.generate)
        assert tokens(forward, inputs) < full
    assert tokens(forward, inputs) == full
    talk.model.base_model.language_model.register_forward_pre_hook(
        lambda _, __, arguments: lengths.append(arguments["inputs_embeds"].shape[1]), with_kwargs=True
    )
    generate(**inputs, max_new_tokens=2, do_sample=False)
    assert lengths[0] == full


def test_a_method_that_is_kept_is_that_of_the_next_patch():
    talk = Talk.of("llava")
    inputs = talk.batch(*PROMPTS)
    with vlmfast.patch(talk.model, reduce=vlmfast.EvenTokens(0.5)):
        forward = talk.model.forward
        half = tokens(forward, inputs)
    with vlmfast.patch(talk.model, reduce=vlmfast.EvenTokens(0.25)):
        assert tokens(forward, inputs) == tokens(talk.model, inputs) < half


def assigned(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.thorough
@pytest.mark.parametrize("wrap", [assigned, prepared])
def test_what_wraps_the_patched_model_sees_full_prompts_after_the_patch(wrap: Callable[[nn.Module], nn.Module]):
    talk = Talk.of("llava")
    inputs = talk.batch(*PROMPTS)
    full = tokens(talk.model, inputs)
    patch = vlmfast.patch(talk.model, reduce=METHOD)
    wrapped = wrap(talk.model)
    assert tokens(wrapped, inputs) < full
    patch.undo()
    assert tokens(wrapped, inputs) == full


def test_a_copy_of_what_is_prepared_is_as_patched():
    talk = Talk.of("llava")
    inputs = talk.batch(*PROMPTS)
    full = tokens(talk.model, inputs)
    patch = vlmfast.patch(talk.model, reduce=METHOD)
    twin = copy.deepcopy(prepared(talk.model))
    patch.undo()
    assert tokens(twin, inputs) < full
    vlmfast.unpatch(twin)
    assert tokens(twin, inputs) == full


def test_accelerate_takes_its_wrapper_off_and_leaves_ours():
    accelerate = pytest.importorskip("accelerate")
    talk = Talk.of("llava")
    inputs = talk.batch(*PROMPTS)
    full = tokens(talk.model, inputs)
    with vlmfast.patch(talk.model, reduce=METHOD):
        wrapped = prepared(talk.model)
        model = accelerate.Accelerator(cpu=True).unwrap_model(wrapped, keep_fp32_wrapper=False)
        assert tokens(model, inputs) < full
    assert tokens(model, inputs) == full


def loss_of_its_own(self: Any, **inputs: Any) -> Any:
    """Run the model below, as TRL's `SFTTrainer` and Liger do for their losses."""
    return self.base_model(**inputs)


@pytest.mark.parametrize("method", [METHOD, vlmfast.FastV(1, 0.5)], ids=["before", "between the layers"])
@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl"])
def test_a_forward_that_passes_by_is_refused(model_type: str, method: Any):
    talk = Talk.of(model_type)
    inputs = talk.batch(*PROMPTS)
    patch = vlmfast.patch(talk.model, reduce=method)
    talk.model(**inputs)
    talk.model.forward = MethodType(loss_of_its_own, talk.model)
    with pytest.raises(RuntimeError, match=r"pixel_values came to \w+Model without the forward of \w+Generation"):
        talk.model(**inputs)
    talk.model(**talk.batch((10, 11, 12)))
    patch.undo()
    talk.model(**inputs)


# ---- wrapped before the patch ----


def test_prepared_before_or_after_is_the_same():
    first, second = Talk.of("llava"), Talk.of("llava")
    inputs = first.batch(*PROMPTS)
    model = prepared(first.model)
    plain, full = model(**inputs).logits, tokens(model, inputs)
    twin = copy.deepcopy(model)
    patch = vlmfast.patch(model, reduce=METHOD)
    vlmfast.patch(second.model, reduce=METHOD)
    assert torch.equal(model(**inputs).logits, prepared(second.model)(**inputs).logits)
    assert tokens(model, inputs) < full
    assert tokens(twin, inputs) == full, "it shares the wrapper, not the patch"
    patch.undo()
    assert torch.equal(model(**inputs).logits, plain)


def test_a_forward_compiled_before_is_refused():
    talk = Talk.of("llava")
    assigned(talk.model)
    with pytest.raises(RuntimeError, match="cannot be shortened: forward was already replaced on 1 of 1 module"):
        vlmfast.patch(talk.model, reduce=METHOD)


class Showing(nn.Module):
    """A wrapper that exposes the attributes of the model as its own, like FSDP and torch.compile."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "wrap", [Showing, functools.partial(torch.compile, backend="eager")], ids=["shown", "compiled"]
)
def test_inside_what_shows_the_attributes_of_the_model(wrap: Callable[[nn.Module], nn.Module]):
    talk = Talk.of("llava")
    inputs = talk.batch(*PROMPTS)
    full, wrapped = tokens(talk.model, inputs), wrap(talk.model)
    with vlmfast.patch(wrapped, reduce=METHOD):
        assert tokens(wrapped, inputs) < full
    assert tokens(wrapped, inputs) == full
    assert vlmfast.compress_inputs(wrapped, inputs, METHOD)["attention_mask"].shape[1] < full


# ---- other models of the class ----


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_another_model_of_the_same_class_is_not_patched(model_type: str):
    talk = Talk.of(model_type)
    inputs = talk.batch(*PROMPTS)
    full = tokens(talk.model, inputs)
    with vlmfast.patch(talk.model, reduce=METHOD):
        other = type(talk.model)(talk.model.config).eval()
        assert tokens(other, inputs) == full
        with vlmfast.patch(other, reduce=METHOD):
            assert tokens(other, inputs) < full
