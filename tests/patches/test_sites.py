"""`vlmfast.patch` recognises methods by their bodies, not by the class or project that they belong to."""

from __future__ import annotations

import gc
import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

import vlmfast
from tests.helpers.default_models import default_models
from tests.helpers.patches_models import METHODS, patched, rms_norms, skip_unless_known, tiny
from tests.helpers.tiny_models import mrope
from vlmfast.patches import upstream


@pytest.fixture(autouse=True)
def on_the_definition() -> Iterator[None]:
    with vlmfast.use("torch"):
        yield


# ---- code from elsewhere ----

REMOTE = '''
import torch
from torch import nn


class Norm(nn.Module):
    """A copy with another name, other comments and no annotations."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype  # as upstream
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + {epsilon})
        return self.weight * hidden_states.to(input_dtype)


class RemoteModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Norm(16) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x
'''


@pytest.fixture
def remote(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Load a module by its path, as ``trust_remote_code`` does."""
    name = f"modeling_{request.node.name.translate(str.maketrans('[].+', '____'))}"
    (tmp_path / f"{name}.py").write_text(
        REMOTE.replace("{epsilon}", getattr(request, "param", "self.variance_epsilon"))
    )
    spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_remote_code_with_a_known_body_is_patched(remote: ModuleType):
    model, x = remote.RemoteModel(), torch.randn(5, 16, dtype=torch.bfloat16)
    want = model(x)
    with vlmfast.patch(model) as patch:
        assert patch.replaced == {f"{remote.__name__}.Norm.forward": 3}
        assert torch.equal(model(x), want)
    assert torch.equal(model(x), want)
    assert not patched(model)


@pytest.mark.parametrize("remote", ["2 * self.variance_epsilon"], indirect=True)
def test_remote_code_that_says_something_else_is_left_alone(remote: ModuleType):
    model = remote.RemoteModel()
    model.layers.append(tiny("llama")[0].model.norm)
    with pytest.warns(UserWarning, match=r"Norm\.forward is not patched: its body is not one"):
        vlmfast.patch(model)
    assert patched(model) == [model.layers[-1]]


def test_a_method_of_torch_that_others_replaced_is_no_part_of_a_body(monkeypatch: pytest.MonkeyPatch):
    """Extensions for other devices replace `nn.Module.to`, which bodies name when they convert a tensor."""
    norm = type(tiny("qwen3_vl")[0].model.language_model.norm)
    want, original = upstream.source(norm, "forward"), nn.Module.to
    monkeypatch.setattr(nn.Module, "to", lambda self, *args, **kwargs: original(self, *args, **kwargs))
    assert upstream.source(norm, "forward") == want


def test_plain_module_around_known_parts():
    model, inputs = tiny("llava")
    parts = nn.ModuleDict({"norm": model.model.language_model.norm, "layers": model.model.language_model.layers})
    want = model(**inputs).logits
    patch = vlmfast.patch(parts)
    assert set(patched(model)) > set(rms_norms(model))
    assert patch.replaced["llama.LlamaRMSNorm.forward"] == len(rms_norms(model))
    assert patch.replaced["llama.LlamaAttention.forward"] == 2
    assert torch.equal(model(**inputs).logits, want)
    patch.undo()
    assert not patched(model)


# ---- nothing known ----


class OtherRMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm()


def test_nothing_known_names_three_bodies_and_no_more():
    kinds = [type(f"{name}RMSNorm", (OtherRMSNorm,), {}) for name in ("Rare", "Common", "Usual", "Frequent")]
    model = nn.Sequential(*(kind() for kind, number in zip(kinds, (1, 4, 2, 3), strict=True) for _ in range(number)))
    with pytest.raises(ValueError, match=r"(?s)CommonRMSNorm.*FrequentRMSNorm.*UsualRMSNorm") as caught:
        vlmfast.patch(model)
    assert "Rare" not in str(caught.value)
    assert str(caught.value).count("its body is not one") == 3
    assert not patched(model)


# ---- every type of this transformers ----


def test_patch_of_a_full_model_is_quick():
    """Half a second of CPU time for Qwen3-VL-8B, the best of three runs; other processes do not count."""
    skip_unless_known("qwen3_vl")
    text = {"num_hidden_layers": 36, **mrope([24, 20, 20], mrope_interleaved=True)}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config={"depth": 27})
    with torch.device("meta"):
        model = transformers.Qwen3VLForConditionalGeneration._from_config(config)
    seconds = []
    gc.collect()
    gc.freeze()  # as in a new process, where the garbage collector has only this model to walk
    for _ in range(3):
        upstream._texts.clear()  # as in a new process, which has parsed no source yet
        start = time.process_time()
        patch = vlmfast.patch(model)
        seconds.append(time.process_time() - start)
        assert sum(patch.replaced.values()) > 4 * 36
        patch.undo()
    assert min(seconds) < 0.5


@pytest.mark.filterwarnings("ignore:.* is not patched")
@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="has fewer types")
def test_most_types_are_patched_and_most_of_these_whole():
    something, everything = [], []
    for model_type, model in default_models():
        try:
            vlmfast.patch(model)
        except ValueError:
            continue
        something.append(model_type)
        alike = [
            m for m in model.modules() if "RMSNorm" in type(m).__name__ or any(hasattr(m, n) for n in METHODS[1:3])
        ]
        if {id(module) for module in alike} <= {id(module) for module in patched(model)}:
            everything.append(model_type)
    assert len(something) >= 72, something
    assert len(everything) >= 60, everything
