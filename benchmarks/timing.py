"""Measure times in interleaved rounds, so that a slow spell of the machine hits every contender alike."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Call = Callable[[], object]
ROUNDS = 25
ROUND_SECONDS = 0.02  # of one contender: long against the clock's resolution, short against a slow spell
ALL_SECONDS = 60.0  # most seconds for all rounds; slow contenders get fewer rounds
FEWEST_ROUNDS = 5
L2_BYTES = 256 << 20  # more than the second-level cache of any GPU
FLUSH_SECONDS = L2_BYTES / 8e12  # least time of writing L2_BYTES, at the 8 TB/s of the fastest GPU
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # more than any cache that one core fills
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}


class CallError(Exception):
    """A contender failed while it was timed: the argument is its name, the cause its error."""


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CallError(name) from error


@dataclass(frozen=True)
class Times:
    """Seconds per call of one contender, one number per round; on a GPU both kinds of time."""

    wall: list[float]  # one of many calls in a row, Python included: the time that eager code waits
    device: list[float] | None = None  # the kernels alone, from a cold second-level cache

    @property
    def best_known(self) -> list[float]:
        """Return device time where there is one, else wall time."""
        return self.device or self.wall

    @property
    def median(self) -> float:
        """Return the median of `best_known`."""
        return statistics.median(self.best_known)

    @property
    def spread(self) -> float:
        """Return the interquartile range of `best_known`, as a share of the median."""
        low, _, high = statistics.quantiles(self.best_known, n=4)
        return (high - low) / self.median

    def over(self, other: Times) -> float:
        """Return the time divided by that of ``other``: the median of the rounds' ratios."""
        return statistics.median(a / b for a, b in zip(self.best_known, other.best_known, strict=True))


@dataclass(frozen=True)
class Ceilings:
    """Limits of this machine: the bandwidth of a large copy and the speed of a large matmul."""

    copy_gb_per_s: float  # counts bytes read and bytes written
    gemm_tflop_per_s: float

    def seconds(self, bytes: int, flops: int) -> float:
        """Return the least time of a call that moves ``bytes`` and computes ``flops``, if its data are in no cache."""
        return max(bytes / self.copy_gb_per_s / 1e9, flops / self.gemm_tflop_per_s / 1e12)


def bytes_to_copy(count: int, device: str | torch.device) -> torch.Tensor:
    """Make a tensor of written bytes: on a CPU, unwritten memory maps to one page of zeros, read from the L1 cache."""
    return torch.ones(count, dtype=torch.int8, device=device)


def ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Measure the limits; the matmul in ``dtype`` or float32, whichever is faster on this processor."""
    source = bytes_to_copy(COPY_BYTES[device] // 2, device)
    target = torch.empty_like(source)
    size = GEMM_SIZE[device]
    matrices = [torch.randn(size, size, device=device).to(each) for each in {dtype, torch.float32}]
    calls: dict[str, Call] = {str(matrix.dtype): functools.partial(torch.mm, matrix, matrix) for matrix in matrices}
    times = measure({"copy": lambda: target.copy_(source), **calls}, device, rounds=9)
    copy = times.pop("copy").median
    return Ceilings(COPY_BYTES[device] / copy / 1e9, 2 * size**3 / min(t.median for t in times.values()) / 1e12)


def synchronizer(device: str) -> Call:
    """Return what waits until the device has done all its work."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def wall_seconds(call: Call, calls: int, synchronize: Call) -> float:
    """Return the seconds per call of ``calls`` calls in a row, synchronizing before the first and after the last."""
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize()
    return (time.perf_counter() - start) / calls


def measure(contenders: Mapping[str, Call], device: str, rounds: int = ROUNDS) -> dict[str, Times]:
    """Time every contender in every round, in turn.

    Raises:
        CallError: naming the contender whose call failed.
    """
    if device == "cpu":
        return _measure_wall(contenders, rounds, lambda: None)
    walls = _measure_wall(contenders, rounds, torch.cuda.synchronize)
    devices = _measure_device(contenders, rounds)
    return {name: Times(walls[name].wall, devices[name]) for name in contenders}


def _measure_wall(contenders: Mapping[str, Call], rounds: int, synchronize: Call) -> dict[str, Times]:
    singles = {}
    for name, call in contenders.items():
        with _named(name):
            call()  # compiles kernels
            singles[name] = wall_seconds(call, 1, synchronize)
    batches = {name: max(1, min(20000, int(ROUND_SECONDS / max(s, 1e-7)))) for name, s in singles.items()}
    rounds = min(rounds, max(FEWEST_ROUNDS, int(ALL_SECONDS / sum(max(s, ROUND_SECONDS) for s in singles.values()))))
    walls: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            with _named(name):
                walls[name].append(wall_seconds(call, batches[name], synchronize))
    return {name: Times(wall) for name, wall in walls.items()}


def _host_seconds(call: Call) -> float:
    """Measure the seconds that the host takes to queue a call, with an empty queue."""
    taken = []
    for _ in range(3):
        torch.cuda.synchronize()
        taken.append(wall_seconds(call, 1, lambda: None))
    return statistics.median(taken)


def _measure_device(contenders: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Time single calls by CUDA events; before each, the cache is flushed for longer than the host takes to queue it.

    All launches of a call are thus queued before the first one runs, and the time of code with many launches, such as
    transformers', does not include the host. Where the host waits for the device within a call, it does.
    """
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    passes = {}
    for name, call in contenders.items():
        with _named(name):
            passes[name] = 2 + int(_host_seconds(call) / FLUSH_SECONDS)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            for _ in range(passes[name]):
                flush.zero_()
            start.record()
            with _named(name):
                call()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}
