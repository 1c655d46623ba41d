"""Whole tiny models, patched and unpatched; no test here names the sites of a model."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

import vlmfast
from tests.helpers.patches_models import (
    BACKENDS,
    COMMON,
    DTYPES,
    METHODS,
    assert_same,
    cast,
    exact,
    is_new_enough,
    logits,
    patched,
    replaceable,
    require,
    rms_norms,
    state,
    tiny,
)
from tests.helpers.thorough import REPEATED, first_of
from tests.helpers.tiny_types import TINY_LANGUAGE, TINY_VISUAL
from vlmfast.patches import rms_norm
from vlmfast.patches.plan import find_sites
from vlmfast.patches.upstream import site_name

EACH_COMMON = (*COMMON, "llama")
EACH = (*TINY_VISUAL, *TINY_LANGUAGE)
pytestmark = pytest.mark.filterwarnings("ignore:.* is not patched")  # some norms and masks have unknown bodies


@pytest.fixture(autouse=True)
def on_the_definition():
    """Use the torch backend unless a test asks for another: kernels under the interpreter sum in another order."""
    with vlmfast.use("torch"):
        yield


# ---- one model, patched and undone ----


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the logits and the loss."""
    found = model(**inputs, labels=inputs["input_ids"])
    return found.logits, found.loss


# Here upstream passes on a transposed view and the ops return a contiguous tensor, so the next sum has another order.
TRANSPOSED = ("ovis2", "cohere2_vision", "gemma3")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", EACH)
def test_outputs_are_those_of_upstream(model_type: str, dtype: torch.dtype):
    model, inputs = tiny(model_type, dtype)
    want = outputs(model, inputs)
    for backend in BACKENDS:
        with vlmfast.patch(model, **({} if backend == "torch" else exact(model))), vlmfast.use(require(backend)):
            for got, theirs in zip(outputs(model, inputs), want, strict=True):
                if model_type in TRANSPOSED:
                    assert (got - theirs).norm() <= 4 * torch.finfo(dtype).eps * theirs.norm()
                else:
                    assert_same(got, theirs, backend)
    assert all(map(torch.equal, outputs(model, inputs), want)), "undone"


@pytest.mark.parametrize("model_type", EACH)
def test_tiny_model_uses_what_it_is_given(model_type: str):
    """Otherwise the comparisons above would prove little."""
    model, inputs = tiny(model_type)
    want = logits(model, inputs)
    assert want.isfinite().all()
    assert torch.equal(logits(tiny(model_type)[0], inputs), want), "built alike at each call"
    assert not torch.equal(want[0], want[1])
    if "pixel_values" in inputs:
        assert not torch.equal(logits(model, {**inputs, "pixel_values": -inputs["pixel_values"]}), want)
    weights = [module.weight for module in rms_norms(model) if getattr(module, "weight", None) is not None]
    for weight in weights:
        with torch.no_grad():
            weight.mul_(1.5)
        assert not torch.equal(logits(model, inputs), want)
        with torch.no_grad():
            weight.div_(1.5)


@pytest.mark.thorough
def test_each_body_of_a_type_that_few_tests_build_is_in_another_type_too():
    def bodies(names: Iterable[str]) -> set[tuple[str, str]]:
        known = [name for name in names if name in CONFIG_MAPPING and is_new_enough(name)]
        sites = [site for name in known for site in find_sites(tiny(name)[0])]
        return {(site.method, str(site.body.key)) for site in sites if site.body is not None and site.reason is None}

    assert {*EACH} > REPEATED
    assert bodies(REPEATED) <= bodies({*EACH} - REPEATED)


@pytest.mark.parametrize("model_type", EACH_COMMON)
def test_every_module_that_can_be_is_replaced_and_only_those(model_type: str):
    model, _ = tiny(model_type)
    modules = replaceable(model)
    patch = vlmfast.patch(model)
    assert modules
    assert patched(model) == modules
    assert sum(patch.replaced.values()) == sum(len(type(module).replacements) for module in modules)
    assert not patch.replaced.keys() & patch.skipped.keys()


