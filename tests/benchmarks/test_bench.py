"""The ``bench`` command: what it measures, prints, writes and refuses."""

from __future__ import annotations

import csv
import json
import re
import types
from html import unescape
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.benchmarks.conftest import MACHINE
from tests.helpers.cases import with_cases
from vlmfast import cli
from vlmfast.benchmarks import bench, html, models, ops, peers, report, timing
from vlmfast.registry import OPS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def asked(monkeypatch):
    """Record what `bench` would measure, instead of measuring; every op gives one record with one error."""
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
    monkeypatch.setattr(models, "run", lambda names, *_, **__: found.append(tuple(names)) or [])
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
    assert printed.count("liger") == 4  # in each of two tables, a row and an error below it
    assert "&lt;planted&gt;, with a comma" in page.read_text()
    assert "wall_us" not in report.columns(written["records"])
    written["records"][0]["contenders"][0]["wall_us"] = 5.0  # as a run on a GPU has it
    assert "wall_us" in report.columns(written["records"])


def test_a_page_shows_what_the_console_shows(capsys):
    """Errors are shown as text, not as HTML; without any time, there is no plot."""
    row = {"name": "vlmfast native", "group": "ours", "error": "planted: <a>"}
    record = {"op": "rms_norm", "workload": "1x2", "dtype": "float32", "bytes": 8, "flops": 0, "contenders": [row]}
    run = {"environment": {"device": "<x>", "kind": "cuda"}, "records": [record], "models": []}
    report.show_op(Console(width=200), [record], run["environment"])
    page = html.page(run)
    assert "<svg" not in page
    assert "vlmfast on &lt;x&gt;" in page
    text = unescape(re.sub("<[^>]*>", "", page))
    for line in capsys.readouterr().out.splitlines():
        assert line in text


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
    for op in (OPS["rms_norm"], OPS["add_rms_norm"]):
        assert [name for name, _ in peers.of(op, ("quack", "liger"))] == ["liger", "quack"]


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

    def run(names, console, *, device, dtype, save, **_):
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
    row = {"name": "vlmfast", "group": "ours", "error": None, "us": "fast"}
    records = [{"op": "rms_norm", "workload": "1x8", "dtype": "float32", "contenders": [row]}]
    where = {"device": "cpu", "kind": "cpu", "threads": 1}
    (tmp_path / "text.json").write_text(json.dumps({"environment": where, "records": records, "models": []}))
    for other in (written.with_name("launches.json"), tmp_path / "broken.json", tmp_path / "text.json"):
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
    work = small.cases.workloads("cpu", torch.float32) * 3
    monkeypatch.setitem(OPS, "rms_norm", with_cases(small, workloads=lambda *_: work))
    with pytest.raises(KeyboardInterrupt):
        cli.main(["bench", "rms_norm", "--peers", "none", "--device", "cpu", "--json", str(tmp_path / "out.json")])
    assert len(json.loads((tmp_path / "out.json").read_text())["records"]) == 1
    assert len(interrupted) == 2


def test_a_run_goes_on_where_an_earlier_one_stopped(small, tmp_path: Path, monkeypatch):
    """Only what has no result, or an error of ours, is timed; nothing of another setting is gone on with."""
    timed, measure, path = [], ops.measure, tmp_path / "out.json"
    ((_, args),) = small.cases.workloads("cpu", torch.float32)
    monkeypatch.setitem(OPS, "rms_norm", with_cases(small, workloads=lambda *_: [("a", args), ("b", args)]))
    monkeypatch.setattr(ops, "measure", lambda *args: timed.append(args) or measure(*args))

    def run(*more: str) -> tuple[int, list[str]]:
        timed.clear()
        command = ["bench", "rms_norm", "--peers", "none", "--device", "cpu", "--json", str(path), *more]
        assert cli.main(command) == 0
        return len(timed), [record["workload"] for record in json.loads(path.read_text())["records"]]

    assert run("--resume") == (2, ["a", "b"])
    assert run("--resume") == (0, ["a", "b"])
    assert run() == (2, ["a", "b"])
    kept = json.loads(path.read_text())
    kept["records"][0]["contenders"][0]["error"] = "planted"
    path.write_text(json.dumps(kept))
    assert run("--resume") == (1, ["b", "a"])
    assert run("--resume", "--threads", "2") == (2, ["a", "b"])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"environment": kept["environment"] | {"torch": "0"}}))
    assert run("--resume") == (2, ["a", "b"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["softmax"], "unknown op softmax; known: "),
        (["--peers", "apex"], "unknown peer apex; known: transformers, torch, compile, liger"),
        (["--models", "gpt-2"], "unknown model gpt-2; known: llava-1.5-7b"),
        (["--threads", "0"], "must be a whole number from 1 to 2147483647, got '0'"),
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
