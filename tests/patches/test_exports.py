"""Exported patched models give upstream's results and contain only operators of torch."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlmfast
from tests.helpers.patches_models import patched, tiny
from tests.helpers.thorough import first_of

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


class Logits(nn.Module):
    """Wraps a model so that it takes tensors by position and returns one, as exporters need it."""

    def __init__(self, model_type: str):
        super().__init__()
        self.model, inputs = tiny(model_type)
        self.names, self.inputs = list(inputs), tuple(inputs.values())

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True)), use_cache=False).logits


def traced(call: Logits) -> Any:
    """Trace, save and load with torch.jit."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(call, call.inputs, check_trace=False), file)
    file.seek(0)
    return torch.jit.load(file)


def exported(call: Logits) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(call, call.inputs)


def of_upstream(graph: Callable[[Logits], Any], call: Logits) -> Any:
    """Export the unpatched model; skip the test where this release of torch or transformers cannot."""
    try:
        return graph(call)
    except Exception as error:
        pytest.skip(f"upstream: {error}"[:200])


@pytest.mark.thorough
@pytest.mark.parametrize("model_type", ["llava", "internvl", "idefics3", "llama4", "qwen2_5_vl", "qwen3_vl"])
def test_a_trainable_model_is_traced_and_saved(model_type: str):
    call = Logits(model_type)
    want = of_upstream(traced, call)(*call.inputs)
    vlmfast.patch(call.model)
    assert patched(call.model)
    assert all(parameter.requires_grad for parameter in call.parameters())
    got = traced(call)
    assert "vlmfast::" not in str(got.inlined_graph)
    assert "vlmfast_native::" not in str(got.inlined_graph)
    assert torch.equal(got(*call.inputs), want)


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["traced", "compiled"])
def test_doubles_are_left_to_upstream(how: str):
    """The ops refuse float64, and upstream's norm computes in float32: so does the graph of a patched model."""
    call = Logits("llama")
    graph = traced if how == "traced" else functools.partial(torch.compile, backend="eager", fullgraph=True)
    of_upstream(graph, call)
    with vlmfast.patch(call.model):
        call.double()
        got = graph(call)(*call.inputs)
    assert torch.equal(graph(call)(*call.inputs), got)


@pytest.mark.parametrize("model_type", first_of(["llava", "internvl", "idefics3", "llama4"]))
def test_a_model_is_exported(model_type: str):
    call = Logits(model_type)
    want = of_upstream(exported, call).module()(*call.inputs)
    vlmfast.patch(call.model)
    program = exported(call)
    assert not [node for node in program.graph.nodes if "vlmfast" in str(node.target)]
    assert torch.equal(program.module()(*call.inputs), want)


@pytest.mark.thorough
@pytest.mark.parametrize("model_type", ["llama", "llava"])
def test_a_model_becomes_onnx(model_type: str, tmp_path: Path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    call = Logits(model_type)
    want = call(*call.inputs)
    vlmfast.patch(call.model)
    path = str(tmp_path / "model.onnx")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(call, call.inputs, path, dynamo=True, verbose=False)
    model = onnx.load(path)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    run = pytest.importorskip("onnx.reference").ReferenceEvaluator(model)
    feed = {given.name: value.numpy() for given, value in zip(model.graph.input, call.inputs, strict=True)}
    torch.testing.assert_close(torch.from_numpy(run.run(None, feed)[0]), want.detach(), rtol=1e-3, atol=1e-3)
