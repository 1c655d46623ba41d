"""`vlmfast.patch(model, reduce=...)`: what it refuses and does not change, training, compilation and wrappers."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import re

import pytest
import torch
from torch import nn

import vlmfast
from tests.helpers.patches_models import cast, patched, state, tiny
from tests.helpers.reduce_models import EACH_TYPE, METHODS, Talk
from tests.helpers.thorough import first_of
from vlmfast.reduce import EvenTokens, Method, Selection, VisualTokens, generation

METHOD = METHODS[0]
EACH_DOUBLE = [name for name in EACH_TYPE if not name.endswith("_moe")]  # torch._grouped_mm has no float64
PROMPTS = ((10, 0, 11, 12), (13, 14, 15, 1, 2, 16))


@pytest.fixture(autouse=True)
def on_the_definition():
    with vlmfast.use("torch"):
        yield


@torch.no_grad()
def logits(model: nn.Module, inputs: dict) -> torch.Tensor:
    return model(**inputs).logits


def tower_of(talk: Talk) -> nn.Module:
    base = talk.model.base_model
    return getattr(base, "vision_tower", None) or base.visual


def settled(model: nn.Module) -> dict[str, tuple[type, dict[str, int]]]:
    """Return the model's state without attributes that prefills set, in Qwen-VL and for recorded hidden states."""
    left = ("rope_deltas", "_output_capturing_hooks_installed")
    return {
        name: (cls, {key: value for key, value in attributes.items() if key not in left})
        for name, (cls, attributes) in state(model).items()
    }


# ---- the patch itself ----


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_undo_and_copy(model_type: str):
    talk = Talk.of(model_type)
    inputs = talk.batch(*PROMPTS)
    full, before = logits(talk.model, inputs), settled(talk.model)
    with vlmfast.patch(talk.model, reduce=METHOD):
        short = logits(talk.model, inputs)
        assert short.shape[1] < full.shape[1]
        twin = copy.deepcopy(talk.model)
        assert isinstance(talk.model, before[""][0])
    assert settled(talk.model) == before
    assert torch.equal(logits(talk.model, inputs), full)
    assert torch.equal(logits(twin, inputs), short)
    vlmfast.unpatch(twin)
    assert torch.equal(logits(twin, inputs), full)


@pytest.mark.parametrize("model_type", EACH_DOUBLE)
@pytest.mark.parametrize("method", first_of(METHODS))
def test_float64_is_reduced_alike(model_type: str, method: Method):
    """No op takes float64, so definitions run, whether the model is float64 before the patch or cast afterwards."""
    talk, later = Talk.of(model_type), Talk.of(model_type)
    inputs = talk.batch(*PROMPTS)
    wide = {name: cast(value, torch.float64) for name, value in inputs.items()}
    with vlmfast.patch(talk.model, exclude="*", reduce=method):
        want = logits(talk.model, inputs)
    talk.model.double()
    with vlmfast.patch(talk.model, exclude="*", reduce=method), vlmfast.patch(later.model, exclude="*", reduce=method):
        got = logits(talk.model, wide)
        later.model.double()
        assert torch.equal(logits(later.model, wide), got)
        ids = talk.model.generate(**wide, max_new_tokens=2, do_sample=False)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 2
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_saved_model_is_the_original(model_type: str):
    model, inputs = tiny(model_type)
    file = io.BytesIO()
    with vlmfast.patch(model, reduce=METHOD):
        torch.save(model, file)
    assert b"vlmfast" not in file.getvalue()
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False), inputs), logits(model, inputs))


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_tower_runs_once_for_each_prompt(model_type: str):
    talk = Talk.of(model_type)
    runs: list[int] = []
    tower_of(talk).register_forward_hook(lambda *_: runs.append(1))
    with vlmfast.patch(talk.model, reduce=METHOD):
        talk.model.generate(**talk.batch(*PROMPTS), max_new_tokens=3, do_sample=False)
        assert len(runs) == 1
        logits(talk.model, talk.batch(*PROMPTS))
        assert len(runs) == 2
        logits(talk.model, talk.batch((10, 11)))
    if talk.compressible:
        vlmfast.compress_inputs(talk.model, talk.batch(*PROMPTS), METHOD)
        assert len(runs) == 3


