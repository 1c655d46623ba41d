"""The benchmark's arithmetic, on a clock and a GPU that are not real, and where its results go."""

from __future__ import annotations

import csv
import dataclasses
import json
import types
from pathlib import Path

import pytest
import torch

from vlmfast import cli
from vlmfast.benchmarks import bench, html, models, ops, peers, report, timing
from vlmfast.registry import OPS

MACHINE = timing.Ceilings(copy_gb_per_s=2.0, gemm_tflop_per_s=0.5)


# ---- what is taken ----


def test_times():
    times = timing.Times([5.0, 1.0, 9.0, 2.0, 3.0], [4.0, 1.0, 100.0, 2.0, 3.0])
    assert times.median == 3.0
    assert timing.Times([5.0, 1.0, 9.0]).median == 5.0
    assert timing.Times([1.0, 2.0, 3.0, 4.0, 15.0]).spread == 8.0 / 3.0  # of the quartiles 1.5 and 9.5
    ours, theirs = timing.Times([1.0, 10.0, 4.0]), timing.Times([3.0, 20.0, 16.0])
    assert theirs.over(ours) == 3.0  # of each round, not of the medians, which is 4
    assert dataclasses.replace(theirs, device=[1.0, 1.0, 1.0]).over(dataclasses.replace(ours, device=[2.0] * 3)) == 0.5


@pytest.fixture
def did(monkeypatch):
    """What is done, in order, with a clock that only calls move on; a call of a GPU is done when it is waited for."""
    log, state = [], {"now": 0.0, "pending": 0.0}

    def synchronize():
        log.append("wait")
        state["now"] += state["pending"]
        state["pending"] = 0.0

    def call(name, seconds):
        def run():
            log.append(name)
            state["pending"] += seconds

        return run

    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: state["now"]))
    return types.SimpleNamespace(log=log, state=state, synchronize=synchronize, call=call)


def test_a_batch_is_waited_for_at_both_ends(did):
    did.call("before", 100.0)()
    assert timing._wall_seconds(did.call("x", 2.0), 3, did.synchronize) == 2.0
    assert did.log == ["before", "wait", "x", "x", "x", "wait"]


def test_rounds_are_interleaved(did, monkeypatch):
    monkeypatch.setattr(timing, "ROUND_SECONDS", 8.0)
    calls = {"slow": did.call("slow", 4.0), "fast": did.call("fast", 1.0)}
    found = timing._measure_wall(calls, 3, did.synchronize)
    assert {name: times.wall for name, times in found.items()} == {"slow": [4.0] * 3, "fast": [1.0] * 3}
    done = [name for name in did.log if name != "wait"]
    assert done == ["slow"] * 2 + ["fast"] * 2 + (["slow"] * 2 + ["fast"] * 8) * 3


@pytest.mark.parametrize(("seconds", "rounds"), [(1e-3, 25), (6.0, 10), (1e3, 5)])
def test_slow_contenders_have_fewer_rounds(did, seconds: float, rounds: int):
    assert len(timing._measure_wall({"x": did.call("x", seconds)}, 25, did.synchronize)["x"].wall) == rounds


def test_a_gpu_is_timed_from_a_cold_cache(did, monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            did.log.append("record")
            self.at = did.state["pending"]

        def elapsed_time(self, other):
            assert did.log[-1] == "wait", "times are asked for when all is done"
            return 1e3 * (other.at - self.at)

    def empty(size, *, dtype, device):
        assert (size >= 256 << 20, dtype, device) == (True, torch.int8, "cuda")
        return types.SimpleNamespace(zero_=did.call("flush", 50.0))

    def slow():  # to queue
        did.state["now"] += 2.5 * timing.FLUSH_SECONDS
        did.call("b", 2.0)()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: did.log.append("wait"))
    found = timing._measure_device({"a": did.call("a", 3.0), "b": slow}, 2)
    assert found == {"a": [3.0] * 2, "b": [2.0] * 2}
    asked = ["wait", "a"] * 3 + ["wait", "b"] * 3
    once = ["flush"] * 2 + ["record", "a", "record"] + ["flush"] * 4 + ["record", "b", "record"]
    assert did.log == [*asked, *once, *once, "wait"]


