"""Whole-model benchmarks: what is counted, what is timed, and that a failure is a record."""

from __future__ import annotations

import contextlib
import json
import os
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

from tests.conftest import shortens_prompts
from tests.test_counting import little
from vlmfast.benchmarks import models, modes, published, report
from vlmfast.benchmarks.forwards import STEPS, Answer, twin, variants
from vlmfast.benchmarks.published import MODELS, Published

QUIET = Console(quiet=True)


@pytest.fixture
def llava(monkeypatch):
    """The little LLaVA under its own name, alone, and one round."""
    monkeypatch.setattr(published, "MODELS", {"llava-1.5-7b": little("llava-1.5-7b")})
    monkeypatch.setattr(models, "ROUNDS", {"cpu": 1})
    return published.MODELS["llava-1.5-7b"]


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
    assert all("differ from its own in eager mode" in row["error"] and "prefill_ms" not in row for row in rows)


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

    monkeypatch.setattr(models, "measure", explode)
    rows = models.run(modes=["eager", "compile"], console=QUIET)
    assert [(row["variant"], row["mode"], row["error"]) for row in rows] == [
        ("all", mode, "OutOfMemoryError: planted") for mode in ("eager", "compile")
    ]
    assert models.failed(rows)
    monkeypatch.setattr(Published, "build", explode)
    (row,) = models.run(modes=["eager"], console=QUIET)
    assert row["error"] == "OutOfMemoryError: planted"
    assert not models.failed([row])


@pytest.mark.parametrize("part", ["prefill", "step"])
def test_a_variant_that_fails_while_it_is_timed_is_a_record(llava, part: str, monkeypatch):
    monkeypatch.setattr(models, "ROUNDS", {"cpu": 2})
    prepare = models.prepare

    def planted(model, inputs, patch, *rest):
        contender = prepare(model, inputs, patch, *rest)
        if patch == {}:
            call, calls = getattr(contender, part), []
            answered = STEPS if part == "step" else 0  # before it fails

            def fails():
                calls.append(1)
                if len(calls) > answered:
                    raise torch.OutOfMemoryError("planted")
                return call()

            setattr(contender, part, fails)
        return contender

    monkeypatch.setattr(models, "prepare", planted)
    original, patched, reduced = models.run(modes=["eager"], console=QUIET)
    assert patched["error"] == "OutOfMemoryError: planted"
    assert "prefill_ms" not in patched
    assert original["prefill_ms"] > 0
    assert reduced["decode_speedup"] > 0
    assert models.failed([original, patched, reduced])


def test_what_the_original_fails_at_is_not_ours():
    def row(variant, error=None):
        return {"model": "x", "mode": "compile", "variant": variant, **({} if error is None else {"error": error})}

    assert not models.failed([row("original"), row("patched")])
    assert not models.failed([row("original", "a"), row("patched")])
    assert not models.failed([row("original", "a"), row("patched", "a")])
    assert models.failed([row("original", "a"), row("patched", "b")])
    assert models.failed([row("original"), row("reduced", "a")])
    assert models.failed([row("original", "a"), {**row("patched", "a"), "mode": "eager"}])


@pytest.mark.parametrize("change", [lambda x: x.flip(-1), lambda x: x * 1.00001], ids=["gross", "fine"])
def test_a_patch_that_answers_otherwise_has_no_time(llava, change, monkeypatch):
    """In eager mode, before it is timed; what reduces the prompt answers otherwise by design."""
    real = modes.twin

    def wrong(model, patch):
        result = real(model, patch)
        if patch == {}:
            result.model.language_model.norm.register_forward_hook(lambda module, args, output: change(output))
        return result

    monkeypatch.setattr(modes, "twin", wrong)
    original, patched, reduced = rows = models.run(modes=["eager"], console=QUIET)
    assert "differ from those of the original" in patched["error"]
    assert "prefill_ms" not in patched
    assert original["prefill_ms"] > 0
    assert reduced["prefill_ms"] > 0
    assert models.failed(rows)


def test_a_patch_is_compared_token_by_token(llava):
    """With the tokens of the original: near a tie a token of its own would change all that follows."""
    model, inputs = llava.build("small", torch.float32, "cpu")
    original = modes.prepare(model, inputs, None, "eager")
    logits, tokens = original.eager
    assert logits.shape[:2] == (1, 1 + STEPS)
    shifted = [(token + 1) % 32 for token in tokens]
    for said, fine in ((tokens, True), (shifted, False)):
        original.eager = logits, said
        patched = modes.prepare(model, inputs, {}, "eager", original)
        assert (patched.error is None) == fine, patched.error
    original.eager, original.error = None, "planted"
    assert modes.prepare(model, inputs, {}, "eager", original).error == "RuntimeError: nothing to compare with: planted"


