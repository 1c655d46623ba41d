"""Whole-model benchmarks: what is counted, what is timed, and that a failure is a record."""

from __future__ import annotations

import json
import re
import runpy
import sys
import types

import pytest
import torch
from rich.console import Console

from tests.conftest import shortens_prompts
from tests.helpers.published_models import little
from vlmfast import cli
from vlmfast.benchmarks import html, models, modes, published, report
from vlmfast.benchmarks.forwards import STEPS, Decoding, patches_of, twin
from vlmfast.benchmarks.published import MODELS, Published

QUIET = Console(quiet=True)


# ---- times ----


def test_a_twin_shares_its_weights(llava):
    model, inputs = llava.build("small", torch.float32, "cpu")
    other = twin(model, {})
    assert type(other.model.language_model.norm) is not type(model.model.language_model.norm)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert ours is theirs
    growing = Decoding(model, inputs)
    static = Decoding(other, inputs, growing_length(growing) + STEPS)
    with torch.no_grad():
        for _ in range(2):  # a second answer starts over
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
            parameter.mul_(8)  # makes attention depend on positions
    model = twin(model, patches_of(MODELS[name])[variant])
    settings = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    wanted = torch.stack(model.generate(**inputs, **settings).logits, 1)
    answer = Decoding(model, inputs)
    got = torch.cat([answer.prefill(), *(answer.step() for _ in range(3))], 1)
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


@torch.no_grad()
def growing_length(answer: Decoding) -> int:
    answer.prefill()
    return answer.cached()


def test_every_variant_is_timed(llava):
    known = []
    rows = models.run([], QUIET, modes=["eager"], save=lambda records: known.append(len(records)))
    assert known == [3]
    assert [row["variant"] for row in rows] == ["original", "patched", "reduced"]
    for row in rows:
        assert row["prefill_ms"] > 0
        assert row["decode_ms"] > 0
        assert row["cache_bytes"] == 2 * 2 * 4 * 64 * row["cached_tokens"]  # keys and values, layers, float32, channels
    assert [rows[0][name] for name in ("prefill_speedup", "decode_over_eager")] == [1.0, 1.0]
    assert rows[0]["prefill_range"] == 0.0  # there is one round
    assert rows[2]["cached_tokens"] == rows[0]["cached_tokens"] - 576 + 64


def test_models_of_an_earlier_run_are_not_measured_again(llava, monkeypatch):
    common = {"model": "llava-1.5-7b", "size": "small", "dtype": "float32"}
    earlier = [{**common, "mode": "eager", "variant": "original", "prefill_ms": 1.0}]
    found = {**common, "variant": "original", "prefill_ms": 2.0}
    asked = []
    monkeypatch.setattr(
        models, "_all_modes", lambda common, left, *_: asked.append(left) or ([{**found, "mode": m}] for m in left)
    )
    both = ["eager", "compile"]
    rows = models.run([], QUIET, modes=both, earlier=earlier)
    assert (asked, [row["mode"] for row in rows]) == ([["compile"]], both)
    assert rows[0]["prefill_ms"] == 1.0
    asked.clear()
    assert models.run([], QUIET, modes=["eager"], earlier=earlier) == earlier
    assert asked == []
    models.run([], QUIET, modes=["eager"], earlier=earlier, dtype=torch.bfloat16)
    assert asked == [["eager"]]


@pytest.mark.parametrize("settings", [{"reduce": "scope:8"}, {"layers": 6}, {"reduce": "scope:8", "layers": 6}])
def test_another_method_or_depth_is_measured_for_itself(settings, llava, monkeypatch):
    common = {"model": "llava-1.5-7b", "size": "small", "dtype": "float32", "mode": "eager", "variant": "original"}
    asked = []
    monkeypatch.setattr(models, "_all_modes", lambda common, left, *_: asked.append(left) or [])
    for other in ({}, {"reduce": "scope:9"}, {"layers": 5}):
        models.run([], QUIET, modes=["eager"], earlier=[{**common, **other}], **settings)
        models.run([], QUIET, modes=["eager"], earlier=[{**common, **settings}], **other)
    assert asked == [["eager"]] * 6
    models.run([], QUIET, modes=["eager"], earlier=[{**common, **settings}], **settings)
    assert len(asked) == 6


def test_a_method_and_a_depth_are_taken(llava, capsys):
    """They are in the records and in the table; the cache tells that they were used."""
    rows = models.run([], QUIET, modes=["eager"], reduce="even:8", layers=1)
    assert [(row["reduce"], row["layers"]) for row in rows] == [("even:8", 1)] * 3
    assert rows[2]["cached_tokens"] == rows[0]["cached_tokens"] - 576 + 8
    assert rows[0]["cache_bytes"] == 2 * 1 * 4 * 64 * rows[0]["cached_tokens"]
    report.show_models(Console(width=200), rows)
    assert "llava-1.5-7b, even:8, 1 layer " in capsys.readouterr().out


