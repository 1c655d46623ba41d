"""Arguments of `vlmfast.patch`, its report, and what it refuses."""

from __future__ import annotations

import copy
import importlib
import sys
import warnings
from types import MethodType

import pytest
import torch
from torch import nn

import vlmfast
from tests.conftest import shortens_prompts
from tests.helpers.patches_models import (
    assert_same,
    logits,
    patched,
    replaceable,
    rms_norms,
    state,
    tiny,
)
from vlmfast.patches import apply, plan
from vlmfast.patches.rms_norm import gated_rms_norm
from vlmfast.patches.swap import PatchedModule
from vlmfast.patches.upstream import source

LLAMA = "llama.LlamaRMSNorm.forward"
VISION = "internvl.InternVLVisionRMSNorm.forward"


@pytest.fixture(autouse=True)
def on_the_definition():
    with vlmfast.use("torch"):
        yield


# ---- only, exclude, report ----

QWEN3 = {"Qwen3Attention", "Qwen3DecoderLayer", "Qwen3MLP", "Qwen3RMSNorm"}


@pytest.mark.parametrize(
    ("arguments", "classes"),
    [
        ({"only": VISION}, {"InternVLVisionRMSNorm"}),
        ({"only": ["internvl.*Model.*", "qwen3.*"]}, {"InternVLModel", *QWEN3}),
        ({"exclude": "internvl.*"}, QWEN3),
        ({"only": "*RMSNorm.forward", "exclude": iter(["qwen*", "internvl.*Vision*"])}, None),
    ],
)
def test_only_and_exclude(arguments: dict, classes: set[str] | None):
    model, _ = tiny("internvl")
    if classes is None:
        with pytest.raises(RuntimeError, match=f"nothing was replaced.*{VISION}: left out by only or exclude"):
            vlmfast.patch(model, **arguments)
        assert not patched(model)
    else:
        vlmfast.patch(model, **arguments)
        assert {type(module).__name__ for module in patched(model)} == classes


def test_report():
    model, _ = tiny("internvl")
    patch = vlmfast.patch(model, exclude="internvl.*")
    first, *sites = patch.report().splitlines()
    assert first == "<Patch of internvl: 15 modules, 4 sites>:"
    assert sorted(map(str.split, sites)) == [
        ["internvl.InternVLModel.get_placeholder_mask", "skipped:", "left", "out", "by", "only", "or", "exclude"],
        ["internvl.InternVLModel.pixel_shuffle", "skipped:", "left", "out", "by", "only", "or", "exclude"],
        ["internvl.InternVLMultiModalProjector.forward", "skipped:", "left", "out", "by", "only", "or", "exclude"],
        [VISION, "skipped:", "left", "out", "by", "only", "or", "exclude"],
        ["qwen3.Qwen3Attention.forward", "2", "modules"],
        ["qwen3.Qwen3DecoderLayer.forward", "2", "modules"],
        ["qwen3.Qwen3MLP.forward", "2", "modules"],
        ["qwen3.Qwen3RMSNorm.forward", "9", "modules"],
    ]
    patch.undo()
    assert repr(patch) == "<Patch of internvl: undone, 4 sites>"


# ---- refusals ----


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"only": "qwen2.*"},
            ValueError,
            r"only: 'qwen2\.\*' matches no site of qwen3_vl; its sites are qwen3_vl\.Qwen3VLModel",
        ),
        ({"exclude": ["*", "x"]}, ValueError, "exclude: 'x' matches no site of qwen3_vl"),
        ({"only": [3]}, TypeError, "only must be a pattern or patterns of site names, got 3"),
    ],
)
def test_bad_patterns(arguments: dict, error: type[Exception], message: str):
    model, _ = tiny("qwen3_vl")
    with pytest.raises(error, match=message):
        vlmfast.patch(model, **arguments)
    assert not patched(model)


def test_not_a_model():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        vlmfast.patch("Qwen/Qwen3-VL-2B-Instruct")
    with pytest.raises(ValueError, match=r"knows no method of this Linear model \(it has no RMSNorm and no"):
        vlmfast.patch(nn.Linear(2, 2))


