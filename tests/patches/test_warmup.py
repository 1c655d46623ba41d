"""`vlmfast.warmup` launches every specialisation that a patched model will need."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vlmfast
from tests.conftest import shortens_prompts
from tests.helpers.tiny_types import build
from vlmfast.registry import OPS, override


def longer(inputs: dict[str, Any], by: int) -> dict[str, Any]:
    """Return the same prompt with more text behind it."""
    more = {}
    for name, value in inputs.items():
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            value = torch.cat([value, value[:, -1:].expand(-1, by)], 1)
        more[name] = value
    return more


@contextlib.contextmanager
def keys(execute: bool = False):
    """Record the specialisations that are launched in the block; ``execute`` runs them, where results matter."""
    pytest.importorskip("triton")
    from tests.helpers.specialisation import launched

    with vlmfast.use("triton"), launched(execute) as found:
        yield found


@torch.no_grad()
def test_norms_placement_and_deepstack_need_no_prompt():
    model, inputs = build("qwen3_vl")
    decoders = "*TextDecoderLayer.forward", "*TextAttention.forward", "*TextMLP.forward"
    with vlmfast.patch(model, exclude=("*Merger*", *decoders)), keys() as warm:
        told = vlmfast.warmup(model)
        assert told.left == ()
        assert {"rms_norm", "place_embeddings", "deepstack_add"} <= told.ops.keys()
        assert set(told.ops.values()) == {("triton",)}
        with keys() as served:
            for by in (0, 1, 12, 40):
                model(**longer(inputs, by))
            model.generate(**inputs, max_new_tokens=3)
    assert served
    assert set(served) <= set(warm)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["internvl", "qwen2_5_vl", "llava"])
def test_a_prompt_warms_all(model_type: str):
    model, inputs = build(model_type)
    with vlmfast.patch(model), keys() as warm:
        told = vlmfast.warmup(model, inputs)
        assert told.left == ()
        with keys() as served:
            for by in (1, 12, 40):
                model(**longer(inputs, by))
    assert served
    assert set(served) <= set(warm)


@torch.no_grad()
def test_a_prompt_warms_a_reduction():
    if not shortens_prompts():
        pytest.skip("prompts can be shortened from transformers 5.17 on")
    model, inputs = build("llava")
    with vlmfast.patch(model, reduce=vlmfast.VisionZip(dominant=5, contextual=2)), keys(execute=True) as warm:
        told = vlmfast.warmup(model, inputs)
        assert {"top_tokens", "merge_slots", "merge_rows"} <= told.ops.keys()
        with keys(execute=True) as served:
            model(**longer(inputs, 12))
    assert {kernel.fn.__name__ for kernel, _ in served} >= {"top_tokens_kernel", "merge_rows_kernel"}
    assert set(served) <= set(warm)


def test_what_is_left_is_told():
    model, inputs = build("internvl")
    with vlmfast.patch(model), vlmfast.use("torch"):
        told = vlmfast.warmup(model)
        assert "internvl.InternVLModel.pixel_shuffle" in told.left
        assert "internvl.InternVLModel.pixel_shuffle: not run, give `warmup` a prompt" in told.report()
        assert vlmfast.warmup(model, inputs).left == ()


def test_on_a_cpu_nothing_is_compiled_and_it_says_so():
    model, _ = build("qwen3_vl")
    with vlmfast.patch(model), vlmfast.use("torch"):
        told = vlmfast.warmup(model)
    assert told.compiled == ()
    assert told.report().startswith("nothing was to be compiled\n")
    assert "\n  rms_norm: torch\n" in str(told)


@torch.no_grad()
def test_of_a_dtype_that_no_op_takes_nothing_is_run():
    model, inputs = build("qwen3_vl")
    model.double()
    with pytest.warns(UserWarning, match="float64"):
        patched = vlmfast.patch(model)
    with patched:
        for prompts in ((), ({**inputs, "pixel_values": inputs["pixel_values"].double()},)):
            told = vlmfast.warmup(model, *prompts)
            assert (told.ops, told.compiled) == ({}, ())


def test_compilations_are_counted(monkeypatch: pytest.MonkeyPatch):
    """They are counted by Triton's hook; a hook that was already there is still called, and stays afterwards."""
    runtime = pytest.importorskip("triton").knobs.runtime
    theirs: list[str] = []

    def hook(*, fn: Any) -> None:
        theirs.append(fn.name)

    monkeypatch.setattr(runtime, "jit_post_compile_hook", hook)
    entry = OPS["rms_norm"]
    found = entry.backend("torch")

    def compiling(*args: Any) -> Any:
        runtime.jit_post_compile_hook(fn=SimpleNamespace(name="rms_norm_kernel"))
        return found.run(*args)

    model, _ = build("qwen3")
    with vlmfast.patch(model), vlmfast.use("torch"), override(entry, "torch", replace(found, run=compiling)):
        told = vlmfast.warmup(model)
    assert set(told.compiled) == {"rms_norm_kernel"}
    assert told.report().startswith(f"{len(told.compiled)} Triton kernels compiled\n")
    assert theirs == list(told.compiled)
    assert runtime.jit_post_compile_hook is hook


def test_bad_calls():
    model, inputs = build("qwen3")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        vlmfast.warmup(inputs)
    with pytest.raises(ValueError, match="model must be patched, got a Qwen3ForCausalLM that is not"):
        vlmfast.warmup(model)
    with vlmfast.patch(model), pytest.raises(TypeError, match=r"prompts must map the model's arguments .* got Tensor"):
        vlmfast.warmup(model, inputs["input_ids"])
