"""The measurement of times, with a fake clock and a fake GPU."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch

from vlmfast.benchmarks import timing


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
    """Record what is done, in order; only calls advance the clock, and GPU calls run when they are waited for."""
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
    assert timing.wall_seconds(did.call("x", 2.0), 3, did.synchronize) == 2.0
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
    """A copy counts bytes read and written; the faster matmul counts."""
    assert timing.COPY_BYTES["cpu"] // 2 > 96 << 20  # the largest cache that one core of any processor fills
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
