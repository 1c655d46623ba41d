"""Additions fused with norms: their results, and all that may happen between a sum and the norm that reads it."""

from __future__ import annotations

import copy
import gc
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

import vlmfast
from tests.helpers.patches_models import DTYPES, assert_same, require, sites_of, tiny
from vlmfast.patches import merger, residual
from vlmfast.registry import OPS, override

FAMILIES = ("llama", "qwen3_vl", "qwen2_5_vl", "qwen3_5", "internvl", "gemma2")
pytestmark = pytest.mark.filterwarnings("ignore:.* is not patched")


@pytest.fixture(autouse=True)
def on_the_definition() -> Iterator[None]:
    with vlmfast.use("torch"):
        yield


def patch(model: nn.Module) -> vlmfast.Patch:
    return vlmfast.patch(model, exclude=sites_of(model, merger) or None)


def text_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of the language model."""
    return list(model.get_decoder().layers)


def run(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Return hidden states and logits; only logits where DeepStack writes into the hidden states (4.57)."""
    found = model(**inputs, output_hidden_states=True)
    written = transformers.__version__.startswith("4.") and hasattr(model.get_decoder(), "_deepstack_process")
    return [found.logits] if written else [*(found.hidden_states or ()), found.logits]


class Fused:
    """Counts the additions that are fused with a norm."""

    def __init__(self) -> None:
        self.calls = 0

    def __enter__(self) -> Fused:
        op = OPS["add_rms_norm"]
        backend = op.backend("torch")

        def counted(*args: Any) -> Any:
            self.calls += 1
            return backend.run(*args)

        self.context = override(op, "torch", backend.__class__("torch", counted, backend.unsupported))
        self.context.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.context.__exit__(None, None, None)


# ---- results ----


@torch.no_grad()
@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_hidden_states_and_logits_are_those_of_upstream(model_type: str, dtype: torch.dtype, backend: str):
    model, inputs = tiny(model_type, dtype)
    want = run(model, inputs)
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with patch(model), vlmfast.use(require(backend)):
        got = run(model, inputs)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), ids)
    for mine, theirs in zip(got, want, strict=True):
        assert_same(mine, theirs, backend)
    assert not any(hasattr(state, residual.LEFT) for state in got), "kept with a tensor that the caller has"


@torch.no_grad()
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_addition_normalises(model_type: str):
    if model_type.startswith("gemma") and Version(transformers.__version__) < Version("5"):
        pytest.skip("layers of Gemma are known from transformers 5 on")
    model, inputs = tiny(model_type)
    inputs = {"input_ids": inputs["input_ids"].clamp(min=10)}
    found = patch(model)
    assert "apart from" not in found.report()
    with Fused() as fused:
        model(**inputs)
    assert fused.calls == 2 * len(text_layers(model))


# ---- changes between a sum and its norm ----


def replaced_output(model: nn.Module) -> None:
    text_layers(model)[0].register_forward_hook(lambda module, args, output: output + 0.5)


def output_changed_in_place(model: nn.Module) -> None:
    text_layers(model)[0].register_forward_hook(lambda module, args, output: output.add_(0.5))


def input_of_the_next_norm(model: nn.Module) -> None:
    text_layers(model)[1].input_layernorm.register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))


def output_of_the_next_norm(model: nn.Module) -> None:
    text_layers(model)[1].input_layernorm.register_forward_hook(lambda module, args, output: output * args[0])


def input_of_the_own_norm(model: nn.Module) -> None:
    text_layers(model)[0].post_attention_layernorm.register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))


def output_of_the_own_norm(model: nn.Module) -> None:
    text_layers(model)[0].post_attention_layernorm.register_forward_hook(lambda module, args, output: output * args[0])


def weight_of_the_next_norm(model: nn.Module) -> None:
    """Change a weight in a hook, as offloading does when a layer is called."""

    def load(module: nn.Module, *args: Any) -> None:
        module.input_layernorm.weight.mul_(4)

    def unload(module: nn.Module, *args: Any) -> None:
        module.input_layernorm.weight.mul_(0.25)

    text_layers(model)[1].register_forward_pre_hook(load)
    text_layers(model)[1].register_forward_hook(unload)


