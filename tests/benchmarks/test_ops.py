"""The benchmark of ops: what is made of times, no speed for a wrong result, a row for every failure, and its files."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import types
from pathlib import Path

import pytest
import torch

import vlmfast
from tests.helpers.cases import EACH_OP, require
from vlmfast import cli
from vlmfast.backends import Backend
from vlmfast.benchmarks import bench, html, models, ops, peers, report, timing
from vlmfast.registry import OPS, Op, pinned

ROOT = Path(__file__).parents[2]
MACHINE = timing.Ceilings(copy_gb_per_s=2.0, gemm_tflop_per_s=0.5)
KINDS = ("transformers", "torch")


# ---- what is made of it ----


def contender(name: str, group: str, us: float | None, **rest) -> ops.Contender:
    times = None if us is None else timing.Times([2e-6 * us] * 3, [us * 1e-6, us * 1e-6, us * 1e-3])
    return ops.Contender(name, group, lambda *_: None, times=times, **rest)


def rows(bytes: int, flops: int, monkeypatch) -> dict[str, dict]:
    op = dataclasses.replace(OPS["rms_norm"], bytes=lambda *_: bytes, flops=(lambda *_: flops) if flops else None)
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
    op = dataclasses.replace(OPS["rms_norm"], bytes=lambda *_: 64, limits={})
    made = ops.contenders(op, (torch.ones(2), torch.ones(2)), ())[-1].prepare(torch.ones(2))()
    assert 2 * made.nbytes == 64  # read and written
    assert made.all()  # what was never written is read from one page of zeros


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
    """In roundings of float32 of the largest value, which is 4."""
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


# ---- what is asked for, and where it goes ----


@pytest.fixture
def asked(monkeypatch):
    """What `bench` would measure; every op has one record with one error."""
    found = []

    def benchmark(op, device, dtype, kinds, machine):
        found.append((op.name, device, dtype, kinds))
        row = {"name": "vlmfast native", "group": "ours", "us": 1.0, "wall_us": 1.0, "roundings": 0.0, "error": None}
        broken = {"name": "liger", "group": "peer", "error": "<planted>, with a comma"}
        yield {
            "op": op.name,
            "workload": "1x2",
            "dtype": "float32",
            "bytes": 8,
            "flops": 0,
            "contenders": [row, broken],
        }

    monkeypatch.setattr(bench, "benchmark", benchmark)
    monkeypatch.setattr(timing, "ceilings", lambda device, dtype: MACHINE)
    monkeypatch.setattr(models, "run", lambda names, **_: found.append(tuple(names)) or [])
    monkeypatch.setattr(peers, "installed", lambda: ("transformers", "torch"))
    threads = torch.get_num_threads()
    yield found
    torch.set_num_threads(threads)


def test_what_is_asked_for_is_measured(asked):
    assert (
        cli.main(["bench", "rms_norm", "top_tokens", "--device", "cpu", "--dtype", "float16", "--peers", "torch"]) == 0
    )
    assert asked == [(name, "cpu", torch.float16, ("torch",)) for name in ("rms_norm", "top_tokens")]
    asked.clear()
    assert cli.main(["bench", "rms_norm", "--device", "cpu", "--peers", "none", "--threads", "2"]) == 0
    assert asked == [("rms_norm", "cpu", torch.bfloat16, ())]
    assert torch.get_num_threads() == 2
    asked.clear()
    assert cli.main(["bench", "--device", "cpu"]) == 0
    assert [each[0] for each in asked] == bench.PUBLIC
    assert "rms_norm_backward" not in bench.PUBLIC
    assert {each[3] for each in asked} == {("transformers", "torch")}
    asked.clear()
    assert cli.main(["bench", "--models", "--device", "cpu"]) == 0
    assert asked == [()]


def test_where_the_results_go(asked, tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    page, kept = tmp_path / "deep" / "out.html", tmp_path / "out.txt"
    command = ["bench", "rms_norm", "top_tokens", "--device", "cpu"]
    assert cli.main([*command, "--html", str(page), "--json", str(kept)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "out.csv", "out.txt"]
    written = json.loads(kept.read_text())
    assert [record["op"] for record in written["records"]] == ["rms_norm", "top_tokens"]
    assert written["environment"]["copy_gb_per_s"] == 2.0
    with kept.with_suffix(".csv").open() as file:
        lines = [(line["op"], line["name"], line["us"], line["error"]) for line in csv.DictReader(file)]
    ours, broken = ("vlmfast native", "1.0", ""), ("liger", "", "<planted>, with a comma")
    assert lines == [(name, *row) for name in ("rms_norm", "top_tokens") for row in (ours, broken)]
    printed = capsys.readouterr().out
    assert printed.count("rms_norm, liger: <planted>, with a comma (1x2)") == 1
    assert printed.count("liger") == 4  # a row of each table, and a reason below each
    assert "&lt;planted&gt;, with a comma" in page.read_text()
    assert "wall_us" not in report.columns(written["records"])
    written["records"][0]["contenders"][0]["wall_us"] = 5.0  # as on a GPU
    assert "wall_us" in report.columns(written["records"])


def test_the_clocks_are_those_of_the_gpu_in_use(monkeypatch):
    asked = []

    def run(command, **_):
        asked.extend(command)
        return types.SimpleNamespace(stdout="580.1, 1980 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 700.00 W\n")

    properties = types.SimpleNamespace(multi_processor_count=132, total_memory=8e10, uuid="1-2-3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(report.subprocess, "run", run)
    found = report._gpu()
    assert (found["multiprocessors"], found["memory_gb"], found["power.limit"]) == (132, 80.0, "700.00 W")
    assert "--id=GPU-1-2-3" in asked


def test_bars_are_as_long_as_the_times(monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(html, "_svg", lambda figure: drawn.extend(bar.get_width() for bar in figure.axes[0].patches))
    contenders = [{"name": "a", "group": "ours", "us": 3.0, "wall_us": 9.0}, {"name": "b", "group": "peer", "us": 7.0}]
    html._bars([{"workload": "1x2", "contenders": contenders}])
    assert drawn == [3.0, 7.0]


def test_the_gpu_is_the_one_that_was_asked_for(asked, monkeypatch):
    chosen = []
    monkeypatch.setattr(bench, "usable_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(report, "environment", lambda device: {"device": "x", "kind": device, "F.rms_norm": ""})
    assert cli.main(["bench", "rms_norm", "--device", "cuda:1", "--peers", "none"]) == 0
    assert chosen == [torch.device("cuda:1")]
    assert asked == [("rms_norm", "cuda", torch.bfloat16, ())]


def test_peers(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name == "quack" or None)
    assert peers.installed() == ("transformers", "torch", "compile", "quack")
    assert [name for name, _ in peers.of(OPS["rms_norm"], ("quack", "liger"))] == ["liger", "quack"]


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

    def run(names, *, device, dtype, save, **_):
        asked.append((list(names), device, dtype))
        save(rows[:1])
        return rows

    monkeypatch.setattr(models, "run", run)
    monkeypatch.setattr(timing, "ceilings", lambda device, dtype: MACHINE)
    page = tmp_path / "report.html"
    assert cli.main(["bench", "--models", "llava-1.5-7b", "--device", "cpu", "--html", str(page)]) == 1
    assert asked == [(["llava-1.5-7b"], "cpu", torch.float32)]
    assert json.loads(page.with_suffix(".json").read_text())["models"] == rows
    assert "&lt;graph break&gt;" in page.read_text()
    assert "12.50" in page.read_text()
    capsys.readouterr()
    assert cli.main(["bench", "--from", str(page.with_suffix(".json"))]) == 1
    assert "llava-1.5-7b" in capsys.readouterr().out
    asked.clear()
    assert cli.main(["bench", "models", "llava-1.5-7b", "--device", "cpu", "--dtype", "bfloat16"]) == 1
    assert asked == [(["llava-1.5-7b"], "cpu", torch.bfloat16)]


def test_a_run_of_models_alone_is_shown(tmp_path: Path, capsys):
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
        (["models", "--dtype", "float16", "--device", "cpu"], "no model runs in float16 on a CPU"),
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
