"""Hugging Face `kernels` and transformers' replacement of classes: the same bits as without, and a way back.

`make hub-kernel` runs all of them. Where `kernels` is not installed, those that need it are skipped.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import re
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import vlmfast
from scripts import export_hub_kernel
from tests.helpers.tiny_types import build
from tests.test_docs import blocks
from vlmfast import hub, registry
from vlmfast.patches import rms_norm as norms
from vlmfast.patches.swap import PatchedModule
from vlmfast.patches.upstream import source

transformers = pytest.importorskip("transformers")

try:
    importlib.metadata.version("kernels")
    KERNELS = True
except importlib.metadata.PackageNotFoundError:
    KERNELS = False
needs_kernels = pytest.mark.skipif(not KERNELS, reason="needs the package kernels: make hub-kernel")
replaces = pytest.mark.skipif(
    importlib.util.find_spec("transformers.monkey_patching") is None, reason="needs transformers 5"
)
DTYPES = [torch.float32, torch.bfloat16]


def made(model_type: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = build(model_type)
    with torch.no_grad():  # ones would hide a weight that is left out
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    return model.to(dtype).eval(), {**inputs, **cast}


def logits(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


# ---- what `kernels` does to rotary functions ----


def as_kernels_does(func: Any) -> nn.Module:
    """Make a module of a function like `kernels._create_func_module`."""

    class Func(nn.Module):
        kernel_layer_name = "rotary_pos_emb"

        def forward(self, *args, **kwargs):
            return func(*args, **kwargs)

    return Func()


def test_a_body_is_known_where_kernels_made_a_module_of_its_function(monkeypatch):
    """With `kernels` installed the rotary function is a module, and all attention was left unpatched."""
    cls = transformers.models.llama.modeling_llama.LlamaAttention
    names = inspect.unwrap(cls.forward).__globals__
    before, turn = source(cls, "forward"), names["apply_rotary_pos_emb"]
    if not isinstance(turn, nn.Module):
        turn = as_kernels_does(turn)
        monkeypatch.setitem(names, "apply_rotary_pos_emb", turn)
    assert source(cls, "forward") == before
    monkeypatch.setattr(turn, "forward", (lambda self, *inputs: inputs).__get__(turn), raising=False)
    assert source(cls, "forward") != before  # another kernel runs in its place


# ---- mapped layers ----


def page() -> dict[str, Any]:
    """Return what docs/patch.md defines for `kernels`; the test of the page cannot call it."""
    [code] = [text for heading, text in blocks("docs/patch.md", "python") if heading == "Hugging Face `kernels`"]
    names: dict[str, Any] = {"vlmfast": vlmfast, "torch": torch}
    exec(code, names)
    return names


def kernelized(model: nn.Module) -> nn.Module:
    return page()["map_layers"](model)


@pytest.fixture
def counted(monkeypatch) -> dict[str, int]:
    """Count the calls of the ops by mapped layers."""
    counts = {"norm": 0, "rotary": 0}

    def counting(name: str, function: Any) -> Any:
        def count(*args: Any) -> Any:
            counts[name] += 1
            return function(*args)

        return count

    monkeypatch.setattr(norms, "rms_norm", counting("norm", norms.rms_norm))
    monkeypatch.setattr(hub, "qk_norm_rope", counting("rotary", hub.qk_norm_rope))
    return counts


@pytest.fixture
def rotary_restored():
    """`kernels` replaces a function for all models of its file: give it back after the test."""
    yield
    for module in list(sys.modules.values()):
        turn = vars(module).get("apply_rotary_pos_emb") if getattr(module, "__name__", "").startswith("trans") else None
        if isinstance(turn, nn.Module):
            vars(turn).pop("forward", None)


@needs_kernels
@pytest.mark.usefixtures("rotary_restored")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("model_type", "calls"),
    [
        ("llava", {"norm": 5, "rotary": 2}),
        ("qwen3_vl", {"norm": 9, "rotary": 2}),
        ("qwen2_5_vl", {"norm": 10, "rotary": 2}),
        (
            "qwen3_5",
            {"norm": 8, "rotary": 0},
        ),  # norms of two names, one with a gate; the function turns a part of a head
        ("gemma3", {"norm": 0, "rotary": 2}),  # its norm is not decorated
        ("olmo2", {"norm": 9, "rotary": 0}),  # weight in float32; its function rounds elsewhere
    ],
)
def test_mapped_layers_give_the_same_bits(model_type, calls, dtype, counted):
    model, inputs = made(model_type, dtype)
    before = logits(model, inputs)
    assert torch.equal(logits(kernelized(model), inputs), before)
    assert counted == calls


@needs_kernels
@pytest.mark.usefixtures("rotary_restored")
def test_mapped_layers_train():
    model, inputs = made("llava")
    grads = []
    for step in (model, kernelized(model)):
        step.zero_grad()
        step(**inputs).logits.square().mean().backward()
        grads.append({name: value.grad.clone() for name, value in step.named_parameters() if value.grad is not None})
    assert any("norm" in name for name in grads[0])
    torch.testing.assert_close(grads[1], grads[0])


@needs_kernels
@pytest.mark.usefixtures("rotary_restored")
def test_an_unknown_norm_runs_itself(counted):
    model, inputs = made("llava")
    norm = model.model.language_model.norm

    class Doubled(type(norm)):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 2.0

    norm.__class__ = Doubled
    before = logits(model, inputs)
    assert torch.equal(logits(kernelized(model), inputs), before)
    assert counted["norm"] == 4


@needs_kernels
@pytest.mark.usefixtures("rotary_restored")
def test_a_mapped_model_does_not_hide_attention_from_a_patch():
    expected = vlmfast.patch(build("llava")[0]).replaced
    kernelized(build("llava")[0])  # from here on the rotary function of all Llamas is that of the mapping
    assert vlmfast.patch(build("llava")[0]).replaced == expected


@needs_kernels
@pytest.mark.usefixtures("rotary_restored")
def test_a_compiled_graph_has_the_lines_of_upstream():
    """Inductor fuses them; a lookup of the body would break the graph, which `fullgraph` refuses."""
    model, _ = made("llama")
    turn = transformers.models.llama.modeling_llama.apply_rotary_pos_emb
    norm, x, heads, angles = model.model.norm, torch.randn(2, 5, 64), torch.randn(2, 4, 5, 16), torch.randn(1, 5, 16)
    before = norm(x), *turn(heads, heads, angles, angles)
    norm = kernelized(model).model.norm
    graphs: list[str] = []

    def keep(graph: Any, example: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    def both(x: Any, heads: Any, angles: Any) -> Any:
        return norm(x), *turn(heads, heads, angles, angles)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(both, backend=keep, fullgraph=True)(x, heads, angles), before)
    assert len(graphs) == 1
    assert "vlmfast" not in graphs[0]


@needs_kernels
@pytest.mark.usefixtures("rotary_restored")
def test_from_pretrained_uses_kernels(tmp_path, counted, recwarn, caplog):
    """`use_kernels=True`, as docs/patch.md has it, warns of no layer and survives a change of mode."""
    saved, inputs = made("llava", torch.bfloat16)
    saved.save_pretrained(tmp_path)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    before = logits(model, inputs)
    mapped = page()["load"](tmp_path)
    mapped.train()
    mapped.eval()
    assert "No kernel mapping" not in caplog.text + "".join(str(warning.message) for warning in recwarn)
    assert torch.equal(logits(mapped, inputs), before)
    assert counted == {"norm": 5, "rotary": 2}
    assert mapped.kernel_config.inherit_mapping is False  # on a GPU, transformers' own mapping would download others


def test_kernels_missing_or_old_is_said(monkeypatch):
    missing = mock.Mock(side_effect=importlib.metadata.PackageNotFoundError)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    for function in (hub.kernel_mapping, hub.kernel_config):
        with pytest.raises(ImportError, match="needs the package kernels of Hugging Face: pip install kernels"):
            function()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.10.5")
    with pytest.raises(ImportError, match=r"needs kernels 0\.16 or later.* got 0\.10\.5"):
        hub.kernel_mapping()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.16.1")
    monkeypatch.setitem(sys.modules, "transformers.integrations.hub_kernels", None)
    with pytest.raises(ImportError, match=r"transformers 5\.17 or later, and the version of kernels that it takes"):
        hub.kernel_config()


# ---- the repository for the Hub ----


@pytest.fixture
def exported(tmp_path):
    """Export for Triton's interpreter, and for a GPU if the tests have one."""
    export_hub_kernel.export(tmp_path, export_hub_kernel.BACKENDS)
    return tmp_path


