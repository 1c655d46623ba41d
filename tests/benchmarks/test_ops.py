"""The benchmark of ops: its records and files, no time for a wrong result, and a row for every failure."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import vlmfast
from tests.benchmarks.conftest import MACHINE
from tests.helpers.cases import EACH_OP, with_cases
from tests.helpers.thorough import first_of
from vlmfast import cli
from vlmfast.backends import LOADERS, Backend
from vlmfast.benchmarks import graphs, ops, peers, timing
from vlmfast.registry import OPS, Op, order

ROOT = Path(__file__).parents[2]
KINDS = ("transformers", "torch")
LAYERS = OPS["rms_norm"].cases.layers


# ---- records ----


def contender(name: str, group: str, us: float | None, **rest) -> ops.Contender:
    times = None if us is None else timing.Times([2e-6 * us] * 3, [us * 1e-6, us * 1e-6, us * 1e-3])
    return ops.Contender(name, group, lambda *_: None, times=times, **rest)


def rows(bytes: int, flops: int, monkeypatch) -> dict[str, dict]:
    op = with_cases(OPS["rms_norm"], bytes=lambda *_: bytes, flops=(lambda *_: flops) if flops else None)
    monkeypatch.setattr(ops, "counted", lambda op, backend: {"triton": 1.5, "cuda": 2.5}.get(backend))
    found = [
        contender("vlmfast native", "ours", 10.0, backend="native", roundings=0.5),
        contender("vlmfast triton", "ours", 20.0, backend="triton"),
        contender("transformers", "peer", 40.0),
        contender("torch.compile", "peer", 30.0),
        contender("broken", "peer", None, error="planted", roundings=float("inf")),
        contender("copy", "limit", 5.0),
    ]
    record = ops.record(op, "label", (torch.ones(2, dtype=torch.float16),), found, MACHINE)
    assert (record["op"], record["workload"], record["dtype"]) == ("rms_norm", "label", "float16")
    assert (record["bytes"], record["flops"]) == (bytes, flops)
    return {row["name"]: row for row in record["contenders"]}


def test_a_record(monkeypatch):
    found = rows(12_000, 1_000_000, monkeypatch)
    ours = found["vlmfast native"]
    assert ours["us"] == pytest.approx(10.0)
    assert ours["wall_us"] == pytest.approx(20.0)
    assert ours["gb_per_s"] == pytest.approx(1.2)
    assert ours["tflop_per_s"] == pytest.approx(0.1)
    assert ours["of_ceiling"] == pytest.approx(0.6)  # 6 us at 2 GB/s, 2 us at 0.5 TFLOP/s
    assert ours["over_copy"] == pytest.approx(2.0)
    assert ours["x_transformers"] == pytest.approx(4.0)
    assert ours["x_compile"] == pytest.approx(3.0)
    assert (ours["roundings"], ours["traffic"], found["vlmfast triton"]["traffic"]) == (0.5, None, 1.5)
    assert found["transformers"]["x_compile"] == pytest.approx(0.75)
    assert (found["broken"]["error"], found["broken"]["roundings"]) == ("planted", None)
    assert "us" not in found["broken"]
    assert not {"gb_per_s", "tflop_per_s", "of_ceiling"} & found["copy"].keys()
    assert rows(12_000, 4_000_000, monkeypatch)["vlmfast native"]["of_ceiling"] == pytest.approx(0.8)  # 8 us
    assert rows(12_000, 0, monkeypatch)["vlmfast native"]["tflop_per_s"] is None


def test_a_copy_moves_as_many_bytes_as_the_op():
    op = with_cases(OPS["rms_norm"], bytes=lambda *_: 64, limits={})
    made = ops.contenders(op, (torch.ones(2), torch.ones(2)), ())[-1].prepare(torch.ones(2))()
    assert 2 * made.nbytes == 64  # read and written
    assert made.all()  # all bytes are written; unwritten memory would be one page of zeros


@pytest.mark.parametrize(
    ("group", "exact", "off", "fine"),
    [
        ("ours", False, 15, True),
        ("ours", False, 17, False),
        ("ours", True, 1, False),
        ("peer", False, 60, True),
        ("peer", True, 60, True),
        ("peer", False, 70, False),
        ("limit", True, 1e6, True),
    ],
)
def test_how_far_a_result_may_be(group: str, exact: bool, off: float, fine: bool):
    """Distances are in float32 roundings of the largest value, which is 4."""
    op = dataclasses.replace(OPS["rms_norm"], exact=exact)
    want = torch.tensor([4.0, 1.0])
    found = ops.Contender("x", group, lambda *_: lambda: want + torch.tensor([0.0, off * 4.0 * 2.0**-23]))
    ops.prepare(found, op, (want,), want)
    assert (found.error is None) == fine, found.error


def test_only_peers_may_round_the_inputs():
    want, inputs = torch.tensor([1.0]), (torch.ones(1, dtype=torch.bfloat16),)
    for group, fine in (("peer", True), ("ours", False)):
        found = ops.Contender("x", group, lambda *_: lambda: want + 0.01)
        ops.prepare(found, OPS["rms_norm"], inputs, want)
        assert (found.error is None) == fine, found.error


@pytest.mark.parametrize(
    "got", [torch.tensor([1.0, float("nan")]), torch.ones(1, 2), torch.tensor([float("inf"), 1.0])]
)
def test_what_cannot_be_compared_is_wrong(got):
    assert ops.distance(got, torch.tensor([1.0, 2.0])) == float("inf")
    assert ops.distance((torch.ones(2), got), (torch.ones(2), torch.tensor([1.0, 2.0]))) == float("inf")


# ---- what is measured ----


def measured(op: Op, kinds=KINDS) -> dict:
    (found,) = ops.benchmark(op, "cpu", torch.float32, kinds, MACHINE)
    return {row["name"]: row for row in found["contenders"]}


def test_every_contender_is_timed(small, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    found = measured(small, (*KINDS, "compile"))
    assert next(iter(found)) == "vlmfast native"
    assert {"transformers", "F.rms_norm", "torch.compile", "copy"} < set(found)
    assert all(row["us"] > 0 and row["error"] is None for row in found.values())
    assert found["transformers"]["x_transformers"] == 1.0
    assert found["vlmfast native"]["roundings"] == 0


def test_each_contender_runs_on_its_own_backend(small, override):
    ran = []
    for name in ("native", "triton"):
        run = lambda x, *_, name=name: ran.append((name, tuple(order.get()))) or x  # noqa: E731
        override(OPS["rms_norm"], name, Backend(name, run, lambda *_: None))
    ((_, args),) = small.cases.workloads("cpu", torch.float32)
    calls = {c.name: c.prepare(*args) for c in ops.contenders(small, args, ())}
    for _ in range(2):
        calls["vlmfast triton"]()
        calls["vlmfast native"]()
    assert ran == [("triton", ("triton",)), ("native", tuple(LOADERS))] * 2  # native is first: it is not pinned


@pytest.mark.parametrize("op", EACH_OP)
def test_every_contender_of_every_op_runs(op: Op, monkeypatch):
    """Run peers and limits on a small call, without our kernels, which other tests run, and without Inductor."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with vlmfast.use("torch"), torch.no_grad():
        args = next(iter(op.cases.samples("cpu", torch.float32)))
        want = op.reference(*args)
        found = ops.contenders(op, args, (*KINDS, "compile"))
        assert {"torch.compile", "copy", *op.cases.peers, *op.cases.limits} <= {c.name for c in found}
        assert op.cases.projects.keys() <= peers.PROJECTS.keys()
        assert op.cases.upstream is None or "transformers" in {c.name for c in found}
        for contender in found:
            ops.prepare(contender, op, args, want)
            assert contender.error is None, contender.error
        assert op.cases.flops is None or op.cases.flops(*args) > 0