@pytest.mark.parametrize("model_type", EACH)
def test_what_looks_replaceable_is_replaced_or_reported(model_type: str):
    model, _ = tiny(model_type)
    patch = vlmfast.patch(model)
    alike = {site_name(type(module), "forward"): module for module in rms_norms(model)}
    for module in model.modules():
        alike |= {site_name(type(module), method): module for method in METHODS if hasattr(module, method)}
    report = patch.report()
    for site, module in alike.items():
        assert (site in patch.replaced) == (site.rpartition(".")[2] in getattr(type(module), "replacements", {}))
        assert site in patch.replaced or patch.skipped[site]
        assert site in report
    assert alike or patch.replaced


@pytest.mark.parametrize("model_type", EACH_COMMON)
def test_undo_restores_the_model(model_type: str):
    model, inputs = tiny(model_type)
    want = logits(model, inputs)
    before, text, keys = state(model), repr(model), list(model.state_dict())
    patch = vlmfast.patch(model)
    assert state(model) != before
    assert repr(model) == text
    assert list(model.state_dict()) == keys
    for name, module in model.named_modules():
        assert isinstance(module, before[name][0])
        assert (type(module).__name__, type(module).__module__) == (
            before[name][0].__name__,
            before[name][0].__module__,
        )
    for _ in range(2):  # the second undo does nothing
        patch.undo()
        assert state(model) == before
    assert torch.equal(logits(model, inputs), want)


@pytest.mark.parametrize("model_type", EACH_COMMON)
def test_other_instances_are_left_alone(model_type: str):
    model, _ = tiny(model_type)
    other, _ = tiny(model_type)
    before, methods = state(other), {type(m): dict(vars(type(m))) for m in other.modules()}
    vlmfast.patch(model)
    assert not patched(other)
    assert state(other) == before
    assert {cls: dict(vars(cls)) for cls in methods} == methods


@pytest.mark.parametrize("model_type", EACH_COMMON)
def test_copy_is_patched_and_stands_alone(model_type: str):
    model, inputs = tiny(model_type)
    want = logits(model, inputs)
    patch = vlmfast.patch(model)
    twin = copy.deepcopy(model)
    assert len(patched(twin)) == len(patched(model))
    assert list(twin.state_dict()) == list(model.state_dict())
    patch.undo()
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: pytest.fail("the copy calls the original"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(logits(twin, inputs), want)


@pytest.mark.parametrize("model_type", EACH_COMMON)
def test_saved_model_holds_the_original_classes(model_type: str):
    model, inputs = tiny(model_type)
    classes = [type(module) for module in model.modules()]
    for protocol in (2, 4):
        with vlmfast.patch(model):
            file = io.BytesIO()
            torch.save(model, file, pickle_protocol=protocol)
        assert b"vlmfast" not in file.getvalue()
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert [type(module) for module in loaded.modules()] == classes
        assert torch.equal(logits(loaded, inputs), logits(tiny(model_type)[0], inputs))


@pytest.mark.parametrize("model_type", EACH)
def test_generates_the_same_ids(model_type: str):
    model, inputs = tiny(model_type)
    want = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with vlmfast.patch(model):
        calls: Counter[nn.Module] = Counter()
        for module in patched(model):
            module.register_forward_hook(lambda module, *_: calls.update([module]))
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), want)
        assert max(calls.values()) >= (4 if rms_norms(model) else 1)


# ---- training ----


