"""The pixel shuffle of every model that has one: upstream's tokens, one copy, and unchanged modules behind it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vlmfast
from tests.helpers.patches_models import DTYPES, logits, patched, places_of, replaceable, sites_of, tiny
from tests.helpers.thorough import first_of
from vlmfast.ops.pixel_shuffle import definition
from vlmfast.patches import pixel_shuffle

COMMON = ("internvl", "idefics3", "smolvlm", "llama4")
EACH_SHUFFLE = (*COMMON, "aya_vision", "cohere2_vision", "granite_docling", "lfm2_vl")


@pytest.fixture(autouse=True)
def on_the_definition():
    with vlmfast.use("torch"):
        yield


def only(model: nn.Module) -> dict[str, list[str]]:
    return {"only": sites_of(model, pixel_shuffle)}


def shuffling(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the first module with a replaced shuffle, and the name of the method."""
    return places_of(model, pixel_shuffle)[0]


def arguments(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Yield patches as slices behind or before a CLS token: of squares, and of other maps where upstream takes them."""
    module, method = shuffling(model)
    takes_scale = "scale_factor" in inspect.signature(getattr(module, method)).parameters
    if model.config.model_type.replace("-", "_") in ("internvl", "lfm2_vl"):  # a hyphen in transformers 4.57
        for height, width, factor in ((4, 4, 0.5), (2, 6, 0.5), (8, 4, 0.25)):
            patches = torch.randn(3, height * width + 1, 32, dtype=dtype)[:, 1:].reshape(3, height, width, 32)
            yield (patches, factor) if takes_scale else (patches,)
        return
    for batch, side in ((1, 4), (3, 8)):
        patches = torch.randn(batch, side**2 + 1, 32, dtype=dtype)[:, :-1]
        yield from [(patches, 2), (patches, 4)] if takes_scale else [(patches,)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("model_type", EACH_SHUFFLE)
def test_tokens_are_those_of_upstream(model_type: str, dtype: torch.dtype):
    model, _ = tiny(model_type, dtype)
    module, method = shuffling(model)
    for args in arguments(model, dtype):
        want = getattr(module, method)(args[0].contiguous(), *args[1:])
        with vlmfast.patch(model):
            got = getattr(module, method)(*args)
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", EACH_SHUFFLE)
def test_gradients_are_those_of_upstream(model_type: str, dtype: torch.dtype):
    model, _ = tiny(model_type, dtype)
    module, method = shuffling(model)
    for first, *rest in arguments(model, dtype):
        grads = []
        for original in (copy.deepcopy(model), model):
            x = first.detach().clone().requires_grad_()
            module, _ = shuffling(original)
            if original is model:
                vlmfast.patch(model)
            output = getattr(module, method)(x, *rest)
            output.backward(torch.linspace(-1, 1, output.numel()).view_as(output).to(dtype))
            grads.append(x.grad)
        vlmfast.unpatch(model)
        assert torch.equal(*grads)


class Copies(TorchDispatchMode):
    """Records each copy of a tensor; our op counts as one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("clone", "copy_", "_reshape_alias_copy", "contiguous", "pixel_shuffle"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_type", EACH_SHUFFLE)
def test_patches_are_moved_once(model_type: str):
    """There is one copy, including the slice that drops the CLS token."""
    model, _ = tiny(model_type)
    module, method = shuffling(model)
    for args in arguments(model, torch.float32):
        with vlmfast.patch(model), Copies() as ours, torch.no_grad():
            getattr(module, method)(*args)
        assert ours.seen == ["pixel_shuffle"]


@pytest.mark.parametrize("model_type", COMMON)
def test_what_is_no_square_or_does_not_divide_is_an_error(model_type: str):
    model, _ = tiny(model_type)
    vlmfast.patch(model)
    module, method = shuffling(model)
    patches = torch.ones(1, 3, 4, 32) if model_type == "internvl" else torch.ones(1, 9, 32)
    with pytest.raises(ValueError, match=r"grid must be divisible by scale, 2, got \(3, [34]\)"):
        getattr(module, method)(patches)
    if patches.dim() == 3:
        with pytest.raises(ValueError, match="the 17 patches of x are no square"):
            getattr(module, method)(torch.ones(1, 17, 32))


def test_ratio_that_is_no_reciprocal():
    model, _ = tiny("internvl")
    vlmfast.patch(model)
    with pytest.raises(ValueError, match=r"the ratio of a pixel shuffle must be 1 / an integer, got 0\.75"):
        model.model.pixel_shuffle(torch.ones(1, 4, 4, 32), 0.75)


# ---- modules behind the shuffle ----


def behind(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that read the shuffled tokens."""
    module, _ = shuffling(model)
    part = getattr(module, "multi_modal_projector", module)
    return {name: child for name, child in part.named_modules() if child is not part}


@pytest.mark.parametrize("model_type", COMMON)
def test_hooks_behind_the_shuffle_see_what_they_saw(model_type: str):
    model, inputs = tiny(model_type)
    seen: list[tuple[str, Tensor]] = []
    for name, child in behind(model).items():
        child.register_forward_hook(lambda _, args, output, name=name: seen.append((name, output)))
    logits(model, inputs)
    want = seen.copy()
    seen.clear()
    with vlmfast.patch(model, **only(model)):
        logits(model, inputs)
    assert len(want) >= len(behind(model)) > 0
    assert [name for name, _ in seen] == [name for name, _ in want]
    assert all(torch.equal(got, output) for (_, got), (_, output) in zip(seen, want, strict=True))


@pytest.mark.parametrize("model_type", COMMON)
def test_adapters_behind_the_shuffle_are_used_and_trained(model_type: str):
    peft = pytest.importorskip("peft")
    model, inputs = tiny(model_type)
    plain = logits(model, inputs)
    ids = {id(child) for child in behind(model).values() if isinstance(child, nn.Linear)}
    targets = [name for name, module in model.named_modules() if id(module) in ids]
    wrapper = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    want = logits(wrapper, inputs)
    assert targets
    assert not torch.equal(want, plain)
    with vlmfast.patch(wrapper, **only(wrapper)):
        assert torch.equal(logits(wrapper, inputs), want)
        wrapper(**inputs).logits.sum().backward()
    trained = [p for name, p in wrapper.named_parameters() if "lora_" in name]
    assert len(trained) == 2 * len(targets)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)


@pytest.mark.parametrize("model_type", COMMON)
def test_dropout_is_that_of_upstream(model_type: str):
    model, inputs = tiny(model_type)
    model.train()
    dropping = [child for child in behind(model).values() if hasattr(child, "dropout")]
    for child in dropping:
        child.dropout = 0.5

    def seeded(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return logits(model, inputs)

    want, other = seeded(0), seeded(1)
    assert torch.equal(want, other) != bool(dropping)
    with vlmfast.patch(model, **only(model)):
        assert torch.equal(seeded(0), want)


@pytest.mark.parametrize("model_type", COMMON)
def test_only_the_shuffle(model_type: str):
    model, inputs = tiny(model_type)
    want = logits(model, inputs)
    vlmfast.patch(model, **only(model))
    assert patched(model) == [shuffling(model)[0]]
    assert patched(model)[0] in replaceable(model)
    assert torch.equal(logits(model, inputs), want)


# ---- torch.compile ----


@pytest.mark.parametrize("model_type", first_of(EACH_SHUFFLE))
def test_compiles_into_one_graph(model_type: str):
    model, _ = tiny(model_type)
    module, method = shuffling(model)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list) -> Any:
        seen.extend(node.meta.get("stack_trace", "") for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    vlmfast.patch(model)
    for args in arguments(model, torch.float32):
        seen.clear()
        with torch.no_grad():
            want = getattr(module, method)(*args)
            compiled = torch.compile(getattr(module, method), backend=backend, fullgraph=True, dynamic=False)
            assert torch.equal(compiled(*args), want)
        assert any(definition.__file__ in trace for trace in seen)
    torch._dynamo.reset()