def weight_after_the_layer(model: nn.Module) -> None:

    def change(*_: Any) -> None:
        text_layers(model)[1].input_layernorm.weight.mul_(1.5)

    text_layers(model)[0].register_forward_hook(change)


def another_norm(model: nn.Module) -> None:
    norm = nn.RMSNorm(text_layers(model)[0].hidden_size, eps=0.1)
    text_layers(model)[0].post_attention_layernorm = norm
    text_layers(model)[1].input_layernorm = norm


def skipped_layer(model: nn.Module) -> None:
    """Skip the second layer, so that the norm of the third reads the sum of the first."""
    decoder = model.get_decoder()
    decoder.layers.append(copy.deepcopy(decoder.layers[1]))
    decoder.layers[2].self_attn.layer_idx = 1
    decoder.layers[2].input_layernorm.weight.mul_(1.5)
    decoder.layers[1].forward = lambda hidden_states, **_: hidden_states


BETWEEN = (
    replaced_output,
    output_changed_in_place,
    input_of_the_next_norm,
    output_of_the_next_norm,
    input_of_the_own_norm,
    output_of_the_own_norm,
    weight_of_the_next_norm,
    weight_after_the_layer,
    another_norm,
    skipped_layer,
)


@torch.no_grad()
@pytest.mark.parametrize("early", [True, False], ids=["before the patch", "after the patch"])
@pytest.mark.parametrize("meddle", BETWEEN, ids=lambda f: f.__name__)
def test_what_comes_between_counts(meddle: Callable[[nn.Module], None], early: bool):
    for model_type in ("llama", "qwen3_vl"):
        model, inputs = tiny(model_type)
        plain = run(model, inputs)[-1]  # registers transformers' hooks before those below
        twin = copy.deepcopy(model)
        meddle(model)
        if early:
            meddle(twin)
        patch(twin)
        if not early:
            meddle(twin)
        want, got = run(model, inputs), run(twin, inputs)
        assert not torch.equal(want[-1], plain), "it changes nothing"
        for mine, theirs in zip(got, want, strict=True):
            assert torch.equal(mine, theirs)


@torch.no_grad()
def test_the_last_norm_reads_the_sum_of_an_early_exit():
    """It differs from the norm that was to read it, the second layer's, in its epsilon alone."""
    model, inputs = tiny("llama")
    decoder = model.get_decoder()
    decoder.norm.weight = decoder.layers[1].input_layernorm.weight
    decoder.norm.variance_epsilon = 0.1
    decoder.config.num_hidden_layers = 1
    want = run(model, inputs)
    with patch(model):
        assert all(map(torch.equal, run(model, inputs), want))


@torch.no_grad()
def test_deepstack_adds_before_the_norm():
    model, inputs = tiny("qwen3_vl")
    plain = run(model, inputs)
    with patch(model):
        assert all(map(torch.equal, run(model, inputs), plain))
        type(model.get_decoder())._deepstack_process = lambda self, hidden_states, *_: hidden_states
        assert not torch.equal(run(model, inputs)[-1], plain[-1]), "it adds nothing"


@torch.no_grad()
def test_a_layer_before_one_on_another_device_leaves_nothing():
    """Where a model is placed on several devices, its loop or a hook moves the sum before the next norm reads it."""
    model, inputs = tiny("llama")
    sums: list[Tensor] = []
    left: list[bool] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        sums.append(output)
        left.append(hasattr(output, residual.LEFT))

    text_layers(model)[0].register_forward_hook(note)
    model(**inputs)
    patch(model)
    model(**inputs)
    text_layers(model)[1].input_layernorm.to("meta")
    with pytest.raises(ValueError, match="must be on the device of"):  # nothing moves the sum here
        model(**inputs)
    assert left == [False, True, False]
    assert all(torch.equal(each, sums[0]) for each in sums)


@torch.no_grad()
def test_an_exception_in_the_middle_leaves_nothing():
    model, inputs = tiny("llama")
    want = run(model, inputs)
    patch(model)

    def stop(*_: Any) -> None:
        raise StopIteration

    handle = text_layers(model)[1].self_attn.register_forward_pre_hook(stop)
    with pytest.raises(StopIteration):
        run(model, inputs)
    handle.remove()
    for _ in range(2):
        assert all(map(torch.equal, run(model, inputs), want))