def test_report_and_images():
    talk = Talk.of("llava")
    patch = vlmfast.patch(talk.model, reduce=METHOD)
    assert patch.report().splitlines()[-1] == f"  {METHOD}: no prompt with images yet"
    logits(talk.model, talk.batch(*PROMPTS))
    assert [(image.total, len(image.features)) for image in patch.images] == [(16, 12)] * 3
    last = "visual tokens of the last prompt 16 -> 12, 16 -> 12, 16 -> 12; prompt 40 -> 32 (20.0% saved)"
    *_, method, costs = patch.report().splitlines()
    assert method == f"  {METHOD}: {last}"
    assert re.fullmatch(r"  language model: prefill \S+ -> \S+ GFLOP, cache 0.04096 -> 0.03277 MB", costs)
    assert not any(image.features.requires_grad for image in patch.images)
    patch.undo()
    alone = vlmfast.patch(talk.model, exclude="*", reduce=METHOD)
    assert patched(talk.model) == [talk.model, talk.model.model]  # the latter to refuse images of other callers
    assert repr(alone) == "<Patch of llava: 2 modules, 0 sites>"


def test_methods_as_text():
    """Text names the same methods as objects do, for `patch` and `compress_inputs`."""
    talk = Talk.of("llava")
    inputs = talk.batch(*PROMPTS)
    expected = vlmfast.compress_inputs(talk.model, inputs, vlmfast.EvenTokens(0.5))
    found = vlmfast.compress_inputs(talk.model, inputs, "even:0.5")
    assert found.keys() == expected.keys()
    name = "input_ids" if "input_ids" in expected else "inputs_embeds"  # of transformers 5.17
    assert torch.equal(found[name], expected[name])
    with vlmfast.patch(talk.model, reduce="even:0.75+fastv:1:0.5") as patch:
        logits(talk.model, inputs)
        lines = patch.report().splitlines()
    assert any("EvenTokens(keep=0.75)" in line for line in lines)
    assert any("FastV(layer=1, keep=0.5)" in line for line in lines)


# ---- refusals ----


