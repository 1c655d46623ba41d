"""Patch mergers and projectors: as accurate as upstream, and upstream's own code where modules are not plain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers.activations import ACT2FN

import vlmfast
from tests.helpers.patches_models import DTYPES, logits, places_of, sites_of, tiny
from tests.helpers.thorough import first_of
from tests.helpers.tiny_patches import QWEN
from vlmfast.patches import merger

BACKENDS = ("native", "torch")


MERGERS = (*(name for name in QWEN if name != "qwen2_5_omni"), "internvl")


def only(model: nn.Module) -> dict[str, list[str]]:
    return {"only": sites_of(model, merger)}


def mergers(model: nn.Module) -> list[nn.Module]:
    """Return the mergers in the order of the model, including those of DeepStack, whose norm follows the shuffle."""
    found = {id(module) for module, _ in places_of(model, merger)}
    return [module for module in model.modules() if id(module) in found]


def parts(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that the merger calls, by role: norm, linear, act, last, and mlp where there is one."""
    layers = [child for child in module.modules() if not list(child.children())]
    norm = next(layer for layer in layers if "Norm" in type(layer).__name__)
    linear, last = (layer for layer in layers if isinstance(layer, nn.Linear))
    act = next(layer for layer in layers if "GELU" in type(layer).__name__)
    found = {"norm": norm, "linear": linear, "act": act, "last": last}
    if isinstance(getattr(module, "mlp", None), nn.Sequential):
        found["mlp"] = module.mlp
    return found