def test_an_export_stands_alone(exported):
    """Each op that Triton launches is in it, with the bits of vlmfast's launcher and no import of vlmfast."""
    from vlmfast.kernels.rms_norm import rms_norm

    build = exported / "build/torch-cuda"
    texts = {path: path.read_text() for path in build.rglob("*.py")}
    assert not [path for path, text in texts.items() if re.search(r"^\s*(from|import) vlmfast", text, re.MULTILINE)]
    metadata = json.loads((build / "metadata.json").read_text())
    spec = importlib.util.spec_from_file_location(metadata["id"], build / "__init__.py")
    kernel = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {metadata["id"]: kernel}):
        spec.loader.exec_module(kernel)
        x, weight = torch.randn(5, 96), torch.randn(96)
        assert torch.equal(kernel.rms_norm(x, weight, 1e-5, "olmo"), rms_norm(x, weight, 1e-5, "olmo"))
    assert not torch.equal(rms_norm(x, weight, 1e-2, "olmo"), rms_norm(x, weight, 1e-5, "olmo"))
    launched = {name for name, op in registry.OPS.items() if op.compose is None and not op.backend("triton").absent}
    assert {*kernel.__all__} == {*launched, "layers"}


@needs_kernels
@pytest.mark.parametrize(
    ("model_type", "name", "layer"), [("llama", "RMSNorm", "LlamaRMSNorm"), ("olmo2", "RMSNorm", "OlmoRMSNorm")]
)
def test_layers_of_an_export_are_mapped(exported, model_type, name, layer):
    import kernels

    model, inputs = made(model_type)
    before = logits(model, inputs)
    repository = kernels.LocalLayerRepository(exported, layer_name=layer)
    with kernels.use_kernel_mapping({name: {"cpu": repository}}, inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
    launcher = sys.modules[repository.load().__module__]
    with mock.patch.object(launcher, "rms_norm", wraps=launcher.rms_norm) as launch:
        torch.testing.assert_close(logits(model, inputs), before)
    assert launch.call_count >= 5
    for module in model.modules():  # float64 is none of its dtypes
        if type(module).__name__.endswith("RMSNorm"):
            x = torch.randn(3, module.weight.shape[0], dtype=torch.float64)
            assert torch.equal(module(x), type(module).forward(module, x))


# ---- models that are patched as they are built ----


def patched(model: nn.Module) -> int:
    return sum(isinstance(module, PatchedModule) for module in model.modules())


@pytest.fixture
def loading(tmp_path):
    """Save a model, and return its inputs and the function that loads it."""
    if transformers.__version__.startswith("5.17.") and importlib.util.find_spec("torchvision") is None:
        pytest.skip("to replace any class, transformers 5.17 looks into modules that import torchvision")
    model, inputs = made("llava", torch.bfloat16)
    model.save_pretrained(tmp_path)
    load = transformers.AutoModelForImageTextToText.from_pretrained
    return inputs, lambda: load(tmp_path, dtype=torch.bfloat16).eval()


@replaces
@pytest.mark.parametrize("types", [("llava",), ("llava", "llama")])
def test_registered_models_are_built_patched(loading, types):
    inputs, load = loading
    model = load()
    hub.register(*types)
    try:
        built = load()
    finally:
        hub.unregister(*types)
    assert torch.equal(logits(built, inputs), logits(model, inputs))
    assert patched(load()) == 0
    assert patched(built) == patched(vlmfast.patch(model) and model) > 0
    assert vlmfast.unpatch(built) > 0
    assert type(built.model) is type(load().model)


@replaces
def test_what_cannot_be_patched_is_built_as_before(loading, monkeypatch):
    """An error would leave the classes of transformers replaced: it restores them only after a success."""
    _, load = loading
    monkeypatch.setattr(hub, "patch", mock.Mock(side_effect=ValueError("nothing known")))
    hub.register("llava")
    try:
        with pytest.warns(UserWarning, match="LlavaModel is not patched: nothing known"):
            assert patched(load()) == 0
    finally:
        hub.unregister("llava")
    assert not isinstance(transformers.models.llava.modeling_llava.LlavaModel, hub._Patching)


@replaces
def test_bad_registrations():
    with pytest.raises(ValueError, match="model_types must be one type of model or several, such as 'llava', got none"):
        hub.register()
    with pytest.raises(TypeError, match="model_types must be strings, got int"):
        hub.register(1)
    with pytest.raises(ValueError, match="types of models that AutoModel knows, got 'lava'"):
        hub.register("lava")
    with pytest.raises(ValueError, match="not found"):
        hub.unregister("llava")


def test_old_transformers_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.monkey_patching", None)
    with pytest.raises(ImportError, match=r"vlmfast\.hub\.register needs transformers 5\.17 or later"):
        hub.register("llava")
