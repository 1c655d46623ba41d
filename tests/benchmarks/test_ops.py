"""The benchmark's own promises: no speed for a wrong result, ratios of one run, a row for every failure."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

import vlmfast
from tests.helpers.cases import EACH_OP, require
from vlmfast import cli
from vlmfast.backends import Backend
from vlmfast.benchmarks import bench, html, models, ops, peers, report, timing
from vlmfast.registry import OPS, Op, pinned

ROOT = Path(__file__).parents[2]
MACHINE = timing.Ceilings(10.0, 1.0)
KINDS = ("transformers", "torch")


@pytest.fixture
def small(monkeypatch):
    """rms_norm with one small workload, timed for a moment."""
    require(OPS["rms_norm"], "native")
    monkeypatch.setattr(timing, "ROUND_SECONDS", 1e-4)
    monkeypatch.setattr(timing.measure, "__defaults__", (3,))
    monkeypatch.setattr(timing, "ceilings", lambda device, dtype: MACHINE)
    workload = ("4x64", (torch.randn(4, 64), torch.randn(64)))
    op = dataclasses.replace(OPS["rms_norm"], workloads=lambda device, dtype: [workload])
    monkeypatch.setitem(OPS, "rms_norm", op)
    return op


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


def test_counted_traffic_is_that_of_the_backend(small, monkeypatch):
    monkeypatch.setattr(ops, "counted", lambda op, backend: {"triton": 1.5, "cuda": 2.5}.get(backend))
    monkeypatch.setitem(OPS["rms_norm"]._loaded, "triton", Backend("triton", small.reference, lambda *_, **__: None))
    found = measured(small)
    assert (found["vlmfast native"]["traffic"], found["vlmfast triton"]["traffic"]) == (None, 1.5)


def test_ceilings_bound_by_bytes_or_flops():
    machine = timing.Ceilings(copy_gb_per_s=100.0, gemm_tflop_per_s=2.0)
    assert machine.seconds(10**9, 10**9) == pytest.approx(0.01)
    assert machine.seconds(10**9, 10**12) == pytest.approx(0.5)


def test_each_contender_runs_on_its_own_backend(small, monkeypatch):
    ran = []
    for name in ("native", "triton"):
        recorder = Backend(name, lambda x, *_, name=name: ran.append((name, pinned.get())) or x, lambda *_, **__: None)
        monkeypatch.setitem(OPS["rms_norm"]._loaded, name, recorder)
    ((_, args),) = small.workloads("cpu", torch.float32)
    calls = {c.name: c.prepare(*args) for c in ops.contenders(small, args, ())}
    for _ in range(2):
        calls["vlmfast triton"]()
        calls["vlmfast native"]()
    assert ran == [("triton", "triton"), ("native", None)] * 2  # the first is what a user gets


@pytest.mark.parametrize("op", EACH_OP)
def test_every_contender_of_every_op_runs(op: Op, monkeypatch):
    """On a small call, without our kernels, which the other tests run, and without waiting for Inductor."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with vlmfast.use("torch"), torch.no_grad():
        args = next(iter(op.samples("cpu", torch.float32)))
        want = op.reference(*args)
        found = ops.contenders(op, args, (*KINDS, "compile"))
        assert {"torch.compile", "copy", *op.peers, *op.limits} <= {c.name for c in found}
        assert op.upstream is None or "transformers" in {c.name for c in found}
        for contender in found:
            ops.prepare(contender, op, args, want)
            assert contender.error is None, contender.error
        assert op.flops is None or op.flops(*args) > 0


def test_a_wrong_result_has_no_speed(small, monkeypatch, capsys):
    wrong = Backend("native", lambda x, weight, *_: x * 1.01, lambda *_, **__: None)
    monkeypatch.setitem(OPS["rms_norm"]._loaded, "native", wrong)
    row = measured(small)["vlmfast native"]
    assert "us" not in row
    assert "differs from the definition" in row["error"]
    assert cli.main(["bench", "rms_norm", "--device", "cpu", "--dtype", "float32", "--peers", "none"]) == 1
    assert "no speed: differs from the definition" in capsys.readouterr().out


@pytest.mark.parametrize("got", [torch.full((2,), float("nan")), torch.ones(3)])
def test_what_cannot_be_compared_is_infinitely_far(got):
    assert ops.distance(got, torch.ones(2)) == float("inf")


def test_a_peer_that_fails_is_a_row_with_its_error(small, monkeypatch):
    def broken(*args):
        raise OSError("no such library\nand more")

    for name, prepare in {"liger": broken, "quack": lambda *args: broken}.items():
        monkeypatch.setitem(peers.PROJECTS, name, (name, {"rms_norm": prepare}))
    found = measured(small, ("liger", "quack", "flashinfer"))
    assert found["liger"]["error"] == found["quack"]["error"] == "OSError: no such library"
    assert "us" in found["vlmfast native"]
    assert "us" not in found["liger"]