def patches(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """Make the patches of six tokens; like features of a tower, their mean is not zero."""
    width = parts(module)["linear"].in_features
    shape = (2, 3, width) if "MultiModalProjector" in type(module).__name__ else (24, width // 4)
    return (3 * torch.randn(shape) + 1).to(dtype)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record for each call whether it ran the op."""
    calls: list[bool] = []
    original = merger._fused

    def recording(*args: Any, **named: Any) -> Tensor | None:
        result = original(*args, **named)
        calls.append(result is not None)
        return result

    monkeypatch.setattr(merger, "_fused", recording)
    return calls


# ---- as accurate as upstream ----


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output and every gradient."""
    x = x.detach().clone().requires_grad_()
    output = module(x)
    grad = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad(output, [x, *module.parameters()], grad)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_type", MERGERS)
def test_error_is_that_of_upstream(model_type: str, backend: str, dtype: torch.dtype, fused: list[bool]):
    for op in merger.pixel_shuffle_linear.op.parts:
        found = vlmfast.registry.OPS[op].backend(backend)
        if isinstance(found, str):
            pytest.skip(found)
    model, _ = tiny(model_type, dtype)
    modules = mergers(model)
    for module in modules:
        x = patches(module, dtype)
        wide = copy.deepcopy(module).double()
        want, exact = results(module, x), results(wide, x.double())
        with vlmfast.patch(model, **only(model)), vlmfast.use(backend):
            got = results(module, x)
            with torch.no_grad():
                quiet = module(x)
        assert quiet.shape == got[0].shape == want[0].shape
        for mine, theirs, true in zip([*got, quiet], [*want, want[0]], [*exact, exact[0]], strict=True):
            assert mine.dtype == theirs.dtype == dtype
            rounding = torch.finfo(dtype).eps / 2 * true.norm()
            assert (mine - true).norm() <= 1.05 * (theirs - true).norm() + rounding
    assert fused == [True, True] * len(modules)


@pytest.mark.parametrize("model_type", MERGERS)
def test_epsilon_is_the_module_s(model_type: str):
    model, _ = tiny(model_type)
    for module in mergers(model):
        norm = parts(module)["norm"]
        name = "eps" if hasattr(norm, "eps") else "variance_epsilon"
        setattr(norm, name, 2.0)
        x = patches(module, torch.float32)
        want = module(x)
        with vlmfast.patch(model, **only(model)), vlmfast.use("torch"):
            assert torch.allclose(module(x), want, rtol=1e-5, atol=1e-5)
        setattr(norm, name, 1e-6)
        assert not torch.allclose(module(x), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", MERGERS)
def test_both_kinds_of_norm(model_type: str):
    """DeepStack mergers normalise tokens; the main merger normalises patches."""
    model, _ = tiny(model_type)
    widths = [parts(m)["linear"].in_features // parts(m)["norm"].weight.numel() for m in mergers(model)]
    deepstack = any(hasattr(module, "_deepstack_process") for module in model.modules())
    assert set(widths) == ({1, 4} if deepstack else {1} if model_type == "internvl" else {4})


# ---- modules that are not plain ----


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class QuantisedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).round()


def instance_forward(layer: nn.Module) -> None:
    original = layer.forward
    layer.forward = lambda x: original(x) + 1


def output_hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, args, output: output + 1)


def input_hook(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def parametrised(layer: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(layer, "weight", Halved())


def quantised(layer: nn.Module) -> None:
    layer.__class__ = QuantisedLinear


class Sixteenths(Tensor):
    """A weight whose matmul is not that of the numbers it holds, as with torchao's subclasses."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, *rest = args
            return func(x, (weight.as_subclass(Tensor) * 16).round() / 16, *rest, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def subclass_weight(layer: nn.Module) -> None:
    weight = layer.weight.detach().as_subclass(Sixteenths)
    layer.weight = nn.Parameter(weight, requires_grad=False)


CHANGES: list[tuple[Callable[[nn.Module], None], tuple[str, ...]]] = [
    (output_hook, ("norm", "linear", "act", "mlp")),
    (input_hook, ("norm", "linear", "act", "mlp")),
    (instance_forward, ("norm", "linear", "act")),
    (parametrised, ("norm", "linear")),
    (lambda layer: parametrizations.weight_norm(layer), ("linear",)),
    (lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5), ("norm", "linear")),
    (quantised, ("linear",)),
    (subclass_weight, ("linear",)),
]


@pytest.mark.parametrize(("change", "names"), CHANGES)
@pytest.mark.parametrize("model_type", MERGERS)
def test_what_was_done_to_a_part_holds(model_type: str, change: Callable, names: tuple[str, ...], fused: list[bool]):
    model, _ = tiny(model_type)
    for name in names:
        changed = copy.deepcopy(model)
        module = mergers(changed)[-1]
        if name not in parts(module):
            continue
        x = patches(module, torch.float32)
        plain = module(x)
        separate_norm = name == "norm" and "RMSNorm" in type(parts(module)["norm"]).__name__
        change(parts(module)[name])
        want = module(x)
        assert not torch.equal(want, plain)
        fused.clear()
        with vlmfast.patch(changed, **only(changed)):
            assert torch.equal(module(x), want), name
        assert fused == ([] if name == "mlp" else [separate_norm])


@pytest.mark.parametrize("model_type", MERGERS)
def test_hooks_fire(model_type: str):
    model, inputs = tiny(model_type)
    seen: list[Any] = []
    for module in mergers(model):
        for name, part in parts(module).items():
            part.register_full_backward_hook(lambda _, grads, outputs, name=name: seen.append((name, outputs[0])))
    grads = []
    for patched in (False, True):
        if patched:
            vlmfast.patch(model, **only(model))
        model.zero_grad()
        model(**inputs).logits.sum().backward()
        grads.append(seen.copy())
        seen.clear()
    assert [name for name, _ in grads[0]] == [name for name, _ in grads[1]]
    assert len(grads[0]) == sum(len(parts(module)) for module in mergers(model))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*grads, strict=True))


@pytest.mark.parametrize("model_type", MERGERS)
def test_hooks_on_every_module(model_type: str, fused: list[bool]):
    model, _ = tiny(model_type)
    vlmfast.patch(model, **only(model))
    module, seen = mergers(model)[0], []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        module(patches(module, torch.float32))
    finally:
        handle.remove()
    assert set(seen) == {module, *parts(module).values()}
    assert not any(fused)


@pytest.mark.parametrize("model_type", MERGERS)
def test_weights_that_accelerate_brings_for_each_call(model_type: str, fused: list[bool]):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = tiny(model_type)
    want = logits(model, inputs)
    for module in mergers(model):  # not the whole model: elsewhere upstream reads weights without calling their module
        accelerate.cpu_offload(module, execution_device="cpu")
    with vlmfast.patch(model, **only(model)):
        assert torch.equal(logits(model, inputs), want)
    assert fused
    assert not any(fused)


@pytest.mark.parametrize("target", ["linear", "last"])
@pytest.mark.parametrize("model_type", MERGERS)
def test_adapters_are_used_and_trained(model_type: str, target: str):
    peft = pytest.importorskip("peft")
    model, inputs = tiny(model_type)
    plain = logits(model, inputs)
    ids = {id(parts(module)[target]) for module in mergers(model)}
    targets = [name for name, module in model.named_modules() if id(module) in ids]
    wrapper = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    want = logits(wrapper, inputs)
    assert not torch.equal(want, plain)
    with vlmfast.patch(wrapper, **only(wrapper)), vlmfast.use("torch"):
        assert torch.allclose(logits(wrapper, inputs), want, rtol=1e-5, atol=1e-5)
        wrapper(**inputs).logits.sum().backward()
    trained = [parameter for name, parameter in wrapper.named_parameters() if "lora_" in name]
    assert len(trained) == 2 * len(targets)
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trained)


@pytest.mark.parametrize("model_type", MERGERS)
def test_float64_and_autocast(model_type: str, fused: list[bool]):
    for dtype, autocast in ((torch.float64, False), (torch.float32, True)):
        model, _ = tiny(model_type, dtype)
        module = mergers(model)[-1]
        x = patches(module, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            want = module(x)
            with vlmfast.patch(model, **only(model)):
                got = module(x)
        assert got.dtype == want.dtype == (torch.bfloat16 if autocast else dtype)
        assert torch.equal(got, want)
    assert fused == [False, False]


@pytest.mark.parametrize("model_type", MERGERS)
def test_weights_of_several_dtypes(model_type: str, fused: list[bool]):
    model, _ = tiny(model_type, torch.bfloat16)
    module = mergers(model)[-1]
    parts(module)["norm"].float()  # PEFT keeps norms in float32 for training
    x = patches(module, torch.bfloat16)

    def outcome() -> list[float] | str:
        try:
            return module(x).flatten().tolist()
        except RuntimeError as error:  # an RMSNorm passes float32 to a bfloat16 layer
            return str(error)

    want = outcome()
    with vlmfast.patch(model, **only(model)):
        assert outcome() == want
    assert fused == [False]


def test_activation_that_is_not_gelu(fused: list[bool]):
    for name in ("gelu_pytorch_tanh", "silu", "gelu_python"):
        model, _ = tiny("internvl")
        module = mergers(model)[0]
        x = patches(module, torch.float32)
        module.act = ACT2FN[name]
        want = module(x)
        with vlmfast.patch(model, **only(model)):
            assert torch.equal(module(x), want)
    assert fused == [False] * 3


@pytest.mark.parametrize("model_type", MERGERS)
def test_features_of_another_width(model_type: str):
    model, _ = tiny(model_type)
    module = mergers(model)[-1]
    for width in (31, 1000):
        x = torch.ones(24, width)
        with pytest.raises(RuntimeError) as upstream:
            module(x)
        with vlmfast.patch(model, **only(model)), pytest.raises(RuntimeError) as ours:
            module(x)
        assert str(ours.value) == str(upstream.value)


# ---- torch.compile ----


@pytest.mark.parametrize("model_type", first_of(MERGERS))
def test_compiles_into_one_graph(model_type: str):
    model, _ = tiny(model_type)
    vlmfast.patch(model, **only(model))
    for module in mergers(model):
        torch._dynamo.reset()
        x = patches(module, torch.float32)
        with torch.no_grad(), vlmfast.use("torch"):
            want = module(x)
            assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), want)
    torch._dynamo.reset()