def test_the_peak_is_that_of_an_answer(llava, monkeypatch):
    """Not of compiling: what is taken before the last reset is none of it."""
    did = []
    real = modes.Contender

    def pretends(device):
        contender = real(device)
        contender.device = torch.device("cuda")
        return contender

    monkeypatch.setattr(modes, "Contender", pretends)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: did.append("before") or 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: did.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100 + 7 * did.count("reset"))
    monkeypatch.setattr(nn.Module, "compile", lambda self, **settings: did.append("compile"))
    monkeypatch.setattr(modes, "_say", lambda *args, say=modes._say: did.append("answer") or say(*args))
    model, inputs = llava.build("small", torch.float32, "cpu")
    assert modes.prepare(model, inputs, None, "eager").facts["peak_bytes"] == 7
    assert did == ["before", "reset", "answer"]
    did.clear()
    assert modes.prepare(model, inputs, None, "compile").facts["peak_bytes"] == 14
    assert did == ["before", "reset", "answer", "compile", "answer", "reset", "answer"]


# ---- a process of its own ----


def _measured_apart(common, place):
    return [{**common, "variant": place}]


def _dies(common):
    os._exit(3)


def _raises(common):
    raise RuntimeError("planted")


def test_a_graph_is_measured_in_a_process_of_its_own(llava, monkeypatch):
    """So that a capture that fails spoils nothing; and what dies there is a record, after which the run goes on."""
    assert models.apart({"mode": "graph"}, _measured_apart, {"model": "x"}, "here") == [
        {"model": "x", "variant": "here"}
    ]
    for function, error in ((_dies, "BrokenProcessPool"), (_raises, "RuntimeError: planted")):
        (row,) = models.apart({"model": "x", "mode": "graph"}, function, {})
        assert (row["mode"], row["variant"]) == ("graph", "all")
        assert row["error"].startswith(error)
        assert models.failed([row])
    asked = []
    monkeypatch.setattr(models, "chosen_modes", lambda *_: ("eager", "graph"))
    monkeypatch.setattr(models, "apart", lambda common, function, *args: asked.append((function, args)) or [common])
    rows = models.run(console=QUIET)
    assert [row["mode"] for row in rows] == ["eager"] * 3 + ["graph"]
    ((function, (common, *rest)),) = asked
    assert function is models._graphs
    assert (common["model"], *rest) == ("llava-1.5-7b", "cpu", torch.get_num_threads())


def test_the_other_process_measures_graphs_alone(llava, monkeypatch):
    chosen, measured = [], []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(models, "MODELS", {"x": llava})
    monkeypatch.setattr(models, "_free", lambda device: None)

    def measure(published, model, inputs, mode):
        measured.append((published, mode))
        return [{"variant": "original"}, {"variant": "patched"}]

    monkeypatch.setattr(models, "measure", measure)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    rows = models._graphs({"model": "x", "size": "small", "dtype": "float32"}, "cpu", 3)
    assert [(row["mode"], row["variant"]) for row in rows] == [("graph", "original"), ("graph", "patched")]
    assert (chosen, measured) == ([3, "cpu"], [(models.MODELS["x"], "graph")])


def test_nothing_is_captured_that_waits(llava, monkeypatch):
    """A capture that fails cannot be mended, so what it would fail at is tried before."""
    mode, captured, asks = [], [], torch.cuda.is_current_stream_capturing

    class Stream(contextlib.nullcontext):
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode.append)
    monkeypatch.setattr(modes, "_graph", lambda call: captured.append(call) or call)
    model, inputs = llava.build("small", torch.float32, "cpu")

    def waits(part):
        def call():
            if mode and mode[-1] == "error":
                assert torch.cuda.is_current_stream_capturing()  # or transformers would look at a mask
                raise RuntimeError("called a synchronizing CUDA operation")
            return getattr(modes.Answer, part)(answer)

        return call

    for part, want in (("step", []), ("prefill", ["step"]), (None, ["step", "prefill"])):
        answer = modes.Answer(model, inputs, inputs["input_ids"].shape[1] + STEPS)
        contender, calls = modes.Contender(torch.device("cpu")), {}
        for name in ("prefill", "step"):
            calls[name] = waits(name) if name == part else getattr(answer, name)
            setattr(answer, name, calls[name])
        captured.clear()
        with torch.no_grad():
            answer.prefill()
            if part == "step":
                with pytest.raises(RuntimeError, match="synchronizing"):
                    modes._capture(contender, answer)
            else:
                modes._capture(contender, answer)
                assert contender.facts["prefill_graph"].startswith("none" if part else "captured")
        assert captured == [calls[name] for name in want]
        assert mode[-1] == "default"
        assert torch.cuda.is_current_stream_capturing is asks


# ---- the command ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vicuna"], "unknown model vicuna; known: llava-1.5-7b, "),
        (["--count", "vicuna"], "unknown model vicuna; known: llava-1.5-7b, "),
        (["--modes", "eager,fast"], "unknown mode fast; known: eager, compile, graph"),
        (["--modes", "graph"], "mode graph: CUDA graphs need a GPU"),
        (["--device", "cuda"], "device cuda: torch sees no GPU"),
        (["--json", "/proc/no/out.json"], "cannot write /proc/no/out.json"),
        (["--dtype", "float16", "--device", "cpu"], "no model runs in float16 on a CPU"),
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