@pytest.mark.parametrize("call", ["second", "last"])
def test_a_peer_that_fails_while_it_is_timed_is_a_row(small, call: str, monkeypatch, capsys):
    """After its result was found right. The others are timed anew; all of them in the same rounds."""
    calls = []

    def fails():
        calls.append(1)
        if len(calls) > (1 if call == "second" else 5):
            raise torch.OutOfMemoryError("planted\nand more")
        return small.reference(*args)

    ((_, args),) = small.workloads("cpu", torch.float32)
    monkeypatch.setitem(peers.PROJECTS, "liger", ("liger", {"rms_norm": lambda *_: fails}))
    monkeypatch.setattr(peers, "installed", lambda: ("liger",))
    found = measured(small, ("liger",))
    assert found["liger"]["error"] == "OutOfMemoryError: planted"
    assert "us" not in found["liger"]
    assert all(found[name]["us"] > 0 for name in ("vlmfast native", "copy"))
    calls.clear()
    assert cli.main(["bench", "rms_norm", "--device", "cpu", "--dtype", "float32"]) == 0
    assert "liger: OutOfMemoryError: planted" in capsys.readouterr().out


def test_what_fails_of_ours_while_it_is_timed_is_exit_code_1(small, monkeypatch, tmp_path: Path):
    calls = []

    def fails(x, weight, *_):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("planted")
        return small.reference(x, weight)

    monkeypatch.setitem(OPS["rms_norm"]._loaded, "native", Backend("native", fails, lambda *_, **__: None))
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


def test_a_limit_without_a_time_leaves_the_others_theirs(small, monkeypatch):
    def broken(*_):
        raise torch.OutOfMemoryError("planted")

    chosen = ops.contenders
    monkeypatch.setattr(ops, "contenders", lambda *args: [*chosen(*args)[:-1], ops.Contender("copy", "limit", broken)])
    found = measured(small)
    assert found["copy"]["error"] == "OutOfMemoryError: planted"
    assert found["vlmfast native"]["us"] > 0
    assert "over_copy" not in found["vlmfast native"]


def test_an_op_without_a_kernel_says_so(small, monkeypatch, capsys):
    for name in ("native", "triton"):
        monkeypatch.setitem(OPS["rms_norm"]._loaded, name, "not built")
    assert cli.main(["bench", "rms_norm", "--device", "cpu", "--dtype", "float32", "--peers", "torch"]) == 1
    assert "no kernel runs this call (native: not built; triton: not built)" in capsys.readouterr().out


def test_rounds_are_paired():
    ours, theirs = timing.Times([1.0, 10.0, 2.0]), timing.Times([2.0, 20.0, 4.0])
    assert theirs.over(ours) == 2.0
    assert timing.Times([1.0, 2.0, 3.0]).spread == 1.0


