"""Ops under tracers: a compiled graph has the op or its definition, an exported one only plain operators."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx

import vlmfast
from tests.helpers.cases import EACH_OP, Recorder, each_traced, is_float, is_tensor, outputs, require
from vlmfast.registry import OPS, Op

Tensors = tuple[Tensor, ...]
LOAD = """
import sys, torch
if sys.argv[2] == "without":
    sys.modules["vlmfast"] = None
else:
    import vlmfast
for kind, name, tensors, want in torch.load(f"{sys.argv[1]}/calls.pt"):
    path = f"{sys.argv[1]}/{name}.{kind}"
    loaded = torch.jit.load(path) if kind == "jit" else torch.export.load(path).module()
    found = loaded(*tensors)
    for g, w in zip(found if isinstance(found, tuple) else (found,), want, strict=True):
        assert torch.equal(g, w), (kind, name)
    print(kind, name)
"""


class Call(nn.Module):
    """A module that calls an op with fixed arguments, except the tensors, which are its inputs."""

    def __init__(self, op: Op, args: tuple[Any, ...]):
        super().__init__()
        self.function, self.args = op.function, [None if is_tensor(a) else a for a in args]
        self.places = [index for index, a in enumerate(args) if is_tensor(a)]

    def forward(self, *tensors: Tensor) -> Any:
        args = list(self.args)
        for place, value in zip(self.places, tensors, strict=True):
            args[place] = value
        return self.function(*args)


def a_call(op: Op) -> tuple[Call, Tensors, Tensors]:
    """Return the sample call with most tensors, these tensors with gradients, and the outputs."""
    args = max(op.cases.samples("cpu", torch.float32), key=lambda args: sum(map(is_tensor, args)))
    tensors = tuple(a.clone().requires_grad_(is_float(a)) for a in args if is_tensor(a))
    return Call(op, args), tensors, outputs(op.reference(*args))


def ours(graph: torch.fx.Graph) -> list[str]:
    """Return the names of the ops of this package in a graph."""
    return [node.target.name() for node in graph.nodes if "vlmfast" in str(node.target)]


def load(folder: Path, how: str) -> list[str]:
    """Load and run the files of ``folder`` in a new process; return the vlmfast modules that it loaded."""
    command = [sys.executable, "-c", LOAD, str(folder), how]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


@pytest.mark.parametrize(
    "exporter",
    [
        "export",
        "make_fx",
        *(pytest.param(how, marks=pytest.mark.thorough) for how in ("strict export", "symbolic make_fx")),
    ],
)
@pytest.mark.parametrize("op", each_traced(OPS.values()))
def test_exporters_get_plain_operators(op: Op, exporter: str):
    call, tensors, want = a_call(op)
    if "export" in exporter:
        program = torch.export.export(call, tensors, strict=exporter.startswith("strict"))
        graph, module = program.graph, program.module()
    else:
        module = make_fx(call, tracing_mode="symbolic" if exporter.startswith("symbolic") else "real")(*tensors)
        graph = module.graph
    assert ours(graph) == []
    for g, w in zip(outputs(module(*tensors)), want, strict=True):
        assert torch.equal(g, w)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_was_exported_loads_where_vlmfast_is_not(tmp_path: Path):
    calls = []
    for name, op in OPS.items():
        call, tensors, want = a_call(op)
        torch.jit.save(torch.jit.trace(call, tensors, check_trace=False), tmp_path / f"{name}.jit")
        torch.export.save(torch.export.export(call, tensors), tmp_path / f"{name}.pt2")
        plain = tuple(tensor.detach() for tensor in tensors)
        calls += [(kind, name, plain, want) for kind in ("jit", "pt2")]
    torch.save(calls, tmp_path / "calls.pt")
    assert len(load(tmp_path, "without")) == 2 * len(OPS)


def test_what_was_saved_with_kernels_loads_after_the_import(tmp_path: Path):
    """Traces of earlier versions have kernels in them."""
    require(OPS["rms_norm"], "native")
    x, weight = torch.randn(3, 64), torch.randn(64)

    def native(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.vlmfast_native.rms_norm(x, weight, 1e-6, "llama")

    torch.jit.save(torch.jit.trace(native, (x, weight)), str(tmp_path / "norm.jit"))
    torch.save([("jit", "norm", (x, weight), outputs(native(x, weight)))], tmp_path / "calls.pt")
    assert load(tmp_path, "with") == ["jit norm"]


@pytest.mark.parametrize("op", each_traced(OPS.values()))
def test_a_compiled_graph_has_the_op_or_its_definition(op: Op):
    seen: list[str] = []

    def compiler(module: torch.fx.GraphModule, example_inputs: list) -> Any:
        seen.extend(name.removeprefix("vlmfast::") for name in ours(module.graph))
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    call, tensors, _ = a_call(op)
    with torch.no_grad():
        torch.compile(call, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)(*tensors)
    nodes = [part for part in op.parts or (op.name,) if "cpu" not in OPS[part].inlined]
    assert seen == nodes if op.compose is None else set(seen) <= set(nodes)


def needs_numbers(op: Op, call: dict[str, Any]) -> bool:
    """Tell whether only values in tensors make the call a bad one; in a graph the kernels check those."""
    try:
        op.check(**{name: value.to("meta") if is_tensor(value) else value for name, value in call.items()})
    except (TypeError, ValueError):
        return False
    return True


@pytest.mark.thorough
@pytest.mark.parametrize("op", EACH_OP)
def test_bad_calls_in_a_compiled_graph_are_refused(op: Op):
    bad = [(name, value, f"{message}|{name}") for name, value, _, message in op.cases.bad_calls]
    for name, value in op.cases.good_call.items():
        if is_tensor(value):
            others = [value.double(), value.long()] if is_float(value) else []
            bad += [(name, other, name) for other in ([1.0], value.to(torch.complex64), *others)]
    for name, value, message in bad:
        call = {**op.cases.good_call, name: value}
        if value is True or needs_numbers(op, call):  # the schema of an op takes True as an int
            continue
        torch._dynamo.reset()
        with pytest.raises((RuntimeError, torch._dynamo.exc.Unsupported), match=message) as raised:
            torch.compile(op.function, fullgraph=True, backend="eager")(**call)
        assert not isinstance(raised.value, torch._dynamo.exc.InternalTorchDynamoError)


INLINED = each_traced(op for op in OPS.values() if "cpu" in op.inlined)


@pytest.mark.parametrize("op", INLINED)
def test_a_check_in_a_compiled_graph_fixes_no_size(op: Op):
    """The graph that was compiled for the second size also runs all further sizes."""
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(op.function, fullgraph=True, backend=graphs)
    args = next(a for a in op.cases.samples("cpu", torch.float32) if a[0].dim() > 1 and a[0].numel())
    size = args[0].shape[0]
    for number in (3, 4, 5, 7):
        alike = [
            a[:1].expand(number, *a.shape[1:]) if is_tensor(a) and a.dim() > 1 and len(a) == size else a for a in args
        ]
        for got, want in zip(outputs(compiled(*alike)), outputs(op.definition(*alike)), strict=True):
            assert torch.equal(got, want)
    assert graphs.frame_count == 2


@pytest.mark.parametrize("op", INLINED)
def test_a_compiled_graph_may_transform_an_inlined_op(op: Op):
    """torch.func.grad works in the graph: the op has no rule for it, but its definition does."""
    call, tensors, _ = a_call(op)
    gradient = torch.func.grad(lambda *tensors: sum(o.square().sum() for o in outputs(call(*tensors)) if o.numel()))
    plain = [tensor.detach() for tensor in tensors]
    torch._dynamo.reset()
    got = torch.compile(gradient, backend="aot_eager", fullgraph=True)(*plain)
    torch.testing.assert_close(got, gradient(*plain))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_modes_that_only_watch_see_one_op(requires_grad: bool):
    x, weight = torch.randn(3, 64, requires_grad=requires_grad), torch.randn(64)
    with Recorder() as recorder:
        vlmfast.rms_norm(x, weight)
    assert "vlmfast::rms_norm" in recorder.names
    assert "aten::rsqrt" not in recorder.names