def test_the_type_of_the_model_decides_nothing():
    model, inputs = tiny("llama")
    want = logits(model, inputs)
    model.config.model_type = "t5"
    two = nn.ModuleList([model, tiny("llama")[0]])
    with vlmfast.patch(two) as patch:
        assert patched(two) == replaceable(two)
        assert patch.model_type == "t5"
        assert_same(logits(model, inputs), want)
    model.config = None
    with vlmfast.patch(nn.Sequential(model.model.norm)) as patch:
        assert repr(patch) == "<Patch of Sequential: 1 module, 1 site>"


class MeanNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-6

    def forward(self, x):
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps)


class OtherNorm(MeanNorm):
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class Masking(nn.Module):
    def get_placeholder_mask(self, input_ids, inputs_embeds):
        return input_ids == 3


def test_what_is_unknown_is_named_by_how_often_it_is_there():
    parts = [OtherNorm(), OtherNorm(), Masking(), MeanNorm(), MeanNorm(), MeanNorm(), nn.LayerNorm(4)]
    site = rf"{__name__}\."
    message = (
        rf"this ModuleList model \({site}MeanNorm.forward of 3 modules: its body .*digest \w+\); "
        rf"{site}OtherNorm.forward of 2 modules: .*; {site}Masking.get_placeholder_mask of 1 module: .*\)$"
    )
    with pytest.raises(ValueError, match=message):
        vlmfast.patch(nn.ModuleList(parts))
    known = nn.ModuleList([*parts, *rms_norms(tiny("llama")[0])])
    with pytest.warns(UserWarning, match="is not patched: its body is not one") as caught:
        patch = vlmfast.patch(known)
    assert len(patch.skipped) == len(caught) == 3
    assert list(patch.replaced) == [LLAMA]


def test_second_patch():
    model, _ = tiny("llava")
    patch = vlmfast.patch(model)
    for again in (model, model.model.language_model, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match="model is patched already"):
            vlmfast.patch(again)
    patch.undo()
    vlmfast.patch(model.model.language_model).undo()
    assert not patched(model)


def test_unpatch_reaches_a_copy():
    model, _ = tiny("llama")
    before = state(model)
    patch = vlmfast.patch(model)
    twin = copy.deepcopy(model)
    assert vlmfast.unpatch(twin) == len(patched(model)) > 0
    assert not patched(twin)
    vlmfast.patch(twin).undo()
    assert patched(model)
    patch.undo()
    assert state(model) == before
    assert vlmfast.unpatch(model) == 0
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        vlmfast.unpatch("llama")


def test_weights_that_the_ops_refuse_are_left_alone():
    model, inputs = tiny("llama")
    want = logits(model.double(), inputs)
    with pytest.raises(RuntimeError, match=r"nothing was replaced.*its weights are torch\.float64"):
        vlmfast.patch(model, only="*RMSNorm.forward")
    assert_same(logits(model, inputs), want)


def test_unknown_bodies(monkeypatch):
    model, _ = tiny("qwen3_5")
    gated = "qwen3_5.Qwen3_5RMSNormGated.forward"
    known = {key: body for key, body in plan.KNOWN.items() if body.function is not gated_rms_norm}
    monkeypatch.setattr(plan, "KNOWN", known)
    with pytest.warns(UserWarning, match=f"{gated} is not patched: its body is not one") as caught:
        patch = vlmfast.patch(model)
    assert caught[0].filename == __file__
    names = {
        "VisionModel",
        "VisionAttention",
        "VisionPatchMerger",
        "Model",
        "RMSNorm",
        "DecoderLayer",
        "MLP",
        "Attention",
    }
    assert {type(m).__name__ for m in patched(model)} == {f"Qwen3_5{name}" for name in names}
    assert f"{gated} skipped: its body is not one" in " ".join(patch.report().split())
    patch.undo()
    monkeypatch.setattr(plan, "KNOWN", dict([known.popitem()]))
    with pytest.raises(ValueError, match=r"knows no method of this qwen3_5 model"):
        vlmfast.patch(model)
    assert not patched(model)


NORM = """
def scaled(x):
    return {scaled}

class Norm:
    def _norm(self, x):
        return {normed}

    def forward(self, x):
        return self._norm(x)
"""


