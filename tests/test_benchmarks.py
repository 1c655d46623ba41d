"""The benchmark's own promises: no speed for a wrong result, ratios of one run, errors in one line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vlmfast
from tests.cases import EACH_OP, outputs, require
from vlmfast.backends import Backend
from vlmfast.benchmarks import report, timing
from vlmfast.benchmarks.ops import benchmark, contenders
from vlmfast.registry import OPS, Op

ROOT = Path(__file__).parents[1]


@pytest.fixture
def small(monkeypatch):
    """rms_norm with one small workload, timed for a moment."""
    require(OPS["rms_norm"], "native")
    monkeypatch.setattr(timing, "ROUND_SECONDS", 1e-4)
    monkeypatch.setattr(timing.measure, "__defaults__", (3,))
    workload = ("4x64", (torch.randn(4, 64), torch.randn(64)))
    return dataclasses.replace(OPS["rms_norm"], workloads=lambda device, dtype: [workload])


def test_every_contender_is_timed(small):
    (found,) = benchmark(small, "cpu", torch.float32)
    assert next(iter(found["times"])) == "vlmfast native"
    assert {"transformers", "F.rms_norm", "torch.compile", "copy"} < set(found["times"])
    assert all(row["us"] > 0 for row in found["times"].values())
    assert found["times"]["transformers"]["speedup"] == 1.0
    assert not found["failed"]


def test_each_contender_runs_on_its_own_backend(small, monkeypatch):
    ran = []
    for name in ("native", "triton"):
        recorder = Backend(name, lambda x, *_, name=name: ran.append(name) or x, lambda *_, **__: None)
        monkeypatch.setitem(OPS["rms_norm"]._loaded, name, recorder)
    ((_, args),) = small.workloads("cpu", torch.float32)
    found = contenders(small, args)
    for _ in range(2):
        found["vlmfast triton"]()
        found["vlmfast native"]()
    assert ran == ["triton", "native"] * 2


@pytest.mark.parametrize("op", EACH_OP)
def test_every_contender_of_every_op_runs(op: Op, monkeypatch):
    """On a small call, without our kernels, which the other tests run, and without waiting for Inductor."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with vlmfast.use("torch"), torch.no_grad():
        args = next(iter(op.samples("cpu", torch.float32)))
        want = outputs(op.reference(*args))
        calls = contenders(op, args)
        assert {"torch.compile", "copy", *op.peers} <= calls.keys()
        assert op.upstream is None or "transformers" in calls
        for name, call in calls.items():
            got = outputs(call())
            if name == "transformers":
                assert [g.shape for g in got] == [w.shape for w in want]


def test_a_wrong_result_has_no_speed(small, monkeypatch):
    wrong = Backend("native", lambda x, weight, *_: x * 1.01, lambda *_, **__: None)
    monkeypatch.setitem(OPS["rms_norm"]._loaded, "native", wrong)
    (found,) = benchmark(small, "cpu", torch.float32)
    assert "vlmfast native" not in found["times"]
    assert "differs from the definition" in found["failed"]["vlmfast native"]


def test_rounds_are_paired():
    ours, theirs = timing.Times([1.0, 10.0, 2.0]), timing.Times([2.0, 20.0, 4.0])
    assert theirs.over(ours) == 2.0


def test_a_report_says_where_it_was_made(tmp_path: Path, small):
    records = list(benchmark(small, "cpu", torch.float32))
    report.write(tmp_path / "deep" / "out.json", "cpu", records)
    written = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert written["records"] == records
    assert {"date", "device", "threads", "torch", "transformers", "vlmfast"} <= written["environment"].keys()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["benchmarks", "softmax"], "unknown op softmax; known: "),
        (["benchmarks", "--threads", "0"], "--threads must be at least 1"),
        (["benchmarks", "--device", "cuda"], "torch sees no GPU"),
        (["benchmarks.gpu_report"], "gpu-report needs a GPU"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_cannot_run_is_one_line_and_exit_code_2(command: list[str], message: str):
    ran = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
