"""What patched layers skip on the host for one token is skipped only where that makes no difference."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations import sdpa_attention

import vlmfast
from tests.helpers.patches_models import tiny
from vlmfast.modules import run_of
from vlmfast.patches import attention, sdpa
from vlmfast.patches.swap import patched_class

CALLED = ("self_attn", "mlp", "mlp.act_fn", "input_layernorm", "post_attention_layernorm")
Doing = Callable[[nn.Module, pytest.MonkeyPatch], None]


@torch.no_grad()
def answer(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Return the logits of a prompt and of two further tokens."""
    found = model(input_ids=ids, use_cache=True)
    logits = [found.logits]
    for token in (11, 12):
        found = model(input_ids=ids.new_full((len(ids), 1), token), past_key_values=found.past_key_values)
        logits.append(found.logits)
    return logits


def twins(model_type: str = "llama") -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a model, a patched copy of it, and a prompt of text."""
    model, inputs = tiny(model_type)
    twin = copy.deepcopy(model)
    vlmfast.patch(twin)
    return model, twin, inputs["input_ids"].clamp(min=10)


def assert_alike(model: nn.Module, twin: nn.Module, ids: Tensor) -> None:
    assert all(map(torch.equal, answer(twin, ids), answer(model, ids)))


# ---- calls of modules ----


def doubled(output: Any) -> Any:
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


def hooked(module: nn.Module, patching: pytest.MonkeyPatch) -> None:
    module.register_forward_hook(lambda module, args, output: doubled(output))


def hooked_before(module: nn.Module, patching: pytest.MonkeyPatch) -> None:
    def double(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        first = {"hidden_states": 2 * kwargs["hidden_states"]} if "hidden_states" in kwargs else {}
        return (tuple(2 * value for value in args), {**kwargs, **first})

    module.register_forward_pre_hook(double, with_kwargs=True)


def replaced(module: nn.Module, patching: pytest.MonkeyPatch) -> None:
    forward = type(module).forward
    module.forward = MethodType(lambda self, *args, **kwargs: doubled(forward(self, *args, **kwargs)), module)


def compiled(module: nn.Module, patching: pytest.MonkeyPatch) -> None:
    module._compiled_call_impl = lambda *args, **kwargs: doubled(module.forward(*args, **kwargs))


def of_a_class_with_a_call(module: nn.Module, patching: pytest.MonkeyPatch) -> None:
    cls = type(module)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return doubled(nn.Module.__call__(self, *args, **kwargs))

    module.__class__ = type(cls)(cls.__name__, (cls,), {"__call__": call})


def hooked_for_all(module: nn.Module, patching: pytest.MonkeyPatch) -> None:
    kinds = type(module).__mro__
    name = next(kind.__name__ for kind in kinds if kind.__module__.startswith(("transformers.", "torch.nn")))

    def double(found: nn.Module, args: Any, output: Any) -> Any:
        return doubled(output) if type(found).__name__ == name else None

    patching.setitem(nn.modules.module._global_forward_hooks, -1, double)


CHANGES = (hooked, hooked_before, replaced, compiled, of_a_class_with_a_call, hooked_for_all)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", CALLED)
def test_what_was_done_to_a_module_counts(name: str, change: Doing, monkeypatch: pytest.MonkeyPatch):
    model, twin, ids = twins()
    plain = answer(model, ids)
    assert all(map(torch.equal, answer(twin, ids), plain))
    for each in (model, twin):
        change(each.get_decoder().layers[0].get_submodule(name), monkeypatch)
    assert_alike(model, twin, ids)
    assert not torch.equal(answer(model, ids)[-1], plain[-1]), "it changes nothing"


def test_a_wrapped_forward_is_called():
    """transformers wraps the forward of each class that is derived from a layer, also of one that is patched."""
    calls: list[Tensor] = []

    class Base(nn.Module):
        def __init_subclass__(cls) -> None:
            forward = cls.forward

            def wrapped(self: Base, x: Tensor) -> Tensor:
                calls.append(x)
                return forward(self, x)

            cls.forward = functools.wraps(forward)(wrapped)

    class Twice(Base):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    owner = nn.ModuleDict({"twice": Twice()})
    owner["twice"].__class__ = patched_class(Twice, {"forward": lambda self, x: 3 * x})
    for wrappers in (1, 2):
        calls.clear()
        run, module = run_of(owner, "twice")
        assert (run(module, torch.ones(1)), len(calls)) == (3, wrappers)
        owner["twice"].__class__ = type("Derived", (type(owner["twice"]),), {})


@torch.no_grad()
def test_a_traced_module_is_called():
    model, twin, ids = twins()
    for layer in twin.get_decoder().layers:
        layer.mlp = torch.jit.trace(copy.deepcopy(layer.mlp), torch.randn(1, 1, model.config.hidden_size))
    assert_alike(model, twin, ids)


def test_a_projection_of_rows_that_are_not_contiguous_and_one_that_is_hooked():
    owner = nn.ModuleDict({name: nn.Linear(6, 4) for name in "abc"})
    names, x = ("a", "b", "c"), torch.randn(6, 5, 2).transpose(0, 2)
    for given in (x, x.contiguous()):
        found = vlmfast.modules.project_all(owner, names, given)
        assert all(torch.equal(got.view(2, 5, 4), owner[name](given)) for got, name in zip(found, names, strict=True))
    shapes = []
    owner["b"].register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    vlmfast.modules.project_all(owner, names, x.contiguous())
    assert shapes == [(2, 5, 4)]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_graph_traced_of_one_token_attends_over_more():
    """Of transformers' attention functions, the trace of ``sdpa`` is of one token only."""
    layer = twins()[1].get_decoder().layers[0].self_attn.requires_grad_(False)
    layer.config._attn_implementation = "eager"

    def attend(x: Tensor, cos: Tensor, mask: Tensor) -> Tensor:
        return layer(x, position_embeddings=(cos, cos), attention_mask=mask)[0]

    def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        x, cos = torch.randn(1, tokens, 64), torch.randn(1, tokens, layer.head_dim)
        return x, cos, torch.zeros(1, 1, tokens, tokens)

    traced = torch.jit.trace(attend, inputs(1), check_trace=False)
    more = inputs(3)
    torch.testing.assert_close(traced(*more), attend(*more))