def test_a_run_is_a_table_json_csv_and_a_page_without_a_network(small, tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    page = tmp_path / "deep" / "report.html"
    command = ["bench", "rms_norm", "--device", "cpu", "--dtype", "float32", "--peers", "torch", "--html", str(page)]
    assert cli.main(command) == 0
    assert "F.rms_norm" in capsys.readouterr().out
    written = json.loads(page.with_suffix(".json").read_text())
    assert {"date", "device", "threads", "torch", "vlmfast", "F.rms_norm"} <= written["environment"].keys()
    (record,) = written["records"]
    with page.with_suffix(".csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == [row["name"] for row in record["contenders"]]
    assert float(lines[0]["us"]) == record["contenders"][0]["us"]
    text = page.read_text()
    assert text.count("<svg") == 2
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", text)
    again = tmp_path / "again.html"
    assert cli.main(["bench", "--from", str(page.with_suffix(".json")), "--html", str(again)]) == 0
    assert again.read_text() == text


def test_whole_models_are_a_part_of_the_run(tmp_path: Path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    rows = [
        {"model": "llava-1.5-7b", "size": "small", "dtype": "float32", "mode": "eager", "variant": "original"}
        | {"prefill_ms": 12.5, "decode_ms": 1.25, "cache_bytes": 1000},
        {"model": "llava-1.5-7b", "size": "small", "dtype": "float32", "mode": "compile", "variant": "patched"}
        | {"error": "Unsupported: <graph break>"},
    ]
    asked = []

    def run(names, *, device, dtype, console, save):
        asked.append((list(names), device, dtype))
        save(rows[:1])
        return rows

    monkeypatch.setattr(models, "run", run)
    monkeypatch.setattr(timing, "ceilings", lambda device, dtype: MACHINE)
    page = tmp_path / "report.html"
    assert cli.main(["bench", "--models", "llava-1.5-7b", "--device", "cpu", "--html", str(page)]) == 1
    assert asked == [(["llava-1.5-7b"], "cpu", None)]
    assert json.loads(page.with_suffix(".json").read_text())["models"] == rows
    assert "&lt;graph break&gt;" in page.read_text()
    assert "12.50" in page.read_text()
    capsys.readouterr()
    assert cli.main(["bench", "--from", str(page.with_suffix(".json"))]) == 1
    assert "llava-1.5-7b" in capsys.readouterr().out


def test_the_dtype_is_that_of_the_models_too(monkeypatch):
    asked = []
    monkeypatch.setattr(models, "run", lambda names, **settings: asked.append(settings["dtype"]) or [])
    monkeypatch.setattr(timing, "ceilings", lambda device, dtype: MACHINE)
    for dtype in ("float32", "bfloat16"):
        assert cli.main(["bench", "--models", "smolvlm-256m", "--device", "cpu", "--dtype", dtype]) == 0
    assert asked == [torch.float32, torch.bfloat16]


def test_a_run_of_models_alone_is_shown(tmp_path: Path, capsys):
    """What `vlmfast.benchmarks.models --json` writes, as in a GPU's report."""
    pytest.importorskip("matplotlib")
    written, page = ROOT / "benchmarks" / "results" / "models_cpu.json", tmp_path / "models.html"
    assert cli.main(["bench", "--from", str(written), "--html", str(page)]) == 0
    for text in (capsys.readouterr().out, page.read_text()):
        assert "llava-next-7b" in text
        assert "757.23" in text
    assert "roundings" not in page.read_text()
    page.unlink()
    (tmp_path / "broken.json").write_text(json.dumps({"environment": {}, "records": [{"model": "x", "variant": "y"}]}))
    for other in (written.with_name("launches.json"), tmp_path / "broken.json"):
        assert cli.main(["bench", "--from", str(other)]) == 2
        assert "it is not what `bench --json` writes" in capsys.readouterr().err


def test_names_in_the_page_are_escaped(small):
    run = {"environment": report.environment("cpu", MACHINE), "records": [], "models": []}
    (record,) = ops.benchmark(small, "cpu", torch.float32, (), MACHINE)
    record["contenders"][0]["error"] = "<b>&"
    run["records"].append(record)
    pytest.importorskip("matplotlib")
    assert "&lt;b&gt;&amp;" in html.page(run)


def test_what_is_known_survives_a_stop(small, tmp_path: Path, monkeypatch):
    first, second = small.workloads("cpu", torch.float32) * 2, ("stop", None)
    monkeypatch.setitem(OPS, "rms_norm", dataclasses.replace(small, workloads=lambda *_: [*first[:1], second]))
    with pytest.raises(TypeError):
        bench.run(bench.Options(["rms_norm"], ["none"], device="cpu", json=tmp_path / "out.json"))
    assert [r["workload"] for r in json.loads((tmp_path / "out.json").read_text())["records"]] == ["4x64"]


def test_an_interruption_stops_and_loses_nothing(small, tmp_path: Path, monkeypatch):
    interrupted, measure = [], ops.measure

    def stop(*args):
        interrupted.append(args)
        if len(interrupted) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(ops, "measure", stop)
    work = small.workloads("cpu", torch.float32) * 3
    monkeypatch.setitem(OPS, "rms_norm", dataclasses.replace(small, workloads=lambda *_: work))
    with pytest.raises(KeyboardInterrupt):
        cli.main(["bench", "rms_norm", "--peers", "none", "--device", "cpu", "--json", str(tmp_path / "out.json")])
    assert len(json.loads((tmp_path / "out.json").read_text())["records"]) == 1
    assert len(interrupted) == 2


def test_the_records_are_written_where_they_are_asked_for(small, tmp_path: Path):
    kept = tmp_path / "out.txt"
    assert cli.main(["bench", "rms_norm", "--device", "cpu", "--peers", "none", "--json", str(kept)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.txt"]


def test_the_table_names_every_failure_once(small):
    (record,) = ops.benchmark(small, "cpu", torch.float32, (), MACHINE)
    record["contenders"][0]["error"] = "broken"
    assert report.errors([record, record]) == ["rms_norm, vlmfast native: broken (4x64, 4x64)"]
    with Console(width=150).capture() as _:
        report.table([record], "here")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["softmax"], "unknown op softmax; known: "),
        (["--peers", "apex"], "unknown peer apex; known: transformers, torch, compile, liger"),
        (["--models", "gpt-2"], "unknown model gpt-2; known: llava-1.5-7b"),
        (["--threads", "0"], "must be at least 1, got 0"),
        (["--device", "cuda"], "--device: cannot use cuda"),
        (["--json", "/proc/no/out.json"], "cannot write /proc/no/out.json"),
        (["--json", "tests"], "cannot write tests: it is a folder"),
        (["--html", "out.json"], "--html out.json: a file of that name would be written over"),
        (["--device", "meta"], "--device"),
        (["rms_norm", "--from", "benchmarks/results/cpu.json"], "--from shows an earlier run whole: it takes no op"),
        (["--dtype", "float32", "--from", "benchmarks/results/cpu.json"], "--from shows an earlier run whole"),
        (["--models", "--dtype", "float16", "--device", "cpu"], "no model runs in float16 on a CPU"),
        (["--from", "Makefile"], "cannot read Makefile: it is not what `bench --json` writes"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_cannot_run_is_one_line_and_exit_code_2(command: list[str], message: str, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(timing, "ceilings", lambda device, dtype: MACHINE)
    for module, function in ((bench, "benchmark"), (models, "run")):
        monkeypatch.setattr(module, function, lambda *_, **__: pytest.fail("it ran"))
    try:
        code = cli.main(["bench", *command])
    except SystemExit as stopped:  # argparse
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