def test_body_includes_the_methods_and_functions_it_calls(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    bodies = {"plain": "x", "negated": "-x", "with_blanks": "x  ", "through": "scaled(x)"}
    cases = {name: {"scaled": "x", "normed": body} for name, body in bodies.items()}
    cases["twice"], digests = {"scaled": "2 * x", "normed": "scaled(x)"}, {}
    for name, texts in cases.items():
        (tmp_path / f"norm_{name}.py").write_text(NORM.format(**texts))
        digests[name] = source(importlib.import_module(f"norm_{name}").Norm, "forward").digest
    assert digests["plain"] == digests["with_blanks"]
    assert len(set(digests.values())) == 4


def test_source_that_cannot_be_read():
    model, _ = tiny("llama")
    norm = model.model.norm
    norm.__class__ = type("LlamaRMSNorm", (type(norm),), {"forward": eval("lambda self, hidden_states: hidden_states")})
    with pytest.warns(UserWarning, match="LlamaRMSNorm.forward is not patched: its source cannot be read"):
        patch = vlmfast.patch(model)
    assert not isinstance(norm, PatchedModule)
    assert LLAMA in patch.replaced
    assert patch.replaced[LLAMA] == len(rms_norms(model)) - 1


def test_replaced_by_somebody_else():
    model, inputs = tiny("internvl")
    theirs = rms_norms(model.model.vision_tower)[0]
    theirs.forward = MethodType(lambda self, hidden_states: hidden_states, theirs)  # kernels.kernelize does this
    with pytest.warns(UserWarning, match="forward was already replaced on 1 of 8 modules"):
        patch = vlmfast.patch(model)
    assert VISION not in patch.replaced
    assert not patched(model.model.vision_tower)
    logits(model, inputs)


@pytest.mark.parametrize("name", ["extra_repr", "forward", "_norm"])
def test_a_subclass_is_patched_unless_it_overrides_what_the_body_names(name: str):
    model, _ = tiny("qwen3_5")
    module = next(module for module in rms_norms(model) if hasattr(module, "_norm"))

    def override(self, *args):
        return getattr(super(cls, self), name)(*args)

    cls = type("FastRMSNorm", (type(module),), {name: override})
    module.__class__ = cls
    if name == "extra_repr":
        patch = vlmfast.patch(model)
        assert patch.replaced[f"{__name__}.FastRMSNorm.forward"] == 1
        assert isinstance(module, PatchedModule)
    else:
        with pytest.warns(UserWarning, match=r"FastRMSNorm.forward is not patched: its body is not one"):
            vlmfast.patch(model)
        assert type(module) is cls


def test_nothing_is_left_of_a_patch_that_failed(monkeypatch):
    model, _ = tiny("qwen3_vl")
    before, calls = state(model), []

    def failing(module: nn.Module, cls: type) -> None:
        calls.append(module)
        if len(calls) == 4:
            raise MemoryError
        set_class(module, cls)

    set_class = apply.set_class
    monkeypatch.setattr(apply, "set_class", failing)
    with pytest.raises(MemoryError):
        vlmfast.patch(model)
    assert len(calls) == 4 + 3
    assert state(model) == before


def test_undo_refuses_a_class_changed_since():
    model, _ = tiny("llama")
    patch = vlmfast.patch(model)
    module = model.model.norm
    ours = type(module)
    module.__class__ = type("FSDPLlamaRMSNorm", (ours,), {})
    with pytest.raises(RuntimeError, match=r"given another class after the patch \(FSDPLlamaRMSNorm\)"):
        patch.undo()
    assert len(patched(model)) == len(replaceable(model)), "all or nothing"
    module.__class__ = ours
    patch.undo()
    assert not patched(model)


def test_error_in_the_block_undoes_the_patch():
    model, _ = tiny("llama")

    def fail() -> None:
        with vlmfast.patch(model):
            assert patched(model)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not patched(model)


def test_no_warning_without_cause():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vlmfast.patch(tiny("internvl")[0]).undo()


# ---- a transformers that is too new ----


def test_a_newer_transformers_is_said(monkeypatch: pytest.MonkeyPatch):
    model, _ = tiny("llava")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.24.0.dev0")
    with pytest.warns(
        UserWarning, match=r"transformers 5\.24\.0\.dev0 is newer than 5\.23\.0, the newest release that"
    ):
        vlmfast.patch(model).undo()
    if shortens_prompts():
        with (
            pytest.warns(match="is newer"),
            pytest.raises(ValueError, match="cut between layers under transformers up to"),
        ):
            vlmfast.patch(model, reduce=vlmfast.FastV(1, 0.5))
    for known in ("5.23.4", "4.57.6"):
        monkeypatch.setattr(sys.modules["transformers"], "__version__", known)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vlmfast.patch(model).undo()