def test_a_model_that_cannot_be_reduced_is_not_by_a_method_of_the_command(monkeypatch):
    monkeypatch.setattr(published, "MODELS", {"smolvlm-256m": little("smolvlm-256m")})
    monkeypatch.setattr(models, "measure", lambda recipe, *_: [{"variant": str(recipe.method)}])
    assert [row["variant"] for row in models.run([], QUIET, modes=["eager"], reduce="even:8")] == ["None"]


def test_ratios_are_of_each_round(capsys):
    times = {
        "original": [(6.0, 1.0), (10.0, 1.0), (20.0, 1.0)],
        "patched": [(3.0, 2.0), (20.0, 2.0), (5.0, 4.0)],
        models.EAGER: [(12.0, 4.0), (10.0, 4.0), (20.0, 4.0)],
    }
    variants = {
        name: types.SimpleNamespace(error=None, facts={"cache_bytes": 8}, times=taken) for name, taken in times.items()
    }
    row = models._row(variants["patched"], variants)
    assert (row["prefill_ms"], row["prefill_range"], row["prefill_speedup"]) == (5e3, 3.4, 2.0)
    assert (row["decode_ms"], row["decode_range"], row["decode_speedup"]) == (2e3, 1.0, 0.5)
    assert (row["prefill_over_eager"], row["decode_over_eager"]) == (4.0, 2.0)
    report.show_models(
        Console(width=150), [{"model": "x", "size": "small", "dtype": "float32", "variant": "patched", **row}]
    )
    assert "x patched 5000.00 340% 2.00 4.00 2000.00 100% 0.50 2.00 0.0" in " ".join(capsys.readouterr().out.split())


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
        models.run([], QUIET, modes=["eager"], save=lambda records: report.write(path, {"records": records}))
    written = json.loads(path.read_text())["records"]
    assert [row["model"] for row in written] == ["first"] * 3


def test_a_budget_ends_after_a_model(llava, monkeypatch):
    monkeypatch.setattr(published, "MODELS", {"first": llava, "second": llava})
    monkeypatch.setattr(models, "measure", lambda *args: [{"variant": "original"}])
    rows = models.run([], QUIET, modes=["eager"], budget=1e-9)
    assert [row["model"] for row in rows] == ["first"]
    assert len(models.run([], QUIET, modes=["eager"], budget=1e9)) == 2


def test_memory_that_does_not_suffice_is_a_record(llava, monkeypatch):
    def explode(*args):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(models, "measure", explode)
    rows = models.run([], QUIET, modes=["eager", "compile"])
    assert [(row["variant"], row["mode"], row["error"]) for row in rows] == [
        ("all", mode, "OutOfMemoryError: planted") for mode in ("eager", "compile")
    ]
    assert models.failed(rows)
    monkeypatch.setattr(Published, "build", explode)
    (row,) = models.run([], QUIET, modes=["eager"])
    assert row["error"] == "OutOfMemoryError: planted"
    assert not models.failed([row])


@pytest.mark.parametrize("part", ["prefill", "step"])
def test_a_variant_that_fails_while_it_is_timed_is_a_record(llava, part: str, monkeypatch):
    monkeypatch.setattr(models, "ROUNDS", {"cpu": 2})
    prepare = models.prepare

    def planted(contender, *rest):
        prepare(contender, *rest)
        if contender.patch == {}:
            call, calls = getattr(contender, part), []
            answered = STEPS if part == "step" else 0  # calls before it fails

            def fails():
                calls.append(1)
                if len(calls) > answered:
                    raise torch.OutOfMemoryError("planted")
                return call()

            setattr(contender, part, fails)

    monkeypatch.setattr(models, "prepare", planted)
    original, patched, reduced = models.run([], QUIET, modes=["eager"])
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
    assert not models.failed([row("original", "a"), row("patched", modes.NOT_RUN)])
    assert models.failed([row("original", modes.NOT_RUN), row("patched", "a")])
    for other in ({"reduce": "scope:8"}, {"layers": 6}):
        assert models.failed([{**row("original"), **other}, row("original", "a"), {**row("patched", "a"), **other}])


@pytest.mark.parametrize("change", [lambda x: x.flip(-1), lambda x: x * 1.00001], ids=["gross", "fine"])
def test_a_patch_that_answers_otherwise_has_no_time(llava, change, monkeypatch):
    """It is found out in eager mode, before timing; a reduced model is exempt, since its answer differs by design."""
    real = modes.twin

    def wrong(model, patch):
        result = real(model, patch)
        if patch == {}:
            result.model.language_model.norm.register_forward_hook(lambda module, args, output: change(output))
        return result

    monkeypatch.setattr(modes, "twin", wrong)
    original, patched, reduced = rows = models.run([], QUIET, modes=["eager"])
    assert "differ from those of the original" in patched["error"]
    assert "prefill_ms" not in patched
    assert original["prefill_ms"] > 0
    assert reduced["prefill_ms"] > 0
    assert models.failed(rows)