@pytest.mark.parametrize("change", [None, *BETWEEN], ids=lambda f: getattr(f, "__name__", "nothing"))
def test_inference_mode(change: Callable[[nn.Module], None] | None):
    """Tensors of inference mode have no version counter, so the sums of layers are made outside of it."""
    model, inputs = tiny("llama")
    if change is not None:
        run(model, inputs)  # registers transformers' hooks before that of the change
    twin = copy.deepcopy(model)
    patch(twin)
    with torch.inference_mode():
        if change is None:
            with Fused() as fused:
                twin(input_ids=inputs["input_ids"])
            assert fused.calls == 2 * len(text_layers(twin))
        else:
            change(model)
            change(twin)
        assert not torch.is_grad_enabled()
        got = run(twin, inputs)
        assert all(map(torch.equal, got, run(model, inputs)))
        assert not any(state.requires_grad for state in got)
    assert torch.is_grad_enabled()


@torch.no_grad()
def test_two_threads_share_a_model():
    model, inputs = tiny("llama")
    inputs = [{"input_ids": (inputs["input_ids"] + shift) % 50} for shift in range(2)]
    want = [model(**each).logits for each in inputs]
    patch(model)
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.no_grad(), vlmfast.use("torch"):
            for _ in range(20):
                if not torch.equal(model(**inputs[index]).logits, want[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_nothing_outlives_the_forward():
    model, inputs = tiny("qwen3_vl")
    patch(model)

    def alive() -> int:
        gc.collect()
        return sum(isinstance(found, Tensor) for found in gc.get_objects())

    model(**inputs)
    before = alive()
    model(**inputs)
    assert alive() == before


# ---- gradients ----


def gradient_of_states(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    found = model(**inputs, output_hidden_states=True, use_cache=False)
    states = list(found.hidden_states[:-1])
    loss = (found.logits * torch.linspace(-1, 1, found.logits.numel()).view_as(found.logits)).sum()
    return list(torch.autograd.grad(loss, states))


def test_gradients_of_hidden_states():
    """The gradient of a sum includes the part that comes through the norm."""
    model, inputs = tiny("llama")
    want = gradient_of_states(model, inputs)
    patch(model)
    for mine, theirs in zip(gradient_of_states(model, inputs), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_vl"])
def test_checkpointed_gradients(model_type: str, reentrant: bool):
    """A checkpointed layer first runs without gradients; it must leave nothing to a norm that needs one."""
    model, inputs = tiny(model_type)
    model.train()
    model.enable_input_require_grads()
    patch(model)

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        model(**inputs, use_cache=False).logits.square().sum().backward()
        return {name: p.grad for name, p in model.get_decoder().named_parameters() if p.grad is not None}

    want = gradients(copy.deepcopy(model))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    got = gradients(model)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=name)


# ---- copies, files, reports ----


@torch.no_grad()
def test_a_copy_is_fused_as_well_and_a_lone_layer_follows_nothing():
    model, inputs = tiny("llama")
    patch(model)
    twin = copy.deepcopy(model)
    with Fused() as fused:
        twin(**inputs)
    assert fused.calls == 2 * len(text_layers(model))
    assert vars(copy.deepcopy(text_layers(model)[0]))[residual.FOLLOWING] is None


def test_files_and_models_that_are_undone_know_nothing_of_it():
    model, _ = tiny("llama")
    found = patch(model)
    assert residual.FOLLOWING in vars(text_layers(model)[0])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert residual.FOLLOWING not in vars(text_layers(torch.load(file, weights_only=False))[0])
    found.undo()
    assert not any(residual.FOLLOWING in vars(module) for module in model.modules())


def test_report_says_where_an_addition_does_not_normalise():
    model, _ = tiny("llama")
    found = patch(model)
    input_of_the_own_norm(model)
    input_of_the_next_norm(model)
    (row,) = (line for line in found.report().splitlines() if "LlamaDecoderLayer" in line)
    assert "1 post_attention_layernorm: it has a hook, or a forward of its own" in row
    assert "1 input_layernorm that follows: it is not there, or has a hook before it" in row
