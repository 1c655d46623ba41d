"""Whole-model benchmarks: what is counted, what is timed, and that a failure is a record."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

from tests.conftest import shortens_prompts
from vlmfast.benchmarks import launches, models, modes, published, report
from vlmfast.benchmarks.counting import Device
from vlmfast.benchmarks.forwards import STEPS, Answer, twin, variants
from vlmfast.benchmarks.published import MODELS, Published

QUIET = Console(quiet=True)


SMALLER_IMAGES = {
    "qwen2.5-vl-7b": published._patches(16, 14),
    "qwen3-vl-8b": published._patches(16, 16),
    "internvl3-8b": lambda: {"pixel_values": torch.randn(2, 3, 448, 448)},
    "smolvlm-256m": lambda: {"pixel_values": torch.randn(1, 2, 3, 512, 512)},
}


def little(name: str) -> Published:
    """The model as narrow as it is counted, with two layers and a smaller image, as its small size too."""
    model = MODELS[name]
    depth = {"depth": 2} if "depth" in model.vision else {"num_hidden_layers": 3}  # LLaVA uses the last but one
    if "deepstack_visual_indexes" in model.vision:
        depth["deepstack_visual_indexes"] = [0, 1]
    result = dataclasses.replace(model, text={**model.text, "num_hidden_layers": 2}, vision={**model.vision, **depth})
    text, vision = result._narrow()
    result = dataclasses.replace(result, image=SMALLER_IMAGES.get(name, result.image))
    return dataclasses.replace(result, small_text=text, small_vision=vision)


@pytest.fixture
def llava(monkeypatch):
    """The little LLaVA under its own name, alone, and one round."""
    monkeypatch.setattr(published, "MODELS", {"llava-1.5-7b": little("llava-1.5-7b")})
    monkeypatch.setattr(models, "ROUNDS", {"cpu": 1})
    return published.MODELS["llava-1.5-7b"]


# ---- what is counted ----


def test_waits_are_seen_where_they_are(llava, monkeypatch):
    from transformers.models.llama import modeling_llama

    before, _, _ = launches.count(llava)
    forward = modeling_llama.LlamaMLP.forward

    def planted(self, x):
        x.sum().item()
        return forward(self, x)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", planted)
    after, _, _ = launches.count(llava)
    for part in ("prefill", "decode"):
        assert after[part]["syncs"] == before[part]["syncs"] + 2  # layers
        assert after[part]["launches"] == before[part]["launches"] + 2


@pytest.mark.parametrize("name", ["llava-1.5-7b", "qwen3-vl-8b"])
def test_patched_models_launch_less(name: str):
    model = little(name)
    if not shortens_prompts():
        model = dataclasses.replace(model, method=None)
    original, patched, *reduced = launches.count(model)
    norms = 2 * (4 if "qwen3" in name else 2) + 1  # q_norm and k_norm
    saved = original["decode"]["launches"] - patched["decode"]["launches"]
    assert saved == norms * 7  # two casts, pow, mean, add, rsqrt, mul, mul in one kernel
    assert original["decode"]["syncs"] == patched["decode"]["syncs"] == 0
    assert patched["prefill"]["launches"] < original["prefill"]["launches"] - saved
    assert patched["prefill"]["syncs"] < original["prefill"]["syncs"]
    for record in reduced:
        assert record["cached_tokens"] < patched["cached_tokens"] == patched["prompt_tokens"]
        assert record["decode"] == patched["decode"]


def test_the_width_changes_no_count():
    narrow = little("llava-1.5-7b")
    wide = dataclasses.replace(narrow, small_text={**narrow.small_text, "hidden_size": 128, "intermediate_size": 200})
    assert list(launches.count(narrow)) == list(launches.count(wide, "small"))


@pytest.mark.parametrize("name", MODELS)
def test_a_step_can_be_captured(name: str, monkeypatch):
    """With a static cache, in every variant, the host waits for nothing; nor in the prefill of a patched LLaVA."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model = little(name)
    original, inputs = model.build("narrow", torch.bfloat16, "cpu")
    device = Device()
    device.move(original)
    on_device = {key: device.put(value) for key, value in inputs.items()}
    for variant, arguments in variants(model).items():
        if variant == "reduced" and not shortens_prompts():
            continue
        with device.count():
            answer = Answer(twin(original, arguments), on_device, inputs["input_ids"].shape[1] + STEPS)
            answer.prefill()
        with device.count() as prefill:
            answer.prefill()
        with device.count() as step:
            answer.step()
        assert step.syncs == 0, step.waits
        if name in ("llava-1.5-7b", "internvl3-8b"):
            assert (prefill.syncs == 0) == (variant == "patched"), prefill.waits


# ---- times ----


def test_a_twin_shares_its_weights(llava):
    model, inputs = llava.build("small", torch.float32, "cpu")
    other = twin(model, {})
    assert type(other.model.language_model.norm) is not type(model.model.language_model.norm)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert ours is theirs
    growing = Answer(model, inputs)
    static = Answer(other, inputs, growing_length(growing) + STEPS)
    with torch.no_grad():
        for _ in range(2):  # a second answer begins anew
            assert torch.allclose(growing.prefill(), static.prefill(), atol=1e-5)
            assert torch.allclose(growing.step(), static.step(), atol=1e-5)


