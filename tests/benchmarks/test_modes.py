"""Whole models compiled and captured: what is timed and compared, and what a failure prevents."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from rich.console import Console
from torch import nn

from vlmfast.benchmarks import models, modes
from vlmfast.benchmarks.forwards import STEPS
from vlmfast.benchmarks.published import Published

QUIET = Console(quiet=True)


def prepared(model, inputs, patch, mode, original=None):
    variant = modes.Variant(model, inputs, patch)
    modes.prepare(variant, mode, original)
    return variant


# ---- compiled ----


def test_compiled_answers_are_those_of_eager(llava, monkeypatch):
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **settings: compiled(self, backend="eager", **settings))
    rows = models.run([], QUIET, modes=["compile"])
    assert [row.get("error") for row in rows] == [None] * 3
    assert all(row["difference"] < 1e-4 for row in rows)
    assert all("decode_over_eager" in row for row in rows)


@pytest.mark.thorough
def test_nothing_is_compiled_while_it_is_timed(llava, monkeypatch):
    """All variants are patched first, because a patch resets torch.compile; each graph is then compiled once."""
    compiled, place, time, prepare = nn.Module.compile, [], modes.Variant.time, models.prepare
    graphs, did = [], []

    def backend(graph, inputs):
        graphs.append(place[-1])
        return graph.forward

    def at(name, call):
        def wrapped(variant, *args):
            place.append((name, variant.patch))
            return call(variant, *args)

        return wrapped

    monkeypatch.setattr(nn.Module, "compile", lambda self, **settings: compiled(self, backend=backend, **settings))
    monkeypatch.setattr(modes.Variant, "time", at("timed", time))
    monkeypatch.setattr(models, "prepare", at("prepared", prepare))
    model, inputs = llava.build("small", torch.float32, "cpu")
    rows = models.measure(llava, model, inputs, "compile", did.append)
    assert [row.get("error") for row in rows] == [None] * 3
    patches = [None, {}, {"reduce": llava.method}]
    assert graphs == [("prepared", patch) for patch in patches for _ in ("prefill", "step")]
    assert did[::3] == ["original: compiling, which takes minutes on a CPU", "eager original: a first answer"]


def test_what_fails_to_compile_is_a_record(llava, monkeypatch):
    def explode(self, **settings):
        raise RuntimeError("planted\nand more")

    monkeypatch.setattr(nn.Module, "compile", explode)
    rows = models.run([], QUIET, modes=["compile", "eager"])
    assert [row.get("error") for row in rows] == ["RuntimeError: planted"] * 3 + [None] * 3


def test_a_wrong_result_has_no_time(llava, monkeypatch):
    def wrong(self, **settings):
        self.norm.register_forward_hook(lambda module, args, output: output.flip(-1))

    monkeypatch.setattr(nn.Module, "compile", wrong)
    rows = models.run([], QUIET, modes=["compile"])
    assert all("differ from its own in eager mode" in row["error"] and "prefill_ms" not in row for row in rows)


# ---- compared, and its memory ----


def test_a_patch_is_compared_token_by_token(llava):
    """It is fed the original's tokens: near a tie it might choose another token, and all later logits would differ."""
    model, inputs = llava.build("small", torch.float32, "cpu")
    original = prepared(model, inputs, None, "eager")
    logits, tokens = original.eager
    assert logits.shape[:2] == (1, 1 + STEPS)
    shifted = [(token + 1) % 32 for token in tokens]
    for said, fine in ((tokens, True), (shifted, False)):
        original.eager = logits, said
        patched = prepared(model, inputs, {}, "eager", original)
        assert (patched.error is None) == fine, patched.error
    original.eager, original.error = None, "planted"
    assert prepared(model, inputs, {}, "eager", original).error == "RuntimeError: nothing to compare with: planted"


def test_the_peak_is_that_of_an_answer(llava, monkeypatch):
    """Memory of the compilation, before the last reset of the statistics, does not count."""
    did = []
    real = modes.Variant

    def pretends(*args):
        variant = real(*args)
        variant.device = torch.device("cuda")
        return variant

    monkeypatch.setattr(modes, "Variant", pretends)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: did.append("before") or 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: did.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100 + 7 * did.count("reset"))
    monkeypatch.setattr(nn.Module, "compile", lambda self, **settings: did.append("compile"))
    monkeypatch.setattr(modes, "_say", lambda *args, say=modes._say: did.append("answer") or say(*args))
    model, inputs = llava.build("small", torch.float32, "cpu")
    assert prepared(model, inputs, None, "eager").facts["peak_bytes"] == 7
    assert did == ["before", "reset", "answer"]
    did.clear()
    assert prepared(model, inputs, None, "compile").facts["peak_bytes"] == 14
    assert did == ["before", "reset", "answer", "compile", "answer", "reset", "answer"]


