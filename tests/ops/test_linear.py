"""Linear layers in half precision, on processors with fast half-precision matmuls and on others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vlmfast import linear as linear_layers

DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=[True, False], ids=["slow", "fast"])
def processor(request, monkeypatch) -> bool:
    monkeypatch.setattr(linear_layers, "SLOW", frozenset(DTYPES if request.param else ()))
    return request.param


@pytest.mark.parametrize("rows", [1, linear_layers.FEWEST_ROWS - 1, linear_layers.FEWEST_ROWS, 100])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
def test_widened_where_it_pays(processor: bool, rows: int, dtype: torch.dtype, monkeypatch):
    seen, original = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: seen.append(x.dtype) or original(x, *rest))
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((rows, 64), (32, 64), (32,)))
    got = linear_layers.linear(x, weight, bias)
    widens = processor and dtype != torch.float32 and rows >= linear_layers.FEWEST_ROWS
    assert seen == [torch.float32 if widens else dtype]
    assert got.dtype == dtype
    exact = original(x.double(), weight.double(), bias.double())
    error, allowed = (got - exact).abs(), (original(x, weight, bias) - exact).abs()
    assert error.max() <= 1.05 * allowed.max() + torch.finfo(dtype).eps * exact.abs().max() / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(processor: bool, dtype: torch.dtype):
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((2, 8, 64), (32, 64), (32,))]
    grads = torch.autograd.grad(linear_layers.linear(*leaves).float().square().sum(), leaves)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for got, want in zip(grads, torch.autograd.grad(F.linear(*wide).square().sum(), wide), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.02 * float(want.abs().max()))


def test_no_wide_copy_is_kept(processor: bool):
    leaves = [torch.randn(shape).bfloat16().requires_grad_() for shape in ((16, 64), (32, 64), (32,))]
    kept: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.dtype) or x, lambda x: x):
        linear_layers.linear(*leaves)
    assert set(kept) == {torch.bfloat16}


def test_a_frozen_layer_keeps_no_input(processor: bool):
    x, weight = torch.randn(16, 64).bfloat16().requires_grad_(), torch.randn(32, 64).bfloat16()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        linear_layers.linear(x, weight)
    assert kept == [weight.numel()]


def test_several_gradients_at_a_time(processor: bool):
    leaves = [torch.randn(shape).bfloat16().requires_grad_() for shape in ((2, 8, 64), (32, 64), (32,))]
    output = linear_layers.linear(*leaves)
    directions = torch.randn(3, *output.shape).bfloat16()
    together = torch.autograd.grad(output, leaves, directions, retain_graph=True, is_grads_batched=True)
    for index, direction in enumerate(directions):
        each = torch.autograd.grad(output, leaves, direction, retain_graph=True)
        for got, want in zip(together, each, strict=True):
            torch.testing.assert_close(got[index], want, rtol=0.02, atol=0.2)


def test_a_traced_graph_runs_elsewhere(processor: bool):
    leaves = [torch.randn(shape).bfloat16().requires_grad_() for shape in ((16, 64), (32, 64))]
    graph = torch.jit.trace(linear_layers.linear, tuple(leaves), check_trace=False).inlined_graph
    assert "PythonOp" not in str(graph)
    assert "aten::linear" in str(graph)


@pytest.mark.parametrize("needed", range(3))
def test_gradient_of_one_argument(processor: bool, needed: int):
    values = [torch.randn(shape).bfloat16() for shape in ((16, 64), (32, 64), (32,))]
    values[needed].requires_grad_()
    output = linear_layers.linear(*values)
    (grad,) = torch.autograd.grad(output, values[needed], torch.ones_like(output), create_graph=True)
    want = torch.autograd.grad(F.linear(*values), values[needed], torch.ones_like(output))[0]
    torch.testing.assert_close(grad, want, rtol=0.02, atol=0.2)