@pytest.mark.parametrize("variant", ["original", "reduced"])
@pytest.mark.parametrize("name", ["llava-1.5-7b", "qwen3-vl-8b"])
@torch.no_grad()
def test_the_answer_is_that_of_generate(name: str, variant: str):
    if variant == "reduced" and not shortens_prompts():
        pytest.skip("this transformers is too old")
    model, inputs = little(name).build("small", torch.float32, "cpu")
    for parameter in model.model.language_model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(8)  # attention that looks at positions
    model = twin(model, variants(MODELS[name])[variant])
    settings = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    wanted = torch.stack(model.generate(**inputs, **settings).logits, 1)
    answer = Answer(model, inputs)
    got = torch.cat([answer.prefill(), *(answer.step() for _ in range(3))], 1)
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


@torch.no_grad()
def growing_length(answer: Answer) -> int:
    answer.prefill()
    return answer.cached()


def test_every_variant_is_timed(llava):
    known = []
    rows = models.run(device="cpu", modes=["eager"], console=QUIET, save=lambda records: known.append(len(records)))
    assert known == [len(rows)] == [3]
    assert [row["variant"] for row in rows] == ["original", "patched", "reduced"]
    for row in rows:
        assert row["prefill_ms"] > 0
        assert row["decode_ms"] > 0
        assert row["cache_bytes"] == 2 * 2 * 4 * 64 * row["cached_tokens"]  # keys and values, layers, float32, channels
    assert rows[0]["prefill_speedup"] == rows[0]["decode_over_eager"] == 1.0
    assert rows[2]["cached_tokens"] == rows[0]["cached_tokens"] - 576 + 64


def test_compiled_answers_are_those_of_eager(llava, monkeypatch):
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **settings: compiled(self, backend="eager", **settings))
    rows = models.run(device="cpu", modes=["compile"], console=QUIET)
    assert [row.get("error") for row in rows] == [None] * 3
    assert all(row["difference"] < 1e-4 for row in rows)
    assert all("decode_over_eager" in row for row in rows)


def test_what_fails_to_compile_is_a_record(llava, monkeypatch):
    def explode(self, **settings):
        raise RuntimeError("planted\nand more")

    monkeypatch.setattr(nn.Module, "compile", explode)
    rows = models.run(device="cpu", modes=["compile", "eager"], console=QUIET)
    assert [row.get("error") for row in rows] == ["RuntimeError: planted"] * 3 + [None] * 3
    console = Console(record=True, width=130, quiet=True)
    models.show(console, rows)


def test_a_wrong_result_has_no_time(llava, monkeypatch):
    def wrong(self, **settings):
        self.norm.register_forward_hook(lambda module, args, output: output.flip(-1))

    monkeypatch.setattr(nn.Module, "compile", wrong)
    rows = models.run(device="cpu", modes=["compile"], console=QUIET)
    assert all("differ from eager ones" in row["error"] and "prefill_ms" not in row for row in rows)


def test_a_stop_loses_nothing(llava, monkeypatch, tmp_path):
    two = {"first": llava, "second": llava}
    monkeypatch.setattr(published, "MODELS", two)
    measure, calls = models.measure, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(models, "measure", stopped)
    path = tmp_path / "deep" / "out.json"
    with pytest.raises(KeyboardInterrupt):
        models.run(modes=["eager"], console=QUIET, save=lambda records: report.write(path, {"records": records}))
    written = json.loads(path.read_text())["records"]
    assert [row["model"] for row in written] == ["first"] * 3


def test_a_budget_ends_after_a_model(llava, monkeypatch):
    monkeypatch.setattr(published, "MODELS", {"first": llava, "second": llava})
    monkeypatch.setattr(models, "measure", lambda *args: [{"variant": "original"}])
    rows = models.run(modes=["eager"], console=QUIET, budget=1e-9)
    assert [row["model"] for row in rows] == ["first"]
    assert len(models.run(modes=["eager"], console=QUIET, budget=1e9)) == 2


def test_memory_that_does_not_suffice_is_a_record(llava, monkeypatch):
    def explode(*args):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(modes, "_prepare", explode)
    (row,) = models.run(modes=["eager"], console=QUIET)
    assert row["error"] == "OutOfMemoryError: planted"


# ---- the command ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vicuna"], "unknown model vicuna; known: llava-1.5-7b, "),
        (["--count", "vicuna"], "unknown model vicuna; known: llava-1.5-7b, "),
        (["--modes", "eager,fast"], "unknown mode fast; known: eager, compile, graph"),
        (["--modes", "graph"], "mode graph: CUDA graphs need a GPU"),
        (["--device", "cuda", "--json", "no/such.json"], "device cuda: torch sees no GPU"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_what_cannot_run_is_one_line_and_exit_code_2(arguments: list[str], message: str, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["models", *arguments])
    with pytest.raises(SystemExit) as end:
        models.main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_command_counts(llava, monkeypatch, capsys, tmp_path):
    path = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["models", "--count", "--json", str(path)])
    assert models.main() == 0
    printed, written = capsys.readouterr().out, json.loads(path.read_text())
    assert [row["variant"] for row in written["records"]] == ["original", "patched", "reduced"]
    assert all(str(row["decode"]["launches"]) in printed for row in written["records"])
