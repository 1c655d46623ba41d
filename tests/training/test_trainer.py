"""transformers' `Trainer`, PEFT and accelerate in one process: a patched model is trained as the unpatched one is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vlmfast
from tests.conftest import shortens_prompts
from tests.helpers.patches_models import patched
from tests.helpers.reduce_models import Talk
from tests.helpers.thorough import first_of
from tests.training.steps import METHOD, MODELS, PROMPTS, assert_losses_alike, assert_trained_alike, samples, weights
from vlmfast.reduce import Method
from vlmfast.reduce.prompt import takes_features

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")


@pytest.fixture(params=[None, METHOD], ids=["all tokens", "half of them"])
def method(request: pytest.FixtureRequest) -> Method | None:
    if request.param is not None and not shortens_prompts():
        pytest.skip("prompts can be shortened from transformers 5.17 on")
    return request.param


class Compressing(transformers.Trainer):
    """Trains an unpatched model on inputs that were shortened beforehand."""

    method: Method | None = None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
        if self.method is not None:
            inputs = vlmfast.compress_inputs(model, inputs, self.method)
        return super().compute_loss(model, inputs, **options)


def train(talk: Talk, model: Any, folder: Path, method: Method | None = None, **options: Any) -> list[float]:
    """Train for three steps of two prompts; return the loss and the norm of the gradient of each step."""
    if method is not None and not talk.compressible:
        pytest.skip("this transformers takes no encoded images with DeepStack")
    settings = {"learning_rate": 0.01, "optim": "sgd", "lr_scheduler_type": "constant", "save_strategy": "no"}
    settings |= {"per_device_train_batch_size": 2, "max_steps": 3, "logging_steps": 1, "report_to": [], **options}
    settings |= {"use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False, "label_names": ["labels"]}
    trainer = Compressing(
        model,
        transformers.TrainingArguments(str(folder), **settings),
        train_dataset=list(range(2 * len(PROMPTS))),
        data_collator=lambda numbers: samples(talk, *(number % len(PROMPTS) for number in numbers)),
    )
    trainer.method = method
    trainer.train()
    trainer.save_model(str(folder))
    return [row[key] for row in trainer.state.log_history for key in ("loss", "grad_norm") if key in row]


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_trained_as_the_unpatched_one(model_type: str, checkpointing: bool, method: Method | None, tmp_path: Path):
    options = {"gradient_checkpointing": checkpointing}
    plain, talk = Talk.of(model_type), Talk.of(model_type)
    before = weights(talk.model)
    want = train(plain, plain.model, tmp_path / "plain", method, **options)
    patch = vlmfast.patch(talk.model, reduce=method)
    got = train(talk, talk.model, tmp_path / "patched", **options)
    assert patched(talk.model), patch.report()
    assert_losses_alike(got, want)
    assert_trained_alike(weights(talk.model), weights(plain.model), before)


@pytest.mark.parametrize("model_type", first_of(reversed(MODELS)))
def test_in_mixed_precision(model_type: str, method: Method | None, tmp_path: Path):
    """Autocast's bfloat16 rounds, and its losses are as near to those of float32 as without the patch."""
    losses = []
    for precision, patching in [("no", False), ("bf16", False), ("bf16", True)]:
        talk = Talk.of(model_type)
        with vlmfast.patch(talk.model, reduce=method) if patching else nullcontext():
            beforehand = None if patching else method
            options = {"bf16": precision == "bf16"}
            losses.append(torch.tensor(train(talk, talk.model, tmp_path, beforehand, **options)[::2]))
    exact, plain, ours = losses
    assert (plain - exact).abs().max() > 0, "nothing was rounded"
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 0.005 * exact.abs().max()