def test_ceilings(monkeypatch):
    """A copy reads and writes; the faster product counts."""
    assert timing.COPY_BYTES["cpu"] // 2 > 96 << 20  # what a core of the processors with the largest caches fills
    taken = {"copy": 2.0, "torch.bfloat16": 4.0, "torch.float32": 1.0}

    def measure(calls, device, rounds):
        assert calls.keys() == taken.keys()
        for call in calls.values():
            result = call()
            assert result.any()  # of memory that was written
        return {name: timing.Times([seconds]) for name, seconds in taken.items()}

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(timing, "COPY_BYTES", {"cpu": 4000})
    monkeypatch.setattr(timing, "GEMM_SIZE", {"cpu": 10})
    assert timing.ceilings("cpu", torch.bfloat16) == timing.Ceilings(4000 / 2.0 / 1e9, 2 * 10**3 / 1.0 / 1e12)


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


# ---- what is asked for ----


@pytest.fixture
def asked(monkeypatch):
    """What `bench` would measure; every op has one record with one error."""
    found = []

    def benchmark(op, device, dtype, kinds, machine):
        found.append((op.name, device, dtype, kinds))
        row = {"name": "vlmfast native", "group": "ours", "us": 1.0, "wall_us": 1.0, "roundings": 0.0, "error": None}
        broken = {"name": "liger", "group": "peer", "error": "planted, with a comma"}
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
    path = tmp_path / "out.json"
    assert cli.main(["bench", "rms_norm", "top_tokens", "--device", "cpu", "--json", str(path)]) == 0
    assert sorted(found.name for found in tmp_path.iterdir()) == ["out.csv", "out.json"]
    written = json.loads(path.read_text())
    assert [record["op"] for record in written["records"]] == ["rms_norm", "top_tokens"]
    assert written["environment"]["copy_gb_per_s"] == 2.0
    with path.with_suffix(".csv").open() as file:
        lines = [(line["op"], line["name"], line["us"], line["error"]) for line in csv.DictReader(file)]
    ours, broken = ("vlmfast native", "1.0", ""), ("liger", "", "planted, with a comma")
    assert lines == [(name, *row) for name in ("rms_norm", "top_tokens") for row in (ours, broken)]
    printed = capsys.readouterr().out
    assert printed.count("rms_norm, liger: planted, with a comma (1x2)") == 1
    assert printed.count("liger") == 4  # a row of each table, and a reason below each
    assert "wall_us" not in report.columns(written["records"])


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


def test_a_gpu_shows_wall_times():
    row = {"name": "x", "group": "ours", "us": 1.0, "wall_us": 5.0, "error": None}
    record = {"op": "rms_norm", "workload": "1x2", "dtype": "float32", "bytes": 8, "flops": 0, "contenders": [row]}
    assert "wall_us" in report.columns([record])


def test_errors_are_in_the_page(asked, tmp_path: Path):
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", "rms_norm", "--device", "cpu", "--html", str(tmp_path / "out.html")]) == 0
    assert "planted, with a comma" in (tmp_path / "out.html").read_text()


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
    monkeypatch.setattr(
        report, "environment", lambda device, machine: {"device": "x", "kind": device, "F.rms_norm": ""}
    )
    assert cli.main(["bench", "rms_norm", "--device", "cuda:1", "--peers", "none"]) == 0
    assert chosen == [torch.device("cuda:1")]
    assert asked == [("rms_norm", "cuda", torch.bfloat16, ())]


def test_peers(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name == "quack" or None)
    assert peers.installed() == ("transformers", "torch", "compile", "quack")
    assert [name for name, _ in peers.of(OPS["rms_norm"], ("quack", "liger"))] == ["liger", "quack"]
    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda function, **settings: compiled.append((function, settings)) or function
    )
    peers._compiled(OPS["rms_norm"], ())
    assert compiled == [(OPS["rms_norm"].reference, {"dynamic": False})]