def training_step(model: nn.Module, inputs: dict[str, Any], checkpointing: bool = False) -> tuple[int, Tensor]:
    """Return how often the norms ran, and all gradients as one vector."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls: list[int] = []
    handles = [module.register_forward_hook(lambda *_: calls.append(1)) for module in rms_norms(model)]
    with torch.random.fork_rng(devices=[]):  # dropout draws the same numbers each time
        output = model(**inputs, use_cache=False).logits
        output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output))
    for handle in handles:
        handle.remove()
    grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return len(calls), torch.cat(grads)


@pytest.mark.parametrize("model_type", EACH_COMMON)
def test_checkpointing_stays_on(model_type: str):
    model, inputs = tiny(model_type)
    calls, _ = training_step(copy.deepcopy(model), inputs)
    more_calls, _ = training_step(copy.deepcopy(model), inputs, checkpointing=True)
    assert more_calls > calls, "upstream itself does not compute anything twice"
    vlmfast.patch(model)
    plain = training_step(copy.deepcopy(model), inputs)
    checkpointed = training_step(model, inputs, checkpointing=True)
    assert (plain[0], checkpointed[0]) == (calls, more_calls)
    assert torch.equal(plain[1], checkpointed[1])


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [(name, dtype) for name in EACH for dtype in DTYPES[: 2 if name in EACH_COMMON else 1]],
    ids=str,
)
def test_gradients_are_no_worse(model_type: str, dtype: torch.dtype, monkeypatch):
    model, inputs = tiny(model_type, dtype)
    _, upstream = training_step(model, inputs)
    vlmfast.patch(model)
    _, got = training_step(model, inputs)

    # For the exact result: the definition takes float64, while the op refuses it and upstream's norms use float32.
    monkeypatch.setattr("vlmfast.patches.rms_norm.rms_norm", vlmfast.rms_norm.op.reference)
    wide = {name: cast(value, torch.float64) for name, value in inputs.items()}
    getattr(model, "set_experts_implementation", lambda name: None)("eager")  # the default one refuses float64
    try:
        _, exact = training_step(model.double(), wide)
    except RuntimeError as error:  # some experts of transformers 4.57 always compute in float32
        pytest.skip(f"upstream: {error}")
    slack = 1.1 if model_type == "gemma4" else 1.05  # gemma4's error varies by 7% between processors
    budget = slack * (upstream - exact).norm() + torch.finfo(dtype).eps * exact.norm()
    assert (got - exact).norm() <= budget


# ---- torch.compile ----


class Recorder:
    """A backend of torch.compile that runs graphs unchanged, and records the number of our norms in each run.

    It also records our ops in the graphs.
    """

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.ops: list[str] = []

    def __call__(self, module: torch.fx.GraphModule, example_inputs: list):
        roots = [node for node in module.graph.nodes if node.target is torch.rsqrt]  # one per norm
        ours = sum(rms_norm.__file__ in node.meta["stack_trace"] for node in roots)
        self.ops += [str(node.target) for node in module.graph.nodes if str(node.target).startswith("vlmfast.")]

        def run(*args):
            self.ran.append(ours)
            return module.forward(*args)

        return run


@pytest.fixture
def recorder():
    torch._dynamo.reset()
    yield Recorder()
    torch._dynamo.reset()


@pytest.mark.parametrize("model_type", first_of(["qwen3_vl", "qwen3_5", "llama4", "internvl"]))
def test_compiles_into_one_graph(model_type: str, recorder: Recorder):
    """Only the language model or the tower: placing an image breaks upstream's own graph in some releases."""
    model, inputs = tiny(model_type)
    if model_type == "internvl":  # the only model with our norm in its vision tower
        model, inputs = model.model.vision_tower, {"pixel_values": inputs["pixel_values"]}
    else:
        inputs = {"input_ids": inputs["input_ids"].clamp(min=10)}
    with torch.no_grad():
        compiled = torch.compile(model, backend=recorder, fullgraph=True)
        want = compiled(**inputs)[0]
        vlmfast.patch(model)
        assert_same(compiled(**inputs)[0], want)
    twice = ["L2Norm" in type(module).__name__ for module in rms_norms(model)]  # one module for queries and keys
    assert recorder.ran == [0, len(twice) + twice.count(True)]


def test_compiled_model_is_compiled_anew_after_patch_and_undo(recorder: Recorder):
    model, inputs = tiny("llama")
    compiled = torch.compile(model, backend=recorder)
    want = logits(compiled, inputs)
    assert sum(recorder.ran) == 0
    with vlmfast.patch(compiled):
        assert_same(logits(compiled, inputs), want)
        assert sum(recorder.ran) == len(rms_norms(model)) > 0
        recorder.ran.clear()
    assert_same(logits(compiled, inputs), want)
    assert recorder.ran
    assert sum(recorder.ran) == 0
    assert recorder.ops == []  # upstream's own lines were compiled: their guards are fewer than those of an op