@pytest.mark.parametrize("model_type", MODELS)
def test_what_is_saved_is_an_ordinary_checkpoint(model_type: str, tmp_path: Path):
    """Its files have the keys of an unpatched model's, and transformers loads an unpatched model that answers alike."""
    safetensors = pytest.importorskip("safetensors")
    talk = Talk.of(model_type)
    talk.model.save_pretrained(tmp_path / "before")
    vlmfast.patch(talk.model)
    train(talk, talk.model, tmp_path / "after", max_steps=1, logging_steps=1)
    files = [sorted(path.name for path in (tmp_path / name).glob("*.safetensors")) for name in ("before", "after")]
    assert files[0] == files[1] == ["model.safetensors"]
    keys = []
    for name in ("before", "after"):
        with safetensors.safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            keys.append({key: file.get_slice(key).get_shape() for key in file.keys()})  # noqa: SIM118
    assert keys[0] == keys[1]
    configs = [transformers.AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("before", "after")]
    assert configs[0]["architectures"] == configs[1]["architectures"]
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "after")
    assert not patched(loaded)
    inputs = samples(talk, 0, 1)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, talk.model.eval()(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_lost_would_be_noticed(tmp_path: Path):
    results = []
    for frozen in (False, True):
        talk = Talk.of("llava")
        before = weights(talk.model)
        norm = talk.model.model.language_model.layers[0].input_layernorm
        if frozen:
            norm.weight.register_hook(torch.zeros_like)
        train(talk, talk.model, tmp_path)
        results.append(weights(talk.model))
    with pytest.raises(AssertionError, match=r"layers\.0\.input_layernorm\.weight: off by"):
        assert_trained_alike(results[1], results[0], before)


# ---- PEFT ----


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


def with_adapter(peft: Any, model: nn.Module) -> Any:
    """Add LoRA to attention and MLP, and train one kind of norm as a whole."""
    torch.manual_seed(0)
    names = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    found = peft.LoraConfig(r=4, target_modules=names, modules_to_save=["post_attention_layernorm"], lora_dropout=0.0)
    wrapped = peft.get_peft_model(model, found)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # zeros, whose other factor would have no gradient
            nn.init.normal_(parameter, std=0.1)
    return wrapped


def patched_first(peft: Any, model: nn.Module, method: Method | None) -> Any:
    vlmfast.patch(model, reduce=method)
    return with_adapter(peft, model)


def patched_last(peft: Any, model: nn.Module, method: Method | None) -> Any:
    wrapped = with_adapter(peft, model)
    vlmfast.patch(wrapped, reduce=method)
    return wrapped


def files_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(params=[patched_first, patched_last], ids=lambda order: order.__name__)
def order(request: pytest.FixtureRequest) -> Iterator[Any]:
    return request.param


@pytest.mark.parametrize("model_type", first_of(reversed(MODELS)))
def test_adapters(peft: Any, model_type: str, order: Any, method: Method | None, tmp_path: Path):
    plain, talk = Talk.of(model_type), Talk.of(model_type)
    upstream = with_adapter(peft, plain.model)
    ours = order(peft, talk.model, method)
    before = weights(ours)
    want = train(plain, upstream, tmp_path / "plain", method, gradient_checkpointing=method is None)
    got = train(talk, ours, tmp_path / "patched", gradient_checkpointing=method is None)
    assert patched(ours)
    assert_losses_alike(got, want)
    assert_trained_alike(weights(ours), weights(upstream), before)
    saved, expected = files_of(tmp_path / "patched"), files_of(tmp_path / "plain")
    assert {name: x.shape for name, x in saved.items()} == {name: x.shape for name, x in expected.items()}
    again = peft.PeftModel.from_pretrained(Talk.of(model_type).model, tmp_path / "patched")
    inputs = samples(talk, 0, 1)
    vlmfast.unpatch(ours)
    with torch.no_grad():
        logits = ours.eval()(**inputs).logits
        torch.testing.assert_close(again.eval()(**inputs).logits, logits, rtol=1e-4, atol=1e-5)
        merged = ours.merge_and_unload()
        assert not patched(merged)
        torch.testing.assert_close(merged(**inputs).logits, logits, rtol=1e-3, atol=1e-3)


# ---- accelerate ----


@pytest.mark.parametrize("model_type", MODELS)
def test_layers_on_the_disk(model_type: str, method: Method | None, tmp_path: Path):
    """``device_map`` of ``from_pretrained``: weights of a layer and of the tower come from the disk for each call."""
    talk = Talk.of(model_type)
    if method is not None and not takes_features(type(talk.model.base_model)):
        pytest.skip("generate of this transformers looks for mm_encoder_outputs behind accelerate's hooks")
    talk.model.save_pretrained(tmp_path)
    tower = "model.visual" if model_type == "qwen3_vl" else "model.vision_tower"
    on_disk = ("model.language_model.layers.1", "model.language_model.norm", tower)
    places = {name: "cpu" for name, module in talk.model.named_modules() if not any(module.children())}
    places = {name: place for name, place in places.items() if not name.startswith(on_disk)}
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path, device_map={**places, **dict.fromkeys(on_disk, "disk")}, offload_folder=tmp_path / "offloaded"
    )
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu", "meta"}
    inputs = {name: value for name, value in samples(talk, 0, 1).items() if name not in ("labels", "use_cache")}
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options |= {"eos_token_id": None, "pad_token_id": 0}
    answers = []
    for each in (talk.model, model):
        is_plain = each is talk.model and method is None
        with nullcontext() if is_plain else vlmfast.patch(each, reduce=method):
            answers.append(each.generate(**inputs, **options))
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    torch.testing.assert_close(answers[0].logits, answers[1].logits, rtol=1e-4, atol=1e-5)