# ---- the command ----


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("models vicuna", "unknown model vicuna; known: llava-1.5-7b, "),
        ("launches vicuna", "unknown model vicuna; known: llava-1.5-7b, "),
        ("models --modes eager,fast", "unknown mode fast; known: eager, compile, graph"),
        ("models --modes graph --device cpu", "mode graph: CUDA graphs need a GPU"),
        ("models --json /proc/no/out.json", "cannot write /proc/no/out.json"),
        ("launches --json /proc/no/out.json", "cannot write /proc/no/out.json"),
        ("models --dtype float16 --device cpu", "no model runs in float16 on a CPU"),
    ],
)
def test_what_cannot_run_is_one_line_and_exit_code_2(command: str, message: str, monkeypatch, capsys):
    monkeypatch.setattr(models, "run", lambda *_, **__: pytest.fail("it ran"))
    assert exit_code(command) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def exit_code(command: str) -> int:
    try:
        return cli.main(["bench", *command.split()])
    except SystemExit as stopped:  # argparse
        return stopped.code


def test_the_command_counts(llava, capsys, tmp_path):
    path = tmp_path / "out.json"
    assert exit_code(f"launches --json {path}") == 0
    printed, written = capsys.readouterr().out, json.loads(path.read_text())
    assert [row["variant"] for row in written["records"]] == ["original", "patched", "reduced"]
    assert all(str(row["decode"]["launches"]) in printed for row in written["records"])


def test_the_commands_of_before_go_on(llava, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["models", "--count", "llava-1.5-7b"])
    with pytest.warns(DeprecationWarning, match="python -m vlmfast bench launches"), pytest.raises(SystemExit) as end:
        runpy.run_path(models.__file__, run_name="__main__")
    assert end.value.code == 0
    assert "decode launches" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["models --modes eager --device cpu", "launches"])
def test_no_model_at_all_is_exit_code_1(llava, command: str, monkeypatch, capsys, tmp_path):
    """If other models were built, one that could not be is only a row of the table."""
    two = {"first": llava, "second": little("qwen3-vl-8b")}
    monkeypatch.setattr(published, "MODELS", two)
    broken, build, path = [two["second"]], Published.build, tmp_path / "out.json"

    def planted(self, *args):
        if self in broken:
            raise OSError("planted")
        return build(self, *args)

    monkeypatch.setattr(Published, "build", planted)
    assert exit_code(command) == 0
    assert "OSError: planted" in capsys.readouterr().out
    broken.append(llava)
    commands = [f"{command} --json {path}", *([f"--from {path}"] if command != "launches" else [])]
    for each in commands:
        assert exit_code(each) == 1
        assert "no model could be built, so none was measured" in capsys.readouterr().out.splitlines()


def test_a_prefill_that_is_no_graph_is_said(capsys):
    row = {"model": "x", "size": "full", "dtype": "bfloat16", "mode": "graph", "prefill_ms": 12.5, "decode_ms": 1.0}
    rows = [
        {**row, "variant": "original", "cache_bytes": 8, "prefill_graph": "none: RuntimeError: it waits"},
        {**row, "variant": "patched", "cache_bytes": 8, "prefill_graph": "captured"},
    ]
    report.show_models(Console(width=150), rows)
    assert re.findall(r"(original|patched) +(12\.50(?: \(no graph\))?)", capsys.readouterr().out) == [
        ("original", "12.50 (no graph)"),
        ("patched", "12.50"),
    ]
    page = html.page({"environment": {"device": "x"}, "records": [], "models": rows})
    assert (page.count("12.50 (no graph)"), page.count("12.50")) == (1, 2)


def test_a_narrow_model_has_all_its_layers(llava, monkeypatch):
    """Its prompt has no image, and it has more rounds, because they are short."""
    timed = []
    time = modes.Variant.time
    monkeypatch.setattr(modes.Variant, "time", lambda variant: timed.append(variant) or time(variant))
    rows = models.run([], QUIET, modes=["eager"], size="narrow")
    assert [(row["variant"], row["size"]) for row in rows] == [
        (name, "narrow") for name in ("original", "patched", "reduced")
    ]
    assert all("decode_speedup" in row for row in rows)
    assert {row["prompt_tokens"] for row in rows} == {published.WORDS - 1}
    assert len(timed) == 3 * models.MORE
