"""Models of many types on their tiny random weights, patched as a whole."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import io

import pytest
import torch
import transformers
from torch import nn

import vlmfast
import vlmfast.patches as patches
from tests.helpers.patches_models import (
    BACKENDS,
    DTYPES,
    EACH_TYPE,
    assert_same,
    cast,
    exact_sites,
    known_sites,
    logits,
    patched,
    replaceable,
    require,
    rms_norms,
    state,
    tiny,
)

LANGUAGE_MODELS = (
    *("gemma", "gemma2", "gemma3_text", "llama", "mistral", "mixtral", "phi3"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
)
NORMS = (
    *("gemma.GemmaRMSNorm", "gemma2.Gemma2RMSNorm", "gemma3.Gemma3RMSNorm", "internvl.InternVLVisionRMSNorm"),
    *("llama.LlamaRMSNorm", "llama4.Llama4TextRMSNorm", "mistral.MistralRMSNorm", "mixtral.MixtralRMSNorm"),
    *("phi3.Phi3RMSNorm", "qwen2.Qwen2RMSNorm", "qwen2_5_vl.Qwen2_5_VLRMSNorm", "qwen2_moe.Qwen2MoeRMSNorm"),
    *("qwen2_vl.Qwen2VLRMSNorm", "qwen3.Qwen3RMSNorm", "qwen3_5.Qwen3_5RMSNorm", "qwen3_5.Qwen3_5RMSNormGated"),
    *("qwen3_5_moe.Qwen3_5MoeRMSNorm", "qwen3_5_moe.Qwen3_5MoeRMSNormGated", "qwen3_moe.Qwen3MoeRMSNorm"),
    *("qwen3_omni_moe.Qwen3OmniMoeCode2WavRMSNorm", "qwen3_omni_moe.Qwen3OmniMoeRMSNorm"),
    *("qwen3_omni_moe.Qwen3OmniMoeTextRMSNorm", "qwen3_omni_moe.Qwen3OmniMoeThinkerTextRMSNorm"),
    *("qwen3_vl.Qwen3VLTextRMSNorm", "qwen3_vl_moe.Qwen3VLMoeTextRMSNorm"),
)


@pytest.fixture(autouse=True)
def on_the_definition():
    """The backend of every test that does not ask for another: an interpreted Triton kernel sums in its own order."""
    with vlmfast.use("torch"):
        yield


# ---- norms ----


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_norm_rounds_as_upstream(name: str, dtype: torch.dtype, weight_dtype: torch.dtype):
    folder, class_name = name.split(".")
    path = f"transformers.models.{folder}.modeling_{folder}"
    cls = getattr(importlib.import_module(path), class_name, None) if importlib.util.find_spec(path) else None
    if cls is None or cls.__name__ != class_name:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    module = cls(48, eps=1e-2).to(weight_dtype)
    nn.init.normal_(module.weight)
    (site,) = known_sites(module)
    assert site.name == f"{name}.forward"
    number = len(inspect.signature(site.body.function).parameters) - 1
    for width in (48, 96):  # 96: rows with a gap between them, as the queries of Qwen3.5
        inputs = [(0.1 * torch.randn(2, 5, 3, width, dtype=dtype))[..., :48] for _ in range(number)]
        want = module(*inputs)
        with vlmfast.patch(module):
            assert_same(module(*inputs), want)


# ---- one model, patched and undone ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_outputs_are_those_of_upstream(model_type: str, backend: str, dtype: torch.dtype):
    require(backend)
    model, inputs = tiny(model_type, dtype)
    want = logits(model, inputs)
    with vlmfast.patch(model, only=None if backend == "torch" else exact_sites(model)), vlmfast.use(backend):
        assert_same(logits(model, inputs), want, backend)


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_tiny_model_uses_what_it_is_given(model_type: str):
    """Otherwise the comparisons above would compare little."""
    model, inputs = tiny(model_type)
    want = logits(model, inputs)
    assert want.isfinite().all()
    assert not torch.equal(want[0], want[1])
    if "pixel_values" in inputs:
        assert not torch.equal(logits(model, {**inputs, "pixel_values": -inputs["pixel_values"]}), want)
    for module in rms_norms(model):
        with torch.no_grad():
            module.weight.mul_(1.5)
        assert not torch.equal(logits(model, inputs), want)
        with torch.no_grad():
            module.weight.div_(1.5)


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_every_module_that_can_be_is_replaced_and_only_those(model_type: str):
    model, _ = tiny(model_type)
    modules, names = replaceable(model), [site.name for site in known_sites(model)]
    patch = vlmfast.patch(model)
    assert modules
    assert patched(model) == modules
    assert sum(patch.replaced.values()) == sum(len(type(module).replacements) for module in modules)
    assert list(patch.replaced) == names


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_every_language_model(model_type: str):
    model, inputs = tiny(model_type)
    want = logits(model, inputs)
    with vlmfast.patch(model):
        assert patched(model) == rms_norms(model) != []
        assert_same(logits(model, inputs), want)


@pytest.mark.parametrize("model_type", EACH_TYPE)
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
    for _ in range(2):  # the second time there is nothing left to do
        patch.undo()
        assert state(model) == before
    assert torch.equal(logits(model, inputs), want)


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_other_instances_are_left_alone(model_type: str):
    model, _ = tiny(model_type)
    other, _ = tiny(model_type)
    before, methods = state(other), {type(m): dict(vars(type(m))) for m in other.modules()}
    vlmfast.patch(model)
    assert not patched(other)
    assert state(other) == before
    assert {cls: dict(vars(cls)) for cls in methods} == methods


@pytest.mark.parametrize("model_type", EACH_TYPE)
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


@pytest.mark.parametrize("model_type", EACH_TYPE)
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


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_generates_the_same_ids(model_type: str):
    model, inputs = tiny(model_type)
    want = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    vlmfast.patch(model)
    calls = []
    patched(model)[-1].register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), want)
    assert len(calls) >= 4


# ---- training ----


def training_step(model: nn.Module, inputs: dict, checkpointing: bool) -> tuple[int, torch.Tensor]:
    """How often the norms ran, and every gradient in one vector."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls: list[int] = []
    handles = [module.register_forward_hook(lambda *_: calls.append(1)) for module in rms_norms(model)]
    output = model(**inputs, use_cache=False).logits
    output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output))
    for handle in handles:
        handle.remove()
    grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return len(calls), torch.cat(grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_gradients_are_no_worse_and_checkpointing_stays_on(model_type: str, dtype: torch.dtype, monkeypatch):
    model, inputs = tiny(model_type, dtype)
    calls, upstream = training_step(copy.deepcopy(model), inputs, False)
    more_calls, _ = training_step(copy.deepcopy(model), inputs, True)
    assert more_calls > calls, "upstream itself does not compute anything twice"

    vlmfast.patch(model)
    assert training_step(copy.deepcopy(model), inputs, False)[0] == calls
    count, got = training_step(copy.deepcopy(model), inputs, True)
    assert count == more_calls

    monkeypatch.setattr(patches.rms_norm, "rms_norm", vlmfast.rms_norm.op.reference)  # it takes float64
    wide = {name: cast(value, torch.float64) for name, value in inputs.items()}
    getattr(model, "set_experts_implementation", lambda name: None)("eager")  # the other one takes no float64
    _, exact = training_step(model.double(), wide, False)
    budget = 1.05 * (upstream - exact).norm() + torch.finfo(dtype).eps * exact.norm()
    assert (got - exact).norm() <= budget


# ---- torch.compile ----


class Recorder:
    """A backend for torch.compile that runs graphs as they are, and notes how many of our ops each run had."""

    def __init__(self) -> None:
        self.ran: list[int] = []

    def __call__(self, module: torch.fx.GraphModule, example_inputs: list):
        ours = sum("vlmfast" in str(node.target) for node in module.graph.nodes)

        def run(*args):
            self.ran.append(ours)
            return module.forward(*args)

        return run


@pytest.fixture
def recorder():
    torch._dynamo.reset()
    yield Recorder()
    torch._dynamo.reset()


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_5", "llava", "llama4", "internvl"])
def test_compiles_into_one_graph(model_type: str, recorder: Recorder):
    """On parts that upstream compiles into one graph: placing an image in a prompt breaks it in some versions."""
    model, inputs = tiny(model_type)
    if model_type == "internvl":  # the one with our op in a vision tower
        model, inputs = model.model.vision_tower, {"pixel_values": inputs["pixel_values"]}
    else:
        inputs = {"input_ids": inputs["input_ids"].clamp(min=10)}
    with torch.no_grad():
        compiled = torch.compile(model, backend=recorder, fullgraph=True)
        want = compiled(**inputs)[0]
        vlmfast.patch(model)
        assert_same(compiled(**inputs)[0], want)
    assert recorder.ran == [0, len(rms_norms(model))]


def test_compiled_model_is_compiled_anew_after_patch_and_undo(recorder: Recorder):
    model, inputs = tiny("llama")
    compiled = torch.compile(model, backend=recorder)
    want = logits(compiled, inputs)
    assert sum(recorder.ran) == 0
    with vlmfast.patch(compiled):
        assert_same(logits(compiled, inputs), want)
        assert sum(recorder.ran) == len(patched(model)) > 0
        recorder.ran.clear()
    assert_same(logits(compiled, inputs), want)
    assert recorder.ran
    assert sum(recorder.ran) == 0
