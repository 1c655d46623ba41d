"""Steps of decoding with a static cache, compiled or captured in a CUDA graph, as upstream's are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import vlmfast
from tests.helpers.patches_models import patched, tiny
from tests.helpers.thorough import first_of
from vlmfast.benchmarks.forwards import Decoding
from vlmfast.benchmarks.modes import _graph

STEPS = 4
TYPES = ("qwen3_vl", "qwen2_5_vl", "internvl", "llama", "llava", "gemma2", "mistral", "qwen3_vl_moe")
pytestmark = pytest.mark.filterwarnings("ignore:.* is not patched")


def decoding(model: nn.Module, inputs: dict[str, Any]) -> Decoding:
    """Make the decoding of a prompt of text, with a static cache for its steps."""
    ids = inputs["input_ids"][:1].clamp(min=10)
    return Decoding(model, {"input_ids": ids}, ids.shape[1] + 2 * STEPS)


@pytest.mark.parametrize("model_type", first_of(TYPES))
@torch.no_grad()
def test_a_compiled_step_breaks_where_upstream_does(model_type: str):
    """Each step runs the same graphs, as many as upstream's step has."""
    model, inputs = tiny(model_type)
    found: list[tuple[int, int, int]] = []
    answers: list[list[Tensor]] = []
    for twin in (model, copy.deepcopy(model)):
        if found:
            vlmfast.patch(twin)
            assert patched(twin)
        torch._dynamo.reset()
        counters.clear()
        answer = decoding(twin, inputs)
        answer.prefill()
        answer.forward = torch.compile(answer.forward, backend="eager", dynamic=False)  # type: ignore[method-assign]
        answers.append([answer.step().clone() for _ in range(STEPS)])
        found.append((sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"], answer.cached()))
    torch._dynamo.reset()
    assert found[1] == found[0]
    for got, want in zip(*reversed(answers), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_a_step_in_a_cuda_graph(model_type: str):
    model, inputs = tiny(model_type, torch.bfloat16)
    vlmfast.patch(model.cuda())
    answer = decoding(model, {name: value.cuda() for name, value in inputs.items()})
    answer.prefill()
    want = [answer.step().clone() for _ in range(STEPS)]  # compiles the kernels as well
    answer.prefill()
    torch.cuda.synchronize()
    replay = _graph(answer.step)
    answer.prefill()
    assert all(torch.equal(replay(), each) for each in want)