# ---- a process of its own ----


def _measured_apart(common, place):
    return [{**common, "variant": place}]


def _dies(common):
    os._exit(3)


def _raises(common):
    raise RuntimeError("planted")


@pytest.mark.thorough
def test_a_graph_is_measured_in_a_process_of_its_own():
    """A failed capture thus affects nothing else, and if the process dies, that is a record and the run goes on."""
    assert models.apart({"mode": "graph"}, _measured_apart, {"model": "x"}, "here") == [
        {"model": "x", "variant": "here"}
    ]
    for function, error in ((_dies, "BrokenProcessPool"), (_raises, "RuntimeError: planted")):
        (row,) = models.apart({"model": "x", "mode": "graph"}, function, {})
        assert (row["mode"], row["variant"]) == ("graph", "all")
        assert row["error"].startswith(error)
        assert models.failed([row])


def test_a_model_that_cannot_be_built_is_not_built_again(llava, monkeypatch):
    tried = []

    def explode(self, *args):
        tried.append(args)
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(Published, "build", explode)
    monkeypatch.setattr(models, "apart", lambda common, *_: [{**common, "variant": "of the other process"}])
    (row,) = models.run([], QUIET, modes=["eager", "compile", "graph"])
    assert row == {**row, "variant": "all", "error": "OutOfMemoryError: planted"}
    assert len(tried) == 1
    assert [row["variant"] for row in models.run([], QUIET, modes=["graph"])] == ["of the other process"]


# ---- captured ----


@pytest.fixture
def mode(monkeypatch):
    """Fake CUDA streams, and record the settings of the synchronisation debug mode."""
    found = []

    class Stream(contextlib.nullcontext):
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", found.append)
    return found


def test_nothing_is_captured_that_waits(llava, mode, monkeypatch):
    """A failed capture cannot be repaired, so what would make it fail is tried before."""
    captured, asks = [], torch.cuda.is_current_stream_capturing
    monkeypatch.setattr(modes, "_graph", lambda call: captured.append(call) or call)
    model, inputs = llava.build("small", torch.float32, "cpu")

    def waits(part):
        def call():
            if mode and mode[-1] == "error":
                assert torch.cuda.is_current_stream_capturing()  # otherwise transformers would read a mask
                raise RuntimeError("called a synchronizing CUDA operation")
            return getattr(modes.Decoding, part)(answer)

        return call

    for part, want in (("step", []), ("prefill", ["step"]), (None, ["step", "prefill"])):
        answer = modes.Decoding(model, inputs, inputs["input_ids"].shape[1] + STEPS)
        variant, calls = modes.Variant(model, inputs, None), {}
        for name in ("prefill", "step"):
            calls[name] = waits(name) if name == part else getattr(answer, name)
            setattr(answer, name, calls[name])
        captured.clear()
        with torch.no_grad():
            answer.prefill()
            if part == "step":
                with pytest.raises(RuntimeError, match="synchronizing"):
                    modes._capture(variant, answer)
            else:
                modes._capture(variant, answer)
                assert variant.facts["prefill_graph"].startswith("none" if part else "captured")
        assert captured == [calls[name] for name in want]
        assert mode[-1] == "default"
        assert torch.cuda.is_current_stream_capturing is asks


@pytest.mark.parametrize(
    ("broken", "errors", "ours"),
    [
        (None, ["CaptureError: RuntimeError: planted", modes.NOT_RUN, modes.NOT_RUN], False),
        ({}, [modes.NOT_RUN, "CaptureError: RuntimeError: planted", modes.NOT_RUN], True),
    ],
    ids=["original", "patched"],
)
def test_what_follows_a_failed_capture_is_not_run(llava, mode, broken, errors: list[str], ours: bool, monkeypatch):
    """Neither later variants nor earlier ones are timed, because the process can no longer be trusted."""
    graph, prepare, tried = modes._graph, models.prepare, []

    @contextlib.contextmanager
    def fails(graph):
        raise RuntimeError("planted")
        yield

    def planted(variant, *rest):
        tried.append(variant.patch)
        monkeypatch.setattr(modes, "_graph", graph if variant.patch == broken else lambda call: call)
        prepare(variant, *rest)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", fails)
    monkeypatch.setattr(models, "prepare", planted)
    monkeypatch.setattr(modes.Variant, "time", lambda *_: pytest.fail("it was timed"))
    rows = models.measure(llava, *llava.build("small", torch.float32, "cpu"), "graph")
    assert [row["error"] for row in rows] == errors
    assert tried == ([None, {}] if ours else [None])
    assert models.failed([{"model": "x", "mode": "graph", **row} for row in rows]) == ours