def test_refusals(monkeypatch):
    talk = Talk.of("llava")
    model = talk.model
    with pytest.raises(TypeError, match=r"reduce must be a method such as .*, got int"):
        vlmfast.patch(model, reduce=64)
    with pytest.raises(TypeError, match="inputs must be a mapping of the arguments of forward, got Tensor"):
        vlmfast.compress_inputs(talk.model, torch.ones(1, 4), METHOD)
    with pytest.raises(TypeError, match=r"method must be one such as .*, got int"):
        vlmfast.compress_inputs(model, {}, 64)
    with pytest.raises(ValueError, match=r"visionzip is written visionzip:DOMINANT:CONTEXTUAL"):
        vlmfast.compress_inputs(model, {}, "visionzip")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be reduced; those of these families can: .*llava"):
        vlmfast.patch(tiny("llama")[0], reduce=METHOD)
    with pytest.raises(
        ValueError, match=r"needs the model with its vision tower and its language head, got LlavaModel"
    ):
        vlmfast.patch(model.model, reduce=METHOD)
    text = tiny("qwen3_vl")[0].model.language_model
    with pytest.raises(ValueError, match="language head, got Qwen3VLTextModel"):
        vlmfast.patch(text, reduce=METHOD)
    with pytest.raises(ValueError, match="Llama4ForConditionalGeneration cannot be reduced"):
        vlmfast.patch(tiny("llama4")[0], reduce=METHOD)
    newer = "_prepare_position_ids_for_generation"
    monkeypatch.setattr(
        generation, "hasattr", lambda owner, name: name != newer and hasattr(owner, name), raising=False
    )
    with pytest.raises(ValueError, match=r"reduce needs transformers 5\.17 or later"):
        vlmfast.patch(model, reduce=METHOD)
    monkeypatch.undo()
    model.forward = lambda **inputs: None
    with pytest.raises(
        RuntimeError, match="prompts cannot be shortened: forward was already replaced on 1 of 1 module"
    ):
        vlmfast.patch(model, reduce=METHOD)
    del model.forward
    assert not patched(model)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": None}, ValueError, r"input_ids must be a tensor \(B, L\) .*, got none"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, ValueError, "attention_mask must have the shape of input_ids"),
        ({"attention_mask": {"full_attention": None}}, ValueError, "attention_mask must have .*, got a dict"),
        ({"inputs_embeds": torch.ones(2, 4, 64)}, ValueError, "inputs_embeds cannot be given where"),
        ({"logits_to_keep": torch.tensor([1])}, ValueError, "logits_to_keep must be an int"),
        (
            {"input_ids": torch.full((2, 40), 9)},
            ValueError,
            "tokens do not match: there are images and no placeholders",
        ),
        (
            {"pixel_values": torch.ones(2, 3, 28, 28)},
            ValueError,
            r"tokens do not match: sample 1 has 32 placeholders, and the next images make \[16\]",
        ),
        (
            {"pixel_values": torch.ones(4, 3, 28, 28)},
            ValueError,
            r"tokens do not match: 48 placeholders, and images of \[16, 16, 16, 16\]",
        ),
    ],
)
def test_inputs_that_do_not_fit(change: dict, error: type[Exception], message: str):
    talk = Talk.of("llava")
    inputs = {**talk.batch(*PROMPTS), **change}
    with vlmfast.patch(talk.model, reduce=METHOD), pytest.raises(error, match=message):
        logits(talk.model, inputs)


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 1, 40, 40), {"full_attention": None}, torch.ones(40)], ids=["4-D", "dict", "1-D"]
)
def test_masks_that_no_prompt_can_be_cut_from_are_refused_by_generate(mask: object):
    talk = Talk.of("llava")
    inputs = {**talk.batch(*PROMPTS), "attention_mask": mask}
    with (
        vlmfast.patch(talk.model, reduce=METHOD),
        pytest.raises(ValueError, match="attention_mask must have the shape"),
    ):
        talk.model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("model_type", ["llava_next", "llava_onevision"])
def test_weights_offloaded_until_they_are_needed(model_type: str):
    """The newline is a parameter of the model itself, and accelerate loads it when the model's forward is called."""
    accelerate = pytest.importorskip("accelerate")
    talk = Talk.of(model_type)
    inputs = talk.batch(*PROMPTS)
    with vlmfast.patch(talk.model, reduce=METHOD):
        want = logits(talk.model, inputs)
        ids = talk.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    accelerate.cpu_offload(talk.model, execution_device=torch.device("cpu"))
    with vlmfast.patch(talk.model, reduce=METHOD):
        assert torch.equal(logits(talk.model, inputs), want)
        assert talk.model.model.image_newline.is_meta
        if "mm_encoder_outputs" in inspect.signature(type(talk.model.model).forward).parameters:
            assert torch.equal(talk.model.generate(**inputs, max_new_tokens=2, do_sample=False), ids)


class OneTooMany(EvenTokens):
    """Keeps the CLS token in addition to all patches."""

    def select(self, tokens: VisualTokens) -> Selection:
        return dataclasses.replace(super().select(tokens), keep_cls=True)


def test_budgets_and_callers_that_do_not_fit():
    talk = Talk.of("llava")
    inputs = talk.batch(*PROMPTS)
    with vlmfast.patch(talk.model, reduce=OneTooMany(1.0)):
        with pytest.raises(ValueError, match=r"makes 17 tokens of an image that has 16 placeholders"):
            logits(talk.model, inputs)
        with pytest.raises(ValueError, match="assistant_model cannot be given"):
            talk.model.generate(**inputs, assistant_model=talk.model)
    with vlmfast.patch(talk.model, reduce=METHOD):
        first = talk.model(**inputs, use_cache=True)
        with pytest.raises(ValueError, match="images in a forward call after a cached prompt"):
            talk.model(**inputs, past_key_values=first.past_key_values)


# ---- training ----