def test_a_wrong_result_has_no_speed(small, override, capsys):
    wrong = Backend("native", lambda x, weight, *_: x * 1.01, lambda *_, **__: None)
    override(OPS["rms_norm"], "native", wrong)
    row = measured(small)["vlmfast native"]
    assert "us" not in row
    assert "differs from the definition" in row["error"]
    assert cli.main(["bench", "rms_norm", "--device", "cpu", "--dtype", "float32", "--peers", "none"]) == 1
    assert "no speed: differs from the definition" in capsys.readouterr().out


def test_a_peer_that_fails_is_a_row_with_its_error(small, monkeypatch):
    def broken(*args):
        raise OSError("no such library\nand more")

    for name, prepare in {"liger": broken, "quack": lambda *args: broken}.items():
        monkeypatch.setitem(small.cases.projects, name, prepare)
    found = measured(small, ("liger", "quack", "flashinfer"))
    assert [found[name]["error"] for name in ("liger", "quack")] == ["OSError: no such library"] * 2
    assert "us" in found["vlmfast native"]
    assert "us" not in found["liger"]


@pytest.mark.parametrize("call", ["second", "last"])
def test_a_peer_that_fails_while_it_is_timed_is_a_row(small, call: str, monkeypatch, capsys):
    """It fails after its result was compared; the others are timed again, all in the same rounds."""
    calls = []

    def fails():
        calls.append(1)
        if len(calls) > (1 if call == "second" else 5):
            raise torch.OutOfMemoryError("planted\nand more")
        return small.reference(*args)

    ((_, args),) = small.cases.workloads("cpu", torch.float32)
    monkeypatch.setitem(small.cases.projects, "liger", lambda *_: fails)
    monkeypatch.setattr(peers, "installed", lambda: ("liger",))
    found = measured(small, ("liger",))
    assert found["liger"]["error"] == "OutOfMemoryError: planted"
    assert "us" not in found["liger"]
    assert all(found[name]["us"] > 0 for name in ("vlmfast native", "copy"))
    calls.clear()
    assert cli.main(["bench", "rms_norm", "--device", "cpu", "--dtype", "float32"]) == 0
    assert "liger: OutOfMemoryError: planted" in capsys.readouterr().out


