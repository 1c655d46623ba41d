"""Upper bounds of the speed on GPUs: the model, and where they are shown beside what was measured."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from vlmfast.benchmarks import html, predicted
from vlmfast.benchmarks.predicted import GPUS, Launch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MOVED = 400 << 20
# A copy: 256 bytes per thread and turn, many small programs, few instructions.
COPY = Launch("copy", 25600, 8, 16 << 10, MOVED // 2, MOVED // 2, MOVED // 4)
H200 = GPUS["H200"]


def bounds(**changes: int) -> tuple[float, str]:
    share, reason = predicted.bound([dataclasses.replace(COPY, **changes)], H200, MOVED)
    return round(share, 2), reason


def test_each_reason_bounds_a_launch() -> None:
    assert bounds() == (1.0, "bandwidth")
    assert bounds(read=MOVED, stored=MOVED) == (0.5, "bandwidth"), "twice the bytes"
    # Little's law: 132 * 2 KiB each 0.25 us are 1.1 TB/s of loads, where a copy loads 2 TB/s.
    assert bounds(each=256) == (0.53, "in flight")
    assert bounds(instructions=16 * MOVED) == (0.52, "issue")
    assert bounds(programs=66, each=64 << 10, instructions=6 * MOVED) == (0.69, "programs"), "half of the schedulers"


def test_a_launch_below_the_threshold_is_named_at_100_per_cent() -> None:
    """Between Little's law and CUB's threshold bandwidth is lost, but not by an amount that could be computed."""
    assert H200.needed > 8 * 4096
    assert bounds(each=4096) == (1.0, "in flight")
    assert bounds(each=4096, programs=8 * 132 - 1) == (1.0, "programs")
    assert bounds(each=4096, programs=8 * 132 - 1, read=8 * 4096 * 132) == (1.0, "bandwidth"), "all of it at once"
    assert predicted.bound([dataclasses.replace(COPY, each=4096)], GPUS["H100"], MOVED) == (1.0, "bandwidth")


def test_launches_of_a_call_add_up() -> None:
    small = dataclasses.replace(COPY, kernel="index", programs=2, each=512, read=1 << 20, stored=0, instructions=0)
    share, reason = predicted.bound([small, COPY], H200, MOVED)
    assert (round(share, 2), reason) == (0.29, "programs"), "1024 turns of 0.25 us are two and a half copies"
    record = predicted.record("op", "shape", MOVED, {name: [small, COPY] for name in GPUS})
    assert record["kernels"] == ["index", "copy"]
    assert record["H200"] == [0.29, "programs"]


@pytest.mark.parametrize(
    ("device", "multiprocessors", "name"),
    [
        ("NVIDIA H200", 132, "H200"),
        ("NVIDIA H100 80GB HBM3", 132, "H100"),
        ("NVIDIA A100-SXM4-80GB", 108, "A100"),
        ("NVIDIA H100 PCIe", 114, None),
        ("NVIDIA GH200 480GB", 132, None),
        ("NVIDIA H200 MIG 1g.18gb", 16, None),
    ],
)
def test_which_gpu_a_run_was_on(device: str, multiprocessors: int, name: str | None) -> None:
    assert predicted.gpu_of({"device": device, "kind": "cuda", "multiprocessors": multiprocessors}) == name
    assert predicted.gpu_of({"device": device, "kind": "cpu"}) is None


# ---- static.json, the HTML report and docs ----


def run_on(device: str, kind: str = "cuda") -> dict:
    """Fake the results of a run with one op, whose Triton kernels take 1.25 times as long as a copy."""
    call = {"op": "rms_norm", "workload": "600x2048", "dtype": "bfloat16", "bytes": 0, "flops": 0}
    row = {"error": None, "roundings": 0.0}
    contenders = [
        {"name": "vlmfast triton", "group": "ours", "over_copy": 1.25, **row},
        {"name": "vlmfast native", "group": "ours", "over_copy": 1.0, **row},
    ]
    where = {"device": device, "kind": kind, "threads": 1, "date": "2026-12-01", "cpu_capability": "AVX2"}
    where |= {"torch": "2.11", "transformers": "5.17", "vlmfast": "0"}
    return {"environment": where, "records": [{**call, "contenders": contenders}], "models": []}


def test_every_call_has_a_bound_for_every_gpu() -> None:
    calls = predicted.calls()
    static = json.loads(predicted.STATIC_REPORT.read_text())
    assert {(call["op"], call["workload"]) for call in calls} == {
        (launch["op"], launch["workload"]) for launch in static["saturation"]
    }
    for call in calls:
        for name in GPUS:
            share, reason = call[name]
            assert 0 < share <= 1
            assert reason in ("bandwidth", "in flight", "issue", "programs")
    several = [call for call in calls if len(call["kernels"]) > 1]
    apart = [(record["op"], record["workload"], *record["kernels"]) for record in static["predicted"]]
    assert several
    assert {(c["op"], c["workload"], kernel) for c in several for kernel in c["kernels"]} <= {*apart}


def test_the_html_report_shows_bounds_apart_from_what_was_measured() -> None:
    page = html.page(run_on("AMD EPYC", "cpu"))
    before, _, after = page.partition("<h2>Predicted for GPUs, not measured</h2>")
    assert "at most" not in before
    assert "H200, at most" in after
    assert "Nothing here was timed" in after
    assert "600x2048" in after
    assert "place_embeddings" not in after, "an op that is not in the run"
    assert ", measured" not in after
    assert "80%" in (measured := html.page(run_on("NVIDIA H200")).partition("Predicted for GPUs")[2])
    assert "H200, measured" in measured


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Load scripts/make_docs.py with results in a temporary folder."""
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.copy(RESULTS / "cpu.json", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_the_page_has_the_measured_share_beside_the_bound(docs, tmp_path: Path) -> None:
    page = docs.predicted_page()
    assert "No GPU was measured yet" in page
    assert "| op | shape | A100, at most | H100, at most | H200, at most | B200, at most |\n" in page
    (tmp_path / "nvidia-h200").mkdir()
    (tmp_path / "nvidia-h200" / "ops.json").write_text(json.dumps(run_on("NVIDIA H200")))
    page = docs.predicted_page()
    assert "No GPU was measured yet" not in page
    assert "B200, at most | H200, measured |\n" in page
    lines = [line for line in page.splitlines() if line.startswith("| `rms_norm` |")]
    (line,) = [line for line in lines if "| 600x2048 |" in line]
    assert line.endswith("| 80% |")
    assert all(other.endswith("|  |") for other in lines if other != line)