# ---- the attention function ----


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Record, for each question to `attend_alone`, whether it gave an answer."""
    found: list[bool] = []
    upstream = sdpa.attend_alone

    def watched(*args: Any) -> Tensor | None:
        output = upstream(*args)
        found.append(output is not None)
        return output

    monkeypatch.setattr(attention, "attend_alone", watched)
    return found


@pytest.mark.parametrize("model_type", ["llama", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_a_token_attends_alone(model_type: str, alone: list[bool]):
    model, twin, ids = twins(model_type)
    assert_alike(model, twin, ids)
    assert alone == [True] * 2 * len(twin.get_decoder().layers)


def test_it_says_what_transformers_says(monkeypatch: pytest.MonkeyPatch):
    """The arguments for torch's function are the same, and it is looked up where other code may replace it."""
    for keys in (2, 4):  # of 4 heads
        model, _, ids = twins()
        config = copy.deepcopy(model.config)
        config.num_key_value_heads = keys
        model = type(model)(config).eval()
        twin = copy.deepcopy(model)
        vlmfast.patch(twin)
        said: list[Any] = []
        attend = F.scaled_dot_product_attention

        def watched(*args: Any, attend: Any = attend, said: list[Any] = said, **kwargs: Any) -> Tensor:
            said.append(([(x.shape, x.stride()) for x in args], kwargs))
            return 2 * attend(*args, **kwargs)

        with monkeypatch.context() as patching:
            patching.setattr(F, "scaled_dot_product_attention", watched)
            assert_alike(model, twin, ids)
        half = len(said) // 2
        assert len(said[:half]) == 3 * len(twin.get_decoder().layers)
        assert [kwargs for _, kwargs in said[:half]] == [kwargs for _, kwargs in said[half:]]


def registered(model: nn.Module, patching: pytest.MonkeyPatch) -> None:
    """Register another function under the name of transformers' own."""

    def halved(*args: Any, **kwargs: Any) -> Any:
        output, weights = sdpa_attention.sdpa_attention_forward(*args, **kwargs)
        return output / 2, weights

    patching.setitem(AttentionInterface._global_mapping, "sdpa", halved)


def told_the_other(model: nn.Module, patching: pytest.MonkeyPatch) -> None:
    """Choose the other function, which has a mask at all tokens."""
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("change", [registered, told_the_other], ids=lambda change: change.__name__)
def test_another_attention_function_is_called(change: Doing, alone: list[bool], monkeypatch: pytest.MonkeyPatch):
    model, twin, ids = twins()
    assert_alike(model, twin, ids)
    alone.clear()
    for each in (model, twin):
        change(each, monkeypatch)
    assert_alike(model, twin, ids)
    assert len(alone) == 2 * len(twin.get_decoder().layers) if change is registered else not alone
    assert not any(alone)


def test_an_unknown_body_of_the_function_is_called(alone: list[bool], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sdpa, "_KNOWN", {})
    sdpa._sdpa.cache_clear()
    try:
        assert_alike(*twins())
    finally:
        sdpa._sdpa.cache_clear()
    assert alone
    assert not any(alone)


@torch.no_grad()
def test_arguments_that_the_function_reads_reach_it(alone: list[bool]):
    model, twin, ids = twins()
    heads = model.config.get_text_config().num_attention_heads
    bias = torch.randn(1, heads, 1, ids.shape[1] + 1)

    def last(model: nn.Module, **kwargs: Any) -> Tensor:
        cache = model(input_ids=ids, use_cache=True).past_key_values
        return model(input_ids=ids[:, :1], past_key_values=cache, **kwargs).logits

    assert torch.equal(last(twin, position_bias=bias), last(model, position_bias=bias))
    assert not any(alone)


@torch.no_grad()
def test_padding_is_masked(alone: list[bool]):
    model, twin, ids = twins()
    ids = torch.cat([ids, ids.flip(1)])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = [each.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False) for each in (model, twin)]
    assert torch.equal(*found)
    assert not any(alone)


def test_a_configuration_with_a_property_of_its_own():
    model, _, _ = twins()
    config = model.config
    assert sdpa.implementation_of(config) == config._attn_implementation == "sdpa"
    cls = type(config)
    config.__class__ = type(cls.__name__, (cls,), {"_attn_implementation": property(lambda self: "mine")})
    assert sdpa.implementation_of(config) == "mine"