def training_step(talk: Talk, inputs: dict) -> tuple[int, torch.Tensor]:
    """Return how often the layers of the language model ran, and all gradients as one vector."""
    model, calls = talk.model, []
    model.train()
    layers = model.base_model.language_model.layers
    handle = layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    handle.remove()
    return len(calls), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_training_reaches_projector_and_tower(model_type: str):
    talk = Talk.of(model_type)
    inputs = talk.batch(*PROMPTS)
    with vlmfast.patch(talk.model, exclude="*", reduce=METHOD):
        calls, plain = training_step(talk, inputs)
        reached = {name for name, p in talk.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        kind = "visual" if hasattr(talk.model.base_model, "visual") else "vision_tower"
        assert any(kind in name for name in reached)
        assert any("projector" in name or "merger" in name for name in reached)
        talk.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        more, checkpointed = training_step(talk, inputs)
    assert more > calls
    torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-5)


# ---- wrappers ----


@pytest.mark.thorough
def test_compiled_forward():
    torch._dynamo.reset()
    talk = Talk.of("llava")
    inputs = talk.batch(*PROMPTS)
    with vlmfast.patch(talk.model, reduce=METHOD):
        want = logits(talk.model, inputs)
        compiled = torch.compile(talk.model, backend="eager")
        torch.testing.assert_close(logits(compiled, inputs), want, rtol=1e-5, atol=1e-5)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
            logits(torch.compile(talk.model, backend="eager", fullgraph=True), inputs)
        text = talk.batch((10, 11, 12))
        torch.compile(talk.model, backend="eager", fullgraph=True)(**text)
    torch._dynamo.reset()


def test_inside_peft():
    peft = pytest.importorskip("peft")
    talk = Talk.of("llava")
    inputs = talk.batch(*PROMPTS)
    wrapped = peft.get_peft_model(
        talk.model, peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    )
    wrapped.eval()
    with vlmfast.patch(wrapped, reduce=METHOD) as patch:
        out = wrapped.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 3
        assert patch.reduction.last.columns.index.shape[1] < patch.reduction.last.columns.total
        assert wrapped(**inputs).logits.shape[1] == patch.reduction.last.columns.index.shape[1]


# ---- inputs shortened beforehand ----


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_compressed_inputs_are_what_the_patch_makes(model_type: str):
    talk = Talk.of(model_type)
    inputs = talk.batch(*PROMPTS)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with vlmfast.patch(talk.model, exclude="*", reduce=METHOD) as patch, torch.no_grad():
        want = talk.model(**inputs)
    before = {name: value.clone() for name, value in inputs.items()}
    if not talk.compressible:
        with pytest.raises(ValueError, match="with DeepStack needs a transformers with mm_encoder_outputs"):
            vlmfast.compress_inputs(talk.model, inputs, METHOD)
        return
    with torch.no_grad():
        short = vlmfast.compress_inputs(talk.model, inputs, METHOD)
        got = talk.model(**short)
    assert inputs.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in inputs.items())
    rows = patch.reduction.last.columns.latest()
    assert torch.equal(got.logits[torch.arange(len(rows))[:, None], rows], want.logits)
    assert torch.equal(got.loss, want.loss)
    text = talk.batch((10, 11))
    assert vlmfast.compress_inputs(talk.model, text, METHOD).keys() == text.keys()


@pytest.mark.parametrize("method", [EvenTokens(0.5), vlmfast.SmallerImage(0.5)], ids=str)
@pytest.mark.parametrize(
    ("model_type", "name"),
    [("qwen2_5_vl", "image_grid_thw"), ("qwen3_vl", "image_grid_thw"), ("llava_next", "image_sizes")],
)
def test_images_without_their_sizes_are_refused(model_type: str, name: str, method: Method):
    talk = Talk.of(model_type)
    inputs = {key: value for key, value in talk.batch((10, 0, 11)).items() if key != name}
    if model_type == "llava_next" and not isinstance(method, EvenTokens):
        pytest.skip("pictures in crops are not made smaller")
    for call in (lambda: vlmfast.compress_inputs(talk.model, inputs, method), lambda: talk.model(**inputs)):
        with vlmfast.patch(talk.model, reduce=method), pytest.raises(ValueError, match=f"{name} must be given with"):
            call()