def test_what_fails_of_ours_while_it_is_timed_is_exit_code_1(small, override, tmp_path: Path):
    calls = []

    def fails(x, weight, *_):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("planted")
        return small.reference(x, weight)

    override(OPS["rms_norm"], "native", Backend("native", fails, lambda *_, **__: None))
    command = ["bench", "rms_norm", "--device", "cpu", "--dtype", "float32", "--peers", "torch"]
    assert cli.main([*command, "--json", str(tmp_path / "out.json")]) == 1
    (record,) = json.loads((tmp_path / "out.json").read_text())["records"]
    errors = {row["name"]: row["error"] for row in record["contenders"]}
    assert errors.pop("vlmfast native") == "RuntimeError: planted"
    assert set(errors.values()) == {None}


def test_an_error_of_the_device_or_the_definition_is_in_every_row(small, monkeypatch):
    def broken(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(ops, "measure", broken)
    assert {row["error"] for row in measured(small).values()} == {"RuntimeError: planted"}
    found = measured(dataclasses.replace(small, reference=broken))
    assert {row["error"] for row in found.values()} == {"no definition to compare with: RuntimeError: planted"}


def test_an_op_without_a_kernel_says_so(small, override, capsys):
    for name in ("native", "triton"):
        override(OPS["rms_norm"], name, "not built")
    assert cli.main(["bench", "rms_norm", "--device", "cpu", "--dtype", "float32", "--peers", "torch"]) == 1
    assert "no kernel runs this call (native: not built; triton: not built)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cls_attention", "received_attention"])
def test_attention_is_timed_on_keys_of_both_layouts(name):
    """PyTorch's own ways are slower on a strided key, so timing only that would be unfair."""
    layouts = {label.rpartition(" ")[2]: args[1] for label, args in OPS[name].cases.workloads("cpu", torch.bfloat16)}
    assert {label: key.is_contiguous() for label, key in layouts.items()} == {"projected": False, "contiguous": True}


# ---- in a graph ----


def test_layers_are_compiled_and_compared(small, monkeypatch):
    """Both graphs are timed; there are no bytes in the record, because Inductor may not move them at all."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    op = with_cases(small, layers=LAYERS)
    (found,) = graphs.benchmark(op, "cpu", torch.float32, MACHINE)
    assert found["workload"] == "4x64, in a graph"
    assert [(row["name"], row["group"], row["error"]) for row in found["contenders"]] == [
        ("vlmfast", "ours", None),
        ("transformers", "peer", None),
    ]
    assert len(compiled) == 2
    assert found["contenders"][0]["x_transformers"] > 0
    assert not {"gb_per_s", "of_ceiling"} & found["contenders"][0].keys()
    assert list(graphs.benchmark(small, "cpu", torch.float32, MACHINE)) == []


def test_layers_that_say_something_else_have_no_time(small, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda: function() * 2)
    (found,) = graphs.benchmark(with_cases(small, layers=LAYERS), "cpu", torch.float32, MACHINE)
    assert all("no speed" in row["error"] for row in found["contenders"])


@pytest.mark.parametrize("dtype", first_of([torch.bfloat16, torch.float32]), ids=str)
def test_layers_of_a_norm_become_the_code_of_upstream(dtype: torch.dtype):
    """Patching does not change the speed of a compiled model, because the graph has the same code."""
    args = torch.randn(3, 64, dtype=dtype), torch.randn(64, dtype=dtype)
    generated = []
    for layers in LAYERS.values():
        torch._dynamo.reset()
        with torch.no_grad():
            _, code = run_and_get_code(torch.compile(layers(*args), dynamic=False))
        generated.append(re.sub(r"#.*", "", "\n".join(code)))
    assert "rsqrt" in generated[0]
    assert generated[0] == generated[1]
